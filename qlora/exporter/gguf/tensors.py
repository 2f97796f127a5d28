"""A tensor of a model folder as llama.cpp stores it: its row order, its orientation, its type."""

from __future__ import annotations

import math

import torch

from ...system.errors import InputError


def is_conv1d(name, architecture):
    return architecture.conv1d and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def as_llama_cpp(name, tensor, config, architecture):
    """Return the tensor `name` as llama.cpp wants it: its row order, its orientation, its zero."""
    if is_conv1d(name, architecture):
        return tensor.T
    if architecture.norms_from_zero and name.endswith("norm.weight"):
        return tensor.float() + 1
    if architecture.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
        return permuted(tensor, config.num_attention_heads)
    if architecture.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
        return permuted(tensor, config.num_key_value_heads)
    return tensor


def permuted(tensor, num_heads):
    """Return the rows of each head interleaved: transformers rotates row i with row i + half, llama.cpp neighbours."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def stored_as(new_name, shape, kind):
    """Return the GGML type: llama.cpp wants what is one-dimensional, and positions, in float32; q8_0 has blocks of 32."""
    import gguf

    if len(shape) == 1 or new_name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32 == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def stored(name, tensor, dtype):
    """Return the bytes of `tensor` as GGML type `dtype`, made a few rows at a time: float32 of all would be twice the file."""
    import gguf
    import numpy as np

    limit = 65504 if dtype == gguf.GGMLQuantizationType.F16 else torch.finfo(torch.float32).max
    result, step = None, max(1, 2**22 // tensor[0].numel())
    for start in range(0, len(tensor), step):
        rows = tensor[start : start + step].float().contiguous()
        largest = rows.abs().max().item()
        if not largest <= limit:
            raise InputError(f"{name} contains {largest:.3g}, which overflows {dtype.name.lower()}; choose --gguf q8_0")
        part = gguf.quants.quantize(rows.numpy(), dtype)
        if result is None:
            result = np.empty((len(tensor), *part.shape[1:]), part.dtype)
        result[start : start + step] = part
    return result


def numpy_dtype(dtype):
    import numpy as np

    return {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "Q8_0": np.dtype(np.uint8)}[dtype.name]


def num_bytes(shape, dtype):
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[dtype]
    return math.prod(shape) // block * size
