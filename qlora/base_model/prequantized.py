"""A folder whose weights are NF4 codes already, as transformers writes a bitsandbytes model: checked and read, never changed.

A quantized weight X is several tensors: X, the codes, two a byte; X.absmax, one of each block of 64; X.quant_map, the 16
values; with double quantization X.nested_absmax and X.nested_quant_map, which absmax is quantized with; and
X.quant_state.bitsandbytes__nf4, the rest (shape, block sizes) as JSON in bytes. config.json has a quantization_config.
"""

from __future__ import annotations

import math
import re

import torch
from safetensors import safe_open

from ..system.errors import InputError
from . import tasks
from .layers import is_conv1d, linear_names
from .quantized import BLOCKSIZE

_STATE = ".quant_state.bitsandbytes__nf4"
_NESTED = (".nested_absmax", ".nested_quant_map")
_BESIDE = (".absmax", ".quant_map", *_NESTED, _STATE)
_REMEDY = "give the 16-bit model it was made from"


def stored_quantization(config):
    """Return the quantization_config of a transformers config as read_config returns it; None for 16- or 32-bit weights."""
    return getattr(config, "quantization_config", None) or None


def refuse_unsupported(config, path):
    """Raise InputError unless the weights that `config`, read from `path`, describes are 16- or 32-bit or NF4."""
    stored = stored_quantization(config)
    if stored is None:
        return
    if not isinstance(stored, dict):
        raise InputError(f"{path}: quantization_config is not a mapping; download the model again")
    if stored.get("load_in_8bit"):
        kind = "bitsandbytes 8-bit"
    elif stored.get("load_in_4bit") and stored.get("quant_method", "bitsandbytes") == "bitsandbytes":
        kind = f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"  # their default
    else:
        kind = str(stored.get("quant_method", "of an unknown kind"))
    if kind != "bitsandbytes nf4":
        raise InputError(
            f"{path}: the weights are quantized already ({kind}); only bitsandbytes nf4 is read here, so {_REMEDY}"
        )
    storage, skipped = (stored.get(name) for name in ("bnb_4bit_quant_storage", "llm_int8_skip_modules"))
    if storage not in (None, "uint8"):
        raise InputError(f"{path}: bnb_4bit_quant_storage is {storage!r}, only uint8 is supported; {_REMEDY}")
    if not (skipped is None or (isinstance(skipped, list) and all(map(_is_expression, skipped)))):
        raise InputError(f"{path}: llm_int8_skip_modules {skipped!r} is not a list of names; download the model again")


def _is_expression(name):
    """True for what transformers can match the names of modules with."""
    try:
        return isinstance(name, str) and bool(re.compile(name))
    except re.error:
        return False


def settle(recipe, config, checkpoint):
    """Return `recipe` with the quantization that the files of `checkpoint` have, where their weights are codes already.

    Raises:
        InputError: the recipe asks for another quantization, or for the original weights, which are not there.
    """
    stored, section = stored_quantization(config), recipe.quantization
    if stored is None:
        return recipe
    own = {"quant_type": "nf4", "use_double_quant": bool(stored.get("bnb_4bit_use_double_quant"))}
    if section is None:
        problems = ["quantization: null, but config.json says bnb_4bit_quant_type: nf4"]
    else:
        problems = [
            f"quantization.{name}: {_yaml(getattr(section, name))}, but config.json says bnb_4bit_{name}: {_yaml(value)}"
            for name, value in own.items()
            if name in section.model_fields_set and getattr(section, name) != value
        ]
    from_originals = {
        "lora.init_lora_weights: loftq": recipe.method.corrects_quantization,
        "export.base: original": recipe.export.base == "original",
    }
    problems += [
        f"{field}, which needs the original weights, and this folder has only their NF4 codes"
        for field, asked in from_originals.items()
        if asked
    ]
    if problems:
        raise InputError.listing(
            f"{checkpoint.folder}: the weights are quantized already; the recipe",
            problems,
            f"leave {'it' if len(problems) == 1 else 'these'} out, or {_REMEDY}",
        )
    return recipe.model_copy(update={"quantization": section.model_copy(update=own)})


def _yaml(value):
    return str(value).lower() if isinstance(value, bool) else value


def chosen(model, names):
    """Return those of `names`, linear layers of a model without numbers, whose weights are codes by its config's word."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = stored_quantization(model.config).get("llm_int8_skip_modules")
    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
    return [name for name in names if should_convert_module(name, kept)]


def holds_codes(checkpoint, name):
    """True if tensor `name` of the files is codes, not numbers."""
    return f"{name}.absmax" in checkpoint.files


def beside_codes(checkpoint):
    """Return the names of the tensors in the files that belong to codes: what else is needed to read these."""
    return {
        name + end
        for name in checkpoint.files
        if holds_codes(checkpoint, name)
        for end in _BESIDE
        if name + end in checkpoint.files
    }


def names_in_4_bit(model):
    """Return the names of the layers that are in 4 bit in a quantized model, of which `model` has the shapes."""
    names = linear_names(model)
    return chosen(model, names) if stored_quantization(model.config) else names


def refuse_other_codes(checkpoint, model):
    """Raise InputError where the files hold NF4 codes and those are not what `model`, on the meta device, has in 4 bit."""
    if not stored_quantization(model.config):
        return
    head = chosen(model, tasks.of_model(model).head_names(model))
    if head:
        raise InputError(
            f"{checkpoint.folder}: the head ({head[0]}) is in 4 bit, which is not supported: config.json does not name it in "
            "llm_int8_skip_modules; give the 16-bit model it was made from"
        )
    expected = {}
    for name in names_in_4_bit(model):
        module, weight = model.get_submodule(name), f"{name}.weight"
        shape = tuple(module.weight.shape)
        found = checkpoint.in_files(weight, model.base_model_prefix) or weight
        expected[found] = shape[::-1] if is_conv1d(module) else shape
    _refuse_other_codes(checkpoint, model.config, expected)


def _refuse_other_codes(checkpoint, config, expected):
    """Raise InputError unless the codes in the files are those of the layers that config.json says, whole, and readable.

    expected: {name in the files: (O, I)} of the weights that are codes by config.json.
    """
    found = {name for name in checkpoint.files if holds_codes(checkpoint, name)}
    problems = [
        f"{name}: 4-bit codes, but config.json has no 4-bit layer here" for name in sorted(found - expected.keys())
    ]
    problems += [f"{name}: no 4-bit codes, but 4-bit by config.json" for name in sorted(expected.keys() - found)]
    nested = bool(stored_quantization(config).get("bnb_4bit_use_double_quant"))
    headers = _headers(checkpoint)
    for name in sorted(found & expected.keys()):
        wrong = _wrong(headers, name, expected[name], nested)
        if wrong:
            problems.append(f"{name}: {wrong}")
    if problems:
        raise InputError.listing(
            f"{checkpoint.folder}: config.json and the 4-bit weights do not match; the model", problems, _REMEDY
        )


def _headers(checkpoint):
    """Return {name: (how many numbers, their dtype, the tensor if it is one of those that are read ahead)}."""
    found = {}
    for path in sorted(set(checkpoint.files.values())):
        with safe_open(checkpoint.folder / path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                ahead = file.get_tensor(name) if name.endswith((_STATE, ".quant_map")) else None
                found[name] = (math.prod(header.get_shape()), header.get_dtype(), ahead)
    return found


def _wrong(headers, name, shape, nested):
    """Return in words why codes `name` cannot be read as NF4 weight of `shape`, None if they can."""
    from bitsandbytes.functional import get_4bit_type
    from bitsandbytes.utils import unpack_tensor_to_dict

    missing = [name + end for end in _BESIDE if name + end not in headers and (nested or end not in _NESTED)]
    if missing:
        return f"{missing[0]} is missing"
    if not nested and name + _NESTED[0] in headers:
        return "has double quantization, but config.json says bnb_4bit_use_double_quant: false"
    try:
        said = unpack_tensor_to_dict(headers[name + _STATE][-1])
    except (ValueError, TypeError, RecursionError):
        said = None
    if not isinstance(said, dict):
        return f"{name + _STATE} is not a JSON object"
    wanted = {"quant_type": "nf4", "blocksize": BLOCKSIZE, "shape": list(shape)}
    wanted |= {"nested_blocksize": 256, "nested_dtype": "float32"} if nested else {}
    for key, value in wanted.items():
        if said.get(key) != value:
            return f"{key} is {said.get(key)!r}, only {value!r} is supported"
    offset = said.get("nested_offset")
    if nested and not (isinstance(offset, float) and math.isfinite(offset)):
        return f"nested_offset is {offset!r}, not a finite number"
    numbers = math.prod(shape)
    blocks = -(-numbers // BLOCKSIZE)
    counts = {"": (-(-numbers // 2), "U8"), ".absmax": (blocks, "U8" if nested else "F32"), ".quant_map": (16, "F32")}
    counts |= {".nested_absmax": (-(-blocks // 256), "F32"), ".nested_quant_map": (256, "F32")} if nested else {}
    for end, form in counts.items():
        if headers[name + end][:2] != form:
            return "{} is {:,} numbers of {}, not {:,} of {}".format(name + end, *headers[name + end][:2], *form)
    # bitsandbytes' kernels have the values built in, whatever stands here
    if not torch.allclose(headers[name + ".quant_map"][-1], get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6):
        return "quant_map does not hold the 16 values of NF4"
    return None


def read(checkpoint, name, device):
    """Return (codes, bitsandbytes' QuantState) of the weight that is tensor `name` of the files."""
    from bitsandbytes.functional import QuantState

    ends = [end for end in _BESIDE if name + end in checkpoint.files]
    state = QuantState.from_dict({f"weight{end}": checkpoint.tensor(name + end) for end in ends}, device)
    return checkpoint.tensor(name).to(device), state
