"""What the files of an adapter folder are called; PEFT's names, but for the manifest. Imports nothing."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MANIFEST = "manifest.json"  # sizes and hashes of the others, and what they were trained on
