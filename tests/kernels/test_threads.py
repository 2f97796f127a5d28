"""Work by a thread a core: the same results in the same order, and torch as it was afterwards."""

import threading

import pytest
import torch

from qlora.kernels import nf4
from qlora.kernels.threads import Cores


def test_results_come_in_order_from_several_threads_that_compute_alone():
    seen = set()

    def square(number):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return number * number

    before = torch.get_num_threads()
    with Cores("cpu") as cores:
        assert list(cores.map(square, range(100))) == [number * number for number in range(100)]
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert {threads for _, threads in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_no_more_than_a_few_are_made_ahead():
    made = []
    with Cores("cpu") as cores:
        results = cores.map(lambda number: made.append(number) or number, iter(range(1000)))
        assert next(results) == 0
        assert len(made) <= 2 * cores.count + 1


def test_an_error_in_a_thread_is_raised_and_torch_is_as_it_was():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), Cores("cpu") as cores:
        list(cores.map(lambda number: 1 / number, [1, 0]))
    assert torch.get_num_threads() == before


def test_codes_made_by_many_threads_are_the_same():
    W = torch.randn(900, 640, dtype=torch.bfloat16)
    alone = nf4.quantize(W)
    with Cores("cpu") as cores:
        together = nf4.quantize(W, each=cores.map)
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.state.absmax, together.state.absmax)
