"""ROUGE, BLEU and chrF of answers, by the libraries that papers compute them with: rouge-score and sacrebleu.

All are shares of 1, as every other metric here: a BLEU of 34.2 is 0.342.
"""

from __future__ import annotations

import importlib
import re

from ..system.errors import InputError
from ..system.extras import how_to_install
from .intervals import ratio

ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# words as rouge-score's own tokenizer finds them in English; it drops all other letters, so that two equal Chinese or Greek texts
# have a ROUGE of 0. Scripts that are written without spaces count by the character; marks that are no letters stay in their word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[{_UNSPACED}]|(?:[^\W_{_UNSPACED}]|[{_MARKS}])+")


class Rouge:
    """The mean over rows of one of rouge-score's F measures: rouge1, rouge2, rougeL or rougeLsum; words are not stemmed."""

    def __init__(self, name):
        self.name, self.scorer = name, _library("rouge_score.rouge_scorer").RougeScorer([name], tokenizer=_Words())

    def row(self, answer, reference):
        return float(self.scorer.score(reference, answer)[self.name].fmeasure), 1.0

    value = staticmethod(ratio)


class Corpus:
    """sacrebleu's BLEU or CHRF, with its defaults, of all rows together: counts are added up before they are divided.

    sacrebleu 2.6 has these counts of a row, and the score of their sums, under the private names that its own
    significance tests use; tests/evaluation/test_text_overlap.py compares with its corpus_score.
    """

    def __init__(self, name):
        self.metric = getattr(_library("sacrebleu.metrics"), name)()

    def row(self, answer, reference):
        return tuple(map(float, self.metric._extract_corpus_statistics([answer], [[reference]])[0]))

    def value(self, sums):
        return self.metric._compute_score_from_stats([round(number) for number in sums]).score / 100


class _Words:
    def tokenize(self, text):
        return _WORD.findall(text.lower())


def _library(name):
    """Return the module of that name; raises InputError with how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0].replace("_", "-")
        raise InputError(f"{package} is not installed:  {how_to_install('eval')}") from None
