"""A low-rank update of a layer, as LoRA and its relatives make it: its arithmetic, what is refused, and how a folder has it.

A (R, I), B (O, R)
LoRA, rsLoRA   W + s B A                       s = lora_alpha / r, or lora_alpha / sqrt(r)
DoRA           m * (W + s B A) / |W + s B A|   m (O,), the norm of each row            arXiv:2402.09353
AdaLoRA        W + s B diag(E) A               s = lora_alpha / (init_r + 1e-5)        arXiv:2303.10512
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..recipe.methods import pattern_of
from ..system.errors import InputError
from . import peft_model
from .contract import Update
from .folder import CONFIG, matched

# O out_features, I in_features, R rank, V vocab

PATTERN = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|E|embedding_A|embedding_B|magnitude_vector|B\.bias(?!\.))(\.weight)?"
)
MARKER = "lora_"
# of a config, beside those of any method; "gaussian" and the like say how A and B began
SILENT = {"lora_dropout", "init_lora_weights", "eva_config", "loftq_config", "megatron_core", "qalora_group_size"}
_LARGEST = {"r": 2**16, "lora_alpha": 1e6, "init_r": 2**16}
# As PEFT makes these starts, they put something else than the base's weights under the adapter, and the folder does not
# hold what. Those of qlora (initial_weights.py) leave the base alone, and say so in the config.
_CHANGED_BASE = ("loftq", "pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class LowRank(Update):
    """A low-rank update of one weight (O, I): A (R, I), B (O, R), and DoRA's magnitude (O,) or None."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    scaling: float
    magnitude_O: torch.Tensor | None = None
    zero: ClassVar[str] = "lora_B is 0, or B A is still what it started from"

    @property
    def shape(self):
        return (self.B_OR.shape[0], self.A_RI.shape[1])

    @property
    def num_parameters(self):
        return self.A_RI.numel() + self.B_OR.numel()

    def merged(self, base_OI, rows=slice(None)):
        """Return `rows` of the merged weight, float32, for those rows of the base.

        Source: LoRA (arXiv:2106.09685) eq. 3; QLoRA (arXiv:2305.14314) sec. 3; DoRA (arXiv:2402.09353) eq. 5.
        """
        device = base_OI.device
        A_RI, B_OR = self.A_RI.to(device).float(), self.B_OR[rows].to(device).float()
        merged = torch.addmm(base_OI, B_OR, A_RI, alpha=self.scaling)
        if self.magnitude_O is not None:
            merged *= (self.magnitude_O[rows].to(device).float() / merged.norm(dim=1))[:, None]
        return merged

    def is_zero(self):
        """True if B A is zero but for what the float32 sums of its parts leave; DoRA's magnitude may be all that was trained."""
        if self.magnitude_O is not None:
            return False
        A_RI, B_OR = self.A_RI.float(), self.B_OR.float()
        x_I = torch.linspace(1, 2, A_RI.shape[1])
        delta_O, size_O = B_OR @ (A_RI @ x_I), B_OR.abs() @ (A_RI.abs() @ x_I)
        return bool(delta_O.abs().max() <= 1e-6 * size_O.max())

    def times(self, x_I):
        """Return scaling * B A x, (O,), float32."""
        return self.scaling * (self.B_OR.float() @ (self.A_RI.float() @ x_I))


# ---- refused before it is attached -----------------------------------------------------------------------------------


def refuse_ranks(model, ranks, factor=1, note=""):
    """Raise InputError where a rank is above the smaller side of a layer: B A cannot have it, and it costs memory.

    ranks: {layer: (field of the recipe, rank)}. factor: how many times the rank a layer may get; note says why.
    """
    too_large: dict = {}
    shapes = peft_model.shapes(model)
    for name, (field, rank) in ranks.items():
        sides = shapes[name]
        if rank * factor > min(sides):
            too_large.setdefault((field, rank), []).append((min(sides), name, sides))
    problems = []
    for (field, rank), layers in too_large.items():
        limit, name, (num_out, num_in) = min(layers)
        problems.append(
            f"{field}: {rank}{note} is above the smaller side of {len(layers)} layers; {name} is {num_out} x {num_in}, "
            f"so at most {limit // factor}"
        )
    if problems:
        raise InputError.listing(
            "the recipe",
            problems,
            "set a lower rank (8 to 64 is usual), or leave the layer out with exclude_modules",
        )


def without_bias(model, targets):
    """Return those of the layers `targets` that have no bias."""
    return [name for name in targets if getattr(model.get_submodule(name), "bias", None) is None]


def refuse_biases(model, section, targets):
    """Raise InputError if `section.bias` means biases, and there are none."""
    if section.bias == "lora_only" and len(without_bias(model, targets)) == len(targets):
        raise InputError(f"{section.key}.bias lora_only: no layer that gets an adapter has a bias; leave it out")
    if section.bias == "all" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise InputError(f"{section.key}.bias all: {type(model).__name__} has no bias; leave it out")


# ---- in a folder -----------------------------------------------------------------------------------------------------


def refuse_settings(folder, config, keys, patterns):
    """Raise InputError if the base is not what was trained on, or a rank or alpha is none.

    keys: of single settings. patterns: {setting by regular expression: the one that it replaces}.
    """
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASE):
        raise InputError(
            f"adapter {folder}: init_lora_weights {start!r} changed the base weights, which the folder does not contain; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )
    wrong = [f"{key} is {config.get(key)!r}" for key in keys if not _is_usable(key, config.get(key))]
    for key, of in patterns.items():
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            wrong.append(f"{key} is {pattern!r}")
            continue
        wrong += [
            f"{key} gives {one!r} the value {value!r}" for one, value in pattern.items() if not _is_usable(of, value)
        ]
    if wrong:
        raise InputError.listing(
            f"{folder / CONFIG}", wrong, "no adapter has such a setting; copy or download it again"
        )


def _is_usable(key, value):
    """True if `value` can be the setting `key`: a rank, whole, or an alpha."""
    kinds = (int, float) if key == "lora_alpha" else (int,)
    return type(value) in kinds and 0 < value <= _LARGEST[key]  # false for NaN


def by_module(folder, config, modules, patterns):
    """Return {module: [its value of each setting]}; patterns: {setting by regular expression: the one it replaces}."""
    return matched(
        folder,
        "rank_pattern, alpha_pattern",
        lambda: {
            module: [_of(config.get(pattern), module, config[key]) for pattern, key in patterns.items()]
            for module in modules
        },
    )


def _of(pattern, module, default):
    """Return the value of the key of `pattern` that is, ends or matches the module's name, as PEFT reads it."""
    key = pattern_of(pattern or {}, module)
    return default if key is None else pattern[key]


def factors(found, module, rank, needed=(), may_have=()):
    """Return (A, B) of a module of adapter.Sorted, or None after noting what is wrong.

    rank: None for whatever A has. needed, may_have: other parts that belong to the kind of adapter.
    """
    parts = found.own[module].keys() - set(may_have)
    embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    missing, extra = {*names, *needed} - parts, parts - {*names, *needed}
    if missing:
        found.problems.append(f"{module}: has {_listed(parts)} but not its partner {_listed(missing)}")
        return None
    if extra or (embedding and needed):
        found.problems.append(f"{module}: {_listed(extra or needed)} does not belong to this kind of adapter")
        return None
    A_RI, B_OR = (found.own[module][name] for name in names)
    if embedding:  # E[id] = A[:, id]^T B^T: the weight is (V, I), and A has a column a token
        A_RI, B_OR = B_OR.T, A_RI.T
    rank = len(A_RI) if rank is None else rank
    if A_RI.dim() != 2 or B_OR.dim() != 2 or not A_RI.shape[0] == B_OR.shape[1] == rank:
        found.problems.append(
            f"{module}: A {tuple(A_RI.shape)} and B {tuple(B_OR.shape)}: the rank differs from r = {rank} in {CONFIG}"
        )
        return None
    return A_RI, B_OR


def _listed(names):
    return ", ".join(f"lora_{name}" for name in sorted(names))
