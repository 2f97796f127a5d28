"""Progress is a bar on a terminal, which goes away, and a line now and then elsewhere."""

import io

import pytest
from rich.console import Console

from qlora.system import events
from qlora.terminal import bars, lines
from qlora.terminal.bars import Bars
from tests.terminal.test_terminal import Screen


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = Screen()
    monkeypatch.setattr(lines, "console", Console(file=text, width=80, color_system=None))
    return text


@pytest.fixture
def heard():
    """Yield the Bars that hear what the test emits."""
    with Bars() as live, events.heard_by(live.hear):
        yield live


def test_work_within_work_has_a_bar_of_its_own_and_both_go_away(screen, heard):
    with events.progress("loading"):
        assert heard.live.tasks[0].total is None
        with events.progress("writing", 100, "bytes") as advance:
            advance(40)
            assert [(task.description, task.completed) for task in heard.live.tasks] == [
                ("loading", 0),
                ("writing", 40),
            ]
        assert [task.description for task in heard.live.tasks] == ["loading"]
    assert heard.live is None
    assert "writing" in screen.getvalue()


def test_a_bar_goes_away_where_the_work_fails(screen, heard):
    with pytest.raises(ValueError, match="no"), events.progress("writing", 100, "bytes"):
        raise ValueError("no")
    assert heard.live is None


def test_elsewhere_a_line_says_how_far_it_is_and_how_long_it_takes(monkeypatch, capsys, heard):
    clock = iter([0.0, 10.0, 25.0, 30.0, 31.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with events.progress("writing", 4 * 2**20, "bytes") as advance:
        advance(2**19)
        advance(2**19)  # 25 s: the first in 20
        advance(2**19)
    assert capsys.readouterr().err == "writing    1 MiB of 4 MiB, 41 KiB/s, 1m15s left\n"


def test_reading_says_how_many_rows(monkeypatch, capsys, heard):
    clock = iter([0.0, 21.0, 22.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with events.progress("tokenizing rows.jsonl", 200, "bytes") as advance:
        advance(50, "1,200 rows")
    assert capsys.readouterr().err == "tokenizing rows.jsonl: 1,200 rows, 25% of the file\n"


def test_rows_are_counted_elsewhere(monkeypatch, capsys, heard):
    clock = iter([0.0, 10.0, 25.0, 30.0, 31.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with events.progress("computing the reference", 1200, "rows") as advance:
        advance(100)
        advance(200)  # 25 s: the first in 20
        advance(300)
    assert capsys.readouterr().err == "computing the reference: 300 of 1,200 rows, 1m15s left\n"


@pytest.mark.parametrize(
    ("unit", "said"), [("rows", "scoring: 100 of 100 rows\n"), ("bytes", "scoring    100 B of 100 B, 5 B/s\n")]
)
def test_what_is_done_has_no_time_left(monkeypatch, capsys, heard, unit, said):
    clock = iter([0.0, 21.0, 22.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with events.progress("scoring", 100, unit) as advance:
        advance(100)
    assert capsys.readouterr().err == said


def test_work_that_nobody_can_measure_is_silent_elsewhere(monkeypatch, capsys, heard):
    clock = iter(range(0, 1000, 100))
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with events.progress("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_a_log_gets_lines_though_force_color_is_set_and_so_does_a_terminal_that_cannot_move_back(monkeypatch, heard):
    # CI services set FORCE_COLOR, editors TERM=dumb: rich takes both for a terminal, and draws into the one, nothing on the other
    monkeypatch.setattr(bars, "EVERY", -1)
    for text, setting in ((io.StringIO(), ("FORCE_COLOR", "1")), (Screen(), ("TERM", "dumb"))):
        with monkeypatch.context() as patched:
            patched.setenv(*setting)
            patched.setattr(lines, "console", Console(file=text, width=80, color_system=None))
            with events.progress("tokenizing rows.jsonl", 200, "bytes") as advance:
                advance(50, "1,200 rows")
        assert text.getvalue() == "tokenizing rows.jsonl: 1,200 rows, 25% of the file\n"
