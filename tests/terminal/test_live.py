"""The live view of a training: what it shows, at 80 and 140 columns; that nothing tears it, and nothing of it stays."""

import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from qlora import train
from qlora.jobs.planning.planned_training import Planned
from qlora.runs.record import Begun, Best, Evaluation, Samples, Step
from qlora.system import events
from qlora.system.errors import TrainingFailed
from qlora.terminal import bars, lines, live, shown, training
from tests import forked
from tests.terminal.screen import Terminal
from tests.terminal.test_terminal import Screen

PLANNED = Planned(0, False, 2**30, SimpleNamespace(tokens_per_second=2000.0), limit_bytes=20 * 2**30)
SAMPLE = {
    "prompt": [{"role": "user", "content": "What is\n0 plus 1?"}],
    "expected": "1",
    "answer": "\x1b[31mtwo " + "x" * 400,
}


def step(number, loss=2.0, rate=500.0):
    return Step(number, number / 50, loss, 2e-4, 0.5, 100 * number, rate, 3 * 2**30, float(number))


class Watched:
    """A terminal of a test: `draw` draws the bars anew, `seen` is what is on it then."""

    def __init__(self, monkeypatch, width):
        self.width, self.written, self.displays = width, Screen(), []
        console = Console(file=self.written, width=width, height=40, force_terminal=True, color_system=None)
        monkeypatch.setattr(lines, "console", console)
        start = bars._Live.start
        monkeypatch.setattr(bars._Live, "start", lambda display: (self.displays.append(display), start(display)))

    def draw(self):
        self.displays[-1].refresh()

    def seen(self):
        terminal = Terminal(self.width)
        terminal.feed(self.written.getvalue())
        return terminal


@pytest.fixture
def screen(monkeypatch):
    """Return screen(width) -> Watched."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return lambda width: Watched(monkeypatch, width)


def emit_all(*told):
    for one in told:
        events.emit(one)


@pytest.mark.parametrize("width", [80, 140])
def test_all_that_is_known_is_seen_at_once(screen, width):
    it = screen(width)
    with shown(steps=True), events.progress(training.TRAINING):
        emit_all(PLANNED, Begun(0, 100, 0), *(step(number, 3 - number / 50) for number in range(1, 51)))
        emit_all(
            Evaluation(50, 1.0, 2.25, 50.0, {"eval_accuracy": 0.5}), Samples(50, 1.0, (SAMPLE,), 50.0), step(51, 1.98)
        )
        it.draw()
        shot = it.seen().text
    for expected in (
        "51 of 100, epoch 1.02 of 2.00",
        "loss      1.9800, mean of the last 20 2.1700",
        "held out  2.2500 at step 50, accuracy 0.5000",
        "rate      2.00e-04, gradient norm 0.5",
        "500 tokens/s, 25% of the plan's most",
        "now, peak 3.00 GiB of 20.00 GiB",
        "CPU ",
        "asked     What is 0 plus 1?",
        "expected  1",
        "answer    \ufffd[31mtwo xxx",
        "51/100",
        "left",
    ):
        assert expected in shot
    (spark,) = re.findall(r"losses    (\S+)", shot)
    assert spark[0] == "█"
    assert spark[-1] == "▁"
    assert len(spark) in (51, width - 10)
    assert max(map(len, shot.splitlines())) <= width
    # side by side where there is room
    assert bool(re.search("step .*speed|loss .*memory|step .*memory|loss .*busy", shot)) == (width == 140)


def test_before_the_first_step_it_says_so(screen):
    it = screen(80)
    with shown(steps=True), events.progress(training.TRAINING):
        emit_all(Begun(5, 1000, 0))
        it.draw()
        assert "step      6 of 1,000 is running" in it.seen().text


def test_what_is_said_meanwhile_stands_above_it_whole_and_the_view_goes_away(screen, make_recipe, unplanned):
    it = screen(80)

    def hear(event):  # after the view has, in the middle of the training
        if isinstance(event, Step):
            events.note(f"a note at {event.step}")
            print(f"a warning at {event.step}", file=sys.stderr)  # as Python does it
            print(f"a print at {event.step}")
            it.draw()

    with shown(steps=True), events.heard_by(hear):
        train(make_recipe(training={"max_steps": 3, "eval_steps": 2}))
    terminal = it.seen()
    for number in (1, 2, 3):
        for kind in ("a note", "a print", "a warning"):
            assert [line.rstrip() for line in terminal.lines].count(f"{kind} at {number}") == 1
    assert "held-out loss" in terminal.text
    assert not re.search(r"^(losses|busy|rate|speed) ", terminal.text, flags=re.MULTILINE)
    assert "━" not in terminal.text
    assert terminal.shows_cursor
    written = it.written.getvalue()
    assert "evaluating" in written  # an evaluation has its bar
    assert re.search(r"step +3 of 3, epoch", written)


def test_a_training_that_fails_leaves_nothing_of_it(screen):
    it = screen(80)

    def fail():
        with shown(steps=True), events.progress(training.TRAINING):
            emit_all(Begun(0, 10, 0), step(1))
            it.draw()
            assert "gradient norm" in it.seen().text
            raise TrainingFailed("no")

    with pytest.raises(TrainingFailed):
        fail()
    assert it.seen().text.strip() == ""
    assert it.seen().shows_cursor


def test_the_next_training_begins_with_an_empty_view(screen):
    it = screen(80)
    with shown(steps=True):
        with events.progress(training.TRAINING):
            emit_all(Begun(0, 10, 0), step(7, 1.2345))
        with events.progress("loading"):
            it.draw()
            assert "loading" in it.seen().text
            assert "1.2345" not in it.seen().text
        with events.progress(training.TRAINING):
            emit_all(Begun(0, 10, 0))
            it.draw()
            assert "step      1 of 10 is running" in it.seen().text


@pytest.mark.parametrize("setting", [("CI", "true"), ("TERM", "dumb")])
def test_a_service_and_a_terminal_that_cannot_move_back_get_none(screen, monkeypatch, setting):
    it = screen(80)
    monkeypatch.setenv(*setting)
    with shown(steps=True), events.progress(training.TRAINING):
        emit_all(Begun(0, 10, 0), step(1))
        if it.displays:
            it.draw()
    assert bool(it.displays) == (setting[0] == "CI")  # a bar as ever, or plain lines
    assert "gradient norm" not in it.written.getvalue()
    assert "loss 2.0000" in it.written.getvalue()


def test_a_file_gets_the_lines_that_it_got_before(capsys):
    with shown(steps=True), events.progress(training.TRAINING):
        emit_all(
            Begun(0, 2, 0),
            step(1),
            Evaluation(1, 0.0, 2.5, 1.0),
            step(2),
            Best(2, 0.0, 1, "eval_loss", 2.5, True, 2.5, None, 2.0),
        )
    assert [re.sub(r"  \S+ left$", "", line) for line in capsys.readouterr().err.splitlines()] == [
        "training  step 1/2  loss 2.0000  500 tokens/s",
        "          step 1  held-out loss 2.5000",
        "training  step 2/2  loss 2.0000  500 tokens/s",
        "best      step 1, held-out loss 2.5000; what was trained is kept as of step 1",
    ]


def test_a_sparkline_is_the_means_of_stretches_from_least_to_greatest():
    assert live.sparkline([3.0, 2.0, 1.0], 10) == "█▅▁" or live.sparkline([3.0, 2.0, 1.0], 10) == "█▄▁"
    assert live.sparkline([4.0, 2.0, 1.0, 1.0, 0.0, 0.0], 3) == "█▃▁"
    assert live.sparkline([5.0, 5.0], 9) == "▁▁"
    assert live.sparkline([1.0, 0.0], 9, ascii_only=True) == "@_"


def test_many_losses_are_kept_as_means_and_the_curve_stays_the_same():
    view = live.View()
    view.hear(Begun(0, 10_000, 0))
    for number in range(1, 10_001):
        view.hear(step(number, 10_000.0 - number))
    assert len(view.losses) < 2_000
    assert view.losses == sorted(view.losses, reverse=True)
    assert abs(sum(view.losses) / len(view.losses) - 5_000) < 20
    assert live.sparkline(view.losses, 8) == "█▇▆▅▄▃▂▁"


def test_a_run_that_knows_little_is_shown_all_the_same():
    view = live.View()
    old = Step(3, 0.5, 1.0, 1e-4, None, 10, 5.0, 2**30, 1.0)  # every step so far was skipped: there is no norm
    view.hear(Begun(0, 10, 0, "images"))
    view.hear(old)
    console = Console(width=80, force_terminal=True, color_system=None)
    with console.capture() as found:
        console.print(view)
    assert "rate      1.00e-04\n" in re.sub(r" +\n", "\n", found.get())
    assert "5 images/s" in found.get()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_whoever_ends_it_has_a_terminal_with_a_cursor(make_recipe, tmp_path, number):
    (tmp_path / "r.yaml").write_text(make_recipe(training={"max_steps": 3000}).to_yaml())
    read, written = pty.openpty()
    fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    before, text = termios.tcgetattr(written), ""
    environ = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm"}
    with forked.Process("train", tmp_path / "r.yaml", err=os.ttyname(written), environ=environ) as process:
        end = time.monotonic() + 60
        while "gradient norm" not in text and time.monotonic() < end:
            text += os.read(read, 100_000).decode(errors="replace")
        os.kill(process.pid, number)
        os.set_blocking(read, False)
        while process.poll() is None and time.monotonic() < end:
            text += _rest(read)
            time.sleep(0.02)
        code = process.wait(10)
    text += _rest(read)
    assert code == (130 if number == signal.SIGINT else -number)
    assert termios.tcgetattr(written) == before
    os.close(written)
    os.close(read)
    assert text.count("\x1b[?25l") > 0
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert ("resume after step" in text) == (number == signal.SIGINT)


def _rest(descriptor):
    try:
        return os.read(descriptor, 100_000).decode(errors="replace")
    except BlockingIOError:
        return ""
