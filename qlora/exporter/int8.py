"""Dynamic int8 for CPUs, by torchao: weights in int8 a row, activations rounded to int8 a token at run time.

A weight row w is round(w / s), s = max |w| / 127.5. transformers opens the folder by itself where torchao is installed: the
numbers are safetensors (`X._weight_qdata`, `X._weight_scale`), which tensors belong together is in the header as JSON.
Source: torchao's Int8DynamicActivationInt8WeightConfig.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import torch
from safetensors import safe_open

from .. import base_model
from ..base_model.messages import said
from ..system import files
from ..system.errors import InputError, ProofFailed
from ..system.extras import how_to_install
from ..system.storage import write_json
from .proof import open_folder

# KL(trained, int8) in nats a position. Measured on SmolLM2-135M: 0.033 after 20 steps of the quickstart, and 0.065 on plain text,
# of which the weights are 0.005 and the activations the rest. A mistake in a weight is found in the weight
# (`refuse_other_weights`); this limit is that of GGUF's q4_k_m, and says that the model is still of use.
KL_LIMIT = 0.3

_CONFIG = "Int8DynamicActivationInt8WeightConfig"
_CODES, _SCALE = "._weight_qdata", "._weight_scale"


def refuse_without_torchao():
    """Raise InputError unless torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"int8 needs the package torchao; install it:  {how_to_install('int8')}")


def is_int8(folder):
    """True if the model in `folder` is in the int8 that `write` writes."""
    said = files.read_object(folder / "config.json").get("quantization_config")
    return isinstance(said, dict) and said.get("quant_method") == "torchao" and _CONFIG in json.dumps(said)


def opened(folder, trust_remote_code=False):
    """Return the int8 model in `folder`, on the CPU, as plain transformers opens it.

    Raises:
        InputError: torchao is not installed, or the folder is damaged.
    """
    refuse_without_torchao()
    base_model.weight_files(folder)  # refuses what is not safetensors
    try:
        return open_folder(folder, torch.device("cpu"), "auto", trust_remote_code)
    except Exception as error:  # torchao makes tensors of what the files say
        raise InputError(f"{folder}: cannot load the model: {said(error)}") from error


def dtype_beside(dtype):
    """Return the name of the dtype of what is not in int8, and of computing, where a merge is stored in `dtype`.

    Never float16: torchao 0.18 rounds the sums of products to it before they are scaled back, and what is above 65,504 is
    infinite (SmolLM2-135M: all logits NaN).
    """
    return "float32" if dtype == "float32" else "bfloat16"


def write(merged, folder, dtype, max_bytes, trust_remote_code=False):
    """Write the model in folder `merged` into `folder` with its linear layers, but the head, in int8; return their number.

    dtype: of the rest. All other files are those of `merged`. The model is in memory once.

    Raises:
        InputError: torchao is not installed.
    """
    refuse_without_torchao()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import AutoModelForCausalLM, GenerationConfig, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        merged,
        dtype=dtype,
        device_map={"": "cpu"},
        trust_remote_code=trust_remote_code,
        quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    )
    model.generation_config = GenerationConfig()  # save_pretrained refuses what published models have; copied below
    model.save_pretrained(folder, max_shard_size=max_bytes)
    said = files.read_object(folder / "config.json")["quantization_config"]
    for path in merged.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, folder / path.name)
    config = files.read_object(merged / "config.json")
    write_json(folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype, "quantization_config": said})
    return refuse_other_weights(merged, folder, dtype)


def refuse_other_weights(merged, folder, dtype):
    """Return how many weights of `folder` are in int8; read back, one at a time, they are those of `merged`.

    Each number is within half a step of its row, and the rounding to `dtype` before that; every other tensor is equal.

    Raises:
        ProofFailed: one is not, is missing or is left over; names it.
    """
    before, after = base_model.weight_files(merged), base_model.weight_files(folder)
    quantized = {name.removesuffix(_CODES) for name in after if name.endswith(_CODES)}
    kept = set(after) - {name + part for name in quantized for part in (_CODES, _SCALE, "._weight_zero_point")}
    if {*kept, *(f"{name}.weight" for name in quantized)} != set(before):
        raise ProofFailed(f"{folder}: its tensors are not those of the model that was to be stored in int8")
    rounding = torch.finfo(getattr(torch, dtype)).eps
    for name in before:
        W = _read(merged, before, name).float()
        layer = name.removesuffix(".weight")
        if layer in quantized and name.endswith(".weight"):
            codes, scale = (_read(folder, after, layer + part) for part in (_CODES, _SCALE))
            away = (codes.float() * scale.float() - W).abs() - (0.5 + 1e-3) * scale.float() - rounding * W.abs()
            wrong = not bool((away <= 0).all())  # NaN too
        else:
            wrong = not torch.equal(_read(folder, after, name), W.to(getattr(torch, dtype)))
        if wrong:
            raise ProofFailed(f"{folder}: {name} in int8 is not within half a step of the merged weight")
    return len(quantized)


def _read(folder, where, name):
    with safe_open(folder / where[name], "pt") as file:
        return file.get_tensor(name)


def failures(live, stored, base):
    """Return what is wrong, as sentences; none means proven. All are proof.Scores; stored: of the model in int8."""
    if not (math.isfinite(stored.loss) and math.isfinite(stored.kl)):
        return ["int8: its logits are not finite"]
    found = []
    if stored.kl > KL_LIMIT:
        found.append(f"int8: KL(trained, exported) is {stored.kl:.2e} nats a token, the limit is {KL_LIMIT}")
    if not base.kl > stored.kl:
        found.append(
            f"int8: it is no closer to the trained model (KL {stored.kl:.2e}) than the untrained base is ({base.kl:.2e}): "
            "rounding activations costs more than the training brought"
        )
    if found:
        found.append(f"its loss is {stored.loss:.4f}, the trained model's {live.loss:.4f}; export without --int8")
    return found
