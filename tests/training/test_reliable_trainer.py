"""Reliability is a part of any Trainer: a plain one of a classifier, and trl's DPOTrainer."""

import copy
import math

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from qlora.recipe import Lora
from qlora.runs.checkpoints import Checkpoints
from qlora.runs.record import Begun, CheckpointSaved, Evaluation, Rehearsed, Rescaled, Skipped, Step
from qlora.system.errors import Interrupted, TrainingFailed
from qlora.system.events import Note, heard_by
from qlora.system.signals import Stop
from qlora.training import loss_scale
from qlora.training.objectives import Objective
from qlora.training.reliability import Reliability
from qlora.training.reliable_trainer import Reliable
from qlora.training.saving import Saving

ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 0.5,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "remove_unused_columns": False,
    "optim": "adamw_torch",
    "prediction_loss_only": True,
}


class Rows(Objective):
    """A loss that is a mean over rows, and is the Trainer's own."""

    def num_items(self, inputs):
        return torch.tensor(len(inputs["input_ids"]))

    def num_tokens(self, inputs):
        return inputs["attention_mask"].sum()

    def lengths(self, inputs):
        return inputs["attention_mask"].sum(1).tolist()


class Pairs(Rows):
    def num_items(self, inputs):
        return torch.tensor(len(inputs["input_ids"]) // 2)

    def metrics(self, logs):
        return {"margin": logs["rewards/margins"]} if "rewards/margins" in logs else {}


class Plain(Reliable, transformers.Trainer):
    pass


class Preference(Reliable, DPOTrainer):
    pass


def rows_of(count):
    return [{"input_ids": [5 + (i * j) % 40 for j in range(1, 4 + i % 5)], "labels": i % 2} for i in range(count)]


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    masks = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(masks),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "rows": [row["number"] for row in rows],
    }


@pytest.fixture(scope="module")
def classifier():
    """A tiny Llama with a head of two classes, in bf16, with LoRA and dropout."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).bfloat16()
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.trained_by = Lora(r=4)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.fixture
def fit(classifier, tmp_path):
    """Return fit(name, poisoned=(), resume=None, stop_in=None, half=False, reliability={}) -> ({name: weight}, events) of a
    training; half: in float16."""

    def fit(name, poisoned=(), resume=None, stop_in=None, half=False, **reliability):
        model = copy.deepcopy(classifier)
        model = model.half() if half else model
        train = [row | {"number": i} for i, row in enumerate(rows_of(16))]
        held_out = [row | {"number": i} for i, row in enumerate(rows_of(5))]
        stop, events = Stop(), []

        def forward(module, args, kwargs, output):
            if module.training and trainer.begun and trainer.state.global_step + 1 in poisoned:
                output.loss = output.loss * math.nan
            return output

        def listen(event):
            events.append(event)
            if isinstance(event, Step | Skipped | Rescaled) and event.step == stop_in:
                stop.number = 15

        saving = Saving(Checkpoints(tmp_path / name, name), every=2, limit=None, resume=resume, stop=stop)
        torch.manual_seed(1)
        trainer = Plain(
            model,
            Rows(),
            Reliability(lengths=[len(row["input_ids"]) for row in train], saving=saving, **reliability),
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path / "out"),
                per_device_eval_batch_size=3,
                eval_strategy="steps",
                eval_steps=3,
                **ARGUMENTS,
            ),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collate,
        )
        model.get_base_model().register_forward_hook(forward, with_kwargs=True)
        with heard_by(listen):
            trainer.result = interrupted(trainer.fit) if stop_in else trainer.fit()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, events, trainer

    return fit


def interrupted(fit):
    with pytest.raises(Interrupted):
        fit()


def of_kind(events, *kinds):
    return [event for event in events if isinstance(event, kinds)]


def computed(events):
    """Return what was computed, without what was measured."""
    return [
        {key: value for key, value in vars(event).items() if key not in ("time", "tokens_per_second", "memory_bytes")}
        for event in of_kind(events, Step, Evaluation, Skipped, Rescaled)
    ]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_plain_trainer_tells_its_steps_and_saves(fit, tmp_path):
    _, events, trainer = fit("plain")
    assert [type(event) for event in events if not isinstance(event, Note)][:2] == [Rehearsed, Begun]
    assert [event.step for event in of_kind(events, Step)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in of_kind(events, CheckpointSaved)] == [2, 4, 6]
    assert [event.step for event in of_kind(events, Evaluation)] == [3, 6]
    rates = [event.learning_rate for event in of_kind(events, Step)]
    assert rates[:4] == pytest.approx([1e-2 / 4, 2e-2 / 4, 3e-2 / 4, 1e-2])
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["step-2", "step-4", "step-6"]
    assert all(parameter.dtype == torch.float32 for parameter in trainer.trained.masters.masters)


def test_its_held_out_loss_is_the_mean_over_rows_whatever_the_batches(fit):
    _, _, trainer = fit("plain")
    model, losses = trainer.model.eval(), []
    for number, row in enumerate(rows_of(5)):
        batch = collate([row | {"number": number}])
        del batch["rows"]
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    # bf16 logits differ in their last digit (2**-8) by how a batch is padded
    assert trainer.result[1] == pytest.approx(sum(losses) / 5, rel=2e-2)


def test_the_rehearsal_of_a_plain_trainer_leaves_no_trace(fit):
    one, events, _ = fit("one")
    other, without, _ = fit("other", rehearse=False)
    assert of_kind(events, Rehearsed)
    assert not of_kind(without, Rehearsed)
    assert computed(events) == computed(without)
    assert_same(one, other)


def test_a_poisoned_step_is_skipped_and_its_rows_are_named(fit, tmp_path):
    weights, events, _ = fit("poisoned", poisoned={3})
    (skipped,) = of_kind(events, Skipped)
    assert skipped.step == 3
    assert "the loss is nan with training rows " in skipped.not_taken
    assert len(skipped.rows) == 4
    assert [event.step for event in of_kind(events, Step)] == [1, 2, 4, 5, 6]
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    with pytest.raises(TrainingFailed, match="3 consecutive steps"):
        fit("hopeless", poisoned=range(9))


def test_a_plain_trainer_that_is_stopped_and_resumed_is_the_one_that_was_not(fit, tmp_path):
    whole, expected, _ = fit("whole", poisoned={2, 5})
    _, first, _ = fit("stopped", poisoned={2, 5}, stop_in=3)
    assert [event.step for event in of_kind(first, CheckpointSaved)][-1] == 3
    resumed, second, _ = fit("stopped", poisoned={2, 5}, resume=tmp_path / "stopped" / "step-3")
    (begun,) = of_kind(second, Begun)
    assert (begun.step, begun.total_steps) == (3, 6)
    assert computed(first)[: begun.lines] + computed(second) == computed(expected)
    assert_same(whole, resumed)
    other, _, _ = fit("other", poisoned={5})
    assert any(not torch.equal(other[name], whole[name]) for name in whole)


def test_in_float16_a_stopped_run_goes_on_with_the_loss_scale_that_it_had(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**22)  # in an fp16 loss: inf, until it is below 2**16
    monkeypatch.setattr(loss_scale, "BACKOFF", 2.0**-4)
    monkeypatch.setattr(loss_scale, "INTERVAL", 2)
    whole, expected, trainer = fit("whole", half=True, poisoned={5})
    assert [(event.step, event.loss_scale) for event in of_kind(expected, Rescaled)] == [(1, 2.0**18), (2, 2.0**14)]
    assert [event.step for event in of_kind(expected, Skipped)] == [5]
    assert [event.metrics["loss_scale"] for event in of_kind(expected, Step)] == [2.0**14, 2.0**15, 2.0**15]
    for stop in (1, 4):
        _, first, _ = fit(f"stopped{stop}", half=True, poisoned={5}, stop_in=stop)
        resumed, second, other = fit(
            f"stopped{stop}", half=True, poisoned={5}, resume=tmp_path / f"stopped{stop}" / f"step-{stop}"
        )
        (begun,) = of_kind(second, Begun)
        assert computed(first)[: begun.lines] + computed(second) == computed(expected)
        assert_same(whole, resumed)
        assert other.result == trainer.result


def test_a_run_that_overflowed_in_float16_has_its_mean_loss_when_it_goes_on_in_another_dtype(
    fit, tmp_path, monkeypatch
):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**22)
    monkeypatch.setattr(loss_scale, "BACKOFF", 2.0**-4)
    _, first, _ = fit("half", half=True, stop_in=3)
    assert len(of_kind(first, Rescaled)) == 2
    _, second, trainer = fit("half", resume=tmp_path / "half" / "step-3")
    losses = [event.loss for event in of_kind(first + second, Step)]
    assert len(losses) == 4
    assert trainer.result[0] == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.fixture
def prefer(load_model, tokenizer, tmp_path):
    """Return prefer(name, resume=None, stop_in=None) -> ({name: weight}, events) of a DPO training of six pairs."""

    def prefer(name, resume=None, stop_in=None):
        model = load_model("llama", None)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.trained_by = Lora(r=4)
        pairs = Dataset.from_list(
            [{"prompt": f"What is {n}?", "chosen": f" {n} it is.", "rejected": " No, no."} for n in range(6)]
        )
        stop, events = Stop(), []

        def listen(event):
            events.append(event)
            if isinstance(event, Step) and event.step == stop_in:
                stop.number = 15

        saving = Saving(Checkpoints(tmp_path / name, name), resume=resume, stop=stop)
        settings = {**ARGUMENTS, "max_steps": 4, "gradient_accumulation_steps": 1}
        trainer = Preference(
            model,
            Pairs(),
            Reliability(lengths=[8] * 6, saving=saving),
            args=DPOConfig(output_dir=str(tmp_path / "out"), bf16=False, gradient_checkpointing=False, **settings),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        with heard_by(listen):
            interrupted(trainer.fit) if stop_in else trainer.fit()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, events

    return prefer


def test_trls_preference_trainer_is_reliable_too(prefer, tmp_path):
    whole, expected = prefer("whole")
    _, first = prefer("stopped", stop_in=1)
    resumed, second = prefer("stopped", resume=tmp_path / "stopped" / "step-2")
    assert computed(first) + computed(second) == computed(expected)
    assert computed(expected)[0]["loss"] == pytest.approx(math.log(2), rel=1e-3)  # nothing has moved yet
    assert computed(expected)[0]["metrics"].keys() == {"margin"}
    assert_same(whole, resumed)
