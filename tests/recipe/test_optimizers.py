"""What the table says of an optimizer is what the libraries make."""

import pytest
import torch
import transformers

from qlora.recipe import Training
from qlora.recipe.optimizers import DEFAULT, OPTIMIZERS


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_what_the_table_says(name, tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), optim=name, use_cpu=True, report_to="none")
    make, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter], **settings)
    optimizer.step()
    states = [
        tensor
        for tensor in optimizer.state[parameter].values()
        if torch.is_tensor(tensor) and tensor.numel() == 64 * 128
    ]
    assert len(states) == OPTIMIZERS[name].states
    assert {8 * tensor.element_size() for tensor in states} == {OPTIMIZERS[name].bits}
    assert getattr(optimizer, "is_paged", False) == OPTIMIZERS[name].paged


def test_the_default_is_paged_with_states_in_8_bits():
    assert Training().optim == DEFAULT
    assert (OPTIMIZERS[DEFAULT].bits, OPTIMIZERS[DEFAULT].paged) == (8, True)
