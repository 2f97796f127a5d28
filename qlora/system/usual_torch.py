"""torch as it is when it is imported, whatever a program around has set."""

from __future__ import annotations

import contextlib
import sys


@contextlib.contextmanager
def usual_torch():
    """Compute in the block with the settings that torch begins with, and leave those of the program around as they are: default
    dtype and device, no gradients, inference mode, autocast.

    Weights, masks and positions are made with these where a library names none, so that a notebook's `set_default_dtype` would
    train other numbers.
    """
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
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
