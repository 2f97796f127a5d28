"""bitsandbytes' optimizers take the same steps without waiting for the GPU at each parameter."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import optimizer as of_bitsandbytes

from qlora.training.optimizer import without_waits


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("cls", [bitsandbytes.optim.AdamW, bitsandbytes.optim.Lion])
@pytest.mark.parametrize("settings", [{"optim_bits": 8, "is_paged": True}, {"optim_bits": 32}])
def test_the_steps_are_those_of_bitsandbytes_and_do_not_wait(cls, settings, monkeypatch):
    waits = []
    monkeypatch.setattr(of_bitsandbytes, "sync_gpu", waits.append)
    found = []
    for make in (cls, without_waits(cls)):
        generator = torch.Generator().manual_seed(0)
        # in 8 bit, too small for it, without a gradient
        parameters = [torch.nn.Parameter(torch.randn(n, 64, generator=generator)) for n in (128, 2, 4)]
        optimizer, before = make(parameters, lr=1e-2, weight_decay=0.1, **settings), len(waits)
        for _ in range(3):
            for parameter in parameters[:2]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        found.append((parameters, optimizer.state_dict()["state"].keys(), len(waits) - before))
    (theirs, their_states, their_waits), (ours, our_states, our_waits) = found
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert their_states == our_states
    assert their_waits >= 6  # as long as bitsandbytes waits: else `without_waits` can go
    assert our_waits == 0


def test_another_optimizer_is_left_as_it_is():
    assert without_waits(torch.optim.AdamW) is torch.optim.AdamW
