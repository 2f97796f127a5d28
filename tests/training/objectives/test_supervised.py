"""The supervised loss is the mean over trained tokens, however rows are batched, and is trl's own."""

import dataclasses
import pickle

import pytest
import torch
from trl import SFTTrainer

from qlora import base_model
from qlora.data import Batches, pack
from qlora.evaluation import metrics
from qlora.recipe import Adalora, Lora
from qlora.training.objectives import supervised
from tests.conftest import CONVERSATIONS, encode, messages, some_slow
from tests.training.conftest import UNEVEN, records


@pytest.mark.parametrize("family", some_slow(["llama", "gpt2"], ["gpt2"]))
def test_sixteen_times_one_is_one_times_sixteen(fit, family):
    # Exact in real arithmetic; in float32 the sums differ by their order. Rows are padded in one case and not in the
    # other. Gradients are compared by their norm: Adam's first step is lr * sign(gradient), which hides their size.
    many = fit(UNEVEN, family, float32=True, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    one = fit(UNEVEN, family, float32=True, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    a, b = records(many[2])[0], records(one[2])[0]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert a["tokens"] == b["tokens"]


def test_the_logged_loss_is_the_mean_over_trained_tokens(fit, load_model, tokenizer):
    _, _, run = fit(UNEVEN, float32=True, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    model = base_model.to_float32(load_model("llama"))
    total, count, means = 0.0, 0, []
    for turns in UNEVEN:
        example = encode(tokenizer, messages(turns))
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        loss = model(input_ids=ids, labels=labels).loss.item()
        total, count = total + loss * example.num_trained, count + example.num_trained
        means.append(loss)
    assert records(run)[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    assert abs(sum(means) / len(means) / (total / count) - 1) > 1e-3  # the mean of means is another number


SPLIT = [(7, 2), (9, 8), (5, 5), (3, 8), (1, 4), (8, 7)]  # rows, rows a batch


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("num_rows", "batch_size"), some_slow(SPLIT, but=[(7, 2), (1, 4)]))
def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(fit, tokenizer, num_rows, batch_size, joined):
    rows = UNEVEN[:num_rows]
    train = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS]
    packs = pack(train, 150) if joined else None
    model, result, run = fit(
        held_out=rows, float32=True, per_device_eval_batch_size=batch_size, batches=packs, eval_steps=1
    )
    examples = [encode(tokenizer, messages(turns)) for turns in rows]
    nats, tokens = map(sum, zip(*metrics.losses(model.eval(), examples), strict=True))
    expected = nats / tokens
    assert result.eval_loss == pytest.approx(expected, rel=1e-4)
    logged = [record["eval_loss"] for record in records(run) if "eval_loss" in record]
    assert logged == pytest.approx([expected] * len(logged), rel=1e-4)
    assert logged


def test_the_loss_on_the_cpu_is_trls_own(fit, monkeypatch):
    ours = fit(UNEVEN, max_steps=3, float32=True, per_device_train_batch_size=4)
    monkeypatch.setattr(supervised.Trainer, "compute_loss", SFTTrainer.compute_loss)
    theirs = fit(UNEVEN, max_steps=3, float32=True, per_device_train_batch_size=4)
    for a, b in zip(records(ours[2]), records(theirs[2]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


ADALORA = Adalora(lora_alpha=64, init_r=6, target_r=3, tinit=1, tfinal=2)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        pytest.param("llama", ADALORA, marks=pytest.mark.slow),
        ("llama", Lora(r=4, use_dora=True, modules_to_save=["embed_tokens", "lm_head"])),
        ("llama-tied", Lora(r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        pytest.param("phi", Lora(r=4, bias="all", modules_to_save=["lm_head"]), marks=pytest.mark.slow),
        ("mixtral", Lora(r=4)),  # with the loss that keeps experts in balance
    ],
)
def test_every_kind_has_the_gradients_of_trls_own_loss(fit, monkeypatch, family, lora):
    settings = {"family": family, "lora": lora, "max_steps": 4, "float32": True, "per_device_train_batch_size": 4}
    ours = fit(UNEVEN, **settings)
    monkeypatch.setattr(supervised.Trainer, "compute_loss", SFTTrainer.compute_loss)
    theirs = fit(UNEVEN, **settings)
    for a, b in zip(records(ours[2]), records(theirs[2]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_padding_is_not_counted_as_tokens(fit, tokenizer):
    _, result, _ = fit(UNEVEN, num_train_epochs=1.0, max_steps=None, per_device_train_batch_size=4)
    assert result.tokens == sum(len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN)
    assert dataclasses.asdict(result)["steps"] == 4


def test_micro_batches_by_tokens_take_the_steps_of_micro_batches_by_rows(fit, tokenizer):
    # one step over all rows is the same step, whatever micro-batches they come in
    examples = [encode(tokenizer, messages(turns)) for turns in UNEVEN]
    batches = Batches(examples, [len(e.input_ids) for e in examples], 256, seed=0)
    assert 1 < len(batches) < len(UNEVEN)
    by_rows = fit(UNEVEN, float32=True, per_device_train_batch_size=16)
    by_tokens = fit(UNEVEN, float32=True, gradient_accumulation_steps=len(batches), batches=batches)
    a, b = records(by_rows[2])[0], records(by_tokens[2])[0]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize("family", some_slow(["llama", "gpt2"], ["gpt2"]))
def test_a_step_of_joined_rows_is_the_step_of_one_row_at_a_time(fit, tokenizer, monkeypatch, family):
    # 6 of 16 rows a step: the last of each epoch is short
    settings = {"float32": True, "kernels_setting": "auto", "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4,
                "per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}  # fmt: skip
    sizes, original = [], supervised.Trainer.run_micro_batch
    monkeypatch.setattr(
        supervised.Trainer,
        "run_micro_batch",
        lambda self, model, n: sizes.append(self.moment.inputs["input_ids"].numel()) or original(self, model, n),
    )
    by_rows = fit(UNEVEN, family, **settings)
    assert len(sizes) == 16 + 6  # 4 steps are an epoch and a step
    lengths = [len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN]
    for tokens in (2 * max(lengths), 10_000):
        sizes.clear()
        joined = fit(UNEVEN, family, tokens=tokens, held_out=UNEVEN[:2], eval_steps=2, **settings)
        assert max(sizes) <= tokens
        assert len(sizes) == 4 if tokens == 10_000 else 4 < len(sizes) < 22
        steps = [record for record in records(joined[2]) if "loss" in record]
        for a, b in zip(records(by_rows[2]), steps, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
            assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize(
    ("lengths", "tokens", "expected"),
    [
        ([7] * 8, 8, [[7]] * 8),  # 56 tokens would be 7 micro-batches of 8, were rows divisible
        ([3, 9, 2, 3], 8, [[9], [3, 2, 3]]),  # a row over the limit is alone
        ([3, 5, 2, 6], 16, [[3, 5, 2, 6]]),
    ],
)
def test_joined_micro_batches_hold_every_row_once_and_no_more_tokens_than_they_may(lengths, tokens, expected):
    rows = [{"input_ids": [at] * n, "labels": [-100] + [at] * (n - 1)} for at, n in enumerate(lengths)]
    objective = supervised.Supervised(None, joined=True, tokens=tokens)
    parts = objective.micro_batches(supervised.join_rows(rows), list(range(len(rows))))
    assert [inputs["segments"] for inputs, _ in parts] == expected
    assert sorted(number for _, numbers in parts for number in numbers) == list(range(len(rows)))
    for inputs, numbers in parts:
        alone = supervised.join_rows([rows[number] for number in numbers])
        assert all(torch.equal(inputs[name], alone[name]) for name in ("input_ids", "labels", "position_ids"))


def test_a_step_that_is_skipped_names_the_rows_of_its_broken_micro_batch_alone(fit, tokenizer, monkeypatch):
    lengths = [len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN]
    longest, calls, original = max(range(16), key=lambda at: lengths[at]), [], supervised.loss_of_trained_positions

    def broken(model, inputs, *rest):
        found = lengths[longest] in inputs.get("segments", ()) and bool(calls)
        calls.append(found)
        return original(model, inputs, *rest) * (float("nan") if found else 1)

    monkeypatch.setattr(supervised, "loss_of_trained_positions", broken)
    settings = {"kernels_setting": "auto", "per_device_train_batch_size": 8, "max_steps": 2}
    _, result, run = fit(UNEVEN, tokens=max(lengths), **settings)
    skipped = [record for record in records(run) if "not_taken" in record]
    assert [record["rows"] for record in skipped] == [[longest + 1]]  # its micro-batch is full with it
    assert result.tokens == sum(lengths)


def test_rows_are_not_read_to_give_the_dataset_a_name(tokenizer):
    class Rows(list):
        def __reduce_ex__(self, protocol):
            raise AssertionError("the rows were pickled")

    rows = Rows([encode(tokenizer, messages(turns)) for turns in UNEVEN])
    dataset = supervised.dataset(rows)
    assert dataset[3]["input_ids"] == rows[3].input_ids
    assert pickle.dumps(dataset.format["format_kwargs"]["transform"])


def test_an_evaluation_returns_losses_and_no_logits(fit, monkeypatch):
    returned = []
    original = SFTTrainer.prediction_step

    def spy(self, model, inputs, prediction_loss_only, ignore_keys=None):
        returned.append(original(self, model, inputs, prediction_loss_only, ignore_keys))
        return returned[-1]

    monkeypatch.setattr(SFTTrainer, "prediction_step", spy)
    fit(held_out=UNEVEN[:5], max_steps=2, eval_steps=1)
    assert len(returned) == 10  # after each of two steps
    assert all(loss.numel() == 1 and logits is None and labels is None for loss, logits, labels in returned)


@pytest.mark.parametrize("joined", [False, True])
def test_what_the_host_knows_of_a_batch_stays_true_in_its_parts(tokenizer, joined):
    examples = [encode(tokenizer, messages(turns)) for turns in UNEVEN[:6]]
    rows = [{"input_ids": e.input_ids, "labels": e.labels, "rows": [at]} for at, e in enumerate(examples)]
    objective = supervised.Supervised(tokenizer, joined, tokens=max(len(e.input_ids) for e in examples))
    batch = objective.collate(rows)
    numbers = batch.pop("rows")
    parts = [batch, *objective.halves(batch)]
    if joined:
        parts += [part for part, _ in objective.micro_batches(batch, numbers)] + [objective.cut(batch, 50)]
        assert len(parts) > 5
    for part in parts:
        assert (part["trained"] == (part["labels"] != supervised.IGNORE_INDEX).numpy()).all()
        given = part["segments"] if joined else part["attention_mask"].sum(1).tolist()
        assert objective.lengths(part) == given
        assert objective.num_tokens(part) == sum(given)
        columns, at, places = supervised._positions(part["trained"], torch.device("cpu"), joined)
        found = part["labels"].flatten()[places]
        assert torch.equal(found, part["labels"][:, 1:][part["labels"][:, 1:] != supervised.IGNORE_INDEX])
        before = part["input_ids"][:, columns].flatten() if at is None else part["input_ids"][:, columns].flatten()[at]
        assert torch.equal(before, part["input_ids"].flatten()[places - 1])  # the position that says each of them
