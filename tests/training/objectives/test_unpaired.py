"""The loss of unpaired answers is trl's with the whole step as one micro-batch, however the rows are split here."""

import datasets
import pytest
import torch
from trl import KTOConfig, KTOTrainer

from qlora import base_model, data, kernels
from qlora.data.encoder import Settings
from qlora.recipe import Kto, Quantization
from qlora.training.objectives.unpaired import SeenUnpaired, UnpairedPreference
from tests.training.objectives.test_preference import adapted, assert_near, batch_of, gradients, joined, train

__all__ = ["adapted"]  # a fixture

ROWS = [
    {"prompt": "What is 1 plus 2?", "completion": "1 plus 2 is 3.", "label": True},
    {"prompt": "Count to 9, if you would be so kind.", "completion": "9 8", "label": False},
    {"prompt": "Hi", "completion": "What is it that you want of me now, today?", "label": False},
    {"prompt": "Good day to you", "completion": "Hello!", "label": True},
]


@pytest.fixture
def rows(tokenizer):
    encoder = data.UnpairedPreferences(tokenizer, Settings("auto", None, "assistant", 200, "error", "error"))
    return [encoder.encode(row).examples[0] for row in ROWS]


def parted(one):
    begin = next(at for at, label in enumerate(one.labels) if label >= 0)
    return one.input_ids[:begin], one.input_ids[begin : begin + one.num_trained]


def mismatched_of(rows):
    """Each prompt with the answer before it, as trl has it."""
    found = []
    for row, before in zip(rows, rows[-1:] + rows[:-1], strict=True):
        (prompt, _), (_, answer) = parted(row), parted(before)
        labels = [data.IGNORE_INDEX] * len(prompt) + answer
        found.append(data.Unpaired(data.Example(prompt + answer, labels), False))
    return found


def ways(section, tokenizer):
    yield "off", UnpairedPreference(section, tokenizer.pad_token_id)
    yield "auto", UnpairedPreference(section, tokenizer.pad_token_id, joined=True, lean=True)


@pytest.mark.parametrize(
    "quantization", [pytest.param(None, marks=pytest.mark.slow), Quantization()], ids=["16-bit", "nf4"]
)
def test_kto_is_trls(adapted, rows, tokenizer, tmp_path, quantization):
    theirs = adapted(quantization)
    arguments = KTOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4,
    )  # fmt: skip
    dummy = datasets.Dataset.from_list(ROWS)
    trainer = KTOTrainer(theirs, args=arguments, train_dataset=dummy, processing_class=tokenizer)
    base_model.to_float32(theirs)
    train(theirs, 2, "ref")
    of_trl = [
        {"prompt_ids": parted(one)[0], "completion_ids": parted(one)[1], "KL_completion_ids": parted(other)[1],
         "label": one.good}
        for one, other in zip(rows, rows[-1:] + rows[:-1], strict=True)
    ]  # fmt: skip
    inputs = trainer.data_collator(of_trl)
    model, mismatched = adapted(quantization), mismatched_of(rows)
    train(model, 2)
    plain = UnpairedPreference(Kto(), tokenizer.pad_token_id)
    with torch.no_grad():
        reference = plain.log_probabilities(model, batch_of(plain, rows))[0]
        of_mismatched = plain.log_probabilities(model, batch_of(plain, mismatched))[0]
    train(model, 1), train(theirs, 1)
    distances = []
    for name in ("kto", "apo_zero_unpaired"):
        section = Kto(loss_type=name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
        trainer.loss_type, trainer.beta = name, section.beta
        trainer.calculate_KL = name == "kto"
        trainer.desirable_weight, trainer.undesirable_weight = 1.5, 0.5
        expected = trainer._compute_loss(theirs, dict(inputs), False).mean()
        expected_gradients = gradients(theirs, expected)
        for setting, objective in ways(section, tokenizer):
            with kernels.installed(model, setting) as installed, joined(model, objective, installed):
                batch = batch_of(objective, rows, reference)
                if name == "kto":
                    with torch.no_grad():
                        ratios = objective._summed_ratios(model, batch_of(objective, mismatched, of_mismatched))
                    batch["kl"] = torch.full((4,), max(0.0, float(ratios) / 4))
                    distances.append(float(batch["kl"][0]))
                loss = objective.loss(model, batch, None)
                found = gradients(model, loss)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
            assert_near(found, expected_gradients)
    assert min(distances) > 0.01
    metrics = objective.seen.take()
    for key in ("rewards/chosen", "rewards/rejected"):
        assert metrics[key] == pytest.approx(trainer._metrics["train"][key][-1], rel=1e-4)
    assert trainer._metrics["train"]["kl"][0] == pytest.approx(distances[0], rel=1e-4)


@pytest.mark.parametrize("together", [True, False], ids=["joined", "padded"])
def test_halves_and_micro_batches_are_the_batch(adapted, rows, tokenizer, together):
    model = adapted()
    section = Kto(undesirable_weight=0.5)
    objective = UnpairedPreference(
        section, tokenizer.pad_token_id, joined=together, lean=together, tokens=60 if together else None
    )
    with kernels.installed(model, "auto" if together else "off") as installed, joined(model, objective, installed):
        batch = {
            **batch_of(objective, rows, torch.tensor([[-9.0], [-8.0], [-20.0], [-7.0]])),
            "kl": torch.full((4,), 0.2),
        }
        whole = gradients(model, objective.loss(model, batch, None))
        parts = (
            [part for part, _ in objective.micro_batches(batch, [0, 1, 2, 3])] if together else objective.halves(batch)
        )
        assert len(parts) > 1
        split = gradients(model, sum(objective.loss(model, part, 4) for part in parts))
    assert_near(split, whole)


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_batch_is_cut_to_a_number_of_tokens(adapted, rows, tokenizer, more):
    objective = UnpairedPreference(Kto(), tokenizer.pad_token_id, joined=True)
    batch = batch_of(objective, rows)
    tokens = sum(len(one.input_ids) for one in rows[:2]) + more
    cut = objective.cut(batch, tokens)
    assert sum(cut["segments"]) == cut["input_ids"].shape[1] == tokens
    assert len(cut["good"]) == len(cut["kl"]) == len(cut["reference"]) == len(cut["segments"]) == 2 + bool(more)


def test_what_was_seen_is_a_mean_over_each_kind():
    seen = SeenUnpaired()
    good = torch.tensor([True, False, True])
    seen.add(
        torch.tensor([1.0, 3.0, 2.0]),
        torch.tensor([-4.0, -5.0, -6.0]),
        torch.tensor([2, 7, 3]),
        good,
        torch.full((3,), 0.5),
    )
    assert seen.chosen_nats() == 2.0
    seen.add(
        torch.tensor([float("nan")]), torch.tensor([-1.0]), torch.tensor([1]), torch.tensor([True]), torch.tensor([9.0])
    )
    seen.add(
        torch.tensor([9.0]), torch.tensor([-1.0]), torch.tensor([1]), torch.tensor([True]), torch.tensor([float("nan")])
    )
    assert seen.take() == {
        "rewards/chosen": 1.5, "logps/chosen": -5.0, "rewards/rejected": 3.0, "logps/rejected": -5.0,
        "rewards/margins": -1.5, "kl": 0.5,
    }  # fmt: skip
    seen.add(torch.tensor([1.0]), torch.tensor([-4.0]), torch.tensor([2]), torch.tensor([True]), torch.tensor([0.0]))
    assert seen.take() == {"rewards/chosen": 1.0, "logps/chosen": -4.0, "kl": 0.0}
    assert seen.take() == {}


def test_a_step_without_good_answers_is_not_watched():
    seen = SeenUnpaired()
    seen.add(torch.tensor([1.0]), torch.tensor([-4.0]), torch.tensor([2]), torch.tensor([False]), torch.tensor([0.0]))
    assert seen.chosen_nats() is None
