"""What a training tells as it goes: its events, the files that keep them, and the one reader of metrics.jsonl.

training emits these (system/events.py); whoever wants to show or keep them listens. metrics.jsonl has a line for each Step,
Evaluation, Skipped, Rescaled, LessMemory, Samples and Best, in the order in which they came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..system import files
from ..system.errors import InputError
from ..system.events import heard_by
from ..system.load import Load
from ..system.storage import write_text

# ---- events that are lines of metrics.jsonl ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A logged step, and the steps since the one logged before it.

    step: counted from 1. epoch: with its part. loss: nats a trained token, the mean over those steps. grad_norm: before
    clipping, of the last of them. tokens: trained on since the run began, padding excluded. tokens_per_second: in the steps
    alone. memory_bytes: the most that this process has held. time: seconds since the run began, over all its processes.
    metrics: what the method or the objective adds by name, such as mean_rank.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    memory_bytes: int
    time: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss after a step, nats a trained token. epoch, time, metrics: as of a Step."""

    step: int
    epoch: float
    eval_loss: float
    time: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A step that changed nothing, because a loss or gradient was not finite.

    not_taken: why, in words. rows: numbers of the training rows that it may have been, from 1.
    """

    step: int
    epoch: float
    not_taken: str
    rows: tuple[int, ...]
    time: float


@dataclass(frozen=True)
class LessMemory:
    """Memory ran out, and the training goes on with less from here on: what did not fit was run again.

    step: the last one that was taken. out_of_memory: when, and what was asked for; change: what is different now; both in
    words. rows: numbers of the rows that did not fit, from 1. checkpointed_layers, offload: as they are now. reserve: nothing
    ran out, but less was left than is to stay free.
    """

    step: int
    epoch: float
    out_of_memory: str
    change: str
    rows: tuple[int, ...]
    checkpointed_layers: int
    offload: bool
    time: float
    reserve: bool | None = False  # None: older


@dataclass(frozen=True)
class Rescaled:
    """A step that changed nothing, because a gradient overflowed float16 at the loss scale of then. loss_scale: from now on.

    It says nothing of the rows: a scale that grows is to overflow now and then. epoch, time: as of a Step.
    """

    step: int
    epoch: float
    loss_scale: float
    time: float


@dataclass(frozen=True)
class Samples:
    """Answers to the first held-out rows, decoded greedily by the model of the Evaluation before it.

    samples: an object a row: {"prompt": messages, "expected", "answer"}. epoch, time: as of a Step.
    """

    step: int
    epoch: float
    samples: tuple[dict, ...]
    time: float


@dataclass(frozen=True)
class Best:
    """The end of a training that compares its evaluations.

    step: the last one that was taken. best_step: of the best evaluation; metric, value: what it is the best in, and how good.
    loaded: the adapter is that of best_step, else of `step`; eval_loss: its held-out loss. stopped_after: so many evaluations in
    a row were no better, so the training ended; None: it took all its steps. epoch, time: as of a Step.
    """

    step: int
    epoch: float
    best_step: int
    metric: str
    value: float
    loaded: bool
    eval_loss: float
    stopped_after: int | None
    time: float


Line = Step | Evaluation | Skipped | Rescaled | LessMemory | Samples | Best


def to_json(event: Line) -> dict:
    """Return the object that stands for `event` in metrics.jsonl: its fields, and its metrics beside them."""
    values = dict(vars(event))
    return values | values.pop("metrics", {})


def numbers_of(event) -> dict:
    """Return {name: number} of a Step, Evaluation, Norms or Trained for a curve each, with the epoch of the first two.

    What an Evaluation measures is named eval_..., as its loss is: a Step has margins and accuracies of its own.
    """
    if isinstance(event, Evaluation):
        own = {"epoch": event.epoch, "eval_loss": event.eval_loss}
        found = own | {f"eval_{name}": number for name, number in event.metrics.items()}
    else:
        found = to_json(event) if isinstance(event, Step) else event.numbers
    return {name: number for name, number in found.items() if name not in ("step", "time") and number is not None}


@functools.cache
def _fields(kind):
    """Return (the names of a kind's fields beside its metrics, those of them that are numbers)."""
    found = [one for one in dataclasses.fields(kind) if one.name != "metrics"]
    return [one.name for one in found], [one.name for one in found if str(one.type).startswith(("int", "float"))]


def from_json(values: dict) -> Line:
    """Return the event of such an object; a field that an older version did not write is None."""
    # the first that is there; a Step of a training in float16 has a loss_scale too, among its metrics
    kinds = {
        "not_taken": Skipped,
        "out_of_memory": LessMemory,
        "samples": Samples,
        "best_step": Best,
        "eval_loss": Evaluation,
        "loss": Step,
        "loss_scale": Rescaled,
    }
    kind: Any = next((kind for name, kind in kinds.items() if name in values), Step)
    names, numbers = _fields(kind)
    for name in numbers:
        files.refuse_no_number(name, values.get(name))
    known: dict[str, Any] = {name: values.get(name) for name in names} | {"step": values["step"]}
    if kind in (Rescaled, Best):
        return kind(**known)
    if kind is Samples:
        return Samples(**(known | {"samples": tuple(known["samples"])}))
    if kind in (Skipped, LessMemory):
        return kind(**(known | {"rows": tuple(known["rows"] or ())}))
    return kind(**known, metrics={name: value for name, value in values.items() if name not in names})


def read(run) -> list[Line]:
    """Return what metrics.jsonl of a RunDir says, in order. A last line without its end is still being written: left out.

    Raises:
        InputError: the file cannot be read, or a line is not one of ours.
    """
    number, found = 0, []
    try:
        with open(run.metrics_file, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 (of the message)
                if line.endswith("\n"):
                    found.append(from_json(json.loads(line)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        where = f" line {number}" if number else ""
        raise InputError(f"{run.metrics_file}{where}: {error!r}; the run folder is damaged") from None
    return found


# ---- other events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsed:
    """The largest micro-batch has run forward and backward, without a trace. peak_bytes: the most that was held by then."""

    peak_bytes: int


@dataclass(frozen=True)
class Begun:
    """The steps begin: all is loaded, restored and rehearsed. Until now nothing of a run that goes on has changed.

    step: the last one that was taken, 0 in a new run. total_steps: the number of the last. lines: of metrics.jsonl that are
    of steps up to `step`; later ones will be computed again. counts: what `tokens` of the steps are a number of.
    """

    step: int
    total_steps: int
    lines: int
    counts: str = "tokens"


@dataclass(frozen=True)
class Norms:
    """How much what is trained changes, as of a checkpoint. numbers: {"adapter_norm/layer_00": norm}."""

    step: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Trained:
    """The training has ended well. numbers: what came of it, {"final_loss", ...}."""

    step: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class CheckpointBegun:
    """A checkpoint is about to be written. What was recorded until now must be on the disk when this returns."""

    step: int


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written and verified. seconds: the time for both."""

    path: Path
    step: int
    num_bytes: int
    seconds: float


# ---- who keeps them --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(run, tensorboard=True):
    """Keep in metrics.jsonl, and in tensorboard/, of a RunDir what is emitted in the block."""
    with contextlib.ExitStack() as stack:
        listeners: list[Any] = [MetricsFile(run.metrics_file), *([TensorBoard(run.tensorboard)] if tensorboard else [])]
        for listener in listeners:
            stack.enter_context(contextlib.closing(listener))
        stack.enter_context(heard_by(*listeners))
        yield


class MetricsFile:
    """A listener: writes metrics.jsonl. The file is not touched before a training has Begun."""

    def __init__(self, path):
        self.path = path
        self.file: Any = None

    def __call__(self, event):
        if isinstance(event, Begun):
            _cut(self.path, event.lines)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        elif isinstance(event, Line):
            self.file.write(json.dumps(to_json(event), allow_nan=False) + "\n")
            self.file.flush()
        elif isinstance(event, CheckpointBegun):
            os.fsync(self.file.fileno())

    def close(self):
        if self.file is not None:
            self.file.close()


class TensorBoard:
    """A listener: writes the numbers of steps and evaluations, how busy the machine is, norms and the samples, as TensorBoard
    events into `folder`."""

    def __init__(self, folder):
        self.folder, self.load = folder, Load()
        self.board: Any = None
        self.began_at = 0

    def __call__(self, event):
        if isinstance(event, Begun):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder), purge_step=event.step + 1 if event.step else None)
            self.began_at = event.step
        elif isinstance(event, Step | Evaluation | Norms):
            if isinstance(event, Norms) and event.step <= self.began_at:
                return  # of the checkpoint that it goes on from, written again: they are there
            for key, number in numbers_of(event).items():
                if key != "epoch":
                    self.board.add_scalar(key, number, event.step)
            for key, number in self.load.now().items() if isinstance(event, Step) else ():
                self.board.add_scalar(f"system/{key}", number, event.step)
        elif isinstance(event, Samples):
            for number, sample in enumerate(event.samples, 1):
                self.board.add_text(f"sample {number}", _as_text(sample), event.step)

    def close(self):
        if self.board is not None:
            self.board.close()


def _as_text(sample):
    """Return a sample as Markdown in which nothing of its texts is Markdown: each is indented, as code is."""
    parts = [(message["role"], message.get("content") or "") for message in sample["prompt"]]
    parts += [("expected", sample["expected"]), ("answer", sample["answer"])]
    return "\n\n".join(
        f"{name}:\n\n" + "\n".join(f"    {line}" for line in str(text).splitlines()) for name, text in parts
    )


def _cut(path, num_lines):
    """Keep the first `num_lines` lines of a file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(lines[:num_lines]))
