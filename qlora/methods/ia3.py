"""(IA)3: a factor l for each output of a layer, y = l * (W x + b), or for each input, y = W (l * x) + b; all start at 1.

Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022
(arXiv:2205.05638), sec. 3.3.
"""

from __future__ import annotations

import re
import types
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..system.errors import InputError
from . import peft_model, targets
from .adapter import Sorted, refuse_unknown_settings
from .contract import Description, Trainable, Update, one_group

# O out_features, I in_features

save, fill = peft_model.save, peft_model.fill

_PATTERN = re.compile(r"(?P<module>.+)\.ia3_(?P<part>l)")
_MARKER = "ia3_"
_FIELDS = ("feedforward_modules", "init_ia3_weights")


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; every factor starts at 1, so nothing depends on the seed, checkpoint and examples."""
    from peft import IA3Config

    targets.refuse_token_rows(token_ids, "PEFT's (IA)3")
    section = _with_defaults(model, section)
    layers, whole = targets.chosen(model, section, token_ids)
    config = IA3Config(**peft_model.settings(model, layers, whole), feedforward_modules=_by_inputs(section, layers))
    attached = peft_model.make(model, config)
    peft_model.to_dtype(attached, peft_model.dtype_of(model))
    return _in_the_models_dtype(attached)


def _with_defaults(model, section):
    """Return the section with the layers of the paper where it names none, as PEFT has them for the architecture."""
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as BY_INPUTS,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind, found = model.config.model_type, {}
    if section.target_modules == "auto":
        if kind not in TARGETS:
            raise InputError(
                f"ia3.target_modules: not known for {kind} models; name the layers of keys and values and the last one of the "
                "MLP there, and the latter in feedforward_modules too"
            )
        found["target_modules"] = TARGETS[kind]
    if section.feedforward_modules is None:
        found["feedforward_modules"] = BY_INPUTS.get(kind, [])
    return section.model_copy(update=found)


def _by_inputs(section, layers):
    """Return the full names of the layers whose inputs are multiplied."""
    named = {one: [name for name in layers if name == one or name.endswith(f".{one}")]
             for one in section.feedforward_modules}  # fmt: skip
    absent = [one for one, found in named.items() if not found]
    if absent:
        raise InputError(f"ia3.feedforward_modules: {absent[0]!r} is none of the layers in target_modules")
    return sorted({name for found in named.values() for name in found})


def trainable(model, section):
    factors = peft_model.named(model, ".ia3_l.")
    return Trainable(f"(IA)3, {len(factors)} layers", first_to_move=factors, groups=one_group(model))


def load(model, adapter, token_ids=()):
    from peft import IA3Config

    return _in_the_models_dtype(peft_model.load(model, adapter, token_ids, IA3Config, _FIELDS))


def describe(config):
    return Description("(IA)3", "a factor each", "diag(l) {W}, or {W} diag(l)")


def read(folder, config):
    refuse_unknown_settings(folder, config, _FIELDS)
    found = Sorted(folder, config, _PATTERN, _MARKER, "(IA)3")
    return found.adapter("(IA)3", {module: _update(found, module) for module in sorted(found.own)}, beside=True)


def _update(found, module):
    factors = found.own[module]["l"]
    # PEFT keeps those of inputs as a row, those of outputs as a column
    if factors.dim() != 2 or 1 not in factors.shape:
        found.problems.append(f"{module}: ia3_l is {tuple(factors.shape)}, not a row or a column")
        return None
    return Factors(factors.flatten(), of_inputs=len(factors) == 1)


@dataclass(frozen=True)
class Factors(Update):
    """Factors of the outputs (O,) of a layer, bias included, or of its inputs (I,)."""

    factors: torch.Tensor
    of_inputs: bool
    zero: ClassVar[str] = "each factor is 1"

    @property
    def shape(self):
        return (None, len(self.factors)) if self.of_inputs else (len(self.factors), None)

    @property
    def num_parameters(self):
        return len(self.factors)

    def merged(self, base_OI, rows=slice(None)):
        factors = self.factors.to(base_OI.device).float()
        return base_OI * (factors if self.of_inputs else factors[rows, None])

    def merged_bias(self, base_O):
        return base_O if self.of_inputs else base_O * self.factors.to(base_O.device).float()

    def is_zero(self):
        return bool((self.factors == 1).all())


def _in_the_models_dtype(attached):
    """Let the layers compute in the dtype of their input; return `attached`.

    On a 4-bit layer PEFT 0.21.2 computes in float32 and returns that, which attention in bfloat16 does not take.
    """
    for layer in _layers(attached):
        layer.forward = types.MethodType(_forward, layer)
    return attached


def _layers(attached):
    from peft.tuners.ia3 import IA3Layer

    return [module for module in attached.modules() if isinstance(module, IA3Layer)]


def _forward(layer, x, *args, **kwargs):
    chosen = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.ia3_l]
    for name in chosen if layer.is_feedforward else ():
        x = x * layer.ia3_l[name].flatten().to(x.dtype)
    result = layer.base_layer(x, *args, **kwargs)
    for name in () if layer.is_feedforward else chosen:
        result = result * layer.ia3_l[name].flatten().to(result.dtype)
    return result
