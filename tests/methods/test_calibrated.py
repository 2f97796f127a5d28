"""CorDA and LoRA-GA: starts that are made of training rows, on 16-bit and on 4-bit bases."""

import pytest
import torch

from qlora import base_model, methods
from qlora.data import IGNORE_INDEX, Example
from qlora.methods import calibrated
from qlora.recipe import Lora
from qlora.system.errors import InputError
from tests.conftest import CONVERSATIONS, encode, messages

IDS = [number * 7 % 509 + 1 for number in range(200)]
ROW = Example(IDS, [IGNORE_INDEX] * 20 + IDS[20:])


def layers(model):
    found = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model."): layer for name, layer in found.items()}


def halves(layer):
    """Return (A, A0, B, B0) of a layer as it was made: each trained half is what the other holds fixed."""
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    rank = len(A) // 2
    assert torch.equal(A[:rank], A[rank:])
    assert torch.equal(B[:, :rank], -B[:, rank:])
    return A[:rank], A[rank:], B[:, :rank], -B[:, rank:]


def in_float32(load_model, family):
    return base_model.to_float32(load_model(family, None)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corda_splits_off_what_counts_for_the_inputs(load_model, family):
    # PEFT 0.21's own needs a package that it does not ask for: from attr import dataclass
    model = methods.attach(
        in_float32(load_model, family), Lora(r=4, lora_alpha=6, init_lora_weights="corda"), examples=[ROW]
    )
    base, seen = in_float32(load_model, family), {}
    for name in layers(model):
        base.get_submodule(name).register_forward_pre_hook(lambda module, x, name=name: seen.update({name: x[0][0]}))
    with torch.no_grad():
        base(input_ids=torch.tensor([IDS]))
    for name, layer in layers(model).items():
        W = base.get_submodule(name).weight.detach()
        W, C = W.T if family == "gpt2" else W, seen[name].T @ seen[name] / len(IDS)
        C += 0.01 * C.diagonal().mean() * torch.eye(len(C))
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        expected = U[:, :4] * S[:4] @ Vh[:4] @ torch.linalg.inv(C)
        _, A0, _, B0 = halves(layer)
        assert (layer.scaling["default"] * B0 @ A0 - expected).norm() < 1e-3 * expected.norm()
        # it loses less of what the layer computes than the main part of W alone
        U, S, Vh = torch.linalg.svd(W)
        lost = [((W - part) @ C).norm() for part in (expected, U[:, :4] * S[:4] @ Vh[:4])]
        assert lost[0] < lost[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_ga_is_made_of_the_gradients_of_the_weights(load_model, family, monkeypatch):
    monkeypatch.setattr(calibrated, "_BYTES", 4 * 64 * 256)  # several passes
    model = methods.attach(in_float32(load_model, family), Lora(r=4, init_lora_weights="lora_ga"), examples=[ROW])
    base = in_float32(load_model, family).requires_grad_(True)
    base(input_ids=torch.tensor([ROW.input_ids]), labels=torch.tensor([ROW.labels])).loss.backward()
    for name, layer in layers(model).items():
        _, A0, _, B0 = halves(layer)
        gradient = base.get_parameter(f"{name}.weight").grad
        U, _, Vh = torch.linalg.svd(gradient.T if family == "gpt2" else gradient)
        size = len(U) ** 0.25 / 4
        for found, singular in ((A0, Vh[:4]), (B0.T, U[:, 4:8].T)):
            torch.testing.assert_close(found.norm(dim=1), torch.full((4,), size))
            # the same space: all of the found vectors' length lies in it
            torch.testing.assert_close((found @ singular.T).norm(dim=1), found.norm(dim=1), atol=1e-2, rtol=2e-2)


MORE = [{"use_dora": True}, {"modules_to_save": ["lm_head"]}]


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
@pytest.mark.parametrize("section", [{}, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)], ids=str)
def test_on_4_bits_it_starts_as_the_base_and_twice_the_same(load_model, tokenizer, start, section):
    examples = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS]
    section, ids = Lora(r=4, init_lora_weights=start, **section), torch.tensor([IDS])
    one, other = (methods.attach(load_model("llama"), section, examples=examples) for _ in range(2))
    numbers = dict(other.named_parameters())
    assert all(torch.equal(parameter, numbers[name]) for name, parameter in one.named_parameters())
    assert all(parameter.grad is None for parameter in one.parameters())
    with torch.no_grad():
        base = load_model("llama")(input_ids=ids).logits
        assert (one.eval()(input_ids=ids).logits - base).norm() < 2e-2 * base.norm()
    for layer in layers(one).values():
        A, _, B, _ = halves(layer)
        assert A.norm() > 0.1
        assert B.norm() > 0.1
    assert methods.trainable(one).held


@pytest.mark.parametrize(
    ("start", "rank", "examples", "said"),
    [
        ("corda", 4, [Example(IDS, [IGNORE_INDEX] * len(IDS))], "corda: no row has a trained token to read"),
        ("lora_ga", 4, [], "lora_ga: no row has a trained token to read"),
        ("lora_ga", 33, [ROW], r"lora.r: 33 \(LoRA-GA takes twice that\) is above the smaller side"),
    ],
)
def test_what_cannot_be_read_is_refused(load_model, start, rank, examples, said):
    with pytest.raises(InputError, match=said):
        methods.attach(load_model("llama"), Lora(r=rank, init_lora_weights=start), examples=examples)
