"""How far something is: a live bar on a terminal, a plain line every 20 seconds elsewhere (logs, CI)."""

from __future__ import annotations

import time

from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Live
from rich.table import Column
from rich.text import Text

from ..system.events import Progress
from ..system.units import duration, size
from . import lines

REFRESH = 2  # drawings a second: each takes milliseconds of the thread that computes
EVERY = 20  # seconds between plain lines
RECENT = 120  # seconds whose pace says how long the rest takes


class Bars:
    """Shows Progress events: one live display while some work has begun and not ended, a bar for each piece of it.

    panel: what rich draws above them; None: nothing.
    """

    def __init__(self):
        self.live = self.panel = None
        self.tasks = {}  # what -> number of its bar
        self.begun = {}  # what -> when, and when a line was said of it last

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.live is not None:
            self.live.stop()

    def hear(self, event):
        if isinstance(event, Progress):
            (self.draw if lines.can_redraw() else self._tell)(event)

    def draw(self, event):
        if self.live is None:
            text = TextColumn("{task.description}", table_column=Column(overflow="fold"))
            columns = (SpinnerColumn(), text, _Bar(), _Numbers(), TimeElapsedColumn(), _Left())
            self.live = _Live(self, *columns)
            self.live.start()
            lines.console.show_cursor(True)  # rich hides it, and whoever is killed cannot show it again
        if event.what not in self.tasks:
            self.tasks[event.what] = self.live.add_task(event.what, total=event.total, unit="", detail="")
        task = self.tasks[event.what]
        self.live.update(task, completed=event.done, total=event.total, unit=event.unit, detail=event.detail)
        if event.ended:
            self.live.remove_task(self.tasks.pop(event.what))
            if not self.tasks:
                self.live.stop()
                self.live = None

    def _tell(self, event):
        now = time.monotonic()
        start, told = self.begun.setdefault(event.what, (now, now))
        if event.ended:
            del self.begun[event.what]
        elif event.done and event.total and now - told > EVERY:
            rate = event.done / (now - start)
            missing = event.total - event.done
            left = f", {duration(missing / rate)} left" if missing else ""
            if event.detail:
                lines.say(f"{event.what}: {event.detail}, {event.done / event.total:.0%} of the file")
            elif event.unit == "bytes":
                lines.say(f"{event.what:<8}   {size(event.done)} of {size(event.total)}, {size(rate)}/s{left}")
            else:
                lines.say(f"{event.what}: {event.done:,.0f} of {event.total:,.0f} {event.unit}{left}")
            self.begun[event.what] = start, now


class _Live(Live):
    """The bars of `bars`, under its panel."""

    def __init__(self, bars, *columns):
        self.bars = bars
        super().__init__(
            *columns,
            console=lines.console,
            transient=True,
            speed_estimate_period=RECENT,
            refresh_per_second=REFRESH,
        )

    def get_renderables(self):
        if self.bars.panel is not None:
            yield self.bars.panel
        yield from super().get_renderables()


class _Bar(BarColumn):
    """The share that is done, where anybody knows."""

    def render(self, task):
        return Text("") if task.total is None else super().render(task)


class _Numbers(ProgressColumn):
    """What is done of what, in the unit of the work, and its detail."""

    def render(self, task):
        done, total = task.completed, task.total
        if total is None:
            count = ""
        elif task.fields["unit"] == "bytes":
            count = f"{size(done)} of {size(total)}, {size(task.speed or 0)}/s"
        else:
            count = f"{done:,.0f}/{total:,.0f}"
        return Text("  ".join(filter(None, [count, task.fields["detail"]])))


class _Left(TimeRemainingColumn):
    """The time that is left, where anybody knows."""

    def render(self, task):
        return Text("") if task.total is None else super().render(task).append(" left")
