"""Metrics of answers against closed forms."""

import json

import pytest

from qlora.evaluation import answer_metrics
from qlora.system.errors import InputError


def value(metric, answers, references):
    return metric.value(answer_metrics.parts(metric, answers, references).sum(0))


def test_exact_match_looks_past_white_space_at_the_ends_only():
    assert value(answer_metrics.ExactMatch(), ["a", " b\n", "c c", "d"], ["a", "b", "cc", "D"]) == 0.5


def test_json_fields_are_compared_as_values():
    references = ['{"a": 1, "b": "x"}', '{"a": 2, "b": "y"}']
    metric = answer_metrics.fitting(references)["json_fields"]
    assert value(metric, ['{"b":"x","a":1}', '{"a": 2, "b": "z"}'], references) == 0.75
    assert value(metric, ["not json", "[1]"], references) == 0
    assert "json_fields" not in answer_metrics.fitting(["plain", "text"])
    assert "json_fields" not in answer_metrics.fitting(['{"a": 1}', "{}"])


@pytest.mark.parametrize(("answer", "right"), [("1.0", 1), ("true", 0), ("[1]", 0), ('"1"', 0), ("null", 0)])
def test_true_is_no_1_in_json(answer, right):
    def score(answer, reference):
        return value(answer_metrics.JsonFields(), [f'{{"a": {answer}}}'], [f'{{"a": {reference}}}'])

    assert score(answer, "1") == right
    assert score(f'[{{"b": [{answer}]}}]', '[{"b": [1]}]') == right
    assert score("true", "true") == 1


def test_a_missing_field_is_not_right_even_if_null_is_expected():
    assert value(answer_metrics.JsonFields(), ["{}"], ['{"a": null}']) == 0


def test_macro_f1_is_the_mean_of_each_class_whatever_their_size():
    references = ["yes"] * 3 + ["no"]
    # yes: 2 right, 1 missed, 1 wrong: F1 = 4/6; no: 0 right
    answers = ["yes", "yes", "perhaps", "yes"]
    metric = answer_metrics.named("macro_f1", references)
    assert value(metric, answers, references) == pytest.approx((4 / 6 + 0) / 2)
    assert value(metric, references, references) == 1


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"no metric 'f1'; there are exact_match, json_fields, macro_f1"):
        answer_metrics.named("f1", [])


def test_the_parts_of_a_row_are_kept_as_json_and_found_again():
    metric = answer_metrics.named("macro_f1", [f"class {number}" for number in range(100)])
    for row in (metric.row("class 3", "class 90"), metric.row("class 3", "class 3"), (1.0, 0.0)):
        text = json.dumps(answer_metrics.to_json(row))
        assert len(text) < 100
        assert answer_metrics.from_json(json.loads(text)).tolist() == list(row)
