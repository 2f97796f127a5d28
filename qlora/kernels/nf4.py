"""Quantize a weight to 4 bit as bitsandbytes does, and dequantize it row by row, fast and in little memory.

On a CPU bitsandbytes 0.50.2 quantizes with several float32 copies of the whole weight and a binary search a number. Here
a piece stays in the cache while it is scaled and compared with the 15 bounds: the same codes, about 15 times as fast.
A GPU has a kernel for it.
"""

from __future__ import annotations

import functools
import threading

import torch

from ..base_model.quantized import BLOCKSIZE

# O out_features, I in_features

_PIECE = 2**18  # numbers in a piece on the CPU: three buffers of a MiB, about a core's cache
_local = threading.local()


class Quantized:
    """A weight (O, I) in 4 bit: codes (O * I / 2, 1) uint8, and `state`, as bitsandbytes keeps them."""

    def __init__(self, codes, state):
        from bitsandbytes.functional import dequantize_blockwise

        self.codes, self.state = codes, state
        self._absmax = state.absmax
        if state.nested:
            self._absmax = dequantize_blockwise(state.absmax, state.state2).float() + state.offset

    def rows(self, start, stop):
        """Return rows start to stop of the weight that the model computes with: float32, not rounded further.

        The rows must begin at a block: (start * I) % 64 == 0.
        """
        from bitsandbytes.functional import QuantState, dequantize_4bit

        num_in, block = self.state.shape[1], self.state.blocksize
        first, last = start * num_in, stop * num_in
        assert first % block == 0, (start, num_in)
        shape = (stop - start, num_in)
        state = QuantState(
            absmax=self._absmax[first // block : -(last // -block)],
            # in blocks where it can be: bitsandbytes 0.50.2 on a CPU begins a block at every row (base_model/checks.py)
            shape=torch.Size(shape if (last - first) % block else ((last - first) // block, block)),
            dtype=torch.float32,  # the state's own dtype, bfloat16, would round every number
            blocksize=block,
            code=self.state.code,
            quant_type=self.state.quant_type,
        )
        return dequantize_4bit(self.codes[first // 2 : -(last // -2)], state).view(shape)


def quantize(W_OI, quant_type="nf4", compress_statistics=True, each=map, memory=None):
    """Return the Quantized weight: the codes and constants of bitsandbytes' quantize_4bit, number for number.

    W_OI: contiguous, in the dtype that is to be quantized. compress_statistics: double quantization. each: how pieces are
    gone through, such as threads.Cores.map. memory: uint8, where the codes may be put.
    Source: QLoRA (arXiv:2305.14314) sec. 3; the codes' equality with bitsandbytes is a test.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    if W_OI.device.type != "cpu" or quant_type != "nf4" or W_OI.numel() % BLOCKSIZE:
        codes, state = quantize_4bit(
            W_OI, blocksize=BLOCKSIZE, compress_statistics=compress_statistics, quant_type=quant_type
        )
        return Quantized(codes, state)
    codes, absmax = _codes(W_OI.reshape(-1), each, memory)
    nested = {}
    if compress_statistics:
        offset = absmax.mean()
        absmax, state2 = quantize_blockwise(absmax - offset, blocksize=256)
        nested = {"offset": offset, "state2": state2}
    code = get_4bit_type("nf4", device="cpu")
    state = QuantState(
        absmax, shape=W_OI.shape, dtype=W_OI.dtype, blocksize=BLOCKSIZE, code=code, quant_type="nf4", **nested
    )
    return Quantized(codes[:, None], state)


def _codes(flat, each, memory):
    """Return (codes, two a byte; absmax float32 of each block) of a flat weight whose length is a multiple of 64."""
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8) if memory is None else memory[: flat.numel() // 2]
    absmax = torch.empty(flat.numel() // BLOCKSIZE)

    def fill(start):
        stop = min(start + _PIECE, flat.numel())
        scaled, above, number = (buffer[: stop - start] for buffer in _buffers())
        blocks = scaled.copy_(flat[start:stop]).view(-1, BLOCKSIZE)
        largest = torch.amax(torch.abs(scaled, out=above).view(-1, BLOCKSIZE), dim=1)
        absmax[start // BLOCKSIZE : stop // BLOCKSIZE] = largest
        blocks.mul_((1.0 / largest.clamp(min=1e-38))[:, None])  # the reciprocal: it rounds as bitsandbytes' kernels do
        number.zero_()
        for bound in _bounds():  # in float32 throughout: a comparison into bool takes five times as long
            number.add_(torch.gt(scaled, bound, out=above))
        pairs = number.to(torch.uint8).view(torch.int16)  # little-endian: the first number is the low byte
        codes[start // 2 : stop // 2] = ((pairs & 0xFF) << 4) | (pairs >> 8)

    for _ in each(fill, range(0, flat.numel(), _PIECE)):
        pass
    return codes, absmax


def _buffers():
    """Return three float32 pieces of this thread; new ones would be cold, and their pages cleared, every time."""
    if not hasattr(_local, "buffers"):
        _local.buffers = [torch.empty(_PIECE) for _ in range(3)]
    return _local.buffers


@functools.cache
def _bounds():
    """Return the 15 numbers halfway between neighbouring codes, as float32 values."""
    from bitsandbytes.functional import get_4bit_type

    code = get_4bit_type("nf4", device="cpu").sort().values
    return ((code[:-1] + code[1:]) / 2).tolist()
