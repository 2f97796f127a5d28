"""A judge that is no judge: it sends requests on, never ends, answers nonsense. Nothing goes elsewhere, or is waited for."""

import contextlib
import gzip
import json
import resource
import time
from http.server import BaseHTTPRequestHandler

import pytest

from qlora.evaluation import judge
from qlora.system.errors import InputError
from tests.local_server import served

pytest.importorskip("openai", reason="the extra `judge` is not installed")

A_VERDICT = json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": "Verdict: A"}}]}).encode()


@contextlib.contextmanager
def serving(answer):
    """Yield (url, [bytes of each request]) of a server that leaves its replies to answer(handler)."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                answer(self)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with served(Handler) as address:
        yield f"{address}/v1", bodies


def sends(handler, body, status=200, **headers):
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def opened(url):
    return judge.opened(judge.Judge(url, "judge-1"))


def test_an_ordinary_reply_is_one_packed_or_not():
    for answer in (
        lambda handler: sends(handler, A_VERDICT),
        lambda handler: sends(handler, gzip.compress(A_VERDICT), Content_Encoding="gzip"),
    ):
        with serving(answer) as (url, bodies):
            assert opened(url).tried() == "Verdict: A"
        assert len(bodies) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_rows_are_not_sent_to_an_address_that_nobody_named(status):
    with serving(lambda handler: sends(handler, A_VERDICT)) as (other, there):
        place = f"{other}/chat/completions"
        with (
            serving(lambda handler: sends(handler, b"", status, Location=place)) as (url, here),
            pytest.raises(InputError, match=rf"sends requests on to {place} \({status}\), which is not followed"),
        ):
            opened(url)
    assert (len(here), there) == (1, [])


def endless(handler):
    sends(handler, b'{"id": "')
    while True:
        handler.wfile.write(bytes(1 << 16))


def gigabyte(handler):
    """A reply of a megabyte that unpacks to one of a gigabyte."""
    sends(handler, PACKED, Content_Encoding="gzip")


PACKED = gzip.compress(bytes(1 << 26)) * 16  # members, one after another


@pytest.mark.parametrize("answer", [endless, gigabyte, lambda handler: sends(handler, b"x" * (64 << 20), 400)])
def test_a_reply_without_an_end_is_given_up(monkeypatch, answer):
    monkeypatch.setattr(judge, "_RETRIES", 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(answer) as (url, bodies), pytest.raises(InputError, match=r"502: .*a reply of more than 4 MiB"):
        opened(url)
    assert len(bodies) == 1  # the same would come again
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10  # KiB; of the server too


def drop_by_drop(handler):
    sends(handler, b"")
    for _ in range(100):
        handler.wfile.write(b" ")
        time.sleep(0.1)


@pytest.mark.parametrize("answer", [drop_by_drop, lambda handler: time.sleep(5)], ids=["drop by drop", "nothing"])
def test_a_reply_that_does_not_come_is_waited_for_twice_at_most(monkeypatch, answer):
    monkeypatch.setattr(judge, "_RETRIES", 5)
    monkeypatch.setattr(judge, "_SECONDS", 0.5)
    with (
        serving(answer) as (url, bodies),
        pytest.raises(InputError, match=r"504: .*no whole reply within 0\.5 seconds.*try again later"),
    ):
        opened(url)
    assert len(bodies) == 2


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"null", b"[1]", b"[" * 200_000, b'{"choices": "x"}', b'{"choices": [{"message": null}]}', b"\xff\xfe",
     b'{"choices": [{"message": {"content": NaN}}]}', b'{"choices": [{"message": {"content": ["A"]}}]}'],
)  # fmt: skip
def test_what_is_no_reply_is_said_to_be_none(body):
    with (
        serving(lambda handler: sends(handler, body)) as (url, _),
        pytest.raises(InputError, match=r"127\.0\.0\.1:\d+ answers, but not as OpenAI's API does"),
    ):
        opened(url)


def test_an_endpoint_that_is_out_of_order_says_so(monkeypatch):
    monkeypatch.setattr(judge, "_RETRIES", 0)
    with serving(lambda handler: sends(handler, b"oops", 500)) as (url, _), pytest.raises(InputError, match=r"\(500: "):
        opened(url)
