"""The live view of a training: what is known of it at this moment, above its bar. A listener; it asks the model for nothing."""

from __future__ import annotations

import itertools
import os

from rich.table import Table
from rich.text import Text

from ..jobs.planning.planned_training import Planned
from ..runs import record
from ..system import memory
from ..system.load import Load
from ..system.units import size
from . import lines

_LABEL = 10  # columns, as those of notes
_WIDE = 110  # columns from which on two facts stand side by side
_SMOOTH = 20  # logged steps that the smoothed loss is the mean of
_MOST = 2000  # losses that are kept; then two become their mean
_LEVELS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_LONGEST = 300  # characters of a text of a sample; metrics.jsonl has all of it


def is_wanted():
    """True where a view can be drawn, and somebody looks: a service's log may be a terminal too."""
    return lines.can_redraw() and not os.environ.get("CI")


class View:
    """What the events of a training have said so far; drawn by rich, from a thread of its own."""

    def __init__(self):
        self.load = Load()
        self.limit_bytes = self.roofline = None
        self._forget(0, 0, "tokens")

    def _forget(self, taken, total, counts):
        self.taken, self.total, self.counts = taken, total, counts
        self.step: record.Step | None = None
        self.held_out: record.Evaluation | None = None
        self.best: record.Evaluation | None = None
        self.sample: dict | None = None
        self.losses, self.each, self.waiting = [], 1, []  # means of `each` logged steps
        self.recent = []  # the last _SMOOTH

    def hear(self, event):
        if isinstance(event, Planned):
            self.limit_bytes = event.limit_bytes
            self.roofline = None if event.plan is None else event.plan.tokens_per_second
        elif isinstance(event, record.Begun):
            self._forget(event.step, event.total_steps, event.counts)
        elif isinstance(event, record.Step):
            self.step = event
            self._keep(event.loss)
        elif isinstance(event, record.Evaluation):
            self.held_out = event
            if self.best is None or event.eval_loss < self.best.eval_loss:
                self.best = event
        elif isinstance(event, record.Samples):
            self.sample = event.samples[-1]

    def _keep(self, loss):
        self.recent = [*self.recent[1 - _SMOOTH :], loss]
        self.waiting.append(loss)
        if len(self.waiting) == self.each:
            self.losses = [*self.losses, sum(self.waiting) / self.each]
            self.waiting = []
        if len(self.losses) >= _MOST:
            self.losses = [sum(self.losses[at : at + 2]) / 2 for at in range(0, _MOST, 2)]
            self.each *= 2

    # ---- how it looks ----

    def __rich_console__(self, console, options):
        width = options.max_width
        ascii_only = options.ascii_only
        facts = self._facts()
        columns = 2 if width >= _WIDE else 1
        grid = Table.grid(padding=(0, 1))
        for _ in range(columns):
            grid.add_column(width=_LABEL - 1, style="dim", no_wrap=True)
            grid.add_column(width=width // columns - _LABEL - 1, no_wrap=True, overflow="ellipsis")
        half = -(-len(facts) // columns)
        for at in range(half):
            pairs = facts[at::half]
            grid.add_row(*(cell for pair in pairs for cell in pair))
        yield Text()
        if len(self.losses) > 1:
            yield _line("losses", Text(sparkline(self.losses, width - _LABEL, ascii_only), "green"), width)
        yield grid
        if self.sample is not None:
            for label, text in zip(("asked", "expected", "answer"), texts_of(self.sample), strict=True):
                yield _line(label, Text(text), width)

    def _facts(self):
        """Return [(label, words)]."""
        step = self.step
        if step is None:
            return [
                ("step", f"{self.taken + 1:,} of {self.total:,} is running"),
                ("memory", self._memory()),
                ("busy", self._busy()),
            ]
        epochs = f"{step.epoch:.2f} of {step.epoch * self.total / step.step:.2f}"
        found = [
            ("step", f"{step.step:,} of {self.total:,}, epoch {epochs}"),
            ("loss", f"{step.loss:.4f}" + self._smoothed()),
            ("held out", self._held_out()),
            (
                "rate",
                f"{step.learning_rate:.2e}"
                + ("" if step.grad_norm is None else f", gradient norm {step.grad_norm:.3g}"),
            ),
            ("speed", self._speed(step.tokens_per_second)),
            ("memory", self._memory()),
            ("busy", self._busy()),
        ]
        return [pair for pair in found if pair[1]]

    def _smoothed(self):
        many = len(self.recent)
        return f", mean of the last {many} {sum(self.recent) / many:.4f}" if many > 1 else ""

    def _held_out(self):
        one, best = self.held_out, self.best
        if one is None or best is None:
            return ""
        more = "".join(f", {name.removeprefix('eval_')} {value:.4f}" for name, value in one.metrics.items())
        lowest = "" if one is best else f"; lowest {best.eval_loss:.4f} at step {best.step:,}"
        return f"{one.eval_loss:.4f} at step {one.step:,}{more}{lowest}"

    def _speed(self, rate):
        share = f", {rate / self.roofline:.0%} of the plan's most" if self.roofline else ""
        return f"{rate:,.0f} {self.counts}/s{share}"

    def _memory(self):
        peak = [] if self.step is None else [f"peak {size(self.step.memory_bytes)}"]
        budget = [] if self.limit_bytes is None else [f"of {size(self.limit_bytes)}"]
        return " ".join([f"{size(memory.held_bytes())} now,", *peak, *budget]).removesuffix(",")

    def _busy(self):
        found = self.load.now()
        names = {"gpu_use": "GPU", "cpu_use": "CPU"}
        return ", ".join(f"{said} {found[name]:.0%}" for name, said in names.items() if name in found)


def _line(label, text, width):
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=_LABEL - 1, style="dim", no_wrap=True)
    grid.add_column(width=width - _LABEL, no_wrap=True, overflow="ellipsis")  # else a long text takes the label's place
    grid.add_row(label, text)
    return grid


def sparkline(values, width, ascii_only=False):
    """Return `values` as at most `width` bars of eight heights, each the mean of a stretch; from the least to the greatest."""
    count = min(width, len(values))
    ends = [len(values) * at // count for at in range(count + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in itertools.pairwise(ends)]
    levels = _ASCII if ascii_only else _LEVELS
    low, high = min(means), max(means)
    if not high > low:
        return levels[0] * count
    return "".join(levels[round((mean - low) / (high - low) * (len(levels) - 1))] for mean in means)


def texts_of(sample):
    """Return what the last message of a sample asked, what it expects, and the answer, each in a line."""
    texts = (sample["prompt"][-1].get("content") or "", sample["expected"], sample["answer"])
    return [_in_one_line(str(text)) for text in texts]


def _in_one_line(text):
    """Return a text without line ends and characters that nobody sees, or that a terminal would obey."""
    text = " ".join(text.split())
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:_LONGEST])
    return shown + "..." * (len(text) > _LONGEST)
