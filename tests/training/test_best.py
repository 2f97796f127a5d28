"""What is looked at while a model trains: samples, the best evaluation, when to stop. None of it changes a number."""

import json
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from qlora import data
from qlora.commands.adapters import adapters
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.evaluation import generate, scores
from qlora.evaluation.sampling import Sampling
from qlora.jobs.evaluating.eval_rows import held_out_rows
from qlora.jobs.opening.opened_adapter import open_trained
from qlora.jobs.opening.opened_model import open_subject
from qlora.recipe import Recipe
from qlora.runs import record
from qlora.runs.checkpoints import Checkpoints, read_tensors
from qlora.system.errors import InputError, Interrupted
from qlora.system.events import heard_by
from qlora.training.best import Best
from qlora.training.reliable_trainer import Reliable
from qlora.training.samples import answered
from tests.conftest import CONVERSATIONS, write_jsonl
from tests.runs.test_checkpoints import (  # noqa: F401 (fixtures)
    assert_same_run,
    computed,
    recipe_of,
    rows,
    stopped_and_resumed,
    stopped_in_evaluations,
    weights,
)

pytestmark = pytest.mark.usefixtures("unplanned")
SMALL = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 4, "lr_scheduler_type": "constant"}
EVALUATED = {**SMALL, "learning_rate": 0.003, "max_steps": 12, "eval_steps": 1, "watchdog_steps": None}


@pytest.fixture
def rising(monkeypatch):
    """A held-out loss that rises again after the fourth step: where it does so by itself, a processor's rounding decides."""
    original = Reliable.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.metrics["eval_loss"] += max(self.state.global_step - 4, 0)
        return output

    monkeypatch.setattr(Reliable, "evaluation_loop", evaluation_loop)


def at_step(run, step):
    """Return the adapter's tensors as the checkpoint after `step` has them, by their names in an adapter folder."""
    found = read_tensors(run.checkpoints / f"step-{step}")
    return {name.removeprefix("weights/").replace(".default", ""): tensor for name, tensor in found.items()}


def is_of_step(tensors, run, step):
    kept = at_step(run, step)
    return all(torch.equal(tensor, kept[name].to(tensor.dtype)) for name, tensor in tensors.items())


# ---- the best --------------------------------------------------------------------------------------------------------


def test_equal_is_no_better_and_the_first_of_equal_ones_is_kept():
    best = Best("eval_loss", patience=2)
    assert [best.take(step, {"eval_loss": loss}) for step, loss in enumerate((3.0, 2.0, 2.0), 1)] == [True, True, False]
    assert (best.step, best.value, best.waited, best.is_over) == (2, 2.0, 1, False)
    assert not best.take(4, {"eval_loss": 2.5})
    assert best.is_over


def test_a_higher_accuracy_is_better_whatever_the_loss():
    best = Best("eval_accuracy")
    for step, (loss, accuracy) in enumerate(((1.0, 0.5), (2.0, 0.75), (0.5, 0.7)), 1):
        best.take(step, {"eval_loss": loss, "eval_accuracy": accuracy})
    assert (best.step, best.value, best.loss, best.last_loss, best.is_over) == (2, 0.75, 2.0, 0.5, False)


def test_what_another_metric_was_best_in_is_forgotten():
    before, now = Best("eval_accuracy"), Best("eval_loss")
    before.take(1, {"eval_loss": 1.0, "eval_accuracy": 0.5})
    now.restore(before.state())
    assert now == Best("eval_loss")
    same = Best("eval_accuracy")
    same.restore(json.loads(json.dumps(before.state())))
    assert same == before


def test_the_best_is_kept_found_again_and_exported(recipe_of, rising, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings = {**EVALUATED, "early_stopping_patience": 3, "load_best_model_at_end": True, "save_total_limit": 1}
    run = train(recipe_of("whole", **settings))
    said = capsys.readouterr().err
    (end,) = [line for line in record.read(run) if isinstance(line, record.Best)]
    losses = {line.step: line.eval_loss for line in record.read(run) if isinstance(line, record.Evaluation)}
    best = min(losses, key=losses.get)
    assert 1 < best < end.step == best + 3 < 12
    assert (end.best_step, end.value, end.eval_loss) == (best, losses[best], losses[best])
    assert f"3 evaluations in a row no better than that of step {best}" in said
    assert f"kept as of step {best}" in said
    assert f"held-out {losses[best]:.4f}" in said
    # save_total_limit 1 keeps the newest, and the best beside it
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted([f"step-{best}", f"step-{end.step}"])
    assert is_of_step(weights(run), run, best)
    assert not is_of_step(weights(run), run, end.step)
    assert evaluate(run.path)["loss"] == pytest.approx(losses[best], rel=1e-3)  # bf16, other batches

    # stopped before the best and between it and the end, the run is the same
    resumed = stopped_and_resumed(monkeypatch, recipe_of("other", **settings), best - 1, best + 2)
    assert_same_run(run, resumed)

    # killed before its adapter was there, it has nothing to train any more
    shutil.rmtree(resumed.adapter)
    with open_trained([resumed.checkpoints / f"step-{best}"]) as trained:
        there = load_file(trained.folder / "adapter_model.safetensors")
    assert not trained.folder.exists()
    assert all(torch.equal(tensor, there[name]) for name, tensor in weights(run).items())
    again = train(recipe_of("other", **settings), resume=True)
    assert_same_run(run, again)

    capsys.readouterr()
    (entry,) = [one for one in adapters(tmp_path) if one["path"] == str(run.path)]
    assert entry["checkpoints"] == [{"step": best, "best": True}, {"step": end.step, "best": False}]
    assert entry["eval_loss"] == losses[best]
    assert f"checkpoints of steps {best} (best), {end.step}" in capsys.readouterr().out

    with pytest.raises(InputError, match=r"inside .*checkpoints, which is an input; choose another folder"):
        export(run.checkpoints / f"step-{best}", run.checkpoints / f"step-{best}" / "out")
    with pytest.raises(InputError, match=rf"no checkpoint at .*step-99; .* has step-{best}, step-{end.step}"):
        export(run.checkpoints / "step-99", tmp_path / "none")
    assert export(run.checkpoints / f"step-{end.step}", tmp_path / "last")["verified"]


@pytest.mark.slow
def test_an_evaluation_that_is_left_counts_once(recipe_of, rising, monkeypatch):  # noqa: F811
    settings = {
        **EVALUATED,
        "early_stopping_patience": 1,
        "load_best_model_at_end": True,
        "per_device_eval_batch_size": 1,
    }
    whole, recipe = train(recipe_of("whole", **settings)), recipe_of("other", **settings)
    (end,) = [line for line in record.read(whole) if isinstance(line, record.Best)]
    # 4 rows each: in the first evaluation, which is the best; then in the one of which patience ends
    assert_same_run(whole, stopped_in_evaluations(monkeypatch, recipe, 1, 4 * end.step - 3))


def test_checkpoints_that_are_kept_keep_the_best_that_they_know_of(tmp_path):
    kept = Checkpoints(tmp_path, "this")
    for step, best in ((10, 10), (20, 10), (30, 30), (40, 30), (50, 30)):
        kept.write(step, {"a": torch.zeros(1)}, {"best": {"step": best}}, {}, limit=2)
        if step == 30:  # should 30 be lost, 20 goes on, and its best is 10
            assert [number for number, _ in kept.listed()] == [10, 20, 30]
    assert kept.listed() == [(30, True), (40, False), (50, False)]


NEEDS = {
    "early_stopping_patience=3": "training.early_stopping_patience needs evaluations while it trains; set training.eval_steps",
    "load_best_model_at_end=true": "training.load_best_model_at_end needs evaluations while it trains; set training.eval_steps",
    "metric_for_best_model=eval_accuracy": "eval_accuracy is for a task with classes; take eval_loss",
    "metric_for_best_model=loss": "'eval_loss', 'eval_accuracy'",
    "early_stopping_patience=0": "training.early_stopping_patience",
    "num_samples=-1": "training.num_samples",
}


@pytest.mark.parametrize("field", NEEDS)
def test_what_is_not_possible_is_refused_with_the_remedy(make_recipe, field):
    with pytest.raises(InputError, match=re.escape(NEEDS[field])):
        Recipe.from_dict(make_recipe().model_dump(exclude_unset=True), [f"training.{field}"])


@pytest.mark.parametrize(
    ("name", "value"), [("num_samples", 1), ("early_stopping_patience", 1), ("load_best_model_at_end", True)]
)
def test_without_held_out_rows_there_is_nothing_to_look_at(make_recipe, name, value):
    with pytest.raises(InputError, match=f"training.{name} needs held-out rows; set data.eval or data.eval_fraction"):
        make_recipe(data={"eval_fraction": 0.0}, training={name: value, "eval_steps": 1})


# ---- samples ---------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "lora": {"r": 4, "lora_dropout": 0.1},
    "quantization": {"compute_dtype": "float32"},  # an answer does not hang on the last digit
}


def test_samples_change_no_number_and_are_the_models_answers(make_recipe, tmp_path, capsys):
    asking, other = (
        make_recipe(
            **QUESTIONS,
            training={"max_steps": 4, "eval_steps": 2, "num_samples": count},
            output_dir=str(tmp_path / name),
        )
        for name, count in (("asking", 2), ("other", 0))
    )
    run = train(asking)
    said = capsys.readouterr().err
    assert "steps     4 steps, in which 16 of 18 rows are seen (89%)" in said
    lines, told = computed(run), [line for line in record.read(run) if isinstance(line, record.Samples)]
    silent = train(other)
    assert [line for line in lines if "samples" not in line] == computed(silent)
    assert all(torch.equal(tensor, weights(silent)[name]) for name, tensor in weights(run).items())

    assert [(line.step, len(line.samples)) for line in told] == [(2, 2), (4, 2)]
    expected = [one["expected"] for one in told[0].samples]
    assert all(one in [turns[1][1] for turns in CONVERSATIONS] for one in expected)
    subject = open_subject(run.path)
    held_out = data.conversations(held_out_rows(subject))[:2]
    assert [one["prompt"] for one in told[-1].samples] == [row.messages[:-1] for row in held_out]
    most = scores.most_tokens(subject.tokenizer, expected)
    for sample, row in zip(told[-1].samples, held_out, strict=True):
        prompt = scores.prompt_of(subject.tokenizer, row)
        of = (subject.model, subject.tokenizer, prompt, subject.stops)
        answer = generate.stream(*of, Sampling(most), lambda text: None)
        assert sample["answer"] == answer
    assert f"step 2  expected  {expected[0]}" in said
    events = b"".join(file.read_bytes() for file in run.tensorboard.rglob("*") if file.is_file())
    assert b"sample 2" in events
    assert expected[1].encode() in events


def test_plain_text_has_no_samples(make_recipe, tmp_path):
    rows = write_jsonl(tmp_path / "text.jsonl", [{"text": f"some words {n}"} for n in range(8)])  # noqa: F811
    recipe = make_recipe(data={"train": str(rows), "eval_fraction": 0.25}, training={"num_samples": 1})
    with pytest.raises(InputError, match=r"training\.num_samples: the held-out rows are plain text"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_where_memory_runs_out_for_an_answer_the_training_goes_on():
    model, notes = torch.nn.Dropout().train(), []

    def ask(go_on):
        assert not model.training
        yield {"answer": "one"}
        raise MemoryError("out of memory")

    with heard_by(notes.append):
        assert answered(ask, model, lambda: None) == ()
    assert model.training
    assert "set a lower training.num_samples" in notes[0].text


@pytest.mark.slow
def test_an_answer_is_left_where_training_is_to_stop(make_recipe, monkeypatch):
    recipe = make_recipe(training={"max_steps": 2, "eval_steps": 1, "num_samples": 1})
    original = generate.stream

    def stopping(*args):
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "stream", stopping)
        with pytest.raises(Interrupted, match="resume after step 1"):
            train(recipe)
    run = train(recipe, resume=True)
    assert [type(line).__name__ for line in record.read(run)][:3] == ["Step", "Evaluation", "Samples"]
    assert len({line.step for line in record.read(run) if isinstance(line, record.Samples)}) == 2
