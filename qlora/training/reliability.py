"""How reliably a training is to run: the settings of reliable_trainer.Reliable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .best import Best
from .less_memory import Economy
from .processes import ALONE, Processes
from .saving import Saving


@dataclass(frozen=True)
class Reliability:
    """lengths: the size of each training row, such as its tokens; those of the largest are rehearsed where `rehearse`.
    group_by_length: rows of like length share a step. tokens: a batch is a whole step, and the objective makes micro-batches of
    at most so many of it. watchdog_steps: the window of Watch; None: only non-finite losses end a run. economy: what is done
    where memory runs out. best: compares the evaluations, None for no. samples: answers at each evaluation, see samples.answered.
    processes: that share each step.
    """

    lengths: Sequence[int] = ()
    rehearse: bool = True
    group_by_length: bool = False
    tokens: int | None = None
    watchdog_steps: int | None = None
    saving: Saving = dataclasses.field(default_factory=Saving)
    economy: Economy = dataclasses.field(default_factory=Economy)
    best: Best | None = None
    samples: Callable | None = None
    processes: Processes = ALONE
