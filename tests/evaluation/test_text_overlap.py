"""ROUGE, BLEU and chrF against the libraries' own scores of the same rows."""

import numpy as np
import pytest

from qlora.evaluation import answer_metrics, intervals
from qlora.system.errors import InputError

REASON = "the extra `eval` is not installed"
ANSWERS = ["The cat sat on the mat.", "It's a dog_house, no. 7", "", "Completely different words here today"]
REFERENCES = ["A cat sat on the mat!", "It is a dog-house, number 7", "nothing was answered here", "Words that differ"]


def of(name, answers=ANSWERS, references=REFERENCES):
    metric = answer_metrics.named(name, references)
    return metric, answer_metrics.parts(metric, answers, references)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_of_english_is_that_of_rouge_score(name):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=REASON).RougeScorer([name])
    metric, parts = of(name)
    expected = [scorer.score(*pair)[name].fmeasure for pair in zip(REFERENCES, ANSWERS, strict=True)]
    assert parts[:, 0].tolist() == expected
    assert metric.value(parts.sum(0)) == pytest.approx(np.mean(expected))
    assert np.mean(expected) > 0.1


def test_rouge_sees_words_in_all_scripts():
    """rouge-score by itself drops every letter that is not English, and equal texts have 0 (huggingface/evaluate, issue 256)."""
    pytest.importorskip("rouge_score", reason=REASON)
    texts = [
        "今天天气很好",
        "Πού είναι ο σταθμός;",
        "где находится вокзал",
        "أين المحطة",
        "สถานีอยู่ที่ไหน",
        "पूर्व प्रधानमन्त्री।",
    ]
    assert of("rougeL", texts, texts)[1][:, 0].tolist() == [1.0] * len(texts)
    assert of("rouge1", ["今天天气不好"], ["今天天气很好"])[1][0, 0] == pytest.approx(5 / 6)
    assert of("rouge1", ["पूर्व नेता"], ["पूर्व प्रधानमन्त्री।"])[1][0, 0] == 0.5  # a word is one, with its marks
    assert of("rougeL", texts[:1], texts[1:2])[1][0, 0] == 0


@pytest.mark.parametrize(("name", "kind"), [("bleu", "BLEU"), ("chrf", "CHRF")])
def test_bleu_and_chrf_are_sacrebleus_of_all_rows_and_of_each_resample(name, kind):
    own = getattr(pytest.importorskip("sacrebleu.metrics", reason=REASON), kind)()
    metric, parts = of(name)
    expected = own.corpus_score(ANSWERS, [REFERENCES]).score / 100
    assert metric.value(parts.sum(0)) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.05
    rows = [0, 0, 1, 3]  # as a resample may draw them
    again = [[texts[row] for row in rows] for texts in (ANSWERS, REFERENCES)]
    expected = own.corpus_score(again[0], [again[1]]).score / 100
    assert metric.value(parts[rows].sum(0)) == pytest.approx(expected, rel=1e-12)
    assert metric.value(of(name, REFERENCES)[1].sum(0)) == pytest.approx(1)
    low, high = intervals.interval(metric.value, np.tile(parts, (2, 1)))
    assert 0 <= low < metric.value(parts.sum(0)) < high < 1
    worse = of(name, [""] * 4)[1]
    assert intervals.change(metric.value, parts, worse)["value"] == -metric.value(parts.sum(0))


@pytest.mark.parametrize(("name", "module"), [("rougeL", "rouge_score.rouge_scorer"), ("bleu", "sacrebleu.metrics")])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch, name, module):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        InputError, match=r"is not installed:  pip install 'sacrebleu[<>=.,\d]+' 'rouge-score[<>=.,\d]+'"
    ):
        answer_metrics.named(name, ())
