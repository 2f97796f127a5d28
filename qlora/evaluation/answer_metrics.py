"""Whether answers are right: metrics that compare an answer with its reference.

A metric is an object with these names; it is made for the references that it is to compare with.

row(answer, reference)  a tuple of numbers of one row, its parts
value(sums)             the metric, from the sums of the parts over rows

`fitting` makes those that suit the references without being asked, `named` one that is asked for. A new metric is a class here
and a line in _BY_NAME. Those of libraries are in text_overlap.py, intervals in intervals.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..system.errors import InputError
from . import intervals, text_overlap


class AnswerMetric(Protocol):
    def row(self, answer: str, reference: str) -> tuple[float, ...]: ...

    def value(self, sums) -> float: ...


class ExactMatch:
    """The share of answers equal to their reference, white space at the ends aside."""

    def row(self, answer, reference):
        return float(answer.strip() == reference.strip()), 1.0

    value = staticmethod(intervals.ratio)


class JsonFields:
    """The share of the references' fields that the answers have right.

    Compared as JSON values, so the order of keys and white space do not matter; an answer that is not an object has no field
    right.
    """

    def row(self, answer, reference):
        found, fields = _object(answer), _object(reference)
        right = sum(key in found and _same(found[key], value) for key, value in fields.items())
        return float(right), float(len(fields))

    def value(self, sums):
        return intervals.ratio(sums) if sums[1] else 0.0


class MacroF1:
    """The mean over the references' texts, taken as classes, of 2 right / (answered so + are so); another answer is wrong."""

    def __init__(self, references):
        self.classes = {name: number for number, name in enumerate(dict.fromkeys(map(str.strip, references)))}

    def row(self, answer, reference):
        right, so = np.zeros(len(self.classes)), np.zeros(len(self.classes))
        number, answered = self.classes[reference.strip()], self.classes.get(answer.strip())
        so[number] += 1
        if answered is not None:
            so[answered] += 1
            right[number] += answered == number
        return (*right, *so)

    def value(self, sums):
        right, so = np.split(np.asarray(sums, float), 2)
        there = so > 0  # a resample may have none of a class
        return float((2 * right[there] / so[there]).mean())


def _same(one, other):
    """Return whether two JSON values are equal; to Python true is 1, at any depth."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _object(text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def fitting(references: Sequence[str]) -> dict[str, AnswerMetric]:
    """Return {name: metric}: exact_match, and json_fields where every reference is a JSON object with fields."""
    found: dict[str, Any] = {"exact_match": ExactMatch()}
    if all(_object(reference) for reference in references):
        found["json_fields"] = JsonFields()
    return found


def named(name: str, references: Sequence[str]) -> AnswerMetric:
    """Return the metric of that name; raises InputError where there is none."""
    if name not in _BY_NAME:
        raise InputError(f"there is no metric {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name](references)


def _rouge(name, references):
    return text_overlap.Rouge(name)


_BY_NAME: dict[str, Callable[[Sequence[str]], AnswerMetric]] = {
    "exact_match": lambda references: ExactMatch(),
    "json_fields": lambda references: JsonFields(),
    "macro_f1": MacroF1,
    "accuracy": lambda references: ExactMatch(),  # of classes, which are their names
    "bleu": lambda references: text_overlap.Corpus("BLEU"),
    "chrf": lambda references: text_overlap.Corpus("CHRF"),
    **{name: functools.partial(_rouge, name) for name in text_overlap.ROUGES},
}


def parts(metric: AnswerMetric, answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return the (N, K) parts of N answers."""
    return np.array([metric.row(*pair) for pair in zip(answers, references, strict=True)], float)


def to_json(row) -> list | dict:
    """Return the parts of one row as JSON: a list, or {"size", "at": {place: number}} where there are many, mostly 0."""
    if len(row) <= 2:
        return [float(number) for number in row]
    return {"size": len(row), "at": {str(place): float(row[place]) for place in np.flatnonzero(row)}}


def from_json(found) -> np.ndarray:
    """Return the parts that `to_json` made that of."""
    if isinstance(found, list):
        return np.array(found, float)
    row = np.zeros(found["size"])
    for place, number in found["at"].items():
        row[int(place)] = number
    return row
