"""How busy the machine is. The system and the driver say it: no computation waits for that."""

from __future__ import annotations

import sys
import time

import psutil

_EVERY = 1.0  # seconds between two readings: shares of less time jump about


class Load:
    """How busy processor and GPU were between two readings; each listener has its own."""

    def __init__(self, every=_EVERY):
        self.every = every
        self._read_at, self._found = -every, {}
        self._times = psutil.cpu_times()
        self._says_gpu = True

    def now(self) -> dict[str, float]:
        """Return {"cpu_use", "gpu_use"}, shares, and {"system_memory_bytes"}, what all processes hold; of the last second.

        gpu_use is left out without a GPU, or where the driver cannot be asked (nvidia-ml-py is not installed).
        """
        now = time.monotonic()
        if now - self._read_at >= self.every:
            self._read_at, self._found = now, self._read()
        return self._found

    def _read(self):
        memory = psutil.virtual_memory()
        found = {"cpu_use": self._cpu(), "system_memory_bytes": memory.total - memory.available}
        gpu = self._gpu()
        return found if gpu is None else found | {"gpu_use": gpu}

    def _cpu(self):
        before, self._times = self._times, psutil.cpu_times()
        idle = sum(getattr(self._times, name, 0) - getattr(before, name, 0) for name in ("idle", "iowait"))
        # Linux counts a guest's time in user and nice already
        counted = [name for name in self._times._fields if not name.startswith("guest")]
        total = sum(getattr(self._times, name) - getattr(before, name) for name in counted)
        return min(1.0, max(0.0, 1 - idle / total)) if total > 0 else 0.0

    def _gpu(self):
        torch = sys.modules.get("torch")
        if not self._says_gpu or torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
            return None
        try:
            return torch.cuda.utilization() / 100
        except Exception:  # no nvidia-ml-py, or a driver that does not say: each has an error of its own
            self._says_gpu = False
            return None
