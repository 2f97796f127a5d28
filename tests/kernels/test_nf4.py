"""The 4-bit codes are those of bitsandbytes, bit for bit, and rows read back are those of the whole."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.kernels import nf4


def same(W, **how):
    found = nf4.quantize(W, how.get("quant_type", "nf4"), how.get("compress_statistics", True))
    codes, state = quantize_4bit(W, blocksize=64, **{"quant_type": "nf4", "compress_statistics": True, **how})
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.state.absmax, state.absmax)
    if state.nested:
        assert torch.equal(found.state.offset, state.offset)
        assert torch.equal(found.state.state2.absmax, state.state2.absmax)
    state.dtype = torch.float32
    if not W.numel() % 64:
        state.shape = torch.Size((W.numel() // 64, 64))  # see base_model.checks.refuse_rows_that_are_no_blocks
    whole = dequantize_4bit(codes, state).view(W.shape)
    assert torch.equal(found.rows(0, len(W)), whole)
    return found, whole


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    nested=st.booleans(),
    scale=st.sampled_from([1e-6, 0.02, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_codes_and_constants_are_those_of_bitsandbytes(rows, blocks, dtype, nested, scale, seed):
    W = (torch.randn(rows, 64 * blocks, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    same(W, compress_statistics=nested)


def test_a_weight_of_many_pieces_is_the_same_too():
    W = torch.randn(1000, 704, dtype=torch.bfloat16) * 0.02
    assert W.numel() > 2 * nf4._PIECE
    assert W.numel() % nf4._PIECE
    same(W)


def test_blocks_of_zeros_and_numbers_on_the_bounds_are_the_same():
    bounds = torch.tensor(nf4._bounds())
    near = torch.cat(
        [bounds, bounds.nextafter(torch.tensor(9.0)), bounds.nextafter(torch.tensor(-9.0)), torch.ones(19)]
    )
    same(torch.stack([near, -near, near * 0.37, torch.zeros(64), torch.full((64,), -1e-30)]))


@pytest.mark.parametrize("shape", [(5, 33), (3, 31), (7, 96)])
def test_shapes_that_are_not_made_of_blocks_go_through_bitsandbytes(shape):
    same(torch.randn(shape, dtype=torch.bfloat16))


def test_fp4_is_the_same():
    same(torch.randn(16, 128, dtype=torch.bfloat16), quant_type="fp4")


def test_rows_read_alone_are_the_rows_of_the_whole():
    found, whole = same(torch.randn(64, 96, dtype=torch.bfloat16))
    for start, stop in [(0, 2), (2, 64), (10, 12), (62, 64)]:
        assert torch.equal(found.rows(start, stop), whole[start:stop])


def test_what_training_holds_is_what_export_makes():
    # training goes through Params4bit; the two must agree in everything that the digest is made of
    W = torch.randn(128, 256, dtype=torch.bfloat16)
    trained = Params4bit(W, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    found = nf4.quantize(W)
    assert torch.equal(found.codes, trained.data)
    assert torch.equal(found.state.absmax, trained.quant_state.absmax)


def test_codes_are_the_same_with_any_number_of_threads():
    # the mean of the absmax of so many blocks is summed in parts by as many threads as there are
    W = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            found.append(nf4.quantize(W).codes)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(codes, found[0]) for codes in found)
