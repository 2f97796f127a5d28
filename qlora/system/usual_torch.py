"""torch as it is when it is imported, whatever a program around has set."""

from __future__ import annotations

import contextlib
import sys
import threading

from .errors import InputError

_alone = threading.RLock()  # held by the thread whose verb is at work


@contextlib.contextmanager
def usual_torch(alone=True):
    """Compute in the block with the settings that torch begins with, and leave those of the program around as they are: default
    dtype and device, no gradients, inference mode, autocast.

    Weights, masks and positions are made with these where a library names none, so that a notebook's `set_default_dtype` would
    train other numbers. The default dtype is that of all threads, and transformers changes it while it loads: of two trainings
    that began together in two threads, both had losses in bfloat16 that one alone has in float32.

    alone: no other thread may begin such a block before this one ends.

    Raises:
        InputError: another thread is in such a block.
    """
    if not _alone.acquire(blocking=False):
        raise InputError(
            "another thread of this process is at work with qlora, and torch's default dtype is that of all threads; wait for "
            "it, or start a process for each"
        )
    with contextlib.ExitStack() as held:
        held.callback(_alone.release)
        if not alone:
            held.close()
        with _usual_settings():
            yield


@contextlib.contextmanager
def _usual_settings():
    torch = sys.modules.get("torch")
    if torch is None:  # nobody can have set anything
        yield
        return
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
