"""Training does what it says: weighted by tokens, in the precision stated, and it stops rather than lies."""

import contextlib
import dataclasses
import json
import pickle
import random
import re
import time
from typing import get_args

import numpy as np
import pytest
import torch
from trl import SFTTrainer

from qlora import base_model, methods
from qlora import training as sft
from qlora.data import Batches, pack
from qlora.evaluation import metrics
from qlora.recipe import Adalora, Lora, Quantization, Training
from qlora.runs.folder import RunDir
from qlora.system.errors import DoesNotFit, InputError, TrainingFailed
from tests.conftest import CONVERSATIONS, encode, messages

# rows of very different lengths, so that a mean over rows or over micro-batches is another number than one over tokens
UNEVEN = [
    [("user", "Count."), ("assistant", "1 " * n + "ab cd ef gh" * (n < 5))]
    for n in (1, 30, 2, 25, 3, 20, 40, 4, 1, 33, 9, 5, 17, 2, 28, 6)
]

RANK_4 = Lora(r=4)


@pytest.fixture
def fit(load_model, tokenizer, tmp_path):
    """Return fit(turns, family="llama", **training) -> (PeftModel, Result, RunDir) after real training."""
    runs = iter(range(100))

    def fit(
        turns=CONVERSATIONS,
        family="llama",
        checkpointed_layers=0,
        offload=False,
        rehearse=True,
        lora=RANK_4,
        held_out=(),
        float32=False,
        batches=None,
        token_ids=(),
        quantization=Quantization(),  # noqa: B008 (frozen)
        **settings,
    ):
        run = RunDir(tmp_path / f"run{next(runs)}")
        run.path.mkdir()
        model = load_model(family, quantization)
        torch.manual_seed(0)
        if float32:
            base_model.to_float32(model)
        model = methods.attach(model, lora, token_ids=token_ids)
        defaults = {"max_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0.0, "gradient_accumulation_steps": 1,
                    "lr_scheduler_type": "constant"}  # fmt: skip
        examples, eval_examples = ([encode(tokenizer, messages(t)) for t in rows] for rows in (turns, held_out))
        training = Training(**{**defaults, **settings})
        options = {"checkpointed_layers": checkpointed_layers, "offload": offload, "rehearse": rehearse}
        result = sft.train(model, tokenizer, batches or examples, eval_examples, training, run, **options)
        return model, result, run

    return fit


def trained(model):
    return {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}


def losses(run):
    """Return everything in metrics.jsonl that says what was computed."""
    measured = ("time", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in record.items() if key not in measured} for record in records(run)]


def records(run):
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


# ---- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
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


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(7, 2), (9, 8), (5, 5), (3, 8), (1, 4), (8, 7)])
def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(fit, tokenizer, num_rows, batch_size, joined):
    rows = UNEVEN[:num_rows]
    train = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS]
    packs = pack(train, 150) if joined else None
    model, result, run = fit(
        held_out=rows, float32=True, per_device_eval_batch_size=batch_size, batches=packs, eval_steps=1
    )
    examples = [encode(tokenizer, messages(turns)) for turns in rows]
    expected = metrics.mean_loss(model.eval(), examples)[0]
    assert result.eval_loss == pytest.approx(expected, rel=1e-4)
    logged = [record["eval_loss"] for record in records(run) if "eval_loss" in record]
    assert logged == pytest.approx([expected] * len(logged), rel=1e-4)
    assert logged


def test_the_loss_on_the_cpu_is_trls_own(fit, monkeypatch):
    ours = fit(UNEVEN, max_steps=3, float32=True, per_device_train_batch_size=4)
    monkeypatch.setattr(sft.Trainer, "compute_loss", SFTTrainer.compute_loss)
    theirs = fit(UNEVEN, max_steps=3, float32=True, per_device_train_batch_size=4)
    for a, b in zip(records(ours[2]), records(theirs[2]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the others: tests/kernels/test_checkpointing.py
def test_checkpointing_changes_memory_not_gradients(fit, family):
    settings = {"family": family, "max_steps": 2, "lora": Lora(r=4, lora_dropout=0.1), "held_out": UNEVEN[:3],
                "gradient_accumulation_steps": 2, "eval_steps": 1}  # fmt: skip
    plain = fit(UNEVEN, **settings)
    for number, offload in ((1, False), (2, False), (1, True), (2, True)):
        other = fit(UNEVEN, checkpointed_layers=number, offload=offload, **settings)
        assert losses(other[2]) == losses(plain[2])
        for name, value in trained(plain[0]).items():
            assert torch.equal(value, trained(other[0])[name]), name


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(fit):
    lora = Lora(r=4, lora_dropout=0.1)
    one, same, other = (trained(fit(lora=lora, max_steps=3, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---- optimizers and precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", get_args(Training.model_fields["optim"].annotation))
def test_every_optimizer_learns(fit, optim):
    learning_rate = 1e-3 if "lion" in optim else 1e-2
    _, _, run = fit(optim=optim, max_steps=8, learning_rate=learning_rate, per_device_train_batch_size=8)
    losses = [record["loss"] for record in records(run)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("optim", get_args(Training.model_fields["optim"].annotation))
def test_no_optimizer_moves_what_pissa_starts_from(fit, load_model, optim):
    lora = Lora(r=64, init_lora_weights="pissa", target_modules=["q_proj"])  # 128 x 64: enough for 8-bit states
    start = trained(methods.attach(load_model("llama", None), lora, 0))
    model, _, _ = fit(lora=lora, quantization=None, max_steps=3, optim=optim, weight_decay=0.1)
    for name, tensor in trained(model).items():
        dim = 0 if ".lora_A." in name else 1
        (new, held), (old, first) = tensor.split(64, dim), start[name].split(64, dim)
        assert torch.equal(held, first), name
        assert not torch.equal(new, old), name


def test_the_default_optimizer_is_the_paged_8_bit_one(load_model, fit, monkeypatch):
    made = []
    original = sft.Trainer.create_optimizer

    def spy(self, model=None):
        made.append(original(self, model))
        return made[-1]

    monkeypatch.setattr(sft.Trainer, "create_optimizer", spy)
    fit(lora=Lora(r=32), max_steps=2)  # 32 x 128 = 4096 numbers (down_proj): the least that is kept in 8 bits
    optimizer = made[0]
    assert type(optimizer).__module__.startswith("bitsandbytes")
    assert optimizer.is_paged
    states = {state["state1"].dtype for state in optimizer.state.values()}
    assert torch.uint8 in states


def test_small_updates_are_not_lost_in_bfloat16(fit):
    # At 1e-5 Adam's step is a 1/1000 of a typical A (0.05): below half a bf16 digit, so bf16 weights alone stand still.
    steps = 40
    model, _, _ = fit(max_steps=steps, learning_rate=1e-5, optim="adamw_torch", per_device_train_batch_size=8)
    start, _, _ = fit(max_steps=1, learning_rate=1e-12, optim="adamw_torch", per_device_train_batch_size=8)
    moved = [(trained(model)[n] != a).float().mean().item() for n, a in trained(start).items() if ".lora_A." in n]
    assert sum(moved) / len(moved) > 0.3
    # and what the model holds is the float32 master, rounded once
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


# ---- stopping --------------------------------------------------------------------------------------------------------


def test_small_updates_of_new_tokens_rows_are_not_lost_in_bfloat16(fit, load_model):
    # numbers over 1/16 lie 2**-11 = 4.9e-4 apart: a step of 5e-5 alone rounds to nothing, twenty of them to one or two
    model, _, _ = fit(max_steps=20, learning_rate=5e-5, optim="adamw_torch", token_ids=[1, 2])
    base = load_model("llama")
    for module, before in (("model.embed_tokens", base.model.embed_tokens), ("lm_head", base.lm_head)):
        before = before.weight[[1, 2]].float()
        name = f"base_model.model.{module}.token_adapter.trainable_tokens_delta.default"
        moved = (trained(model)[name] != before)[before.abs() > 1 / 16]
        assert moved.float().mean() > 0.5, module


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_checkpointing_does_not_change_the_rows_of_new_tokens(fit, family):
    on, off = (fit(family=family, checkpointed_layers=k, token_ids=[1, 2])[0] for k in (2, 0))
    rows = {name: tensor for name, tensor in trained(off).items() if "trainable_tokens" in name}
    assert len(rows) == (2 if family == "llama" else 1)
    for name, tensor in rows.items():
        torch.testing.assert_close(trained(on)[name], tensor, atol=1e-3, rtol=1e-2)


def test_a_loss_that_is_never_finite_stops_the_run_with_the_weights_it_had(fit, load_model, monkeypatch):
    before = {}

    def poisoned(model, inputs, num_items, lean):
        loss = ORIGINAL(model, inputs, num_items)
        before.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        before["model"] = model
        return loss * float("nan")

    ORIGINAL = sft.loss_of_trained_positions
    monkeypatch.setattr(sft.trainer, "loss_of_trained_positions", poisoned)
    with pytest.raises(TrainingFailed, match=r"the loss is nan .* skipped: 3 consecutive steps had a non-finite loss"):
        fit(max_steps=9)
    model = before.pop("model")
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_a_run_whose_adapters_do_not_move_stops(fit, monkeypatch):
    monkeypatch.setattr(sft.MasterWeights, "give_weights", lambda self: None)
    with pytest.raises(TrainingFailed, match="14 of 14 adapters did not move in the first step"):
        fit(max_steps=3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize(
    ("num_steps", "ratio", "warmup"), [(1, 0.03, 0), (1, 0.9, 0), (2, 0.9, 1), (6, 0.5, 3), (4, 0.0, 0)]
)
def test_a_warmup_starts_above_zero_and_is_never_the_whole_run(fit, num_steps, ratio, warmup, schedule):
    _, result, run = fit(
        max_steps=num_steps, warmup_ratio=ratio, lr_scheduler_type=schedule, learning_rate=1e-2, rehearse=False
    )
    assert result.steps == num_steps
    rates = [record["learning_rate"] for record in records(run) if "learning_rate" in record]
    # rates rise in equal steps to the full one, which the first step after the warmup has
    assert rates[: warmup + 1] == pytest.approx([1e-2 * (step + 1) / (warmup + 1) for step in range(warmup + 1)])
    assert all(0 < rate <= 1e-2 for rate in rates)


def test_no_limit_on_the_norm_is_no_clipping(fit):
    runs = {limit: fit(max_steps=2, max_grad_norm=limit, optim="adamw_torch") for limit in (None, 0, 1e6, 1e-3)}
    weights = {limit: trained(model) for limit, (model, _, _) in runs.items()}
    norms = [record["grad_norm"] for record in records(runs[None][2]) if "grad_norm" in record]
    assert norms
    assert min(norms) > 1e-3  # so that the last one is clipped
    for unlimited in (0, 1e6):
        assert all(torch.equal(tensor, weights[unlimited][name]) for name, tensor in weights[None].items())
    assert not all(torch.equal(tensor, weights[1e-3][name]) for name, tensor in weights[None].items())


# ---- AdaLoRA ---------------------------------------------------------------------------------------------------------

ADALORA = Adalora(lora_alpha=64, init_r=6, target_r=3, tinit=1, tfinal=2)


def singular_values(model):
    return {name: p.detach().flatten() for name, p in model.named_parameters() if ".lora_E." in name}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranks_shrink_to_the_target_on_average_and_what_is_pruned_is_zero(fit, family, tmp_path):
    model, _, run = fit(family=family, lora=ADALORA, max_steps=8, per_device_train_batch_size=8)
    values = singular_values(model)
    ranks = [int((tensor != 0).sum()) for tensor in values.values()]
    assert sum(ranks) == 3 * len(values)
    assert len(set(ranks)) > 1  # shared out by importance
    mean_ranks = [record["mean_rank"] for record in records(run)]
    assert mean_ranks[0] == 6
    assert mean_ranks == sorted(mean_ranks, reverse=True)
    assert mean_ranks[-3:] == [3, 3, 3]
    methods.save(model, tmp_path / "adapter", "base", None)
    pattern = json.loads((tmp_path / "adapter" / methods.CONFIG).read_text())["rank_pattern"]
    assert {name: sum(kept) for name, kept in pattern.items()} == {
        name.removeprefix("base_model.model.").removesuffix(".default"): int((tensor != 0).sum())
        for name, tensor in values.items()
    }


@pytest.mark.parametrize("accumulation", [1, 4])
def test_adalora_takes_the_steps_of_pefts_own_loop(fit, load_model, tokenizer, accumulation):
    from peft import AdaLoraConfig, get_peft_model

    rows = UNEVEN[:8]
    # PEFT's documented loop, on PEFT's loss (which has the penalty in it), one row of all a step
    examples = [encode(tokenizer, messages(turns)) for turns in rows]
    length = max(len(example.input_ids) for example in examples)

    def padded(values, fill):
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values])

    ids, labels = padded([e.input_ids for e in examples], 0), padded([e.labels for e in examples], -100)
    mask = padded([[1] * len(e.input_ids) for e in examples], 0)
    base = base_model.to_float32(load_model("llama"))
    names = base_model.linear_names(base)
    torch.manual_seed(0)
    reference = get_peft_model(base, AdaLoraConfig(init_r=6, target_r=3, lora_alpha=64, tinit=1, tfinal=2, total_step=6,
                                                   target_modules=names, task_type="CAUSAL_LM"))  # fmt: skip
    start = trained(methods.attach(base_model.to_float32(load_model("llama")), ADALORA))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    reference.train()
    losses = []
    for step in range(1, 7):
        loss = reference(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in reference.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        reference.base_model.update_and_allocate(step)
        optimizer.zero_grad()

    model, _, run = fit(rows, lora=ADALORA, float32=True, max_steps=6, optim="adamw_torch",
                        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)  # fmt: skip
    found, expected = singular_values(model), singular_values(reference)
    for name, tensor in expected.items():
        assert torch.equal(found[name] != 0, tensor != 0), name
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-2)
    # the logged loss is the cross entropy alone; at the start it is the base's, as E is 0
    with reference.disable_adapter(), torch.no_grad():
        entropy = reference(input_ids=ids, attention_mask=mask, labels=labels, return_dict=False)[0].item()
    assert records(run)[0]["loss"] == pytest.approx(entropy, rel=1e-4)
    assert losses[0] > entropy + 0.5


def test_a_schedule_without_a_step_to_shrink_in_is_refused(fit):
    with pytest.raises(InputError, match=r"adalora.tinit 1 and adalora.tfinal 2 leave none of 3 steps"):
        fit(lora=ADALORA, max_steps=3)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", ADALORA),
        ("llama", Lora(r=4, use_dora=True, modules_to_save=["embed_tokens", "lm_head"])),
        ("llama-tied", Lora(r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        ("phi", Lora(r=4, bias="all", modules_to_save=["lm_head"])),
    ],
)
def test_every_kind_has_the_gradients_of_trls_own_loss(fit, monkeypatch, family, lora):
    settings = {"family": family, "lora": lora, "max_steps": 4, "float32": True, "per_device_train_batch_size": 4}
    ours = fit(UNEVEN, **settings)
    monkeypatch.setattr(sft.Trainer, "compute_loss", SFTTrainer.compute_loss)
    theirs = fit(UNEVEN, **settings)
    for a, b in zip(records(ours[2]), records(theirs[2]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("lora", [ADALORA, Lora(r=4, use_dora=True, modules_to_save=["embed_tokens", "lm_head"])])
def test_checkpointing_does_not_change_what_other_kinds_learn(fit, lora):
    plain, checkpointed = (fit(lora=lora, max_steps=4, checkpointed_layers=k) for k in (0, 2))
    assert [r["loss"] for r in records(plain[2])] == [r["loss"] for r in records(checkpointed[2])]


# ---- records ---------------------------------------------------------------------------------------------------------


def test_metrics_have_the_stable_keys_and_tensorboard_the_same_numbers(fit):
    _, result, run = fit(max_steps=2, held_out=CONVERSATIONS[:2], eval_steps=1)
    training = [record for record in records(run) if "loss" in record]
    keys = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "memory_bytes",
        "time",
    }
    assert all(record.keys() == keys for record in training)
    assert [record["step"] for record in training] == [1, 2]
    assert training[-1]["tokens"] == result.tokens
    assert [r["eval_loss"] for r in records(run) if "eval_loss" in r][-1] == result.eval_loss

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([record["loss"] for record in training])


def test_padding_is_not_counted_as_tokens(fit, tokenizer):
    _, result, _ = fit(UNEVEN, num_train_epochs=1.0, max_steps=None, per_device_train_batch_size=4)
    assert result.tokens == sum(len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN)
    assert dataclasses.asdict(result)["steps"] == 4


# ---- micro-batches by tokens -----------------------------------------------------------------------------------------


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


def test_rows_of_like_length_share_a_batch_where_the_recipe_says_so(fit, monkeypatch, tokenizer):
    tokens = 4 * sum(len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN)
    widths = {}
    loss = sft.loss_of_trained_positions

    def noted(model, inputs, count, lean):
        widths.setdefault(grouped, []).append(inputs["input_ids"].shape)
        return loss(model, inputs, count, lean)

    monkeypatch.setattr(sft.trainer, "loss_of_trained_positions", noted)
    for grouped in (False, True):
        fit(UNEVEN * 4, max_steps=8, per_device_train_batch_size=8, group_by_length=grouped, rehearse=False)
    assert len(widths[True]) == len(widths[False])
    padded = {grouped: sum(rows * width for rows, width in shapes) for grouped, shapes in widths.items()}
    assert padded[True] - tokens < 0.5 * (padded[False] - tokens)


def test_rows_are_not_read_to_give_the_dataset_a_name(tokenizer):
    class Rows(list):
        def __reduce_ex__(self, protocol):
            raise AssertionError("the rows were pickled")

    rows = Rows([encode(tokenizer, messages(turns)) for turns in UNEVEN])
    dataset = sft.rows.dataset(rows)
    assert dataset[3]["input_ids"] == rows[3].input_ids
    assert pickle.dumps(dataset.format["format_kwargs"]["transform"])


# ---- rehearsal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (Lora(r=4, lora_dropout=0.2), {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2}),
        (ADALORA, {"per_device_train_batch_size": 4, "group_by_length": True}),
        (Lora(r=32), {"optim": "paged_lion_8bit", "eval_steps": 2}),  # 32 x 128: states in 8 bits
        (RANK_4, {"optim": "adamw_torch", "weight_decay": 0.1}),
        (Lora(r=4, use_dora=True, modules_to_save=["embed_tokens"]), {"optim": "adamw_8bit"}),
    ],
)
def test_the_rehearsal_leaves_no_trace(fit, lora, settings):
    drawn = []
    for rehearse in (True, False):
        model, result, run = fit(
            UNEVEN, lora=lora, max_steps=5, held_out=UNEVEN[:3], rehearse=rehearse, checkpointed_layers=1, **settings
        )
        drawn.append((losses(run), trained(model), torch.rand(3), random.random(), np.random.rand(), result))
    one, other = drawn
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], tensor) for name, tensor in other[1].items())
    assert torch.equal(one[2], other[2])
    assert one[3:5] == other[3:5]
    assert one[5].tokens == other[5].tokens
    assert (one[5].rehearsed_bytes is not None, other[5].rehearsed_bytes) == (True, None)


def test_the_rehearsal_is_not_in_trls_own_counters(fit, monkeypatch):
    # on a GPU trl computes the loss, and its accuracy, entropy and tokens along with it
    monkeypatch.setattr(sft.Trainer, "compute_loss", SFTTrainer.compute_loss)
    logged, original = [], SFTTrainer.log

    def log(self, logs, start_time=None):
        original(self, logs, start_time)
        logged[-1].append({key: value for key, value in self.state.log_history[-1].items() if "runtime" not in key})

    monkeypatch.setattr(SFTTrainer, "log", log)
    for rehearse in (True, False):
        logged.append([])
        fit(UNEVEN, max_steps=2, rehearse=rehearse)
    (one, _), (other, _) = ([history[:2], history[2:]] for history in logged)
    assert one == other
    assert one[0]["num_tokens"] > 0


def padded_tokens(inputs):
    return inputs["input_ids"].numel()


@pytest.mark.parametrize("how", ["rows", "grouped", "batches", "packs"])
def test_no_micro_batch_is_larger_than_the_one_that_was_rehearsed(fit, tokenizer, monkeypatch, how):
    seen = []
    original = SFTTrainer.training_step
    monkeypatch.setattr(
        SFTTrainer,
        "training_step",
        lambda self, model, inputs, n: seen.append(inputs) or original(self, model, inputs, n),
    )
    examples = [encode(tokenizer, messages(turns)) for turns in UNEVEN]
    lengths = [len(example.input_ids) for example in examples]
    batches = {"batches": Batches(examples, lengths, 200, 0), "packs": pack(examples, 150)}.get(how)
    settings = {"per_device_train_batch_size": 3, "group_by_length": how == "grouped"} if batches is None else {}
    fit(UNEVEN, batches=batches, max_steps=len(UNEVEN) if batches is None else len(batches), **settings)
    sizes = [padded_tokens(inputs) for inputs in seen]
    assert len(sizes) > 5
    assert sizes[0] == max(sizes)
    expected = 3 * max(lengths) if batches is None else max(batches.lengths)
    assert sizes[0] == expected  # tight: the three longest can meet, and every batch and pack comes
    assert min(sizes) < sizes[0]


def test_what_later_micro_batches_find_is_held_in_the_rehearsal(fit, monkeypatch):
    held, original = [], sft.Trainer._held_later

    @contextlib.contextmanager
    def spy(trainer):
        with original(trainer):
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            held.append([state["state1"].dtype for state in optimizer.state.values()])
            yield
            assert all(not state["state1"].any() for state in optimizer.state.values())

    monkeypatch.setattr(sft.Trainer, "_held_later", spy)
    model, _, _ = fit(lora=Lora(r=32))
    assert len(held[0]) == len(trained(model))
    assert torch.uint8 in held[0]


# ---- out of memory ---------------------------------------------------------------------------------------------------

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 22.48 GiB memory in use."
)
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "134217728 bytes. Error code 12 (Cannot allocate memory)"
)


def run_out(monkeypatch, error, at):
    """Let the forward pass number `at` (0, 1, ...) of each model run out of memory, in its last layer."""
    original = methods.attach

    def attach(*args, **kwargs):
        model, calls = original(*args, **kwargs), iter(range(10**6))

        def full(*_):
            if next(calls) == at:
                raise error

        base_model.decoder_layers(model)[-1].register_forward_hook(full)
        return model

    monkeypatch.setattr(methods, "attach", attach)


@pytest.mark.parametrize(
    ("at", "where"),
    [
        (0, r"in the rehearsal, before the first step: .*\n  training rows 7, 10: 67, 60 tokens, padded to 67\n"),
        (1, r"in step 1, micro-batch 1: .*\n  training rows \d+, \d+: \d+, \d+ tokens, padded to \d+\n"),
        (4, r"in step 2, micro-batch 2: .*\n  training rows \d+, \d+: "),
        (5, r"in the evaluation after step 2: .*\n  held-out rows 1, 2: 39, 57 tokens, padded to 57\n"),
    ],
)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), "2.00 GiB requested, 1.20 GiB free"),
        (RuntimeError(CPU_SAYS), "134217728 bytes requested"),
        (MemoryError(), "no more memory is available"),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_says_when_which_rows_and_what_to_change(fit, tmp_path, monkeypatch, at, where, error, said):
    run_out(monkeypatch, error, at)
    with pytest.raises(DoesNotFit, match=f"out of memory {where}") as caught:
        fit(UNEVEN, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, held_out=UNEVEN[:2],
            per_device_eval_batch_size=2, eval_steps=2, checkpointed_layers=1)  # fmt: skip
    message = str(caught.value)
    assert said in message
    smaller = "training.per_device_train_batch_size=1 training.gradient_accumulation_steps=4 (now 2 and 2)"
    evaluates = at == 5
    assert ("set memory.gradient_checkpointing=true (now 1 of 2 layers)" in message) != evaluates
    assert (smaller in message) != evaluates
    assert ("set training.per_device_eval_batch_size=1 (now 2)" in message) == evaluates
    assert f"set data.max_length below {57 if evaluates else 67}," in message
    assert ("measured in the rehearsal" in message) == (at > 0)
    assert "offload" not in message  # a CPU has no other memory
    kept = json.loads((tmp_path / "run0" / "memory.json").read_text())
    assert kept["out_of_memory"].endswith(said)
    assert kept["peak_bytes"] > 0
    assert (kept["rehearsed_bytes"] is None) == (at == 0)


def test_rows_in_packs_and_batches_are_named_by_their_numbers(fit, tokenizer, monkeypatch):
    run_out(monkeypatch, MemoryError(), 0)
    examples = [encode(tokenizer, messages(turns)) for turns in UNEVEN]
    lengths = [len(example.input_ids) for example in examples]
    for batches, joined in (
        (pack(examples, 150), "joined to one row of"),
        (Batches(examples, lengths, 200, 0), "padded to"),
    ):
        with pytest.raises(DoesNotFit) as caught:
            fit(UNEVEN, batches=batches)
        found = re.search(rf"training rows ([\d, ]+): ([\d, ]+) tokens, {joined} (\d+)\n", str(caught.value))
        numbers, tokens = ([int(word) for word in found[group].split(", ")] for group in (1, 2))
        assert [lengths[number - 1] for number in numbers] == tokens
        size = int(found[3])
        assert size == (sum(tokens) if joined.startswith("joined") else max(tokens))


def test_an_error_that_is_not_about_memory_stays_what_it_is(fit, monkeypatch):
    run_out(monkeypatch, RuntimeError("shapes do not match"), 2)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(UNEVEN, max_steps=4)


def test_tokens_a_second_are_those_of_the_steps(fit, monkeypatch):
    """An evaluation or a checkpoint that takes long makes the run longer, and no step slower."""
    original = sft.Trainer.evaluation_loop

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return original(*args, **kwargs)

    monkeypatch.setattr(sft.Trainer, "evaluation_loop", slow)
    _, result, run = fit(held_out=UNEVEN[:2], max_steps=4, eval_steps=1, logging_steps=2)
    assert result.seconds - result.step_seconds > 4 * 0.5
    logged = [record for record in records(run) if "loss" in record]
    # the tokens between two lines by their seconds: those without the evaluations in between
    seconds = sum(
        (record["tokens"] - before) / record["tokens_per_second"]
        for record, before in zip(logged, [0, *(one["tokens"] for one in logged)], strict=False)
    )
    assert seconds < result.step_seconds + 0.5


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_returns_losses_and_no_logits(fit, monkeypatch):
    returned = []
    original = SFTTrainer.prediction_step

    def spy(self, model, inputs, prediction_loss_only, ignore_keys=None):
        returned.append(original(self, model, inputs, prediction_loss_only, ignore_keys))
        return returned[-1]

    monkeypatch.setattr(SFTTrainer, "prediction_step", spy)
    fit(held_out=UNEVEN[:5], max_steps=2, eval_steps=1)
    assert len(returned) == 15  # after each of two steps, and at the end
    assert all(loss.numel() == 1 and logits is None and labels is None for loss, logits, labels in returned)
