"""Events reach those who listen, there and then, and nobody else."""

import threading

from qlora.system import events


def test_those_who_listen_hear_what_is_emitted_in_their_block():
    inner, outer = [], []
    events.emit("before")
    with events.heard_by(outer.append):
        events.emit("one")
        with events.heard_by(inner.append):
            events.emit("two")
        events.emit("three")
    events.emit("after")
    assert outer == ["one", "two", "three"]
    assert inner == ["two"]


def test_another_thread_is_not_heard():
    heard = []
    with events.heard_by(heard.append):
        thread = threading.Thread(target=events.emit, args=("elsewhere",))
        thread.start()
        thread.join()
    assert heard == []


def test_who_listens_is_forgotten_where_the_block_fails():
    heard = []
    try:
        with events.heard_by(heard.append):
            raise ValueError
    except ValueError:
        events.emit("after")
    assert heard == []


def test_progress_says_where_work_begins_how_far_it_is_and_that_it_ended():
    heard = []
    with events.heard_by(heard.append), events.progress("writing", 10, "bytes") as advance:
        advance(4)
        advance(4)
    assert [event.done for event in heard] == [0, 4, 8, 10]
    assert {(event.what, event.total, event.unit) for event in heard} == {("writing", 10, "bytes")}
