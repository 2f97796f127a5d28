"""OFT: the inputs of a layer are rotated in blocks, y = W (R x) + b; R is block-diagonal and orthogonal, and starts as 1.

A block of size K is made of K (K - 1) / 2 numbers, the skew-symmetric Q: R = (1 + Q) (1 - Q)^-1, or the first terms of its
series. It computes on 4-bit layers as they are (QOFT).
Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023 (arXiv:2306.07280); the series: Qiu et
al., Orthogonal Finetuning Made Scalable, 2025 (arXiv:2506.19847).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..system.errors import InputError
from . import peft_model, targets
from .adapter import Sorted, refuse_unknown_settings
from .contract import Description, Trainable, Update, one_group
from .folder import CONFIG

# O out_features, I in_features, N blocks, K numbers in a block

save, fill = peft_model.save, peft_model.fill

_PATTERN = re.compile(r"(?P<module>.+)\.oft_(?P<part>R)\.weight")
_MARKER = "oft_"
# settings of a folder that are followed, and those that say nothing beside them
_FIELDS = ("oft_block_size", "module_dropout", "use_cayley_neumann", "num_cayley_neumann_terms", "bias")
_SILENT = ("eps", "init_weights", "r")
_TERMS = 5


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; every rotation starts as 1, so nothing depends on the seed, checkpoint and examples."""
    from peft import OFTConfig

    targets.refuse_token_rows(token_ids, "PEFT's OFT")
    layers, whole = targets.chosen(model, section, token_ids)
    _refuse_blocks(model, section, layers)
    config = OFTConfig(
        **peft_model.settings(model, layers, whole),
        r=0,  # PEFT takes one of both, and computes the other
        oft_block_size=section.oft_block_size,
        module_dropout=section.module_dropout,
        use_cayley_neumann=section.use_cayley_neumann,
        num_cayley_neumann_terms=_TERMS,
    )
    attached = peft_model.make(model, config)
    peft_model.to_dtype(attached, peft_model.dtype_of(model))
    return attached


def _refuse_blocks(model, section, layers):
    shapes, size = peft_model.shapes(model), section.oft_block_size
    wrong = [f"{name}: {shapes[name][1]} inputs" for name in layers if shapes[name][1] % size]
    if wrong:
        raise InputError.listing(
            f"oft.oft_block_size: {size} does not divide the inputs of {len(wrong)} layers; there",
            wrong,
            "take a size that divides them, such as 32 or 16",
        )


def trainable(model, section):
    rotations = peft_model.named(model, ".oft_R.")
    return Trainable(
        f"OFT, blocks of {section.oft_block_size}, {len(rotations)} layers",
        first_to_move=rotations,
        groups=one_group(model),
    )


def load(model, adapter, token_ids=()):
    from peft import OFTConfig

    kind = functools.partial(OFTConfig, r=0)  # of PEFT's folders the rank too, which is computed
    return peft_model.load(model, adapter, token_ids, kind, _FIELDS)


def describe(config):
    return Description("OFT", f"blocks of {config.get('oft_block_size')}", "{W} R")


def read(folder, config):
    refuse_unknown_settings(folder, config, {*_FIELDS, *_SILENT})
    if config.get("bias", "none") != "none":
        raise InputError(f"adapter {folder}: bias {config['bias']!r} in {CONFIG} is not supported for OFT")
    found = Sorted(folder, config, _PATTERN, _MARKER, "OFT")
    updates = {module: _update(found, module, config) for module in sorted(found.own)}
    return found.adapter("OFT", updates, beside=True)


def _update(found, module, config):
    numbers = found.own[module]["R"]
    size = config.get("oft_block_size")
    if type(size) is not int or numbers.dim() != 2 or numbers.shape[1] != size * (size - 1) // 2:
        found.problems.append(
            f"{module}: {tuple(numbers.shape)} is not rotations of blocks of {size}, as {CONFIG} says"
        )
        return None
    terms = config.get("num_cayley_neumann_terms", _TERMS) if config.get("use_cayley_neumann", True) else None
    return Rotations(numbers, size, terms)


@dataclass(frozen=True)
class Rotations(Update):
    """Rotations of a layer's inputs in N blocks of K numbers, made of (N, K (K - 1) / 2) numbers.

    terms: of the series; None for the inverse itself.
    """

    numbers: torch.Tensor
    size: int
    terms: int | None = _TERMS
    zero: ClassVar[str] = "every rotation is still 1"

    @property
    def shape(self):
        return (None, len(self.numbers) * self.size)

    @property
    def num_parameters(self):
        return self.numbers.numel()

    def rotations(self, device="cpu"):
        """Return R (N, K, K), float32."""
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        Q_NKK = torch.zeros(len(self.numbers), self.size, self.size, device=device)
        Q_NKK[:, rows, columns] = self.numbers.to(device).float()
        Q_NKK = Q_NKK - Q_NKK.transpose(1, 2)
        one = torch.eye(self.size, device=device).expand_as(Q_NKK)
        if self.terms is None:
            return torch.linalg.solve(one + Q_NKK, one - Q_NKK, left=False)
        # 1 + 2 Q + 2 Q^2 + ... + Q^(terms - 1)
        R_NKK, power = one.clone(), one
        for degree in range(1, self.terms):
            power = power @ Q_NKK
            R_NKK += power if degree == self.terms - 1 and degree > 1 else 2 * power
        return R_NKK

    def merged(self, base_OI, rows=slice(None)):
        base_ONK = base_OI.unflatten(1, (-1, self.size))
        return torch.einsum("onc,nkc->onk", base_ONK, self.rotations(base_OI.device)).flatten(1)

    def is_zero(self):
        return not self.numbers.any()
