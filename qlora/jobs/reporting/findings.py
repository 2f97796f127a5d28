"""Why a training went wrong, in plain words, concluded from what was measured; nothing where the numbers do not say it.

`of` is a pure function of the lines of metrics.jsonl and of a few Facts of the run.
"""

from __future__ import annotations

import itertools
import math
import shlex
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

from ...runs import record
from ...runs.folder import RunDir
from ...system import files

_FEWEST = 8  # logged steps, below which a loss says nothing of its direction
_CHANCE = 2.0  # standard errors: what chance alone moves a difference of two means by
_RISE = 0.1  # nats a loss has to rise by, chance apart
_FALL = 0.05  # of the loss in the first steps: it did not fall where not even chance allows so much
_STILL = 1e-7  # a gradient norm of nothing
_MOVED = 1e-3  # the sum of the learning rates, below which no weight has gone anywhere
_MASKED = 0.01  # of the tokens
_PER_ROW = 2  # trained tokens: a word and the end
_WORSE = 0.02  # nats of held-out loss above the lowest, as in verdicts
_KNOWN = 0.05  # nats: there is nothing left to learn
_SKIPPED = 3
_APART, _GAP, _SHARE = 6, 0.5, 0.2  # spreads, nats, and share of the steps of two kinds of losses
_ELSEWHERE = 1.0  # nats that held-out rows lie above training rows, before any was seen twice
_UNLIKELY, _HALF = (
    2.0,
    0.5,
)  # nats: 7 times less likely; of what it lacked of certainty (docs/preferences.md has a case)
_NO_MARGIN = 0.1  # nats between two answers
_GUESSED = 0.55  # of the pairs
_COLLAPSED, _HIGH = 0.05, 0.5  # of the first gradient norm; nats: where a loss is low, gradients are too


@dataclass(frozen=True)
class Finding:
    """name: in a few words. words: a sentence, with the numbers that it is concluded from. change: what to set."""

    name: str
    words: str
    change: str


@dataclass(frozen=True)
class Facts:
    """What the lines do not say.

    learning_rate: the recipe's; fastest: how many times that some weights learn (LoRA+). method: the recipe's section. rows,
    trained, tokens: of the training data, None where unknown. in_epochs: the recipe counts those, not steps. ended: what was said
    when it ended before its time. recipe: its file, for commands. objective: the recipe's section, None of supervised training.
    """

    learning_rate: float
    fastest: float = 1.0
    method: str = "lora"
    rows: int | None = None
    trained: int | None = None
    tokens: int | None = None
    in_epochs: bool = False
    ended: str = ""
    recipe: str = "RECIPE"
    objective: Any = None


def of_run(run: RunDir) -> list[Finding]:
    """Return the findings of a run folder, finished or not; none before its first step."""
    if not (run.metrics_file.is_file() and run.data_report_file.is_file()):
        return []
    recipe, report = run.recipe(), files.read_object(run.data_report_file)
    tokens = report.get("tokens") or {}
    facts = Facts(
        learning_rate=recipe.training.learning_rate,
        fastest=getattr(recipe.method, "loraplus_lr_ratio", None) or 1.0,
        method=recipe.method.key,
        rows=report.get("rows"),
        trained=tokens.get("trained"),
        tokens=tokens.get("total"),
        in_epochs=recipe.training.max_steps is None,
        ended=str((run.ended() or {}).get("message") or ""),
        recipe=str(run.recipe_file),
        objective=recipe.objective,
    )
    return of(record.read(run), facts)


def of(lines, facts: Facts) -> list[Finding]:
    """Return what the lines of a training, in their order, say of why it went wrong; [] where nothing did, or they do not say."""
    steps = [line for line in lines if isinstance(line, record.Step) and _finite(line.loss)]
    skipped = [line for line in lines if isinstance(line, record.Skipped)]
    nothing = _nothing_trained(steps, facts)
    if nothing:
        return nothing
    found = _unlikely(steps, facts) or _too_high(steps, skipped, facts)
    found = found or _not_preferred(steps, facts)
    if not _rewarded(steps, facts):  # their loss hardly falls where margins rise
        found = found or _does_not_fall(steps, facts)
    found += _masked(steps, facts, found) + _two_kinds(steps, facts) + _held_out_elsewhere(steps, lines, facts)
    return found + _overfits(steps, lines, facts) or _stopped(lines)


def _finite(value):
    return value is not None and math.isfinite(value)


# ---- each of them ----------------------------------------------------------------------------------------------------


def _nothing_trained(steps, facts):
    norms = [step.grad_norm for step in steps if _finite(step.grad_norm)]
    if len(norms) < 3 or max(norms) > _STILL or fmean(step.loss for step in steps) < _KNOWN:
        return []
    words = (
        f"no weight was told where to go: the gradient norm was at most {max(norms):.1e} in all {len(norms)} logged steps, at a "
        f"loss of {steps[-1].loss:.2f}"
    )
    field = f"{facts.method}.target_modules" if facts.method not in ("full", "bottleneck") else "model.name_or_path"
    return [Finding("nothing is trained", words, f"{field}: train layers that the answer depends on")]


def _unlikely(steps, facts):
    """Margins that come of both answers being given up: the loss of DPO is low then."""
    steps = _rewarded(steps, facts)
    diverged = "has diverged" in facts.ended
    if len(steps) < (1 if diverged else _FEWEST):
        return []
    section, last = facts.objective, steps[-_many(steps) :]
    chosen, margin = (fmean(step.metrics[name] for step in last) for name in ("rewards/chosen", "rewards/margins"))
    now = fmean(step.metrics["logps/chosen"] for step in last)
    fell = -chosen / section.beta
    # long answers fall by many nats that are little of theirs
    if fell < _UNLIKELY or (fell < _HALF * -(now + fell) and not diverged):
        return []
    words = (
        f"the log probability of a chosen answer fell from {now + fell:.1f} (the reference) to {now:.1f} nats in the last "
        f"{len(last)} logged steps (rewards/chosen {chosen:.2f}), so the margin of {margin / section.beta:.1f} nats is one "
        "between answers that both got less likely, and others take their place"
    )
    change = _set_rate(facts.learning_rate / 3)
    if "sft" not in dict(getattr(section, "losses", [("sft", 1)])):
        change += f", or {section.key}.loss_type='[{section.losses[0][0]}, sft]', which keeps the chosen answers likely"
    return [Finding("chosen answers get unlikely too", words, change)]


def _not_preferred(steps, facts):
    """Rewards that say that nothing is learned: no margin, or no more pairs the right way round than by chance."""
    steps = _rewarded(steps, facts)
    if len(steps) < _FEWEST:
        return []
    last, half = steps[-_many(steps) :], steps[len(steps) // 2 :]
    margin = fmean(step.metrics["rewards/margins"] for step in last) / facts.objective.beta
    right = [step.metrics["rewards/accuracies"] for step in half if "rewards/accuracies" in step.metrics]
    rates = _rates(steps, facts)
    words = f"good answers are {margin:.2f} nats ahead of bad ones in the last {len(last)} logged steps"
    if margin < _NO_MARGIN and rates < _MOVED:
        words += f", and the learning rates of all steps add up to {rates:.1e}; no weight moves further than about that"
        higher = f"{_set_rate(10 * facts.learning_rate)} or more, or take more steps"
        return [Finding("the learning rate is too low", words, higher)]
    guessed = len(right) >= _FEWEST and fmean(right) < _GUESSED
    if margin >= _NO_MARGIN and not guessed:
        return []
    if right:
        words += f", and {fmean(right):.0%} of the pairs have the chosen answer ahead; by chance it is half"
    look = (
        f"data.train: look at its rows with  qlora data {shlex.quote(facts.recipe)}: are good answers better, and by more than "
        "words that differ by chance? Then training.learning_rate, both ways"
    )
    return [Finding("no preference is learned", words, look)]


def _rewarded(steps, facts):
    """Return the steps that have rewards, beta times the log probability of an answer less that of the reference."""
    if facts.objective is None or not facts.objective.has_reference:
        return []
    names = ("rewards/chosen", "rewards/margins", "logps/chosen")
    return [step for step in steps if all(_finite(step.metrics.get(name)) for name in names)]


def _too_high(steps, skipped, facts):
    rates = _rates(steps, facts)
    lower = _set_rate(facts.learning_rate / 3)
    name = "the learning rate is too high"
    if len(skipped) >= _SKIPPED and rates >= _MOVED:
        when = f"steps {skipped[0].step:,} to {skipped[-1].step:,}"
        words = (
            f"{len(skipped)} of {len(skipped) + len(steps)} steps had a loss or gradient that was not finite ({when}), at a "
            f"learning rate of {facts.learning_rate:g}"
        )
        return [Finding(name, words, lower)]
    if "has diverged" in facts.ended and steps:
        low = min(steps, key=lambda step: step.loss)
        words = (
            f"the loss rose from {low.loss:.2f} at step {low.step:,} to {steps[-1].loss:.2f} at step {steps[-1].step:,}"
        )
        return [Finding(name, f"{words}, at a learning rate of {facts.learning_rate:g}", lower)]
    if rates < _MOVED:
        return []
    if stuck := _stuck(steps):
        return [Finding(name, stuck, f"{_set_rate(facts.learning_rate / 10)} or less")]
    trend = _lowest_and_last(steps)
    if trend is None:
        return []
    low, last, chance, at = trend
    if last - low <= max(_RISE, chance):
        return []
    words = (
        f"the loss rose from {low:.2f} around step {at:,} to {last:.2f} in the last steps, chance apart by more than "
    )
    words += f"{last - low - chance:.2f}"
    norms = [step.grad_norm for step in steps if _finite(step.grad_norm)]
    many = max(3, len(norms) // 4)
    if len(norms) >= _FEWEST:
        words += (
            f"; gradient norm {median(norms[:many]):.2g} in the first steps, {median(norms[-many:]):.2g} in the last"
        )
    return [Finding(name, words, lower)]


def _stuck(steps):
    """Return in words that the weights were driven to where no gradient leads away from, at a high loss; or ""."""
    if len(steps) < 2 * _FEWEST or not all(_finite(step.grad_norm) for step in steps):
        return ""
    norms, losses, many = [step.grad_norm for step in steps], [step.loss for step in steps], _many(steps)
    before, now, loss = max(norms[:_FEWEST]), median(norms[-many:]), fmean(losses[-many:])
    middle = losses[-2 * many : -many]
    still = fmean(middle) - loss < _chance(middle, losses[-many:])
    if now > _COLLAPSED * before or loss < _HIGH or not still:
        return ""
    return (
        f"the gradient norm fell from {before:.2g} in the first steps to {now:.2g} in the last {many}, while the loss stands at "
        f"{loss:.2f}: the weights were driven to where nothing leads away from"
    )


def _does_not_fall(steps, facts):
    """Too low a rate, where the rates so far cannot have moved a weight; else only that the loss stands still."""
    ends = _first_and_last(steps)
    if ends is None:
        return []
    first, last, chance = ends
    if first - last + chance >= _FALL * first or first < _KNOWN:
        return []
    rates = _rates(steps, facts)
    many = _many(steps)
    words = f"the loss did not fall: {first:.3f} in the first {many} logged steps, {last:.3f} in the last {many}"
    if rates < _MOVED:  # a step of Adam or Lion moves a weight by about the rate at most
        words += f"; the learning rates of all steps add up to {rates:.1e}, and no weight moves further than about that"
        higher = f"{_set_rate(10 * facts.learning_rate)} or more, or take more steps"
        return [Finding("the learning rate is too low", words, higher)]
    norms = [step.grad_norm for step in steps if _finite(step.grad_norm)]
    if not norms:
        return []
    words += (
        f", though the learning rates add up to {rates:.2g} and the gradient norm is {median(norms):.2g}: the answers do not "
        "follow from the prompts in a way that it finds, or the rate is far off"
    )
    look = f"data.train: look at its rows with  qlora data {shlex.quote(facts.recipe)}; then training.learning_rate, both ways"
    return [Finding("a plateau from the first step on", words, look)]


def _masked(steps, facts, found):
    """Labels that are nearly all masked: by the row in any case; by their share where the loss does not fall."""
    if not facts.trained or not facts.tokens or not facts.rows or not steps:
        return []
    per_row, share = facts.trained / facts.rows, facts.trained / facts.tokens
    flat = any("did not fall" in one.words for one in found)
    if per_row >= _PER_ROW and not (flat and share < _MASKED):
        return []
    words = f"{facts.trained:,} of {facts.tokens:,} tokens are trained on ({share:.2%}), {per_row:.1f} a row"
    change = f"data.train_on, or data.chat_template; see which are trained with  qlora data {shlex.quote(facts.recipe)}"
    return [Finding("nearly all labels are masked", words, change)]


def _two_kinds(steps, facts):
    """Losses that jump to and fro between two levels in the second half of the training, with nothing between."""
    losses = [step.loss for step in steps[len(steps) // 2 :]]
    fewest = max(_FEWEST // 2, int(_SHARE * len(losses)))
    if len(losses) < 2 * _FEWEST:
        return []
    ordered = sorted(losses)
    cut = max(range(fewest, len(losses) - fewest + 1), key=lambda at: ordered[at] - ordered[at - 1])
    low, high = ordered[:cut], ordered[cut:]
    apart = fmean(high) - fmean(low)
    jumps = sum((one < high[0]) != (other < high[0]) for one, other in itertools.pairwise(losses))
    # a loss that fell once, or in a few stretches, is of one kind of rows
    if apart < max(_GAP, _APART * max(stdev(low), stdev(high))) or jumps < min(len(low), len(high)):
        return []
    words = (
        f"the losses of the last {len(losses)} logged steps jump between two levels, {fmean(low):.2f} ({len(low)} steps) and "
        f"{fmean(high):.2f} ({len(high)} steps), with nothing between"
    )
    look = f"data.train: look at both kinds with  qlora data {shlex.quote(facts.recipe)}; weight them, or take more rows a step"
    return [Finding("the rows are of two kinds", words, look)]


def _held_out_elsewhere(steps, lines, facts):
    """Held-out rows that are far from the training rows before overfitting can be why."""
    first = next((line for line in lines if isinstance(line, record.Evaluation)), None)
    if first is None or first.epoch > 1 or not _finite(first.eval_loss):
        return []
    before = [step.loss for step in steps if step.step <= first.step][-_many(steps) :]
    if len(before) < 3 or first.eval_loss - fmean(before) < max(_ELSEWHERE, _APART * stdev(before)):
        return []
    words = (
        f"at step {first.step:,}, when no row had been seen twice, the held-out loss was {first.eval_loss:.2f} and that of the "
        f"last {len(before)} training steps {fmean(before):.2f}"
    )
    return [
        Finding(
            "held-out rows are of another kind than training rows",
            words,
            "data.eval, or data.eval_fraction in its place",
        )
    ]


def _overfits(steps, lines, facts):
    evaluations = [line for line in lines if isinstance(line, record.Evaluation) and _finite(line.eval_loss)]
    ends = [line for line in lines if isinstance(line, record.Best)]
    if len(evaluations) < 3 or (ends and ends[-1].loaded):
        return []
    best, last = min(evaluations, key=lambda one: one.eval_loss), evaluations[-1]
    before = [step.loss for step in steps if step.step <= best.step][-_many(steps) :]
    after = [step.loss for step in steps if step.step > best.step][-_many(steps) :]
    if last.eval_loss <= best.eval_loss + _WORSE or len(before) < 3 or len(after) < 3:
        return []
    if fmean(after) >= fmean(before) - _chance(before, after):
        return []
    words = (
        f"the held-out loss rose from {best.eval_loss:.3f} at step {best.step:,} to {last.eval_loss:.3f} at step {last.step:,}, "
        f"while the training loss fell from {fmean(before):.3f} to {fmean(after):.3f}"
    )
    fewer = f"training.num_train_epochs={best.epoch:.2g}" if facts.in_epochs else f"training.max_steps={best.step}"
    return [Finding("it overfits", words, f"training.load_best_model_at_end=true, or {fewer}, or more rows")]


def _stopped(lines):
    """An early end for want of a better evaluation, where the held-out loss is no worse: it stands still."""
    end = next((line for line in reversed(lines) if isinstance(line, record.Best)), None)
    if end is None or end.stopped_after is None or end.loaded or end.metric != "eval_loss":
        return []
    later = [line for line in lines if isinstance(line, record.Evaluation) and line.step > end.best_step]
    if not later or max(line.eval_loss for line in later) > end.value + _WORSE:
        return []
    words = (
        f"the held-out loss stood still: {end.value:.4f} at step {end.best_step:,}, {later[-1].eval_loss:.4f} at step "
        f"{end.step:,}, the last of {end.stopped_after} evaluations that were no better"
    )
    return [Finding("a plateau", words, "training.early_stopping_patience higher, if it may take longer than that")]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _set_rate(rate):
    return f"training.learning_rate={float(f'{rate:.1g}'):g}"


def _many(steps):
    return max(3, len(steps) // 4)


def _chance(one, other):
    """Return what chance alone moves the difference of the means of two lists by."""
    return _CHANCE * math.sqrt(stdev(one) ** 2 / len(one) + stdev(other) ** 2 / len(other))


def _first_and_last(steps):
    """Return (mean loss of the first quarter, of the last, what chance moves their difference by), or None of few steps."""
    if len(steps) < _FEWEST:
        return None
    losses, many = [step.loss for step in steps], _many(steps)
    return fmean(losses[:many]), fmean(losses[-many:]), _chance(losses[:many], losses[-many:])


def _lowest_and_last(steps):
    """Return (the lowest mean loss of a stretch, that of the last, chance, the step in the middle of the lowest), or None.

    Stretches do not overlap the last. The lowest of many is low by chance too: their number counts.
    """
    if len(steps) < _FEWEST:
        return None
    losses, many = [step.loss for step in steps], _many(steps)
    last = losses[-many:]
    starts = range(0, len(losses) - 2 * many + 1, many)
    start = min(starts, key=lambda at: fmean(losses[at : at + many]))
    low = losses[start : start + many]
    return fmean(low), fmean(last), _chance(low, last) * math.sqrt(len(starts)), steps[start + many // 2].step


def _rates(steps, facts):
    """Return the sum of the learning rates of all steps until the last that was logged, of the weights that learn fastest."""
    total, before = 0.0, 0
    for step in steps:
        if _finite(step.learning_rate):
            total += step.learning_rate * (step.step - before)
        before = step.step
    return total * facts.fastest
