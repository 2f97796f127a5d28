"""Why a training went wrong: each finding by a real training that shows it, and at its threshold; none of a healthy one."""

import dataclasses
import math
import shutil

import pytest
import torch
import transformers

from qlora import train
from qlora.jobs.reporting import findings, reported_run
from qlora.jobs.reporting.findings import Facts
from qlora.recipe.objectives import Dpo, Kto, Orpo
from qlora.runs.record import Best, Evaluation, Skipped, Step
from tests.conftest import CONVERSATIONS, messages, write_jsonl

FACTS = Facts(learning_rate=2e-4, rows=100, trained=2_000, tokens=10_000)
HIGH, LOW = "the learning rate is too high", "the learning rate is too low"


def steps(losses, rate=2e-4, norms=None):
    """Logged steps with these losses, and a little noise of equal size in both directions."""
    norms = [1.0] * len(losses) if norms is None else norms
    return [
        Step(at, at / 10, loss + 0.01 * (-1) ** at, rate, norm, 100 * at, 50.0, 2**30, float(at))
        for at, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]


def falling(count=40, start=3.0, end=1.0):
    return [start + (end - start) * at / (count - 1) for at in range(count)]


def names(lines, facts=FACTS):
    return [one.name for one in findings.of(lines, facts)]


def evaluation(step, loss):
    return Evaluation(step, step / 10, loss, float(step))


# ---- the function alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 40, 400])
def test_of_a_loss_that_falls_nothing_is_said(count):
    lines = steps(falling(count) if count > 1 else [3.0] * count)
    assert findings.of([*lines, evaluation(count, 1.1)], FACTS) == []


def test_of_few_steps_nothing_is_said_whatever_they_are():
    assert findings.of(steps([2.0] * 7, 1e-9), FACTS) == []
    assert names(steps([2.0] * 8, 1e-9)) == [LOW]


def test_a_loss_that_stands_still_has_too_low_a_rate_where_no_weight_can_have_moved():
    flat = [2.0] * 40
    (found,) = findings.of(steps(flat, 0.9e-3 / 40), Facts(0.9e-3 / 40))
    assert found.name == LOW
    assert found.words.startswith("the loss did not fall: 2.000 in the first 10 logged steps, 2.000 in the last 10")
    assert found.change.startswith("training.learning_rate=0.0002 or more")
    assert names(steps(flat, 1.1e-3 / 40), Facts(1.1e-3 / 40)) == ["a plateau from the first step on"]
    # of LoRA+ some weights learn faster
    assert names(steps(flat, 0.9e-3 / 40), Facts(0.9e-3 / 40, fastest=16)) == ["a plateau from the first step on"]


def test_rates_of_steps_that_were_not_logged_count():
    lines = [Step(50 * at, 0.0, 2.0 + at % 2 / 100, 1e-5, 1.0, 0, 1.0, 0, 0.0) for at in range(1, 13)]
    assert names(lines) == ["a plateau from the first step on"]  # 600 steps, 6e-3
    assert names([Step(**(vars(line) | {"step": at})) for at, line in enumerate(lines, 1)]) == [LOW]  # 12 steps


def test_a_fall_that_noise_may_hide_is_no_plateau():
    noisy = [2.0 + 0.5 * (-1) ** (at // 2) for at in range(16)]
    assert findings.of(steps(noisy, 1e-9), FACTS) == []


def test_losses_that_jump_between_two_levels_are_of_rows_of_two_kinds():
    kinds = [(0.5 if at * 7 % 3 else 2.5) - at / 100 for at in range(40)]
    (found,) = findings.of(steps(kinds), FACTS)
    assert found.name == "the rows are of two kinds"
    assert found.words.startswith("the losses of the last 20 logged steps jump between two levels, 0.2")
    assert "(13 steps) and 2.20 (7 steps)" in found.words
    assert not findings.of(steps([2.5] * 5 + [1.5] * 25 + [0.5] * 10), FACTS)  # it fell, and fell again
    assert not findings.of(steps(kinds[:30]), FACTS)  # too few
    assert not findings.of(steps([0.5 + at * 7 % 11 / 5 - at / 100 for at in range(40)]), FACTS)  # all sorts, evenly


def test_held_out_rows_that_are_far_off_before_any_was_seen_twice_are_of_another_kind():
    lines = steps(falling())
    (found,) = findings.of([*lines, evaluation(10, 3.9)], FACTS)
    assert found.name == "held-out rows are of another kind than training rows"
    assert "at step 10, when no row had been seen twice, the held-out loss was 3.90" in found.words
    assert not findings.of([*lines, evaluation(10, 3.6)], FACTS)
    assert not findings.of([*lines, evaluation(20, 3.9)], FACTS)  # two epochs


def test_what_was_known_before_need_not_fall():
    assert findings.of(steps([0.03] * 40), FACTS) == []


@pytest.mark.parametrize(("rise", "expected"), [(0.2, [HIGH]), (0.05, [])])
def test_a_loss_that_rises_has_too_high_a_rate(rise, expected):
    losses = [*falling(20, 3.0, 1.0), *[1.0] * 10, *[1.0 + rise] * 10]
    assert names(steps(losses)) == expected


def test_a_loss_that_rises_though_no_weight_can_have_moved_is_not_the_rates_doing():
    assert HIGH not in names(steps([*[2.0] * 20, *[3.0] * 20], 1e-6))


def test_a_gradient_that_is_gone_at_a_high_loss_has_too_high_a_rate():
    losses = [6.0, 5.0, *[4.0] * 38]
    (found,) = findings.of(steps(losses, norms=[2.0] * 8 + [0.05] * 32), FACTS)
    assert found.name == HIGH
    assert "from 2 in the first steps to 0.05 in the last 10, while the loss stands at 4.00" in found.words
    assert found.change == "training.learning_rate=2e-05 or less"
    assert names(steps(losses, norms=[2.0] * 8 + [0.2] * 32)) == []
    assert names(steps([loss / 10 for loss in losses], norms=[2.0] * 8 + [0.05] * 32)) == []  # learned


def test_steps_that_are_not_finite_have_too_high_a_rate_unless_nothing_has_moved_yet():
    skipped = [Skipped(at, 0.0, "the loss is nan", (1,), 0.0) for at in (21, 22, 23)]
    (found,) = findings.of([*steps(falling(20)), *skipped], FACTS)
    assert (found.name, found.change) == (HIGH, "training.learning_rate=7e-05")
    assert "3 of 23 steps" in found.words
    assert "steps 21 to 23" in found.words
    assert findings.of([*steps(falling(20)), *skipped[:2]], FACTS) == []
    assert findings.of([*steps(falling(3)), *skipped], FACTS) == []


def test_no_gradient_means_that_nothing_is_trained():
    (found,) = findings.of(steps([3.0] * 5, norms=[1e-8] * 5), FACTS)
    assert found.name == "nothing is trained"
    assert found.change.startswith("lora.target_modules")
    assert names(steps([3.0] * 40, norms=[1e-8] * 39 + [1e-6])) != ["nothing is trained"]
    assert names(steps([0.01] * 5, norms=[1e-8] * 5)) == []  # nothing is left to learn


def test_labels_that_are_nearly_all_masked():
    masked = "nearly all labels are masked"
    assert names(steps(falling()), Facts(2e-4, rows=100, trained=199, tokens=10_000)) == [masked]
    assert names(steps(falling()), Facts(2e-4, rows=100, trained=200, tokens=100_000)) == []  # a class and its end
    flat = steps([2.0] * 40)
    assert masked in names(flat, Facts(2e-4, rows=100, trained=900, tokens=100_000))
    assert masked not in names(flat, Facts(2e-4, rows=100, trained=1_100, tokens=100_000))
    assert masked not in names(steps(falling()), Facts(2e-4))  # of a task with classes


def test_overfitting_is_a_held_out_loss_that_rises_while_the_training_loss_falls():
    lines = [*steps(falling()), evaluation(10, 2.5), evaluation(20, 2.2), evaluation(40, 2.23)]
    (found,) = findings.of(lines, FACTS)
    assert found.name == "it overfits"
    assert "from 2.200 at step 20 to 2.230 at step 40" in found.words
    assert found.change == "training.load_best_model_at_end=true, or training.max_steps=20, or more rows"
    (found,) = findings.of(lines, Facts(2e-4, in_epochs=True))
    assert "training.num_train_epochs=2" in found.change
    assert names([*lines[:-1], evaluation(40, 2.215)]) == []
    assert names([*steps([2.0] * 40), *lines[-3:]]) == ["a plateau from the first step on"]
    kept = Best(40, 4.0, 20, "eval_loss", 2.2, True, 2.2, None, 40.0)
    assert names([*lines, kept]) == []  # what is kept is the best


def test_a_held_out_loss_that_stood_still_until_patience_ended():
    lines = [*steps(falling()), evaluation(20, 2.2), evaluation(30, 2.21), evaluation(40, 2.205)]
    end = Best(40, 4.0, 20, "eval_loss", 2.2, False, 2.205, 2, 40.0)
    assert names([*lines, end]) == ["a plateau"]
    assert names(lines) == []


def test_lines_without_numbers_say_nothing():
    empty = [Step(at, None, None, None, None, None, None, None, None) for at in range(1, 40)]
    assert findings.of(empty, FACTS) == []
    assert findings.of([Step(at, 0.0, math.nan, 1e-4, math.nan, 0, 0.0, 0, 0.0) for at in range(1, 40)], FACTS) == []


def rewarded(fell, reference, margin=20.0, right=1.0, rate=2e-4, count=40):
    """Steps of a DPO whose chosen answers have fallen by so many nats from their reference's log probability; beta is 0.1."""
    numbers = {"rewards/chosen": -fell / 10, "rewards/margins": margin / 10, "rewards/accuracies": right}
    numbers |= {"logps/chosen": reference - fell}
    return [Step(**(vars(step) | {"metrics": numbers})) for step in steps(falling(count, 0.7, 0.1), rate)]


DPO = dataclasses.replace(FACTS, objective=Dpo())


@pytest.mark.parametrize(
    ("fell", "reference", "expected"),
    [
        (2.3, -3.5, True),  # as measured where exact match fell from 42 to 26 %
        (1.9, -1, False),
        (15, -28, True),
        (13, -28, False),
        (100, -280, False),  # usual of long answers, whose margins are as large
        (-3, -4, False),
    ],
)
def test_chosen_answers_that_are_given_up_are_a_finding_however_low_the_loss(fell, reference, expected):
    found = findings.of(rewarded(fell, reference), DPO)
    assert [one.name for one in found] == ["chosen answers get unlikely too"] * expected
    if expected:
        assert f"fell from {reference:.1f} (the reference) to {reference - fell:.1f} nats" in found[0].words
        assert found[0].change.startswith("training.learning_rate=7e-05, or dpo.loss_type='[sigmoid, sft]'")
    assert findings.of(rewarded(fell, reference), FACTS) == []
    kept = dataclasses.replace(FACTS, objective=Dpo(loss_type=["sigmoid", "sft"]))
    assert all("loss_type" not in one.change for one in findings.of(rewarded(fell, reference), kept))
    assert findings.of(rewarded(fell, reference), dataclasses.replace(FACTS, objective=Orpo())) == []


@pytest.mark.parametrize(
    ("margin", "right", "rate", "expected"),
    [
        (0.09, 0.9, 2e-6, [LOW]),
        (0.09, 0.9, 2e-4, ["no preference is learned"]),
        (0.11, 0.9, 2e-6, []),
        (1.0, 0.54, 2e-4, ["no preference is learned"]),
        (1.0, 0.56, 2e-4, []),
    ],
)
def test_margins_at_zero_and_pairs_told_apart_by_chance(margin, right, rate, expected):
    assert names(rewarded(0.0, -4, margin, right, rate), DPO) == expected


def test_few_steps_of_rewards_say_nothing():
    assert findings.of(rewarded(6, -4, count=7), DPO) == findings.of(rewarded(0, -4, 0.0, 0.5, count=7), DPO) == []
    assert names(rewarded(0, -4, 1.0, 0.4, count=14), DPO) == []
    assert names(rewarded(0, -4, 1.0, 0.4, count=15), DPO) == [
        "no preference is learned"
    ]  # by eight in the second half


# ---- trainings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(make_recipe, unplanned, capsys):
    """Return found(model=None, **training) -> names of the findings of a training, which it has said."""

    def found(model=None, data=None, lora=None, **training):
        settings = {"max_steps": 24, "save_steps": None, **training}
        sections = {"training": settings, "data": data or {}, "lora": lora or {}}
        sections["quantization"] = {
            "compute_dtype": "bfloat16"
        }  # on every processor: which rate is too high depends on it
        run = train(make_recipe(**sections, **({"model": {"name_or_path": str(model)}} if model else {})))
        said, kept = capsys.readouterr().err, findings.of_run(run)
        assert [line.split(": ")[0] for line in said.splitlines() if line.startswith("why")] == [
            f"why       {one.name}" for one in kept
        ]
        assert [one["words"] for one in reported_run.facts(run, (), 10, 10, (2, 2), 10)["findings"]] == [
            one.words for one in kept
        ]  # and the report
        return [one.name for one in kept]

    return found


def test_a_healthy_training_has_no_finding(found):
    assert found(eval_steps=8) == []


def test_a_training_at_too_high_a_rate(found):
    assert found(learning_rate=3.0) == [HIGH]


def test_a_training_at_too_low_a_rate(found):
    assert found(learning_rate=1e-8) == [LOW]


@pytest.mark.parametrize(
    ("share", "expected"), [(1e-9, "nothing is trained"), (1e-4, "a plateau from the first step on")]
)
def test_a_training_whose_answers_cannot_follow_from_the_prompts(found, tiny_model, tmp_path, share, expected):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "faint")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(share)  # behind a norm: whatever is trained, all words stay equally likely
    model.save_pretrained(base)
    assert found(base, max_steps=12) == [expected]


def test_a_training_that_overfits(found, tmp_path):
    # what is held out is answered in words that the training rows do not have: the surer of those, the worse at these
    held_out = [[("user", f"What is {a} plus {a}?"), ("assistant", "Zebra, quick zebra!")] for a in range(7, 10)]
    train = [{"messages": messages(turns)} for turns in CONVERSATIONS]
    files = [write_jsonl(tmp_path / "few.jsonl", train)]
    files += [write_jsonl(tmp_path / "others.jsonl", [{"messages": messages(turns)} for turns in held_out])]
    data = {"train": str(files[0]), "eval": str(files[1]), "eval_fraction": 0.0}
    assert found(data=data, lr_scheduler_type="constant", max_steps=40, eval_steps=4) == ["it overfits"]


def test_an_orpo_training_that_diverged_is_told_what_a_supervised_one_is():
    """Its message is of the chosen answers, and it has no reference."""
    rising = steps([2.0, 1.8, 1.5, 3.0, 5.0, 6.5])
    facts = dataclasses.replace(
        FACTS, ended="the loss of the chosen answers has diverged: the median", objective=Orpo()
    )
    assert names(rising, facts) == [HIGH]


@pytest.mark.parametrize("section", [Dpo(), Kto()])
def test_a_loss_that_hardly_falls_while_margins_rise_is_no_plateau(section):
    lines = []
    for number in range(1, 401):
        margin = 0.18 * number / 400  # beta times nats
        rewards = {
            "rewards/chosen": margin / 2,
            "rewards/margins": margin,
            "logps/chosen": -20.0,
            "rewards/accuracies": 0.8,
        }
        lines.append(Step(number, 0.0, 0.5 - margin / 8, 5e-6, 1.0, 100 * number, 50.0, 2**30, 1.0 * number, rewards))
    facts = dataclasses.replace(FACTS, learning_rate=5e-6, objective=section)
    assert names(lines, facts) == []
