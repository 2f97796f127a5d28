"""How much a saved adapter changes, by layer and module: norms of its tensors, read without torch.

LoRA: |scaling * B A| (Frobenius), of a few small products: |B A|^2 is the sum of (B^T B) * (A A^T), elementwise.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import safetensors

from ...recipe.methods import divisor, pattern_of
from ...runs import record
from ...system import bounded, files
from ...system.adapter_files import CONFIG, WEIGHTS
from ...system.errors import InputError
from ...system.events import emit, note

_TRAINED = "weights/base_model.model."  # of a checkpoint's tensors
_LARGEST = 2**32  # bytes that are read at once
_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.weight)?")
_ENDS = re.compile(r"(\.modules_to_save)?(\.(weight|bias|ia3_l|oft_r|trainable_tokens_delta|lora_\w+|\w*adapter\w*))+$")
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")


def norms(folder) -> dict:
    """Return {"of", "layers", "modules": {module: [norm of each layer, or None]}, "others": {tensor's module: norm}} of an
    adapter folder; "of" says in words what the norms are of. Where there is nothing to read, {"missing"} says why.

    Raises:
        InputError: the folder is damaged; names the file.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS
    if not (folder / CONFIG).is_file():
        return {
            "missing": "the weights themselves were trained: there is no adapter whose norm says how far they moved"
        }
    config = files.read_object(folder / CONFIG)
    if not weights.is_file():
        raise InputError(f"{folder}: no {WEIGHTS}; copy the folder again")
    if weights.stat().st_size > _LARGEST:
        return {"missing": f"{weights} has {weights.stat().st_size:,} bytes, too many to read for this"}
    tensors = _tensors(weights)
    if config.get("peft_type") == "LORA":
        what, found = "of scaling * B A, what is added to each weight", _of_lora(folder, config, tensors)
        if config.get("use_dora"):
            what += ", before DoRA's magnitudes"
    elif config.get("peft_type") == "IA3":
        what = "of the factors' distance from 1"
        found = {_module(name): float(np.linalg.norm(tensor - 1)) for name, tensor in tensors.items()}
    else:
        what, found = "of the saved numbers", _of_any(tensors)
    return {"of": what} | _by_layer(found)


def of_checkpoints(method):
    """Return a listener that emits the record.Norms of each checkpoint that is saved; method: a recipe's section, of an adapter.

    They are read from the file: asking the model would make a GPU wait.
    """

    def hear(event):
        if not isinstance(event, record.CheckpointSaved):
            return
        try:
            layers = _of_checkpoint(Path(event.path), method)
        except InputError as error:
            note(f"norms     left out: {error}")
            return
        emit(record.Norms(event.step, {f"adapter_norm/layer_{number:02}": norm for number, norm in layers.items()}))

    return hear


def _of_checkpoint(folder, method):
    """Return {layer: norm} of the weights in a checkpoint, its modules taken together."""
    from ...runs.checkpoints import TENSORS  # with torch, which has to read them: NumPy knows no bfloat16

    tensors = {}
    with safetensors.safe_open(folder / TENSORS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if name.startswith(_TRAINED):
                tensors[name.removeprefix(_TRAINED).replace(".default", "")] = file.get_tensor(name).float().numpy()
    of_lora = method.key == "lora"
    found = _by_layer(_of_lora(folder, method.model_dump(), tensors) if of_lora else _of_any(tensors))
    columns = zip(*found["modules"].values(), strict=True) if found["modules"] else ()
    return {
        number: math.sqrt(sum(norm**2 for norm in column if norm is not None))
        for number, column in zip(found["layers"], columns, strict=True)
    }


def _tensors(path):
    """Return {name: float32 array} of a safetensors file; bfloat16 is the upper half of a float32."""
    try:
        found = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: {error}; the run folder is damaged") from None
    arrays = {}
    for name, one in found:
        if one["dtype"] == "BF16":
            numbers = (np.frombuffer(one["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif one["dtype"] in _DTYPES:
            numbers = np.frombuffer(one["data"], _DTYPES[one["dtype"]]).astype(np.float32, copy=False)
        else:
            continue  # indices and the like
        arrays[name.removeprefix("base_model.model.")] = numbers.reshape(one["shape"])
    return arrays


def _of_lora(folder, config, tensors):
    pairs: dict = defaultdict(dict)
    found: dict = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            pairs[match["module"]][match["part"]] = tensor.T if match["embedding"] else tensor
        elif ".lora_" not in name:
            found[_module(name)] = float(np.linalg.norm(tensor))
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise InputError(
                f"{folder / WEIGHTS}: {module} has no counterpart to lora_{min(pair)}; copy the folder again"
            )
        A_RI, B_OR = (pair["A"], pair["B"]) if pair["A"].shape[0] == pair["B"].shape[1] else (pair["B"], pair["A"])
        squared = float(((B_OR.T @ B_OR) * (A_RI @ A_RI.T)).sum(dtype=np.float64))
        found[module] = _scaling(folder, config, module) * math.sqrt(max(squared, 0.0))
    return found


def _scaling(folder, config, module):
    """Return lora_alpha / r of a module, or lora_alpha / sqrt(r); patterns as PEFT reads them."""
    try:
        rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        return alpha / divisor(rank, config.get("use_rslora"))
    except (LookupError, TypeError, ValueError, ArithmeticError, re.error, bounded.TookTooLong) as error:
        raise InputError(f"{folder / CONFIG}: r or lora_alpha of {module}: {error!r}; copy the folder again") from None


def _of_pattern(patterns, module, default):
    key = bounded.call(lambda: pattern_of(patterns, module)) if patterns else None
    return default if key is None else patterns[key]


def _of_any(tensors):
    squared: dict = defaultdict(float)
    for name, tensor in tensors.items():
        squared[_module(name)] += float(np.square(tensor, dtype=np.float64).sum())
    return {name: math.sqrt(value) for name, value in squared.items()}


def _module(name):
    return _ENDS.sub("", name)


def _by_layer(found):
    """Return {"layers", "modules", "others"} of {module: norm}: by the first number in a module's name, those inside a layer that
    differ in further numbers (experts, blocks) taken together."""
    cells: dict = defaultdict(lambda: defaultdict(float))
    others, numbers = {}, set()
    for name, norm in found.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            others[name] = norm
        else:
            numbers.add(int(match[1]))
            cells[re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])][int(match[1])] += norm**2
    layers = sorted(numbers)
    modules = {
        name: [math.sqrt(row[number]) if number in row else None for number in layers]
        for name, row in sorted(cells.items())
    }
    return {"layers": layers, "modules": modules, "others": others}
