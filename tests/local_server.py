"""A server on this machine for as long as a block lasts."""

import contextlib
import threading
from http.server import ThreadingHTTPServer


@contextlib.contextmanager
def served(handler):
    """Yield the address of a server whose requests a BaseHTTPRequestHandler class answers, each in a thread of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True  # one that never answers ends with the tests
    # it looks every 0.01 seconds whether it is to stop
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
