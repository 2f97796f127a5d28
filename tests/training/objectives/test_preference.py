"""Losses and gradients of pairs are trl's, however the pairs are batched; the reference is the model before the first step."""

import contextlib
import json
import math
import types
from typing import get_args

import datasets
import pytest
import torch
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOTrainer

from qlora import base_model, data, kernels, methods
from qlora.data.encoder import Settings
from qlora.kernels import attention
from qlora.recipe import Dpo, Lora, Orpo, Quantization
from qlora.recipe.objectives import Loss
from qlora.training.objectives import preference_losses
from qlora.training.objectives.preference import Preference

ROWS = [
    {"prompt": "What is 1 plus 2?", "chosen": "1 plus 2 is 3.", "rejected": "It is 4, I think."},
    {"prompt": "Count to 9, if you would be so kind.", "chosen": "1 2 3 4 5 6 7 8 9", "rejected": "9 8"},
    {"prompt": "Hi", "chosen": "Hello!", "rejected": "What is it that you want of me now, today?"},
]


@pytest.fixture
def pairs(tokenizer):
    encoder = data.Preferences(tokenizer, Settings("auto", None, "assistant", 200, "error", "error"))
    return [encoder.encode(row).examples[0] for row in ROWS]


@pytest.fixture
def adapted(load_model):
    """Return adapted(quantization) -> a PeftModel in float32 whose adapter has been trained before."""

    def adapted(quantization=None):
        model = load_model("llama", quantization)
        base_model.to_float32(model)
        model = methods.attach(model, Lora(r=4))
        train(model, 1)
        return model.train()

    return adapted


def train(model, seed, adapter="default"):
    """Give the adapter the weights that a training might, others with another seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            size = 0.02 if "lora_B" in name else 0.1
            parameter.data = torch.randn(parameter.shape, generator=generator) * size


def batch_of(objective, pairs, reference=None):
    reference = torch.zeros(len(pairs), objective.each) if reference is None else reference
    batch = objective.collate(list(zip(range(len(pairs)), pairs, reference, strict=True)))
    del batch["rows"]
    return batch


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ways(section, tokenizer):
    """Yield (kernels, Preference): padded without kernels, joined with them."""
    yield "off", Preference(section, tokenizer.pad_token_id)
    yield "auto", Preference(section, tokenizer.pad_token_id, joined=True, lean=True)


def trls_rows(pairs):
    found = []
    for pair in pairs:
        row = {}
        for name, one in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            begin = next(at for at, label in enumerate(one.labels) if label >= 0)
            row |= {"prompt_ids": one.input_ids[:begin], f"{name}_ids": one.input_ids[begin : begin + one.num_trained]}
        found.append(row)
    return found


@pytest.mark.parametrize(
    "quantization", [pytest.param(None, marks=pytest.mark.slow), Quantization()], ids=["16-bit", "nf4"]
)
def test_dpo_is_trls(adapted, pairs, tokenizer, tmp_path, quantization):
    smoothed = {"robust": 0.1, "exo_pair": 0.01}
    theirs = adapted(quantization)
    dummy = datasets.Dataset.from_list(ROWS)
    arguments = DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    trainer = DPOTrainer(theirs, args=arguments, train_dataset=dummy, processing_class=tokenizer)
    base_model.to_float32(theirs)  # trl has made the adapters bf16, its copy of it too
    train(theirs, 1, "ref")
    inputs = trainer.data_collator(trls_rows(pairs))
    model = adapted(quantization)
    plain = Preference(Dpo(), tokenizer.pad_token_id)
    with torch.no_grad():  # trl has a copy of the adapter as it is now for that
        reference = plain.log_probabilities(model, batch_of(plain, pairs))[0]
    train(model, 2), train(theirs, 2)
    for name in get_args(Loss):
        section = Dpo(loss_type=name, beta=0.3, label_smoothing=smoothed.get(name, 0.0))
        if name == "sft":  # of one pair: the test below
            continue
        trainer.loss_types, trainer.beta, trainer.label_smoothing = [name], section.beta, section.label_smoothing
        expected = trainer._compute_loss(theirs, dict(inputs), False)
        expected_gradients = gradients(theirs, expected)
        for setting, objective in ways(section, tokenizer):
            with kernels.installed(model, setting) as installed, joined(model, objective, installed):
                loss = objective.loss(model, batch_of(objective, pairs, reference), None)
                found = gradients(model, loss)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
            assert_near(found, expected_gradients)
    metrics = objective.seen.take()
    for key in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        assert metrics[key] == pytest.approx(trainer._metrics["train"][key][-1], rel=1e-4)


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert (value - expected[key]).norm() <= 1e-3 * expected[key].norm(), key


def joined(model, objective, installed):
    attend = attention.within_documents(model, plain=not installed.joined)
    return attend if objective.joined else contextlib.nullcontext()


def test_sft_beside_dpo_is_a_mean_over_pairs_of_trls(adapted, pairs, tokenizer):
    model, section = adapted(), Dpo(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    objective = Preference(section, tokenizer.pad_token_id)
    with torch.no_grad():
        total = sum(objective.loss(model, batch_of(objective, [pair]), None) for pair in pairs) / len(pairs)
        plain = Preference(Dpo(), tokenizer.pad_token_id)
        without = plain.loss(model, batch_of(plain, pairs), None)
        nats = [
            F.cross_entropy(model(torch.tensor([one.input_ids])).logits[0, :-1], torch.tensor(one.labels[1:]))
            for one in data.Answers(pairs)
        ]
    torch.testing.assert_close(total, without + 0.2 * sum(nats) / len(nats))


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["16-bit", "nf4"])
def test_orpo_is_trls_with_the_cross_entropy_of_the_answer(adapted, pairs, tokenizer, quantization):
    section = Orpo(beta=0.5)
    trls = types.SimpleNamespace(beta=section.beta, accelerator=types.SimpleNamespace(device="cpu"))
    model, expected = adapted(quantization), 0.0
    for pair in pairs:
        both = []
        for one in (pair.chosen, pair.rejected):
            logits, labels = model(torch.tensor([one.input_ids])).logits, torch.tensor([one.labels])
            both.append(ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True))
        odds, *_ = ORPOTrainer.odds_ratio_loss(trls, *both)
        expected = expected + (-both[0] - odds).sum() / len(pairs)
    expected_gradients = gradients(model, expected)
    for setting, objective in ways(section, tokenizer):
        with kernels.installed(model, setting) as installed, joined(model, objective, installed):
            loss = objective.loss(model, batch_of(objective, pairs), None)
            assert_near(gradients(model, loss), expected_gradients)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("together", [True, False])
def test_halves_and_micro_batches_are_the_batch(adapted, pairs, tokenizer, together):
    objective = Preference(Dpo(), tokenizer.pad_token_id, joined=together, tokens=1 if together else None)
    model, batch = adapted(), batch_of(objective, pairs, torch.randn(3, 2))
    items = objective.num_items(batch)
    assert int(objective.num_tokens(batch)) == sum(len(pair.input_ids) for pair in pairs)
    with torch.no_grad(), attention.within_documents(model) if together else contextlib.nullcontext():
        whole = objective.loss(model, batch, items)
        halves = objective.halves(batch)
        assert [len(half["reference"]) for half in halves] == [1, 2]
        assert objective.halves(halves[0]) == ()
        torch.testing.assert_close(sum(objective.loss(model, half, items) for half in halves), whole)
        parts = objective.micro_batches(batch, [7, 8, 9])
        assert sorted(number for _, rows in parts for number in rows) == [7, 8, 9]
        assert len(parts) == (3 if together else 1)
        torch.testing.assert_close(sum(objective.loss(model, part, items) for part, _ in parts), whole)


@pytest.mark.parametrize("more", [0, 1, 2, 7, 1000])
def test_a_batch_is_cut_to_a_number_of_tokens(adapted, pairs, tokenizer, more):
    objective = Preference(Dpo(), tokenizer.pad_token_id, joined=True)
    batch, first = batch_of(objective, pairs), len(pairs[0].input_ids)
    found = objective.cut(batch, first + more)
    total = sum(len(pair.input_ids) for pair in pairs)
    assert found["input_ids"].shape[1] == sum(found["segments"]) == (first if more < 2 else min(first + more, total))
    assert len(found["segments"]) == 2 * len(found["reference"])
    model = adapted()
    with attention.within_documents(model):
        assert objective.loss(model, found, None).isfinite()


def test_what_was_seen_is_a_mean_over_pairs_and_comes_back():
    seen = Preference(Dpo(), 0).seen
    assert seen.take() == {}
    seen.add(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[-4.0, -5.0], [-6.0, -7.0]]), torch.ones(2, 2))
    seen.add(
        torch.tensor([[math.nan, 0.0]]), torch.tensor([[-4.0, -5.0]]), torch.ones(1, 2)
    )  # of a step that is skipped
    again = Preference(Dpo(), 0)
    again.seen.sums = seen.sums
    restored = Preference(Dpo(), 0)
    restored.restore(json.loads(json.dumps(again.state())))
    found = restored.seen.take()
    assert found["rewards/chosen"] == 1.5
    assert found["rewards/margins"] == 0.0
    assert found["rewards/accuracies"] == 0.5
    assert found["logps/rejected"] == -6.0
    assert restored.state() is None


def test_orpo_of_answers_that_are_certain_is_finite():
    logps = torch.tensor([[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]], requires_grad=True)
    losses, _ = preference_losses.of(Orpo(), logps, torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.long))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logps.grad.isfinite().all()


def test_only_what_is_compared_with_a_reference_loses_its_dropout(tokenizer):
    for section, left in ((Dpo(), 0.0), (Orpo(), 0.1)):
        dropout = torch.nn.Dropout(0.1)
        objective = Preference(section, tokenizer.pad_token_id)
        objective.without_dropout(torch.nn.Sequential(dropout))
        assert dropout.p == left
