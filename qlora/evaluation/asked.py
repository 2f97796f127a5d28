"""What is asked of an evaluation beside loss and fitting metrics; what is wrong with it is said before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..system.errors import InputError, ProofFailed
from . import answer_metrics

BUILT_IN = "built-in"
GENERAL_TEXT = Path(__file__).with_name("general_text.jsonl")
BATCH_SIZE = 25

_REQUIREMENT = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*(\S+)\s*")
_SIGNS: dict[str, Callable] = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}


@dataclass(frozen=True)
class Asked:
    """metrics: names of answer_metrics beside those that fit the references. extract: a regular expression, of which the group
    (or the whole) of the last match is compared, or a Jinja template with {{ answer }}; for answers and references alike.
    batch_size: of answers that are made together. forgetting: a file of rows that were not trained on, or BUILT_IN. latency:
    measure the time of an answer's token. require: such as "exact_match>=0.8". max_forgetting: nats a token.

    Raises:
        InputError: one of them means nothing.
    """

    metrics: Sequence[str] = ()
    extract: str | None = None
    batch_size: int = BATCH_SIZE
    forgetting: str | None = None
    latency: bool = False
    require: Sequence[str] = ()
    max_forgetting: float | None = None

    def __post_init__(self):
        for name in self.metrics:
            answer_metrics.named(name, ())
        _ = self.cut
        for text in self.require:
            _parsed(text)
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size}: at least 1")
        if self.max_forgetting is not None and not self.max_forgetting >= 0:
            raise InputError(f"max_forgetting {self.max_forgetting}: a number of nats a token from 0, such as 0.05")

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
        return _template(self.extract) if "{{" in self.extract else _expression(self.extract)

    def refuse_for(self, has_classes: bool, is_run: bool):
        """Raise InputError where something is asked that only answers in words have, and the model `has_classes`; or what only a
        run has, which knows its base."""
        if self.max_forgetting is not None and not is_run:
            raise InputError("--max-forgetting is for a run: a model by itself has no loss before its training")
        words = {"--metric": self.metrics, "--extract": self.extract, "--latency": self.latency}
        words |= {"--forgetting": self.forgetting, "--max-forgetting": self.max_forgetting is not None}
        for option, asked in words.items():
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


def values_of(result: dict) -> dict[str, float]:
    """Return {name: number} of what a result of `evaluate` has measured, "forgetting" too where it has."""
    found = {name: result[name] for name in ("loss", "perplexity") if name in result}
    found |= {name: metric["value"] for name, metric in result["metrics"].items()}
    forgetting = result.get("forgetting", {})
    return found | ({"forgetting": forgetting["value"]} if "value" in forgetting else {})


def _parsed(text) -> tuple[str, str, float]:
    match = _REQUIREMENT.fullmatch(text)
    try:
        if match is not None:
            return match[1], match[2], float(match[3])
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
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        template = ImmutableSandboxedEnvironment().from_string(source)
        template.render(answer="")
    except TemplateError as error:
        raise InputError(f"--extract {source!r}: not a Jinja template of `answer`: {error}") from None
    return lambda text: template.render(answer=text).strip()
