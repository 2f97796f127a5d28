"""Two processes train what one does with pairs, unpaired answers and classes: losses, rewards, distances, accuracies."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from qlora import train
from tests.commands.images import models, recipe_of, where  # noqa: F401 (fixtures)
from tests.commands.test_preferences import ROWS as PAIRS
from tests.commands.test_preferences import computed
from tests.commands.test_unpaired import ROWS as UNPAIRED
from tests.conftest import write_jsonl
from tests.training.test_processes import FLOAT32, ROUNDING, STEPS, Started, written
from tests.training.test_sharding import shared

# 6 held-out rows are 2 batches, of 4 and of 2; the last step of an epoch of 18 rows has fewer
UNEVEN = {**STEPS, "per_device_eval_batch_size": 4, "eval_steps": 3, "logging_steps": 1}
OF_TOKENS = {"tokens_per_micro_batch": "auto"}
OF_ROWS = {"tokens_per_micro_batch": None}


@pytest.fixture
def preferring(make_recipe, tmp_path):
    """Return preferring(objective, rows=None, **sections) -> a Recipe of pairs or unpaired answers."""

    def preferring(objective, rows=None, **sections):
        rows = rows or (UNPAIRED if objective == "kto" else PAIRS)
        data = {"train": str(write_jsonl(tmp_path / f"{objective}.jsonl", rows))} | sections.pop("data", {})
        values = {"training": {**UNEVEN, **sections.pop("training", {})}, "quantization": FLOAT32, "data": data}
        return make_recipe(**values, **{objective: {"beta": 0.5}}, **sections)

    return preferring


def assert_same(run, both, rounding=ROUNDING):
    """Every line of metrics.jsonl has the same numbers, but for rounding."""
    theirs, ours = computed(run), computed(both)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for expected, found in zip(theirs, ours, strict=True):
        for name, value in expected.items():
            number = pytest.approx(value, abs=rounding, rel=rounding) if isinstance(value, float) else value
            assert found[name] == number, (name, expected, found)


def alone(recipe, folder, name="alone"):
    return train(recipe.model_copy(update={"output_dir": str(folder / name)}))


def trained_by(count, recipe, folder, name, *arguments):
    file, run = written(recipe, folder, name)
    ended = Started(file, *arguments, count=count).finish()
    assert [code for code, *_ in ended] == [0] * count, ended
    assert not any(out or "Traceback" in err for _, out, err in ended[1:])
    return run


@pytest.mark.parametrize(
    ("objective", "together"),
    [
        ("dpo", OF_ROWS),
        pytest.param("kto", OF_TOKENS, marks=pytest.mark.slow),
        pytest.param("dpo", OF_TOKENS, marks=pytest.mark.slow),
        pytest.param("kto", OF_ROWS, marks=pytest.mark.slow),
        pytest.param("orpo", OF_TOKENS, marks=pytest.mark.slow),
        pytest.param("orpo", OF_ROWS, marks=pytest.mark.slow),
    ],
)
def test_two_processes_prefer_what_one_does(preferring, tmp_path, objective, together):
    recipe = preferring(objective, training=together)
    run, both = alone(recipe, tmp_path), trained_by(2, recipe, tmp_path, "two")
    assert_same(run, both)
    assert any(line.get("rewards/margins") for line in computed(both))
    if objective == "kto":
        assert max(line.get("kl", 0) for line in computed(both)) > 0.01
    if objective != "orpo":
        theirs, ours = load_file(run.reference_file), load_file(both.reference_file)
        assert theirs.keys() == ours.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


BEST = {"metric_for_best_model": "eval_accuracy", "early_stopping_patience": 1}


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {"data": {"class_weights": {"pos": 3.0}}}),
        pytest.param("qwen2", {"training": BEST}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_the_classes_that_one_does(classify_recipe, tmp_path, family, sections):
    """Of 20 held-out rows in batches of 8 the last has 4. Decoders: the others have dropout."""
    training = {
        **UNEVEN,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        **sections.pop("training", {}),
    }
    recipe = classify_recipe(family, training=training, quantization=FLOAT32, **sections)
    run, both = alone(recipe, tmp_path), trained_by(2, recipe, tmp_path, "two")
    assert_same(run, both)
    assert any("accuracy" in line for line in computed(both))


@pytest.mark.slow
def test_two_processes_learn_the_classes_of_images(models, where, tmp_path):  # noqa: F811
    training = {**UNEVEN, "per_device_train_batch_size": 4, "tokens_per_micro_batch": None}
    recipe = recipe_of(models["vit"], where, tmp_path / "run", training=training, quantization=FLOAT32)
    assert_same(alone(recipe, tmp_path), trained_by(2, recipe, tmp_path, "two"))


@pytest.mark.slow
def test_a_process_that_has_only_good_answers_measures_with_one_that_has_only_bad_ones(preferring, tmp_path):
    """A mean of each process' means has no rewards of bad answers, or is not a number."""
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **OF_ROWS}
    recipe = preferring("kto", training=training, data={"eval_fraction": 0.0}, rows=UNPAIRED[:2])
    run, both = alone(recipe, tmp_path), trained_by(2, recipe, tmp_path, "two")
    assert_same(run, both)
    for line in computed(both)[:3]:
        assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl"} <= line.keys()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_run_of_two_goes_on_with_one_and_the_other_way_round(preferring, tmp_path, objective):
    """Its reference stays the model as it was when training began, and a log has steps from before and after."""
    training = {"logging_steps": 3, "save_steps": 2, "lr_scheduler_type": "constant", "max_steps": 2}
    recipe = preferring(objective, training=training)
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 4})})
    whole = alone(longer, tmp_path, "whole")
    alone(recipe, tmp_path, "of_one")
    of_two = trained_by(2, recipe, tmp_path, "of_two")
    kept = of_two.reference_file.read_bytes()
    train(longer.model_copy(update={"output_dir": str(of_two.path)}), resume=True, allow_change=["training.max_steps"])
    resumed = trained_by(2, longer, tmp_path, "of_one", "--resume", "--allow-change", "training.max_steps")
    assert of_two.reference_file.read_bytes() == kept
    for run in (of_two, resumed):
        lines = [[line for line in computed(one) if line["step"] > 2] for one in (whole, run)]
        assert len(lines[0]) == len(lines[1]) > 1
        for expected, found in zip(*lines, strict=True):
            assert found == pytest.approx(expected, abs=ROUNDING, rel=ROUNDING)


# 18 rows are 9 micro-batches, of which the third step has one; 6 held-out rows are 3 batches: one process has one more
ODD = {**UNEVEN, **OF_ROWS, "per_device_eval_batch_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "together"), [("dpo", ODD), ("kto", ODD), ("kto", OF_TOKENS), ("orpo", ODD)])
def test_two_that_share_the_base_prefer_what_one_does(preferring, tmp_path, objective, together):
    recipe = preferring(objective, training=together)
    run, both = alone(recipe, tmp_path), trained_by(2, shared(recipe), tmp_path, "two")
    assert_same(run, both)


@pytest.mark.slow
def test_two_that_share_the_base_learn_the_classes_that_one_does(classify_recipe, tmp_path):
    """A batch that a process runs only to gather the weights for another is not counted."""
    training = {**UNEVEN, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
    recipe = classify_recipe("llama", training=training, quantization=FLOAT32)
    run, both = alone(recipe, tmp_path), trained_by(2, shared(recipe), tmp_path, "two")
    assert_same(run, both)


@pytest.mark.slow
def test_two_that_share_the_base_end_with_the_best_of_two_rates(make_recipe, tmp_path):
    """Each has some of the masters, of one optimizer's group maybe none, and takes its own back from the best checkpoint."""
    training = {
        **UNEVEN, **OF_ROWS, "max_steps": 6, "eval_steps": 1, "learning_rate": 0.06, "weight_decay": 0.1,
        "load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    recipe = make_recipe(training=training, quantization=FLOAT32, lora={"r": 4, "loraplus_lr_ratio": 2.0})
    run, both = alone(recipe, tmp_path), trained_by(2, shared(recipe), tmp_path, "two")
    assert_same(run, both, 1e-3)
    theirs, ours = (load_file(one.adapter / "adapter_model.safetensors") for one in (run, both))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-2, atol=2e-3)


# a method's own part of a step is that of the summed gradients: AdaLoRA's importance, the rows that full training holds
METHODS = {
    "ia3": {"ia3": {}},
    "oft": {"oft": {}},
    "hira": {"hira": {"r": 8}},
    "bottleneck": {"bottleneck": {}},
    "prefix": {"prefix_tuning": {}},
    "prompt": {"prompt_tuning": {}},
    "adalora": {"adalora": {"init_r": 6, "target_r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1}, "training": {"max_steps": 6}},
    "dora": {"lora": {"use_dora": True, "r": 4}},
    "full": {"full": {}, "quantization": None, "model": {"dtype": "float32"}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_any_method_as_one_does(make_recipe, tmp_path, name):
    sections = dict(METHODS[name])
    training = {**UNEVEN, **OF_ROWS, **sections.pop("training", {})}
    recipe = make_recipe(**{"training": training, "quantization": FLOAT32} | sections)
    run, both = alone(recipe, tmp_path), trained_by(2, recipe, tmp_path, "two")
    assert_same(run, both)


IN_THE_REFERENCE = """
import math, os, signal, sys
from qlora import cli
from qlora.training.objectives.preference import Preference

real, numbers, is_last, what = Preference.log_probabilities, [], os.environ["RANK"] == "1", sys.argv.pop(1)

def other(self, model, inputs):
    found, counts = real(self, model, inputs)
    if not model.training and is_last:
        numbers.append(None)
        if what.startswith("SIG") and len(numbers) == 2:
            os.kill(os.getpid(), getattr(signal, what))
        if what == "nan" and len(numbers) == 1:
            found = found * math.nan
    return found, counts

Preference.log_probabilities = other
sys.argv = ["qlora", "train", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        ("SIGTERM", [143, 143], "stopped"),
        ("SIGKILL", [1, -signal.SIGKILL], "another process has ended"),
        ("nan", [2, 2], "the reference's log probability of training row"),
    ],
)
def test_what_happens_to_one_in_the_reference_ends_all_with_one_message(preferring, tmp_path, what, codes, said):
    file, run = written(preferring("dpo", training=OF_ROWS), tmp_path, "two")
    (tmp_path / "other.py").write_text(IN_THE_REFERENCE)
    ended = Started(what, file, before=[tmp_path / "other.py"]).finish()
    assert [code for code, *_ in ended] == codes, ended
    assert "".join(err for *_, err in ended).count(said) == 1
    assert "Traceback" not in ended[0][2]
    assert not run.reference_file.exists()


IN_THE_DISTANCE = """
import math, os, sys
from qlora import cli
from qlora.training.objectives.unpaired import UnpairedPreference

real, numbers, is_last = UnpairedPreference._summed_ratios, [], os.environ["RANK"] == "1"

def other(*arguments):
    numbers.append(None)
    return real(*arguments) * (math.nan if is_last and len(numbers) == 1 else 1)

UnpairedPreference._summed_ratios = other
sys.argv = ["qlora", "train", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
def test_a_distance_that_is_not_finite_in_one_process_skips_the_step_in_all(preferring, tmp_path):
    file, run = written(preferring("kto", training={**OF_ROWS, "eval_steps": None}), tmp_path, "two")
    (tmp_path / "other.py").write_text(IN_THE_DISTANCE)
    ended = Started(file, before=[tmp_path / "other.py"]).finish()
    assert [code for code, *_ in ended] == [0, 0], ended
    (skipped,) = [line for line in computed(run) if "not_taken" in line]
    assert (skipped["step"], len(skipped["rows"])) == (1, 8)
    assert [line["step"] for line in computed(run) if "loss" in line] == [2, 3]


@pytest.mark.slow
def test_rows_that_are_there_twice_have_the_reference_of_one(preferring, tmp_path):
    recipe = preferring("dpo", rows=PAIRS + PAIRS[:7], training=OF_ROWS)
    run, both = alone(recipe, tmp_path), trained_by(2, recipe, tmp_path, "two")
    assert_same(run, both)
    theirs, ours = load_file(run.reference_file), load_file(both.reference_file)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_reference_that_is_missing_is_said_once(preferring, tmp_path):
    recipe = preferring("kto", training={"max_steps": 1, "save_steps": 1, "lr_scheduler_type": "constant"})
    run = trained_by(2, recipe, tmp_path, "two")
    run.reference_file.unlink()
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 2})})
    file, _ = written(longer, tmp_path, "two")
    first, second = Started(file, "--resume", "--allow-change", "training.max_steps").finish()
    assert (first[0], second[0] != 0) == (2, True)
    assert (first[2] + second[2]).count("reference.safetensors is missing") == 1
    assert "Traceback" not in first[2] + second[2]
