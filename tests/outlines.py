"""planner.outline takes 2 s and is asked for the same few models in some hundred tests: its results are kept in files,

which all processes of the suite share.
"""

import hashlib
import os
import pickle

FOLDER = "QLORA_TEST_OUTLINES"


def kept(original, folder):
    """Return `original`, planner.outline, so that it keeps in `folder` what it returns."""
    os.environ[FOLDER] = str(folder)

    def outline(config, model, quantization, lora, *rest):
        described = config.to_dict() | {"_name_or_path": None}
        anywhere = {} if model.trust_remote_code else {"name_or_path": "any", "revision": None, "new_tokens": None}
        lora_key = lora.model_copy(update={"lora_alpha": 1})  # a number, no size
        key = repr((described, model.model_copy(update=anywhere), quantization, lora_key, rest))
        file = folder / f"outline-{hashlib.sha256(key.encode()).hexdigest()}"
        if not file.exists():
            half = folder / f"{file.name}.{os.getpid()}"
            half.write_bytes(pickle.dumps(original(config, model, quantization, lora, *rest)))
            half.rename(file)
        return pickle.loads(file.read_bytes())

    return outline
