"""The 4-bit layers of a loaded model: which they are, what their codes are, what they compute in."""

from __future__ import annotations

import hashlib

import torch

from ..system.errors import InputError
from .empty_weights import upcast

# W is cast to bfloat16 before it is quantized, whatever the files hold: fp32, fp16 and bf16 copies of one weight give
# different NF4 codes, so the dtype is part of what was trained.
DTYPE_WHEN_QUANTIZED = torch.bfloat16


def dtype_of(name):
    """Return the torch dtype that a recipe calls "float16", "bfloat16" or "float32"."""
    return getattr(torch, name)


def floating_dtype(model):
    """Return the dtype of a model's numbers that are not in 4 bit."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def quantized_modules(model):
    """Return {name: module} of the 4-bit linear layers of a plain or PEFT model."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def digest(codes):
    """Return the sha256 of the codes of a 4-bit weight.

    They depend on nothing but the weight. The constants of double quantization do on the order in which a mean is summed,
    so on the number of threads.
    """
    return hashlib.sha256(codes.cpu().contiguous().numpy()).hexdigest()


_OF_ZEROS = (
    0x77,
    0x00,
)  # two codes a byte of a block of zeros: on a CPU, the code of 0.0; on CUDA, where 0 * inf is no number
BLOCKSIZE = 64  # numbers that share an absmax: what transformers asks of bitsandbytes
_BLOCK = BLOCKSIZE // 2  # bytes of their codes


def as_recorded(codes, recorded):
    """Return the codes of which `recorded` is the digest: `codes`, or these with another code in blocks of zeros; else None.

    A block of 64 zeros has no scale, and bitsandbytes 0.50.2 gives its numbers another code on CUDA than on a CPU. With double
    quantization the scale that is read back is not quite 0, so they do not decode to the same: what training held counts.
    """
    if digest(codes) == recorded:
        return codes
    if codes.numel() % _BLOCK:
        return None
    blocks = codes.reshape(-1, _BLOCK)
    for here in _OF_ZEROS:
        zeros = (blocks == here).all(1)
        for there in range(16) if zeros.any() else ():
            tried = torch.where(zeros[:, None], torch.full_like(blocks, 0x11 * there), blocks).view(codes.shape)
            if digest(tried) == recorded:
                return tried
    return None


def restore_codes(model, recorded):
    """Give blocks of zeros in a plain model the codes that they had where `recorded`, {name: digest}, was made."""
    for name, module in quantized_modules(model).items():
        if hasattr(module, "digest_of_codes"):  # shares.py has done so, when it had the whole weight
            continue
        codes = as_recorded(module.weight.data, recorded[name]) if name in recorded else None
        if codes is not None and codes is not module.weight.data:
            module.weight.data.copy_(codes)


def digests(model):
    """Return {name: digest} of the 4-bit linear layers of a plain model."""
    modules = quantized_modules(model).items()
    return {name: getattr(module, "digest_of_codes", None) or digest(module.weight.data) for name, module in modules}


def cast(model, name):
    """Let a model that was read in bfloat16 compute in the dtype of this name, in place."""
    if name != "bfloat16":
        {"float16": to_float16, "float32": to_float32}[name](model)


def to_float16(model):
    """Compute in float16 from now on, in place: a model that was read in bfloat16. The NF4 codes stay what they are.

    What the architecture keeps in float32 beside float16 gets there: transformers does so only where it loads in float16.

    Raises:
        InputError: a weight is beyond float16; names it.
    """
    in_float32 = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.bfloat16:
            continue
        dtype = torch.float32 if any(one in name for one in in_float32) else torch.float16
        parameter.data = parameter.data.to(dtype)
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise InputError(f"{name} has weights above 65,504, where float16 ends; compute in float32")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype == torch.bfloat16:
                module._buffers[name] = buffer.to(torch.float16)
    for module in quantized_modules(model).values():
        module.compute_dtype = torch.float16
        module.weight.quant_state.dtype = torch.float16
    return model


def to_float32(model):
    """Compute in float32 from now on, in place: exact NF4 values (not rounded to bfloat16), all else upcast.

    dequantize_4bit rounds to `quant_state.dtype`, the dtype W had; in float32 the KL of a faithful merge is 3e-6
    instead of 2e-4 (measured, SmolLM2-135M).
    """
    # transformers refuses its own .float() on a quantized model; codes are uint8 and stay
    model._apply(lambda tensor: upcast(tensor) if tensor.is_floating_point() else tensor)
    for module in quantized_modules(model).values():
        module.compute_dtype = torch.float32
        module.weight.quant_state.dtype = torch.float32
    return model
