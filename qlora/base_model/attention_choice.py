"""model.attn_implementation: what it may be, and what is missing for it here. Nothing is downloaded that it does not name.

transformers 5.23 takes a kernel from the hub in place of a flash-attn that is not installed, without asking, where the package
`kernels` is there (huggingface/transformers#40178); so the package is asked for here, before transformers is.
"""

from __future__ import annotations

from ..system.errors import InputError

_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
OF_TORCH = ("auto", "sdpa", "eager")


def refuse_missing(name, device):
    """Raise InputError if attention `name` cannot be had on a torch device: a package or a GPU is missing.

    A kernel of the hub is fetched, if it is not in the cache.
    """
    if name in OF_TORCH:
        return
    field = f"model.attn_implementation: {name}"
    if device.type != "cuda":
        raise InputError(f"{field} trains on an NVIDIA GPU only, and this is {device.type}; set it to auto")
    if name in _PACKAGES and not _has_flash(name):
        raise InputError(
            f"{field} needs the package {_PACKAGES[name]}, which is not installed or too old; install it, or set it to auto, "
            "whose attention is FlashAttention-2 too, as torch carries it"
        )
    if "/" in name:
        _fetch(field, name)


def _has_flash(name):
    from transformers import utils

    return getattr(utils, f"is_flash_attn_{name[-1]}_available")()


def _fetch(field, name):
    from transformers.integrations import hub_kernels
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        raise InputError(f"{field} needs the package kernels: pip install kernels; or set it to auto")
    try:
        hub_kernels.load_and_register_attn_kernel(name)
    except Exception as error:  # no network, no such kernel, none for this torch and card: any class of two libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{field} cannot be taken from the hub or its cache: {reason}\n  look at its builds on the hub, and at the "
            "network; or set it to auto"
        ) from error
