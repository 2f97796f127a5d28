"""The choices of `training.optim`, and what else depends on which one it is; those of `training.lr_scheduler_type`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Name = Literal[
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_8bit",
    "adamw_torch",
    "adamw_torch_fused",
    "paged_lion_8bit",
    "paged_lion_32bit",
]
DEFAULT: Name = "paged_adamw_8bit"


@dataclass(frozen=True)
class Optimizer:
    """states: kept for each trained number. bits: of each. paged: kept where the CUDA driver moves it to CPU memory when the
    GPU is full. copies_all: a step on a GPU goes through all tensors at once, with one float32 copy of them."""

    states: int
    bits: int
    paged: bool = False
    copies_all: bool = False


OPTIMIZERS: dict[str, Optimizer] = {
    "paged_adamw_8bit": Optimizer(2, 8, paged=True),
    "paged_adamw_32bit": Optimizer(2, 32, paged=True),
    "adamw_8bit": Optimizer(2, 8),
    "adamw_torch": Optimizer(2, 32, copies_all=True),
    "adamw_torch_fused": Optimizer(2, 32),
    "paged_lion_8bit": Optimizer(1, 8, paged=True),
    "paged_lion_32bit": Optimizer(1, 32, paged=True),
}
assert OPTIMIZERS.keys() == set(get_args(Name))

Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
