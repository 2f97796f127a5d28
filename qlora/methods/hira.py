"""HiRA: y = (W + W * (B A)) x, the update of LoRA multiplied with the weight, number by number; its rank can be that of W.

Source: Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR 2025.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import low_rank, peft_model, targets
from .adapter import Sorted, refuse_unknown_settings
from .contract import Description, Trainable, Update, one_group
from .folder import CONFIG

# O out_features, I in_features, R rank

save, fill = peft_model.save, peft_model.fill

_PATTERN = re.compile(r"(?P<module>.+)\.hira_(?P<part>[AB])")
_MARKER = "hira_"
_FIELDS = ("r",)


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; nothing is read from checkpoint and examples."""
    from peft import HiraConfig

    targets.refuse_token_rows(token_ids, "PEFT's HiRA")
    layers, whole = targets.chosen(model, section, token_ids)
    low_rank.refuse_ranks(model, dict.fromkeys(layers, ("hira.r", section.r)))
    torch.manual_seed(seed)
    config = HiraConfig(**peft_model.settings(model, layers, whole), r=section.r, hira_dropout=section.hira_dropout)
    attached = peft_model.make(model, config)
    peft_model.to_dtype(attached, peft_model.dtype_of(model))
    return attached


def trainable(model, section):
    return Trainable(
        f"HiRA, r = {section.r}", first_to_move=peft_model.named(model, ".hira_B."), groups=one_group(model)
    )


def load(model, adapter, token_ids=()):
    from peft import HiraConfig

    return peft_model.load(model, adapter, token_ids, HiraConfig, _FIELDS)


def describe(config):
    return Description("HiRA", f"r={config.get('r')}", "{W} + {W} * (B A)")


def read(folder, config):
    refuse_unknown_settings(folder, config, {*_FIELDS, "hira_dropout", "init_weights"})
    low_rank.refuse_settings(folder, config, ("r",), {})
    found = Sorted(folder, config, _PATTERN, _MARKER, "HiRA")
    return found.adapter("HiRA", {module: _update(found, module) for module in sorted(found.own)}, beside=True)


def _update(found, module):
    parts, rank = found.own[module], found.config["r"]
    if parts.keys() != {"A", "B"}:
        found.problems.append(f"{module}: has hira_{next(iter(parts))} but not its partner")
        return None
    A_RI, B_OR = parts["A"], parts["B"]
    if A_RI.dim() != 2 or B_OR.dim() != 2 or not len(A_RI) == B_OR.shape[1] == rank:
        found.problems.append(
            f"{module}: A {tuple(A_RI.shape)} and B {tuple(B_OR.shape)}: the rank differs from r = {rank} in {CONFIG}"
        )
        return None
    return Hadamard(A_RI, B_OR)


@dataclass(frozen=True)
class Hadamard(Update):
    """A low-rank factor of each number of one weight (O, I): A (R, I), B (O, R)."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    zero: ClassVar[str] = "hira_B is 0"

    @property
    def shape(self):
        return (len(self.B_OR), self.A_RI.shape[1])

    @property
    def num_parameters(self):
        return self.A_RI.numel() + self.B_OR.numel()

    def merged(self, base_OI, rows=slice(None)):
        device = base_OI.device
        product = self.B_OR[rows].to(device).float() @ self.A_RI.to(device).float()
        return base_OI * (1 + product)

    def is_zero(self):
        return not self.B_OR.any() or not self.A_RI.any()
