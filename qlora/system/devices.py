"""Which device a verb computes on, and why not on another that is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .events import note

_LIBRARY_OF_WSL = Path("/usr/lib/wsl/lib/nvidia-smi")


def nvidia_smi() -> str | None:
    """Return the path of nvidia-smi, which comes with the driver of an NVIDIA card; None without it."""
    found = shutil.which("nvidia-smi")
    return found or (str(_LIBRARY_OF_WSL) if _LIBRARY_OF_WSL.exists() else None)


def has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or nvidia_smi() is not None


def remark() -> str | None:
    """Return what a person may not expect of the device that is used, in a line; None if there is nothing to say.

    NVIDIA cards and CPUs are supported. torch calls AMD's cards cuda too.
    """
    import torch

    if torch.cuda.is_available():
        return _remark_on_cuda(torch)
    if torch.backends.mps.is_available():
        # bitsandbytes 0.50.2 has NF4 on Metal, in kernels from the hub or in plain PyTorch, but no 8-bit optimizer
        return "cpu: Apple's GPU is not used (not tested; bitsandbytes has no 8-bit optimizer for it), so this is slow"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "cpu: Intel's GPU is not used (not tested), so this is slow"
    if not has_nvidia_driver() or _is_hidden():
        return None
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is a build without CUDA"
    else:
        why = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it"
    return f"cpu: an NVIDIA driver is there, but {why}; qlora doctor says what to do"


def _remark_on_cuda(torch):
    count, current = torch.cuda.device_count(), torch.cuda.current_device()
    parts = []
    if torch.version.hip is not None:
        parts.append(f"an AMD GPU with ROCm {torch.version.hip}, which is not tested")
    if count > 1:
        parts.append(f"one of {count} GPUs; choose another with CUDA_VISIBLE_DEVICES={(current + 1) % count}")
    return f"cuda:{current}: {torch.cuda.get_device_name(current)}, {', '.join(parts)}" if parts else None


def _is_hidden():
    """True where the user has hidden the cards."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "?").strip() in ("", "-1", "NoDevFiles")


def sent(array, device):
    """Return a numpy array as a tensor on `device`; nobody waits for the copy, which a GPU makes from pinned memory."""
    import torch

    source = torch.from_numpy(array)
    if device.type != "cuda":
        return source.to(device)
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source).to(device, non_blocking=True)


def say_device():
    """Emit `remark`, if there is one."""
    found = remark()
    if found is not None:
        note(f"device    {found}")
