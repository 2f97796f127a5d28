"""Chunks of rows through a function, in this process or in several, in order."""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from typing import Any

from ..system.errors import InputError


def results(chunks, job, workers):
    """Yield what `job` makes of each chunk, in order. No more than a few chunks a worker are in memory."""
    if workers == 1:
        yield from map(job, chunks)
        return
    # fork where it is the custom: nothing is imported again, and a script needs no `if __name__ == "__main__"`
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
            waiting = collections.deque()
            try:
                for chunk in chunks:
                    with warnings.catch_warnings():
                        # the children tokenize and end; they touch no thread's lock
                        warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
                        waiting.append(pool.submit(_run_job, chunk))
                    if len(waiting) > 3 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:  # nobody wants the rest
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except concurrent.futures.BrokenExecutor:
        raise InputError("a tokenizing process died, probably of too little memory; set data.num_proc=1") from None


_job: Any = None


def _start_worker(job):
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = job


def _end_with_parent():
    """End this worker when the main process has, however: nobody else would tell it that no more rows come."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(chunk):
    return _job(chunk)
