"""What a training tells is kept as it was told, and read back as it was kept."""

import json

import pytest

from qlora.runs import record
from qlora.runs.folder import RunDir
from qlora.runs.record import Begun, CheckpointBegun, Evaluation, LessMemory, Norms, Rescaled, Skipped, Step
from qlora.system.errors import InputError
from qlora.system.events import Note, emit

STEP = Step(1, 0.5, 2.25, 1e-4, 0.75, 100, 50.0, 2**30, 2.0, {"mean_rank": 6.0})
LINES = [STEP, Skipped(2, 1.0, "the loss is nan", (5, 6), 3.0), Evaluation(2, 1.0, 2.0, 4.0)]

# of a step in metrics.jsonl
KEYS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "memory_bytes",
    "time",
]


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def recorded(run, *events):
    with record.recorded(run):
        for event in events:
            emit(event)


def test_lines_are_read_as_they_were_emitted_and_other_events_are_no_lines(run):
    recorded(run, Note("before"), Begun(0, 2, 0), LINES[0], Note("said"), *LINES[1:], CheckpointBegun(2))
    assert record.read(run) == LINES
    emit(STEP)  # nobody listens any more
    assert record.read(run) == LINES


def test_a_run_in_float16_and_one_that_ran_out_of_memory_are_read_too(run):
    scaled = Step(2, 0.5, 2.25, 1e-4, 0.75, 100, 50.0, 2**30, 2.0, {"loss_scale": 32768.0})
    less = LessMemory(2, 0.5, "in step 3: 1 GiB requested", "2 of 2 layers checkpointed", (5, 6), 2, False, 3.0)
    lines = [Rescaled(1, 0.25, 32768.0, 1.0), scaled, less]
    recorded(run, Begun(0, 3, 0), *lines)
    assert record.read(run) == lines


def test_the_keys_of_a_line_are_those_that_scripts_read(run):
    recorded(run, Begun(0, 2, 0), *LINES)
    step, skipped, evaluation = map(json.loads, run.metrics_file.read_text().splitlines())
    assert list(step) == [*KEYS, "mean_rank"]
    assert list(skipped) == ["step", "epoch", "not_taken", "rows", "time"]
    assert list(evaluation) == ["step", "epoch", "eval_loss", "time"]


def test_a_run_that_goes_on_keeps_the_lines_that_are_not_computed_again(run):
    recorded(run, Begun(0, 4, 0), *LINES)
    recorded(run, Note("what did not begin changes nothing"))
    assert record.read(run) == LINES
    recorded(run, Begun(1, 4, 1), LINES[2])
    assert record.read(run) == [LINES[0], LINES[2]]


def test_a_line_that_is_still_being_written_is_left_out(run):
    recorded(run, Begun(0, 4, 0), *LINES)
    text = run.metrics_file.read_text()
    for end in range(len(text) - 1, len(text) - 9, -1):
        run.metrics_file.write_text(text[:end])
        assert record.read(run) == LINES[:-1]


def test_what_an_older_version_did_not_write_is_none(run):
    run.metrics_file.write_text('{"step": 3, "loss": 1.5}\n')
    (line,) = record.read(run)
    assert (line.step, line.loss, line.memory_bytes, line.metrics) == (3, 1.5, None, {})


@pytest.mark.parametrize("text", ["[]\n", "3\n", "{}\n", "not JSON\n", '{"loss": 1}\n'])
def test_a_damaged_file_is_named(run, text):
    run.metrics_file.write_text(f'{{"step": 1, "loss": 2.0}}\n{text}')
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2: .*; the run folder is damaged"):
        record.read(run)


def test_a_missing_file_is_named(run):
    with pytest.raises(InputError, match=r"metrics\.jsonl: .*; the run folder is damaged"):
        record.read(run)


def test_a_number_that_is_not_finite_is_no_json(run):
    with pytest.raises(ValueError, match="JSON"):
        recorded(run, Begun(0, 1, 0), Evaluation(1, 1.0, float("nan"), 1.0))


def test_tensorboard_has_a_curve_each_for_steps_and_evaluations_and_one_value_a_step(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def step(number, margin):
        return Step(number, 0.5, 2.25, 1e-4, 0.75, 100, 50.0, 2**30, 2.0, {"rewards/margins": margin})

    def evaluation(number, margin):
        return Evaluation(number, 1.0, 2.0, 4.0, {"rewards/margins": margin})

    def norms(number):
        return Norms(number, {"adapter_norm/layer_00": float(number)})

    recorded(run, Begun(0, 9, 0), step(1, 0.25), step(2, 0.5), evaluation(2, 8.0), norms(2), step(3, 1.0), norms(3))
    # it goes on from the checkpoint of step 2, which is written once more, with its evaluation
    recorded(run, Begun(2, 9, 3), norms(2), step(3, 2.0), evaluation(3, 16.0), norms(3))
    board = EventAccumulator(str(run.tensorboard)).Reload()
    found = {tag: [(one.step, one.value) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert found["rewards/margins"] == [(1, 0.25), (2, 0.5), (3, 2.0)]
    assert found["eval_rewards/margins"] == [(2, 8.0), (3, 16.0)]
    assert found["adapter_norm/layer_00"] == [(2, 2.0), (3, 3.0)]
    assert "epoch" not in found
    for tag, values in found.items():
        assert [at for at, _ in values] == sorted({at for at, _ in values}), tag
