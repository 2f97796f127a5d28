"""Two processes train what one does: the same steps to rounding, one run folder, one message."""

import json
import os
import re
import shutil
import signal
import time

import pytest
from torch.distributed import TCPStore

from qlora import train
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError
from qlora.training import processes
from tests import forked

# Sums of float32 gradients in another order: about 1e-7 of each, through a few steps at a high learning rate.
ROUNDING = 2e-5
STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_samples": 0}
ENDLESS = {**STEPS, "max_steps": 400, "logging_steps": 1}
FLOAT32 = {"compute_dtype": "float32"}


def surroundings(count, rank, port):
    names = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    names |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": True}
    return {**os.environ, **{name: str(value) for name, value in names.items()}}


class Started:
    """The processes of a training, as torchrun starts them: the store by which they find each other is not theirs."""

    def __init__(self, recipe_file, *arguments, count=2, before=("train",)):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            forked.Process(*before, recipe_file, *arguments, environ=surroundings(count, rank, self.store.port))
            for rank in range(count)
        ]

    def __getitem__(self, rank):
        return self.processes[rank]

    def finish(self, timeout=120):
        """Return [(exit code, stdout, stderr)]."""
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout)
            found.append((process.returncode, out, err))
            process.end()
        return found


def written(recipe, folder, name):
    file = folder / f"{name}.yaml"
    file.write_text(recipe.model_copy(update={"output_dir": str(folder / name)}).to_yaml())
    return file, RunDir(folder / name)


def _ours(text):
    """Return `text` without what libraries write to stderr themselves: bars, remarks on kernels."""
    return "".join(line for line in text.splitlines() if not line.startswith(("Loading weights", "Failed to load CPU")))


def losses(run):
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [
        line["eval_loss"] for line in lines if "eval_loss" in line
    ]


def test_two_processes_train_what_one_does(make_recipe, tmp_path):
    recipe = make_recipe(training={**STEPS, "eval_steps": 3, "logging_steps": 1}, quantization=FLOAT32)
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    two, both = written(recipe, tmp_path, "two")
    (first, _, said), (second, out, err) = Started(two).finish()
    assert (first, second) == (0, 0), said + err
    assert (out, _ours(err)) == ("", ""), err
    assert "processes 2" in said
    assert re.search(r"plan +peak .* of .* for each of 2 processes \(", said)
    for ours, theirs in zip(losses(both), losses(run), strict=True):
        assert ours == pytest.approx(theirs, abs=ROUNDING)
    assert len(losses(both)[0]) == 3
    assert both.adapter.is_dir()


@pytest.mark.parametrize("fields", [{"data": {"packing": True}}, {"training": {"tokens_per_micro_batch": None}}])
@pytest.mark.slow
def test_packed_rows_and_micro_batches_of_rows_too(make_recipe, tmp_path, fields):
    training = {**STEPS, "logging_steps": 1, "group_by_length": False, **fields.pop("training", {})}
    recipe = make_recipe(training=training, quantization=FLOAT32, **fields)
    run = train(recipe.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    two, both = written(recipe, tmp_path, "two")
    codes = [code for code, *_ in Started(two).finish()]
    assert codes == [0, 0]
    assert losses(both)[0] == pytest.approx(losses(run)[0], abs=ROUNDING)


def test_a_signal_saves_once_and_another_number_of_processes_goes_on(make_recipe, tmp_path):
    training = {**STEPS, "max_steps": 400, "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    recipe = make_recipe(training=training, quantization=FLOAT32)
    two, both = written(recipe, tmp_path, "two")
    started = Started(two)
    wait_for_steps(both, 3)
    started[1].send_signal(signal.SIGTERM)  # one of them is enough
    ended = started.finish()
    assert [code for code, *_ in ended] == [143, 143], ended
    assert sum("resume after step" in err for *_, err in ended) == 1
    (checkpoint,) = both.checkpoints.glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert len(losses(both)[0]) == step
    length = {"max_steps": step + 2}
    one = recipe.model_copy(
        update={"output_dir": str(tmp_path / "two"), "training": recipe.training.model_copy(update=length)}
    )
    train(one, resume=True, allow_change=["training.max_steps"])
    run = train(one.model_copy(update={"output_dir": str(tmp_path / "alone")}))
    ours, theirs = losses(both)[0], losses(run)[0]
    assert len(ours) == len(theirs) == step + 2
    assert ours == pytest.approx(theirs, abs=ROUNDING)


def test_when_one_is_killed_the_other_ends_with_one_message(make_recipe, tmp_path):
    ends_when_the_other_is_killed(make_recipe(training=ENDLESS), tmp_path)


def ends_when_the_other_is_killed(recipe, tmp_path):
    two, both = written(recipe, tmp_path, "two")
    started = Started(two)
    wait_for_steps(both, 2)
    started[1].kill()
    (code, _, said), (killed, *_) = started.finish()
    assert (code, killed) == (1, -signal.SIGKILL)
    assert said.count("another process has ended") == 1
    assert "Traceback" not in said


def wait_for_steps(run, steps, seconds=60):
    until = time.monotonic() + seconds
    while not (run.metrics_file.exists() and len(run.metrics_file.read_text().splitlines()) >= steps):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_a_model_whose_rows_are_not_joined_leaves_no_process_without_work(make_recipe, tmp_path):
    """Its step of 4 rows is one micro-batch, which a single process would compute."""
    file, _ = written(make_recipe("gemma2"), tmp_path, "two")
    (code, _, said), (other, *_) = Started(file).finish()
    assert code == 2
    assert other != 0
    assert "a step has 1 micro-batch, which 2 processes cannot share equally" in said


def test_a_batch_that_does_not_divide_is_refused(make_recipe):
    recipe = make_recipe(training={**STEPS, "tokens_per_micro_batch": None})
    for count in (2, 4):
        processes.refuse_unsupported(recipe, count)
    with pytest.raises(
        InputError, match=r"gradient_accumulation_steps.*4 micro-batches.*3 processes.*=6, or start 2 or 4"
    ):
        processes.refuse_unsupported(recipe, 3)
    joined = make_recipe(training={"per_device_train_batch_size": 8})
    processes.refuse_unsupported(joined, 2)
    with pytest.raises(InputError, match="a step has 1 micro-batch, which 2 processes cannot share equally"):
        processes.refuse_unsupported(joined, 2, joins=False)
    of_classes = make_recipe(task="text-classification", training={"per_device_train_batch_size": 16})
    said = "a step has 1 micro-batch, .*gradient_accumulation_steps=2 and training.per_device_train_batch_size=8$"
    with pytest.raises(InputError, match=said):
        processes.refuse_unsupported(of_classes, 2)


@pytest.mark.parametrize(
    ("said", "is_of_processes"),
    [
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:6", True),
        ("NCCL communicator was aborted on rank 0", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("NCCL error: ncclUnhandledCudaError: Failed to CUDA calloc, out of memory", False),
    ],
)
def test_only_what_processes_say_is_taken_for_a_lost_one(monkeypatch, said, is_of_processes):
    def fail(tensor):
        raise RuntimeError(said)

    monkeypatch.setattr(processes.dist, "all_reduce", fail)
    with pytest.raises(processes.Lost if is_of_processes else RuntimeError) as raised:
        processes.Processes(0, 2).sums([1])
    assert (str(raised.value) == said) == (not is_of_processes)


def test_what_is_wrong_is_said_once(make_recipe, tmp_path):
    recipe = make_recipe(data={"train": str(tmp_path / "none.jsonl")}, training=STEPS)
    two, _ = written(recipe, tmp_path, "two")
    ended = Started(two).finish()
    assert ended[0][0] == 2
    assert sum("none.jsonl" in err for *_, err in ended) == 1
    assert not any("Traceback" in err for *_, err in ended)
    assert sum("qlora:" in err for *_, err in ended) == 1, ended


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two_and_three(make_recipe, tmp_path):
    """With dropout in the rows' order and the random numbers: two and three draw the same."""
    training = {
        **STEPS,
        "gradient_accumulation_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }
    recipe = make_recipe(training=training, quantization=FLOAT32)
    whole = train(recipe.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 5})})
    expected = losses(train(longer.model_copy(update={"output_dir": str(tmp_path / "longer")})))[0]
    for count in (2, 3):
        shutil.copytree(whole.path, tmp_path / f"on{count}")
        file, run = written(longer, tmp_path, f"on{count}")
        ended = Started(file, "--resume", count=count).finish()
        assert [code for code, *_ in ended] == [0] * count, ended
        assert f"processes {count}, the run had 1 until now" in ended[0][2]
        assert losses(run)[0] == pytest.approx(expected, abs=ROUNDING)
        assert run.environment()["processes"] == count


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_number_of_processes(make_recipe, tmp_path):
    recipe = make_recipe(training={**STEPS, "gradient_accumulation_steps": 6, "tokens_per_micro_batch": None, "logging_steps": 1},
                         lora={"lora_dropout": 0.3}, quantization=FLOAT32)  # fmt: skip
    found = []
    for count in (2, 3):
        file, run = written(recipe, tmp_path, f"with{count}")
        assert [code for code, *_ in Started(file, count=count).finish()] == [0] * count
        found.append(losses(run)[0])
    assert found[0] == pytest.approx(found[1], abs=ROUNDING)


BROKEN = """
import math, os, sys
from qlora import Recipe, train
from qlora.training.objectives import supervised

real, calls, rank = supervised.loss_of_trained_positions, 0, os.environ["RANK"]

def broken(model, *rest):
    global calls
    calls += model.training
    loss = real(model, *rest)
    return loss * math.nan if rank == "1" and calls == 3 and model.training else loss  # the first is rehearsed

supervised.loss_of_trained_positions = broken
train(Recipe.load(sys.argv[1]))
"""


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(make_recipe, tmp_path):
    two, both = written(make_recipe(training={**STEPS, "logging_steps": 1}), tmp_path, "two")
    (tmp_path / "broken.py").write_text(BROKEN)
    ended = Started(two, before=[tmp_path / "broken.py"]).finish()
    assert [code for code, *_ in ended] == [0, 0], ended
    lines = [json.loads(line) for line in both.metrics_file.read_text().splitlines()]
    (skipped,) = [line for line in lines if "not_taken" in line]
    assert skipped["step"] == 2
    assert len(skipped["rows"]) in range(1, 8)  # those of the micro-batch of the other process, and not the step's


@pytest.mark.slow
def test_a_loss_that_diverges_ends_all_with_one_message(make_recipe, tmp_path):
    diverging = {"learning_rate": 30.0, "max_steps": 40, "warmup_ratio": 0.3, "watchdog_steps": 8, "save_steps": 3}
    two, both = written(make_recipe(training={**STEPS, **diverging}), tmp_path, "two")
    ended = Started(two).finish()
    assert [code for code, *_ in ended] == [1, 1], ended
    assert sum("the loss has diverged" in err for *_, err in ended) == 1
    assert list(both.checkpoints.glob("step-*"))


STOPPED = """
import os, signal, sys
from qlora import cli
from qlora.training.reliable_trainer import Reliable

real, numbers = Reliable.prediction_step, []
is_last = int(os.environ["RANK"]) + 1 == int(os.environ["WORLD_SIZE"])

def stopped(self, *rest, **named):
    found = real(self, *rest, **named)
    if is_last and not numbers:
        os.kill(os.getpid(), signal.SIGTERM)
    numbers.append(found)
    return found

Reliable.prediction_step = stopped
sys.argv = ["qlora", "train", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("count", "every"),
    [(2, None), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, None), (1, 3), (2, 3)])],
)
def test_a_signal_in_the_last_evaluation_saves_once_and_the_run_ends_when_it_goes_on(
    make_recipe, tmp_path, count, every
):
    training = {**STEPS, "per_device_eval_batch_size": 2, "eval_steps": every}
    file, run = written(make_recipe(training=training), tmp_path, "run")
    (tmp_path / "stopped.py").write_text(STOPPED)
    ended = Started(file, count=count, before=[tmp_path / "stopped.py"]).finish()
    assert [code for code, *_ in ended] == [143] * count, ended
    assert sum("resume after step 3" in err for *_, err in ended) == 1
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-3"]
    assert not run.adapter.exists()
    assert not losses(run)[1]
    ended = Started(file, "--resume", count=count).finish()
    assert [code for code, *_ in ended] == [0] * count, ended
    assert run.adapter.is_dir()
    assert len(losses(run)[1]) == 1
