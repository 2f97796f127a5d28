"""Rows of new tokens against PEFT's own layer, which makes a copy of the whole table and a gradient of it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora import kernels, methods
from qlora.kernels import loss
from qlora.methods import token_rows
from qlora.recipe import Lora, Quantization
from qlora.training.objectives import supervised

IDS = [500, 3, 7]  # in no order; 3 and 7 stand in the rows below, 500 does not
ROW = [1, 3, 9, 7, 3, 11, 2, 3]
FAMILIES = ["llama", "llama-tied", "gemma"]  # Gemma multiplies its embeddings
FLOAT32 = Quantization(compute_dtype="float32")


def attached(load_model, family, quantization, rows=True):
    with pytest.MonkeyPatch.context() as patch:
        if not rows:
            patch.setattr(token_rows, "install", lambda model: None)
        model = methods.attach(load_model(family, quantization), Lora(r=4), token_ids=IDS)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
    return model.train()


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, lean=False, setting="off"):
    """Return (loss, {name: gradient}) of one backward pass."""
    inputs = {"input_ids": torch.tensor([ROW, ROW[::-1]]), "labels": torch.tensor([ROW, ROW[::-1]])}
    with kernels.installed(model, setting) as found:
        assert found.loss or not lean
        total = supervised.loss_of_trained_positions(model, inputs, torch.tensor(14), lean)
        total.backward()
    gradients = {name: parameter.grad for name, parameter in trained(model).items()}
    model.zero_grad()
    return total.detach(), gradients


def distance(one, other):
    return sum((one[name].float() - other[name].float()).square().sum() for name in one).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_pefts_layer(load_model, family):
    ways = [{}] if family == "gemma" else [{}, {"lean": True, "setting": "auto"}]
    exact, gradients = step(attached(load_model, family, FLOAT32, rows=False))
    model = attached(load_model, family, FLOAT32)
    for way in ways:
        found, ours = step(model, **way)
        torch.testing.assert_close(found, exact, atol=0, rtol=1e-5)
        assert ours.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    # in bfloat16 both are rounded, neither more than the other
    peft, of_peft = step(attached(load_model, family, Quantization(), rows=False))
    model = attached(load_model, family, Quantization())
    for way in ways:
        found, ours = step(model, **way)
        torch.testing.assert_close(found, peft, atol=0, rtol=1e-2)
        assert distance(ours, gradients) <= 1.2 * distance(of_peft, gradients)


class Tables(TorchDispatchMode):
    """Counts tensors of the shape of the whole table that operations make; views of the table are none."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        aliases = any(one.alias_info is not None for one in function._schema.returns)
        self.made += isinstance(found, torch.Tensor) and found.shape == self.shape and not aliases
        return found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_table_is_copied_and_none_gets_a_gradient(load_model, family):
    for rows in (True, False):
        model = attached(load_model, family, Quantization(), rows)
        with Tables(model.get_input_embeddings().original_module.weight.shape) as tables:
            step(model, lean=rows and family != "gemma", setting="auto" if rows else "off")
        assert (tables.made == 0) == rows


def test_the_loss_of_a_head_without_a_hidden_gradient_is_that_of_its_logits(load_model):
    model = attached(load_model, "llama", FLOAT32).eval()
    head, hidden, targets = model.get_output_embeddings(), torch.randn(100, 64), torch.arange(100)
    with torch.no_grad():
        found = loss.cross_entropy(hidden, head, targets)
        torch.testing.assert_close(
            found, torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum"), atol=0, rtol=1e-5
        )


def test_without_the_adapter_the_base_computes(load_model):
    base, model = load_model("llama"), attached(load_model, "llama", Quantization()).eval()
    ids = torch.tensor([ROW])
    with torch.no_grad():
        with_rows = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
        assert torch.equal(model(input_ids=ids).logits, with_rows)
    assert not torch.equal(with_rows, base(input_ids=ids).logits)
