"""Work on pieces of a tensor by one thread a core, each computing with that core alone.

torch itself shares an operation out to all cores and waits for the slowest. With pieces that fit a core's cache an operation
takes a tenth of a millisecond, and where another process has one of the cores that waiting costs far more than the work
(docs/log.md). Threads that never wait for one another lose what the other process takes and no more.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch


class Cores:
    """`with Cores(device) as cores:` a thread a core on the CPU; on a GPU one thing after another, in this thread."""

    def __init__(self, device):
        self._before = torch.get_num_threads()
        self.count = self._before if torch.device(device).type == "cpu" else 0

    def __enter__(self):
        if self.count:
            torch.set_num_threads(1)
            # glibc gives freed memory back to the system, and takes it again page by page, above a size that grows to
            # that of what was freed before. Without this line an export spends more time there than computing.
            torch.empty(31 * 2**20, dtype=torch.uint8)
            self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *exception):
        if self.count:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._before)

    def map(self, function, items):
        """Yield function(item) for each item, in order; no more than a few are ready and not yet taken."""
        if not self.count:
            yield from map(function, items)
            return
        waiting = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > 2 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
