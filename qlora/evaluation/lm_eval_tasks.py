"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model that is in memory, by its own code.

Names of numbers are TASK.METRIC, and TASK.METRIC,FILTER where lm-eval has a filter of another name than none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import base_model, methods
from ..system import memory
from ..system.errors import InputError
from ..system.events import note, progress
from ..system.extras import how_to_install
from . import intervals
from .asked import Asked
from .intervals import ratio, with_interval

_NO_FILTER = "none"
_ON_A_GPU = 8  # rows together: lm-eval keeps the logits of all their tokens, 0.8 GiB of float32 a row of 1,600 and 128,000 words


@dataclass(frozen=True)
class Number:
    """What lm-eval says of a task. parts_N2: (value, 1) of each row, where it is their mean; else None. error: the standard
    error that lm-eval gives, None where it gives none."""

    value: float
    parts_N2: np.ndarray | None
    error: float | None

    def to_json(self):
        if self.parts_N2 is not None:
            return with_interval(self.value, *intervals.interval(ratio, self.parts_N2))
        ends = (None, None) if self.error is None else intervals.of_error(self.value, self.error)
        return with_interval(self.value, *ends)


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval measured. samples: {task: what it logs of each row}."""

    numbers: Mapping[str, Number]
    samples: Mapping[str, Sequence[dict]]

    @property
    def num_rows(self) -> int:
        return sum(len({one["doc_id"] for one in samples}) for samples in self.samples.values())

    def to_json(self) -> dict:
        """Return {"metrics": {name: {"value", "low", "high"}}}; without an interval where lm-eval has no standard error."""
        return {"metrics": {name: number.to_json() for name, number in self.numbers.items()}}

    def since(self, before: TaskScores) -> dict:
        """Return {name: {"value", "low", "high"}} of the change, row by row; without an interval where there are only sums."""
        found = {}
        for name, number in self.numbers.items():
            then = before.numbers[name]
            if number.parts_N2 is None or then.parts_N2 is None:
                found[name] = with_interval(number.value - then.value, None, None)
            else:
                found[name] = intervals.change(ratio, then.parts_N2, number.parts_N2)
        return found

    def rows(self, before: TaskScores | None) -> list[dict]:
        """Return {"task", "row", "prompt", "expected", "before", "after"} of each row, and "filter" where there is one."""
        found = []
        for task, samples in self.samples.items():
            for number, sample in enumerate(samples):
                one = {"task": task, "row": sample["doc_id"], "prompt": _prompt(sample), "expected": _expected(sample)}
                one |= {} if sample["filter"] == _NO_FILTER else {"filter": sample["filter"]}
                one |= {} if before is None else {"before": _answered(before.samples[task][number])}
                found.append(one | {"after": _answered(sample)})
        return found


def score(model, tokenizer, asked: Asked, max_rows=None, what="lm-eval") -> TaskScores:
    """Return what lm-eval measures of a model on `asked.tasks`, the first max_rows rows of each; its own bars show how far it is.

    Raises:
        InputError: as `named`, or what a task needs cannot be had; says what lm-eval says.
    """
    lm_eval, tasks, huggingface = refuse_missing()
    names = named(asked)
    limit, taken = base_model.num_positions(model.config), methods.num_positions(model)

    def evaluated(batch_size):
        live = huggingface.HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=limit and limit - taken,
            softmax_dtype="float32",
        )
        return lm_eval.simple_evaluate(
            model=live,
            tasks=names,
            task_manager=_manager(tasks, asked.include_path),
            num_fewshot=asked.shots,
            limit=max_rows,
            apply_chat_template=asked.chat,
            bootstrap_iters=intervals.RESAMPLES,
        )

    with _warnings_counted():
        found = _where_it_fits(evaluated, asked.batch_size or (1 if model.device.type == "cpu" else _ON_A_GPU), names)
    return TaskScores(_numbers(found), found["samples"])


def named(asked: Asked) -> list[str]:
    """Return the names of `asked.tasks`, those that a pattern such as mmlu_* stands for.

    Raises:
        InputError: lm-eval is not installed, or there is no such task or folder of tasks.
    """
    _, tasks, _ = refuse_missing()
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise InputError(f"--include-path {asked.include_path}: there is no such folder")
    manager, names = _manager(tasks, asked.include_path), []
    for name in asked.tasks:
        if not (found := manager.match_tasks([name])):
            raise InputError(f"--lm-eval {name}: lm-eval has no such task; `lm_eval ls tasks` lists them")
        names += found
    return names


@functools.cache
def _manager(tasks, include_path):
    """Return lm-eval's list of tasks, for which it reads 14,000 files."""
    with progress("reading lm-eval's list of tasks"):
        return tasks.TaskManager(include_path=include_path)


def _where_it_fits(evaluated, batch_size, names):
    """Return evaluated(batch_size), or with half as many rows together where memory runs out: the longest rows are first."""
    while True:
        try:
            return evaluated(batch_size)
        except (OSError, ValueError, LookupError, ImportError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise InputError(f"--lm-eval {','.join(names)}: {said}; most tasks download their rows") from error
        except Exception as error:
            if batch_size == 1 or not memory.is_refusal(error):
                raise
            refusal = memory.refused(error)
            memory.release(error)
        memory.free_cached()
        batch_size //= 2
        note(f"out of memory in lm-eval ({refusal}): once more with --batch-size {batch_size}")


def refuse_missing():
    """Return the modules lm_eval, lm_eval.tasks and lm_eval.models.huggingface; raises InputError where it is not installed."""
    try:
        return [importlib.import_module(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")]
    except ImportError as error:
        raise InputError(f"--lm-eval: {error}; install it:  {how_to_install('lm-eval')}") from None


@contextlib.contextmanager
def _warnings_counted():
    """Say at the end how many prompts lm-eval has cut, instead of what it logs of each, and of the model being in memory."""
    logger, cuts = logging.getLogger("lm_eval"), []

    class Counting(logging.Handler):
        def emit(self, record):
            if "runcat" in record.getMessage():
                cuts.append(record)

    counting, propagated = Counting(), logger.propagate
    logger.addHandler(counting)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(counting)
        logger.propagate = propagated
    if cuts:
        note(f"lm-eval cut {len(cuts):,} prompts that are too long for the model, from the left; see --shots")


def _numbers(found) -> dict[str, Number]:
    numbers = {}
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, _, filter_name = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, (str, bool)) or not filter_name:
                continue
            error = results.get(f"{metric}_stderr,{filter_name}")
            name = f"{task}.{metric}" + ("" if filter_name == _NO_FILTER else f",{filter_name}")
            if not _is_number(value):
                note(f"lm-eval: {name} is {value}, which is not a number; left out")
                continue
            parts = _parts(found["samples"].get(task, ()), metric, filter_name, value)
            numbers[name] = Number(float(value), parts, float(error) if _is_number(error) else None)
    return numbers


def _parts(samples, metric, filter_name, value):
    """Return (N, 2): the value of each row and 1, where the mean of them is `value`; else None."""
    values = [one.get(metric) for one in samples if one["filter"] == filter_name]
    if not values or not all(map(_is_number, values)) or not math.isclose(np.mean(values), value, rel_tol=1e-9):
        return None
    return np.stack([np.array(values, float), np.ones(len(values))], 1)


def _is_number(value):
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _prompt(sample):
    return str(sample["arguments"][0][0])


def _expected(sample):
    """Return the target as text: of choices the one that it is the number of."""
    target, arguments = sample["target"], sample["arguments"]
    if isinstance(target, int) and len(arguments) > 1 and 0 <= target < len(arguments):
        return str(arguments[target][1]).strip()
    return str(target)


def _answered(sample) -> dict[str, Any]:
    """Return {"answer", metric: number} of a row: of choices the likeliest."""
    answers = sample["filtered_resps"]
    if len(sample["arguments"]) > 1:
        answer = str(sample["arguments"][int(np.argmax([one[0] for one in answers]))][1]).strip()
    else:
        answer = answers[0] if isinstance(answers[0], str) else str(answers[0])
    numbers = {name: float(sample[name]) for name in sample["metrics"] if _is_number(sample.get(name))}
    return {"answer": answer, **numbers}
