"""Everything that is printed for a person goes through here, to stderr; data for scripts goes to stdout."""

from __future__ import annotations

import contextlib
import re
import textwrap
import time

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ..runs import record

_console = Console(stderr=True, highlight=False, emoji=False)
_results = Console(highlight=False, emoji=False)
quiet_tables = False  # set by --json, whose stdout is for scripts


_WIDTH = 80  # columns of a line on a terminal
_INDENT = " " * 10  # under the words of a line, which begin there
_COMMAND = re.compile(r"qlora (?:plan|data|train|eval|export|chat|push|adapters) [^,;`\n]*")


def say(text):
    """Print one line, never as markup; folded on a terminal, whole in a file."""
    text = str(text)
    _console.print(folded(text, _console.width) if _console.is_terminal else text, markup=False, soft_wrap=True)


def folded(text, width=_WIDTH):
    """Return `text` in lines of at most 80 columns, or `width` if that is less, with a hanging indent; words and commands,
    to be pasted, stay whole."""
    kept = _COMMAND.sub(lambda command: command[0].replace(" ", "\0"), text)
    lines = [
        textwrap.fill(
            line, min(_WIDTH, width), subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
        )
        for line in kept.split("\n")
    ]
    return "\n".join(lines).replace("\0", " ")


def has_color():
    """True if what `show` prints can be told apart by color."""
    return _results.is_terminal and not _results.no_color


def show(text):
    """Print a line of the result to stdout; a str is folded on a terminal, a rich Text stays whole. Silent under --json."""
    if not quiet_tables:
        fold = isinstance(text, str) and _results.is_terminal
        _results.print(folded(text, _results.width) if fold else text, markup=False, soft_wrap=True)


def table(title, header, rows):
    """Print a small table to stdout; the first column is text, the others numbers. Silent under --json.

    On a terminal the text is folded so that the table fits; in a file it is whole.
    """
    if quiet_tables:
        return
    grid = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        grid.add_column(name, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index > 0)
    for row in rows:
        grid.add_row(*row)
    show(title)
    if _results.is_terminal:
        _results.print(grid, end="", width=_WIDTH)  # or the window's, if that is less
    else:
        Console(highlight=False, emoji=False, width=1000).print(grid, end="")


def hush_libraries():
    """Silence what the libraries print in every run: their bars, and warnings about their own future versions.

    Called by the command line, before they are imported. Errors, and warnings of other kinds, still show.
    """
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate|torch)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # offers to download a CPU kernel
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextlib.contextmanager
def status(text):
    """Show `text` with a spinner on a terminal; one plain line elsewhere."""
    if _console.is_terminal:
        with _console.status(text):
            yield
    else:
        yield


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}h{minutes % 60:02d}m"
        if minutes >= 60
        else f"{minutes}m{seconds:02d}s"
        if minutes
        else f"{seconds}s"
    )


def size(count):
    """Return bytes as text, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


class Reading:
    """Progress of reading and tokenizing files: a live bar on a terminal, a plain line every `every` seconds elsewhere."""

    every = 20

    def __init__(self):
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=_console, transient=True)
        self.task = self.bar.add_task("tokenizing", total=1.0)
        self.start = self.said = time.monotonic()

    def __enter__(self):
        if _console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception):
        if _console.is_terminal:
            self.bar.stop()

    def update(self, path, share, rows):
        self.bar.update(self.task, description=f"tokenizing {path}: {rows:,} rows", completed=share)
        now = time.monotonic()
        if not _console.is_terminal and now - self.said > self.every:
            say(f"data      {path}: {rows:,} rows tokenized, {share:.0%} of the file")
            self.said = now


class Steps:
    """A listener: shows a training as a live bar on a terminal, as a plain line every `every` seconds elsewhere (logs, CI)."""

    every = 20

    def __init__(self):
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=_console,
            speed_estimate_period=120,
        )
        self.task = self.bar.add_task("training", total=None, loss="-", rate="-")
        self.start = self.said = self.last_save = time.monotonic()
        self.first = None  # step that was logged here
        self.total = 0

    def __enter__(self):
        if _console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *exception):
        if _console.is_terminal:
            self.bar.stop()

    def __call__(self, event):
        if isinstance(event, record.Begun):
            self.total = event.total_steps
        elif isinstance(event, record.Step):
            self._show(event)
        elif isinstance(event, record.Skipped):
            say(f"          step {event.step}  skipped: {event.not_taken}")
        elif isinstance(event, record.Evaluation):
            say(f"          step {event.step}  held-out loss {event.eval_loss:.4f}")
        elif isinstance(event, record.CheckpointSaved):
            now = time.monotonic()
            share = event.seconds / max(now - self.last_save, 1e-9)
            say(f"          step {event.step}  checkpoint of {size(event.num_bytes)} in {event.seconds:.2f}s, "
                f"{share:.1%} of the time since the last")  # fmt: skip
            self.last_save = now

    def _show(self, event):
        step, total = event.step, self.total
        if self.first is None:
            self.first, self.start = step, time.monotonic()
        loss, rate = f"{event.loss:.4f}", f"{event.tokens_per_second:,.0f}"
        self.bar.update(self.task, completed=step, total=total, loss=loss, rate=rate)
        now = time.monotonic()
        if not _console.is_terminal and (now - self.said > self.every or step in (self.first, total)):
            # the first step is slow (allocation, warm-up), so the pace is that of the steps after it
            done = step - self.first
            left = f"  {duration((now - self.start) / done * (total - step))} left" if done else ""
            say(f"training  step {step}/{total}  loss {loss}  {rate} tokens/s{left}")
            self.said = now


@contextlib.contextmanager
def writing(text, total, every=20):
    """Yield advance(bytes): a bar with bytes and their rate on a terminal, a plain line every 20 s elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=_console, disable=not _console.is_terminal, transient=True) as bar:
        task, start, done = bar.add_task(text, total=total), time.monotonic(), 0
        said = start

        def advance(count):
            nonlocal done, said
            done += count
            bar.advance(task, count)
            now = time.monotonic()
            if not _console.is_terminal and now - said > every:
                left = duration((now - start) / done * (total - done))
                say(f"{text}   {size(done)} of {size(total)}, {size(done / (now - start))}/s, {left} left")
                said = now

        yield advance


@contextlib.contextmanager
def counting(text, total):
    """Yield advance(n): a bar over `total` rows on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, disable=not _console.is_terminal, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)
