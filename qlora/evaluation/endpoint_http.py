"""An HTTP client for an endpoint that is not trusted: it is sent to one address only, and what comes back has an end."""

from __future__ import annotations

import importlib
import time

LONGEST = 4 << 20  # bytes of a reply, unpacked: a hundred times what a judge that reasons at length says
CONNECTING = 15.0  # seconds


def client(openai, seconds):
    """Return an HTTP client for the package `openai`, with its settings but for three.

    A redirect is not followed: it would send what is asked, rows of somebody's data, to an address that nobody has named. A
    reply longer than LONGEST is given up, and comes as status 502; one that is not whole after so many `seconds` as 504, which
    is tried once more.
    """
    modules = [base.__module__.partition(".")[0] for base in openai.DefaultHttpxClient.__mro__]
    httpx = importlib.import_module(
        next(name for name in modules if name.startswith("httpx"))
    )  # httpx2 for openai 3.57

    def instead(status, said, request, again=False):
        headers = {"x-should-retry": str(again).lower()}  # heeded by openai
        return httpx.Response(status, headers=headers, json={"error": {"message": said}}, request=request)

    made = openai.DefaultHttpxClient(follow_redirects=False, timeout=httpx.Timeout(seconds, connect=CONNECTING))
    unbounded = made.send

    def send(request, *, stream=False, **settings):
        del stream  # read below
        until = time.monotonic() + seconds
        try:
            response = unbounded(request, stream=True, **settings)
            try:
                body = _body(response, until)
            finally:
                response.close()
        except httpx.ConnectTimeout:
            raise
        except (httpx.TimeoutException, TimeoutError):
            first = request.headers.get("x-stainless-retry-count", "0") == "0"
            return instead(504, f"no whole reply within {seconds:g} seconds", request, again=first)
        if body is None:
            return instead(502, f"a reply of more than {LONGEST >> 20} MiB", request)
        kept = [(name, value) for name, value in response.headers.multi_items() if name not in _OF_THE_BODY]
        return httpx.Response(response.status_code, headers=kept, content=body, request=request)

    made.send = send
    return made


_OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding")


def _body(response, until):
    """Return the bytes of a response, None where they are too many; raises TimeoutError where they take too long."""
    pieces, length = [], 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST:
            return None
        if time.monotonic() > until:
            raise TimeoutError
    return b"".join(pieces)
