"""RMSNorm by Liger's Triton kernel, on a GPU where the package liger-kernel is installed: one launch instead of nine.

Of Liger's kernels this is the one that is taken (docs/log.md says why not the others). It computes what kernels.norm does, and
keeps the same; the plan counts kernels.norm, which takes more.
"""

from __future__ import annotations

import importlib.util
import types

from . import norm

FAILURES = (Exception,)  # what Triton raises without a C compiler, or on a card that is too old: any of a dozen classes


def forward_of(module):
    """Return what computes the forward of a module that kernels.norm takes, or None: no such module, or no Liger here."""
    found = norm.settings(module)
    if found is None or not runs_on(module.weight):
        return None
    scale, eps = found

    def forward(self, x):
        from liger_kernel.ops.rms_norm import (
            LigerRMSNormFunction,  # here, so that one that cannot be imported is said so
        )

        # gemma: all in float32, rounded once. Not in place: Liger would write over a gradient that a residual shares
        return LigerRMSNormFunction.apply(x, scale, eps, 0.0, "gemma", False)

    return types.MethodType(forward, module)


def runs_on(weight):
    """Return whether Liger is installed and the weight is where Triton computes."""
    return weight.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
