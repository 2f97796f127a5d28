"""Out of memory says when, for which rows, and what to change."""

import json
import re

import pytest
import torch

from qlora import base_model, methods
from qlora.data import Batches, pack
from qlora.system.errors import DoesNotFit
from qlora.training import trained_parameters
from tests.conftest import encode, messages
from tests.training.conftest import UNEVEN

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 22.48 GiB memory in use."
)


CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "134217728 bytes. Error code 12 (Cannot allocate memory)"
)


def run_out(monkeypatch, error, at):
    """Let the forward passes of each model from number `at` (0, 1, ...) on run out of memory, in its last layer."""
    original = methods.attach

    def attach(*args, **kwargs):
        model, calls = original(*args, **kwargs), iter(range(10**6))

        def full(*_):
            if next(calls) >= at:
                raise error

        base_model.decoder_layers(model)[-1].register_forward_hook(full)
        return model

    monkeypatch.setattr(methods, "attach", attach)


@pytest.mark.parametrize(
    ("at", "where"),
    [
        (0, r"in the rehearsal, before the first step: .*\n  training row 7: 67 tokens\n"),
        (1, r"in step 1, micro-batch 1: .*\n  training row \d+: \d+ tokens\n"),
        pytest.param(4, r"in step 2, micro-batch 2: .*\n  training row \d+: ", marks=pytest.mark.slow),
        (5, r"in the evaluation after step 2: .*\n  held-out row 1: 39 tokens\n"),
    ],
)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA_SAYS), "2.00 GiB requested, 1.20 GiB free"),
        (RuntimeError(CPU_SAYS), "134217728 bytes requested"),
        (SystemError("error return without exception set"), "error return without exception set"),
        pytest.param(MemoryError(), "no more memory is available", marks=pytest.mark.slow),
    ],
    ids=["cuda", "cpu", "c code", "python"],
)
def test_out_of_memory_says_when_which_rows_and_what_to_change(fit, tmp_path, monkeypatch, at, where, error, said):
    run_out(monkeypatch, error, at)
    with pytest.raises(DoesNotFit, match=f"out of memory {where}") as caught:
        fit(UNEVEN, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, held_out=UNEVEN[:2],
            per_device_eval_batch_size=2, eval_steps=2, checkpointed_layers=1)  # fmt: skip
    message = str(caught.value)
    assert said in message
    evaluates = at == 5
    assert "batches of this size run in two halves" in message  # what was tried
    assert "gradient_checkpointing" not in message  # all layers are checkpointed by then, and rows run one by one
    assert "batch_size" not in message
    assert f"set data.max_length below {57 if evaluates else 67}," in message
    assert ("measured in the rehearsal" in message) == (at > 0)
    assert "offload" not in message  # a CPU has no other memory
    kept = json.loads((tmp_path / "run0" / "memory.json").read_text())
    assert kept["out_of_memory"].endswith(said)
    assert kept["peak_bytes"] > 0
    assert (kept["rehearsed_bytes"] is None) == (at == 0)
    assert [one["checkpointed_layers"] for one in kept["less_memory"]] == ([1] if evaluates else [2, 2])


def test_masters_that_do_not_fit_are_no_other_error(fit, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(trained_parameters, "MasterWeights", full)
    with pytest.raises(DoesNotFit, match=r"out of memory before the first step: 2\.00 GiB requested, 1\.20 GiB free"):
        fit(UNEVEN, max_steps=1)
    kept = json.loads((tmp_path / "run0" / "memory.json").read_text())
    assert kept["out_of_memory"].startswith("before the first step")


def test_rows_in_packs_and_batches_are_named_by_their_numbers(fit, tokenizer, tmp_path, monkeypatch):
    run_out(monkeypatch, MemoryError(), 0)
    examples = [encode(tokenizer, messages(turns)) for turns in UNEVEN]
    lengths = [len(example.input_ids) for example in examples]
    for run, batches, joined in (
        ("run0", pack(examples, 150), "joined to one row of"),
        ("run1", Batches(examples, lengths, 200, 0), "padded to"),
    ):
        with pytest.raises(DoesNotFit):
            fit(UNEVEN, batches=batches)
        first = json.loads((tmp_path / run / "memory.json").read_text())["less_memory"][0]
        found = re.search(rf"training rows ([\d, ]+): ([\d, ]+) tokens, {joined} (\d+)$", first["out_of_memory"])
        numbers, tokens = ([int(word) for word in found[group].split(", ")] for group in (1, 2))
        assert [lengths[number - 1] for number in numbers] == tokens
        assert first["rows"] == numbers
        size = int(found[3])
        assert size == (sum(tokens) if joined.startswith("joined") else max(tokens))


def test_an_error_that_is_not_about_memory_stays_what_it_is(fit, monkeypatch):
    run_out(monkeypatch, RuntimeError("shapes do not match"), 2)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(UNEVEN, max_steps=4)
