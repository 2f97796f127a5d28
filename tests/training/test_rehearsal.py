"""The rehearsal runs the largest micro-batch there can be, and leaves no trace."""

import contextlib
import random

import numpy as np
import pytest
import torch
from trl import SFTTrainer

from qlora.data import Batches, pack
from qlora.recipe import Adalora, Lora
from qlora.training import rehearsal
from qlora.training.objectives import supervised
from tests.conftest import encode, messages, some_slow
from tests.training.conftest import RANK_4, UNEVEN, losses, trained

ADALORA = Adalora(lora_alpha=64, init_r=6, target_r=3, tinit=1, tfinal=2)


@pytest.mark.parametrize(
    ("lora", "settings"),
    [
        (Lora(r=4, lora_dropout=0.2), {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2}),
        pytest.param(ADALORA, {"per_device_train_batch_size": 4, "group_by_length": True}, marks=pytest.mark.slow),
        # 32 x 128: states in 8 bits
        pytest.param(Lora(r=32), {"optim": "paged_lion_8bit", "eval_steps": 2}, marks=pytest.mark.slow),
        pytest.param(RANK_4, {"optim": "adamw_torch", "weight_decay": 0.1}, marks=pytest.mark.slow),
        pytest.param(
            Lora(r=4, use_dora=True, modules_to_save=["embed_tokens"]), {"optim": "adamw_8bit"}, marks=pytest.mark.slow
        ),
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
    monkeypatch.setattr(supervised.Trainer, "compute_loss", SFTTrainer.compute_loss)
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


@pytest.mark.parametrize("how", some_slow(["rows", "grouped", "batches", "packs"], ["rows", "packs"]))
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


@pytest.mark.parametrize("tokens", some_slow([120, 200, 10_000], [120, 10_000]))
def test_no_joined_micro_batch_is_larger_than_the_one_that_was_rehearsed(fit, tokenizer, monkeypatch, tokens):
    seen = []
    original = SFTTrainer.training_step
    monkeypatch.setattr(
        SFTTrainer,
        "training_step",
        lambda self, model, inputs, n: seen.append(sum(inputs["segments"])) or original(self, model, inputs, n),
    )
    lengths = [len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN]
    settings = {"kernels_setting": "auto", "per_device_train_batch_size": 5, "max_steps": 7}
    fit(UNEVEN, tokens=tokens, **settings)
    assert seen[0] == max(seen)
    largest = sum(sorted(lengths)[-5:])
    assert seen[0] == min(tokens, largest)
    assert len(seen) == 8 if tokens > largest else len(seen) > 8


def test_the_largest_joined_micro_batch_is_of_the_longest_rows():
    def largest(*settings):
        return [[9, 7, 5, 4, 4, 1][at] for at in rehearsal.largest_micro_batch([9, 7, 5, 4, 4, 1], *settings)]

    assert largest(3) == [9, 7, 5]
    assert largest(6, 9) == [9]
    assert largest(6, 10) == [9, 7]  # the second is cut
    assert largest(6, 16) == [9, 7]
    assert largest(2, 100) == [9, 7]
    assert largest(9, 30) == [9, 7, 5, 4, 4, 1]


def test_what_later_micro_batches_find_is_held_in_the_rehearsal(fit, monkeypatch):
    held, original = [], rehearsal.held_later

    @contextlib.contextmanager
    def spy(trainer):
        with original(trainer):
            optimizer = trainer.own_optimizer
            held.append([state["state1"].dtype for state in optimizer.state.values()])
            yield
            assert all(not state["state1"].any() for state in optimizer.state.values())

    monkeypatch.setattr(rehearsal, "held_later", spy)
    model, _, _ = fit(lora=Lora(r=32))
    assert len(held[0]) == len(trained(model))
    assert torch.uint8 in held[0]
