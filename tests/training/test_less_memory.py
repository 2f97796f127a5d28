"""Out of memory in mid-run: what did not fit runs again with less memory, and the run is the one that never ran out."""

import gc
import json

import pytest
import torch
from trl import SFTTrainer

from qlora import base_model
from qlora.data import pack
from qlora.kernels.checkpointing import Checkpointing
from qlora.recipe import Adalora, Lora, Quantization
from qlora.runs.record import LessMemory, read
from qlora.system.errors import DoesNotFit
from qlora.system.memory import LiveTensors
from qlora.training import loss_scale
from qlora.training.less_memory import Economy
from tests.conftest import encode, messages
from tests.training.conftest import UNEVEN, losses, trained

DROPOUT = Lora(r=4, lora_dropout=0.2)
# 6 rows a step, joined into micro-batches of at most 200 tokens: several a step, and the last step of an epoch is short
JOINED = {"kernels_setting": "auto", "tokens": 200, "gradient_accumulation_steps": 6}
FLOAT16 = Quantization(compute_dtype="float16")


class Limit(LiveTensors):
    """An allocator with `most` bytes: it counts what is alive, so what a broken-off attempt keeps is missing in the next."""

    most = float("inf")
    refused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if self.bytes > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError(f"Tried to allocate {self.bytes} bytes")
        return made


@pytest.fixture
def limited(fit, monkeypatch):
    """Return limited(most=None, **how) -> (losses, weights, RunDir, Limit): fit(UNEVEN, **how) in so many bytes.

    Only `where`, SFTTrainer's training_step or prediction_step, has the limit.
    """

    def run(most=float("inf"), where="training_step", **how):
        gc.collect()
        limit, original = Limit(), getattr(SFTTrainer, where)
        limit.most = most

        def within(self, *args, **kwargs):
            with limit:
                return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(SFTTrainer, where, within)
            model, _, run = fit(UNEVEN, **{"max_steps": 2, "rehearse": False} | how)
        return losses(run), trained(model), run, limit

    return run


def changes(run):
    return [line for line in read(run) if isinstance(line, LessMemory)]


def without_changes(lines):
    return [line for line in lines if "out_of_memory" not in line]


def same_weights(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            {"lora": DROPOUT, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"lora": DROPOUT, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"lora": DROPOUT, "rehearse": True}, marks=pytest.mark.slow),
        JOINED | {"lora": DROPOUT, "neftune_noise_alpha": 5.0, "group_by_length": True, "max_steps": 3},
        pytest.param(JOINED | {"quantization": FLOAT16, "rehearse": True, "max_steps": 3}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "batches", "rehearsed", "joined", "joined in float16"],
)
def test_a_run_that_runs_out_is_to_the_bit_the_run_that_never_did(limited, how):
    lines, weights, _, plain = limited(**how)
    *_, one = limited(checkpointed_layers=1, **how)
    *_, two = limited(checkpointed_layers=2, **how)
    assert two.peak < one.peak < plain.peak
    for most, steps in ((one.peak, [1]), ((two.peak + one.peak) // 2, [1, 2])):
        found, now, run, limit = limited(most, **how)
        assert limit.refused == len(steps)
        assert [line.checkpointed_layers for line in changes(run)] == steps
        assert without_changes(found) == lines
        assert same_weights(weights, now)
        kept = json.loads(run.memory_file.read_text())
        assert kept["checkpointed_layers"] == steps[-1]
        assert [one["change"] for one in kept["less_memory"]] == [line.change for line in changes(run)]
        when = "in the rehearsal" if how.get("rehearse") else "in step"
        assert changes(run)[0].out_of_memory.startswith(when)
        assert changes(run)[0].rows


@pytest.mark.parametrize("joined", [pytest.param(False, marks=pytest.mark.slow), True], ids=["padded", "joined"])
def test_where_all_layers_do_not_do_the_rows_go_in_halves_to_the_same_gradients(limited, tokenizer, joined):
    how = {"checkpointed_layers": 2, "float32": True, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    examples = [encode(tokenizer, messages(turns)) for turns in UNEVEN]
    how |= {"batches": pack(examples, 300)} if joined else {"per_device_train_batch_size": 4}
    lines, weights, _, all_rows = limited(**how)
    found, now, run, limit = limited(int(0.7 * all_rows.peak), **how)
    said = changes(run)
    assert said
    assert all("two halves" in line.change for line in said)
    assert limit.refused == len(said)
    for one, other in zip(lines, without_changes(found), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)  # float32 sums in another order
        assert one["tokens"] == other["tokens"]
    for name, weight in weights.items():
        assert torch.allclose(weight, now[name], atol=1e-4), name
    assert not same_weights(weights, now)  # it was another order indeed


@pytest.mark.parametrize(
    "how",
    [
        {"lora": Adalora(lora_alpha=64, init_r=6, target_r=3, tinit=1, tfinal=1), "float32": True, "max_steps": 4},
        pytest.param({"quantization": FLOAT16, "max_steps": 4}, marks=pytest.mark.slow),
    ],
    ids=["adalora", "float16"],
)
def test_joined_micro_batches_in_halves_are_the_same_steps(limited, monkeypatch, how):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**8)  # at the edge halves overflow later than the whole
    how |= JOINED | {"checkpointed_layers": 2, "learning_rate": 1e-3}
    lines, weights, _, whole = limited(**how)
    found, now, run, limit = limited(int(0.7 * whole.peak), **how)
    said = changes(run)
    assert said
    assert all("two halves" in line.change for line in said)
    assert limit.refused == len(said)
    found = without_changes(found)
    assert [line["step"] for line in found] == [line["step"] for line in lines]
    exact = 1e-4 if how.get("float32") else 1e-2
    for one, other in zip(lines, found, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one.get("loss_scale") == other.get("loss_scale")
        assert one["loss"] == pytest.approx(other["loss"], rel=exact)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * exact)
    assert weights.keys() == now.keys()


def test_an_evaluation_goes_on_in_halves(limited):
    how = {"where": "prediction_step", "held_out": UNEVEN[:8], "eval_steps": 1, "per_device_eval_batch_size": 8}
    lines, weights, _, whole = limited(**how)
    found, now, run, limit = limited(int(0.8 * whole.peak), **how)
    assert limit.refused
    assert "in the evaluation after step 1" in changes(run)[0].out_of_memory
    assert len(changes(run)) == limit.refused  # in later ones nothing runs out again
    assert same_weights(weights, now)
    for one, other in zip(lines, without_changes(found), strict=True):
        assert one.get("eval_loss", 0) == pytest.approx(
            other.get("eval_loss", 0), rel=1e-3
        )  # bfloat16, of other shapes
        assert one.get("loss") == other.get("loss")


def test_where_nothing_is_left_the_message_says_what_was_tried(limited):
    with pytest.raises(DoesNotFit) as caught:
        limited(1000, per_device_train_batch_size=2)
    message = str(caught.value)
    assert "out of memory in step 1, micro-batch 1: " in message
    assert "training row " in message  # the one that is left
    assert "tried already: batches of this size run in two halves" in message
    assert "per_device_train_batch_size" not in message
    assert "set data.max_length below" in message


def test_a_checkpoint_remembers_what_did_not_fit(load_model):
    layers = base_model.decoder_layers(load_model())
    planned = Economy(Checkpointing(layers, 1))
    assert planned.state() is None
    with planned.layers:
        planned.layers.change(2, False)
    planned.halved_from[0] = 640
    later = Economy(Checkpointing(layers, 0))
    later.restore(json.loads(json.dumps(planned.state())))
    assert (later.layers.number, later.layers.offload, later.halved_from) == (2, False, [640, None])
    again = Economy(Checkpointing(layers, 2))
    again.restore(None)
    assert again.state() is None


def test_layers_are_taken_a_quarter_first_then_twice_as_many_then_all_then_offloaded(load_model):
    layers = list(base_model.decoder_layers(load_model())) * 9  # 18
    steps, chosen = [], Checkpointing(layers, 0)
    while (then := chosen.next(on_gpu=True)) is not None:
        chosen.number, chosen.offload = then
        steps.append(then)
    assert steps == [(5, False), (10, False), (18, False), (18, True)]
    assert Checkpointing(layers, 18).next(on_gpu=False) is None
    plain = [torch.nn.Linear(1, 1)]
    assert Checkpointing(plain, 0).next(on_gpu=True) is None  # cannot be checkpointed
