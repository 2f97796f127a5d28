"""Merge arithmetic: dequantize(NF4(W)) + scaling * B A in float32, cast once, one tensor in memory at a time.

The base is the NF4 weight that the adapter was trained against, not the 16-bit weight of the files: B A was fitted on
top of the quantized model, and W + scaling * B A is another function (measured on SmolLM2-135M: KL 0.18-0.23 to the
trained model, against 1e-6 for this). Which layers were quantized is taken from the trained model, never guessed from
shapes: rounding the embedding too costs 0.1 nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from safetensors import safe_open

from .. import base_model
from ..errors import InputError
from .writer import Spec

# O out_features, I in_features, R rank, V vocab, N new tokens


def dequantized(W_OI, quantization):
    """Return what the trained model held for `W_OI`: its NF4 round trip, shape (O, I), float32 and not rounded further.

    Quantized through the same class and on the same kind of device as at training.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    codes = Params4bit(
        W_OI.to(base_model.DTYPE_WHEN_QUANTIZED).contiguous(),
        requires_grad=False,
        compress_statistics=quantization.use_double_quant,
        quant_type=quantization.quant_type,
    ).to(W_OI.device)
    codes.quant_state.dtype = torch.float32
    return dequantize_4bit(codes.data, codes.quant_state)


def merged_weight(base_OI, A_RI, B_OR, scaling):
    """Return base + scaling * B A, shape (O, I), float32; the caller casts once.

    Source: LoRA (arXiv:2106.09685) eq. 3; QLoRA (arXiv:2305.14314) sec. 3.
    """
    return base_OI + scaling * (B_OR.to(base_OI.device).float() @ A_RI.to(base_OI.device).float())


def with_rows(base_VI, ids, rows_NI, num_rows):
    """Return (num_rows, I): `base_VI` with `rows_NI` at `ids`, which hold every row that the base does not have."""
    result = torch.nn.functional.pad(base_VI, (0, 0, 0, num_rows - len(base_VI)), value=math.nan)
    result[ids] = rows_NI.to(result)
    return result


@dataclass
class Plan:
    """What will be written, and where each tensor comes from.

    specs: every parameter of the model once (a tied head is not written), in the model's order. source: {name: tensor
    name in the files}. conv1d: names of modules that store (I, O). shapes: {linear module: (O, I)}. embeddings:
    {module: (V, I)} of embedding and head where rows of new tokens belong; empty without new tokens.
    """

    specs: list
    source: dict
    conv1d: set
    shapes: dict
    embeddings: dict


def plan(checkpoint, config, dtype, trust_remote_code=False):
    """Return the Plan for writing the model of `checkpoint` in `dtype`, from headers alone.

    Raises:
        InputError: a parameter has no tensor in the files; or new tokens where their rows cannot be trained.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    shapes = {}
    for name in base_model.linear_names(model):
        shape = tuple(model.get_submodule(name).weight.shape)
        shapes[name] = shape[::-1] if name in conv1d else shape
    modules = base_model.token_modules(model) if checkpoint.new_tokens else []
    embeddings = {name: tuple(model.get_submodule(name).weight.shape) for name in modules}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    specs, source, missing = [], {}, []
    for name, tensor in model.state_dict().items():
        if name in tied:
            if name in checkpoint.files and tied[name] in checkpoint.files:
                _refuse_unequal(checkpoint, name, tied[name])
            continue
        prefix = f"{model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), prefix + name)  # GPT-2's files leave out "transformer."
        found = next((candidate for candidate in names if candidate in checkpoint.files), None)
        if found is None:
            missing.append(name)
        source[name] = found
        specs.append(Spec(name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype))
    if missing:
        raise InputError.listing(f"{checkpoint.folder}: export finds no tensor for parameters: it", missing)
    return Plan(specs, source, conv1d, shapes, embeddings)


def _refuse_unequal(checkpoint, one, other):
    tensors = [_read(checkpoint, name) for name in (one, other)]
    if not torch.equal(*tensors):
        raise InputError(
            f"{checkpoint.folder}: config.json ties {one} to {other}, but the files hold different weights"
        )


def _read(checkpoint, name):
    with safe_open(checkpoint.folder / checkpoint.files[name], "pt") as file:
        return file.get_tensor(name)


class Merge:
    """Makes the tensors of a Plan one by one, and measures what merging and casting did to each adapted module."""

    def __init__(self, checkpoint, plan, adapter, quantized, quantization, device):
        self.checkpoint, self.plan, self.adapter = checkpoint, plan, adapter
        self.quantized, self.quantization, self.device = set(quantized), quantization, device
        self.dtypes = {spec.name: spec.dtype for spec in plan.specs}
        self.modules = []

    def tensor(self, name):
        """Return the tensor of parameter `name` as it is stored in the output.

        Raises:
            InputError: a number does not fit the output dtype; names the tensor and the remedy.
        """
        stored = _read(self.checkpoint, self.plan.source[name]).to(self.device)
        if not stored.is_floating_point():
            return stored
        module, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and module in self.plan.shapes
        turned = module in self.plan.conv1d and is_matrix
        original = stored.T if turned else stored
        base = original.to(base_model.DTYPE_WHEN_QUANTIZED).float()
        if is_matrix and module in self.quantized:
            base = dequantized(original, self.quantization)
        result = base
        if is_matrix and module in self.adapter.factors:
            A_RI, B_OR = self.adapter.factors[module]
            result = merged_weight(base, A_RI, B_OR, self.adapter.scaling)
        elif leaf == "weight" and module in self.adapter.rows:
            ids, rows_NI = self.adapter.rows[module]
            base = result = with_rows(base, ids, rows_NI, self.plan.embeddings[module][0])
        cast = result.to(self.dtypes[name])
        self._refuse_overflow(name, result, cast)
        if result is not base:
            self._measure(module, original, base, result, cast)
        return cast.T if turned else cast

    def _refuse_overflow(self, name, exact, cast):
        if not torch.isfinite(cast).all():
            raise InputError(
                f"{name}: largest number {exact.abs().max().item():.3g} does not fit {str(cast.dtype)[6:]}; "
                "export with --dtype bfloat16 or float32"
            )

    def _measure(self, module, original, base, merged, cast):
        delta = (merged - base).norm().item()
        self.modules.append(
            {
                "name": module,
                "delta_norm": delta,
                "quantization_error": (base - original.float()).norm().item(),
                "cast_error": (cast.float() - merged).norm().item(),
                "changed": (cast != base.to(cast.dtype)).float().mean().item(),
            }
        )
