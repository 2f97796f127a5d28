"""What is asked of an evaluation beside loss and fitting metrics; what is wrong with it is said before a model is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe.comparison import BUILT_IN
from ..system.errors import InputError, ProofFailed
from . import answer_metrics
from .intervals import OF_LOSS
from .judge import Judge

BEFORE, EXPECTED = "before", "expected"
GENERAL_TEXT = Path(__file__).with_name("general_text.jsonl")
BATCH_SIZE = 25
_MOST_OF_A_LINE = 1 << 24  # bytes

_REQUIREMENT = re.compile(r"\s*([A-Za-z][A-Za-z0-9_.,/:-]*)\s*(>=|<=|>|<)\s*(\S+)\s*")
_SIGNS: dict[str, Callable] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}


@dataclass(frozen=True)
class Asked:
    """What is asked of the answers to held-out rows:

    metrics: names of answer_metrics beside those that fit the references. extract: a regular expression, of which the group
    (or the whole) of the last match is compared, or a Jinja template with {{ answer }}; for answers and references alike.
    forgetting: a file of rows that were not trained on, or BUILT_IN. latency: measure the time of an answer's token.
    max_forgetting: nats a token. before_of: an evaluated run, whose base's answers are taken. judge_url, judge_model,
    judge_criteria: of a judge.Judge, which says what answers are better than; judge_against: BEFORE, EXPECTED or an evaluated
    run, whose answers those are; None: BEFORE of a run, EXPECTED of a model.

    Or instead of them:
    choices: a file of questions, see data.multiple_choice; by_text: score the text of each choice, not its letter. tasks: of
    lm-eval, which finds further ones in the folder include_path. shots: examples before each question; None: 0, or what the
    task says. examples: the file of those; None: the run's training rows. chat: under the chat template.

    And of all: batch_size: of rows that go through the model together; None: BATCH_SIZE, fewer in lm-eval. require: such as
    "exact_match>=0.8". answers: a file that gets every answer.

    Raises:
        InputError: one of them means nothing.
    """

    metrics: Sequence[str] = ()
    extract: str | None = None
    batch_size: int | None = None
    forgetting: str | None = None
    latency: bool = False
    before_of: str | None = None
    require: Sequence[str] = ()
    max_forgetting: float | None = None
    judge_url: str | None = None
    judge_model: str | None = None
    judge_against: str | None = None
    judge_criteria: str | None = None
    answers: str | None = None
    choices: str | None = None
    by_text: bool = False
    tasks: Sequence[str] = ()
    include_path: str | None = None
    shots: int | None = None
    examples: str | None = None
    chat: bool = False

    def __post_init__(self):
        for name in self.metrics:
            answer_metrics.named(name, ())
        _ = self.cut, self.judge
        for text in self.require:
            _parsed(text)
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size}: at least 1")
        if self.max_forgetting is not None and not self.max_forgetting >= 0:
            raise InputError(f"max_forgetting {self.max_forgetting}: a number of nats a token from 0, such as 0.05")
        if self.shots is not None and self.shots < 0:
            raise InputError(f"shots {self.shots}: at least 0")
        if self.choices is not None and self.tasks:
            raise InputError("--choices and --lm-eval are scores of their own; ask for one of them")
        self._refuse_without()
        if self.answers is not None and not Path(self.answers).absolute().parent.is_dir():
            raise InputError(f"--answers {self.answers}: there is no folder {Path(self.answers).parent}")
        if self.answers is not None and Path(self.answers).is_dir():
            raise InputError(f"--answers {self.answers}: is a folder; name a file in it")
        if self.answers is not None and Path(self.answers).is_file() and not _has_answers(self.answers):
            raise InputError(
                f"--answers {self.answers}: is there and was not written by qlora eval; choose another name"
            )

    def _refuse_without(self):
        """Raise InputError for an option that has no effect without another, or beside it."""
        choices, tasks, judge = self.choices is not None, bool(self.tasks), self.judge_url is not None
        needs = {
            "--judge-model": (self.judge_model is not None, judge, "--judge URL"),
            "--judge-against": (self.judge_against is not None, judge, "--judge URL"),
            "--judge-criteria": (self.judge_criteria is not None, judge, "--judge URL"),
            "--by-text": (self.by_text, choices, "--choices FILE"),
            "--examples": (self.examples is not None, choices, "--choices FILE"),
            "--include-path": (self.include_path is not None, tasks, "--lm-eval TASK"),
            "--shots": (self.shots is not None, choices or tasks, "--choices FILE or --lm-eval TASK"),
            "--chat": (self.chat, choices or tasks, "--choices FILE or --lm-eval TASK"),
        }
        for option, (asked, there, other) in needs.items():
            if asked and not there:
                raise InputError(f"{option} is for {other}; give that too, or leave it out")
        if (choices or tasks) and (useless := [option for option, asked in self._of_words().items() if asked]):
            other = "--choices" if choices else "--lm-eval"
            raise InputError(f"{useless[0]} is for answers to rows of your own; leave it out with {other}")
        if self.examples is not None and not self.shots:
            raise InputError("--examples FILE: give --shots too, how many of them stand before each question")

    def refuse_beside(self, data_file):
        """Raise InputError where a file of rows is given that would not be read, or that `answers` would overwrite."""
        if data_file is not None and (self.choices is not None or self.tasks):
            raise InputError("--data is for rows of your own, not for --choices or --lm-eval; leave it out")
        for read in filter(None, (data_file, self.choices, self.examples, self.forgetting)):
            if self.answers is not None and Path(self.answers).resolve() == Path(read).resolve():
                raise InputError(f"--answers {self.answers}: would overwrite the rows that are read; name another file")

    def _of_words(self):
        """Return {option: whether it is asked for} of those that are for generated answers."""
        forgetting = {"--forgetting": self.forgetting, "--max-forgetting": self.max_forgetting is not None}
        before = {"--latency": self.latency, "--before-of": self.before_of is not None}
        judge = {"--judge": self.judge_url is not None}
        return {"--metric": self.metrics, "--extract": self.extract} | before | forgetting | judge

    @property
    def rows_together(self) -> int:
        return self.batch_size or BATCH_SIZE

    @property
    def general_text(self) -> str | None:
        """The file of rows that forgetting is measured on; None where it is not."""
        asked = self.forgetting or (None if self.max_forgetting is None else BUILT_IN)
        return str(GENERAL_TEXT) if asked == BUILT_IN else asked

    @property
    def cut(self) -> Callable[[str], str] | None:
        """What makes of an answer the part that is compared; None where that is all of it."""
        if self.extract is None:
            return None
        return _template(self.extract) if re.search(r"{[{%]", self.extract) else _expression(self.extract)

    @property
    def judge(self) -> Judge | None:
        """Who says which answers are better; None: nobody."""
        if self.judge_url is None:
            return None
        if self.judge_model is None:
            raise InputError("--judge: name its model too, with --judge-model NAME")
        return Judge(self.judge_url, self.judge_model, self.judge_criteria)

    def refuse_for(self, has_classes: bool, is_run: bool):
        """Raise InputError where something is asked that only answers in words have, and the model `has_classes`; or what only a
        run has, which knows its base."""
        if self.max_forgetting is not None and not is_run:
            raise InputError("--max-forgetting is for a run: a model by itself has no loss before its training")
        if self.before_of is not None and not is_run:
            raise InputError("--before-of is for a run: a model by itself has no answers before its training")
        if self.judge_against == BEFORE and not is_run:
            raise InputError(
                f"--judge-against {BEFORE} is for a run: a model by itself has no answers before its training"
            )
        of_words = {"--choices": self.choices is not None, "--lm-eval": self.tasks, "--batch-size": self.batch_size}
        of_words |= self._of_words()
        for option, asked in of_words.items():
            if has_classes and asked:
                raise InputError(f"{option} is for answers in words, and this model answers with classes; leave it out")

    def check(self, result: dict):
        """Raise ProofFailed where a result of `evaluate` does not meet what is required, with both numbers of each.

        Raises:
            InputError: a required metric was not measured.
        """
        limits = [_parsed(text) for text in self.require]
        if self.max_forgetting is not None:
            limits.append(("forgetting", "<=", self.max_forgetting))
        known = values_of(result)
        if unknown := [name for name, _, _ in limits if name not in known]:
            raise InputError(f"--require {unknown[0]}: not measured on these rows; there are {', '.join(known)}")
        missed = [
            f"  {name} is {known[name]:.4f}, required is {sign} {limit:g}"
            for name, sign, limit in limits
            if not _SIGNS[sign](known[name], limit)
        ]
        if missed:
            raise ProofFailed("\n".join(["the evaluation does not meet what is required:", *missed]))


def cut_in_words(extract):
    """Return how a score of answers that `extract` has cut is told from one of whole answers, "" of these."""
    return "" if extract is None else f", cut by --extract {extract!r}"


def values_of(result: dict) -> dict[str, float]:
    """Return {name: number} of what a result of `evaluate` has measured, "forgetting" and "win_rate" too where it has."""
    found = {name: result[name] for name in OF_LOSS if name in result}
    found |= {name: metric["value"] for name, metric in result["metrics"].items()}
    further = {"forgetting": result.get("forgetting"), "win_rate": result.get("judge", {}).get("win_rate")}
    return found | {name: one["value"] for name, one in further.items() if one and "value" in one}


def _parsed(text) -> tuple[str, str, float]:
    match = _REQUIREMENT.fullmatch(text)
    try:
        if match is not None and not math.isnan(limit := float(match[3])):
            return match[1], match[2], limit
    except ValueError:
        pass
    raise InputError(f"--require {text!r} is not of the form NAME>=NUMBER, such as exact_match>=0.8 or loss<1.2")


def _expression(pattern):
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"--extract {pattern!r}: not a regular expression: {error}") from None
    if compiled.groups > 1:
        raise InputError(
            f"--extract {pattern!r}: has {compiled.groups} groups; one says what to compare; write others as (?:...)"
        )

    def cut(text):
        matches: list[Any] = list(compiled.finditer(text))
        return (matches[-1][compiled.groups] or "").strip() if matches else ""

    return cut


def _template(source):
    from jinja2 import TemplateError, UndefinedError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment()
    try:
        unknown = meta.find_undeclared_variables(environment.parse(source)) - {"answer"}
        template = environment.from_string(source)
        with contextlib.suppress(UndefinedError, *_NOTHING_THERE):  # "" need not have what answers have
            template.render(answer="")
    except TemplateError as error:
        raise InputError(f"--extract {source!r}: not a Jinja template of `answer`: {error}") from None
    if unknown:
        raise InputError(f"--extract {source!r}: there is only `answer`, no {', '.join(sorted(unknown))}")

    def cut(text):
        try:
            return template.render(answer=text).strip()
        except (TemplateError, *_NOTHING_THERE):
            return ""

    return cut


_NOTHING_THERE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _has_answers(file):
    """True if a file begins as one of answers does, or is empty."""
    try:
        with open(file, "rb") as stream:
            line = stream.readline(_MOST_OF_A_LINE)
        found = json.loads(line) if line else None
        return found is None or (isinstance(found, dict) and "after" in found)
    except OSError as error:
        raise InputError(f"--answers {file}: {error.strerror}; choose another name") from None
    except (ValueError, RecursionError):
        return False
