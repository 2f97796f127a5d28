"""Memory in bytes: measured, and counted from stored tensors."""

from __future__ import annotations

import resource
import sys

import torch


def reset_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes():
    """Return the most bytes held at once: torch's allocations on the GPU since reset_peak, else the process' peak RSS."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def stored_bits_per_parameter(quant_state, codes):
    """Return the bits that one number of a 4-bit weight costs: codes, 8-bit absmax, and the constants of those.

    4.127 with double quantization: 4 + 8/64 + 32/(64*256), QLoRA (arXiv:2305.14314) sec. 3.
    """
    bits = codes.numel() * codes.element_size() * 8 + quant_state.absmax.numel() * quant_state.absmax.element_size() * 8
    if quant_state.nested:
        bits += quant_state.state2.absmax.numel() * quant_state.state2.absmax.element_size() * 8
    return bits / quant_state.shape.numel()
