"""Metrics against closed forms."""

import math

import pytest
import torch

from qlora.evaluation import metrics


def test_exact_match_looks_past_white_space_at_the_ends_only():
    assert metrics.exact_match(["a", " b\n", "c c", "d"], ["a", "b", "cc", "D"]) == 0.5


def test_json_fields_are_compared_as_values():
    references = ['{"a": 1, "b": "x"}', '{"a": 2, "b": "y"}']
    assert metrics.json_fields(['{"b":"x","a":1}', '{"a": 2, "b": "z"}'], references) == 0.75
    assert metrics.json_fields(["not json", "[1]"], references) == 0
    assert metrics.json_fields(["x", "y"], ["plain", "text"]) is None


def test_a_missing_field_is_not_right_even_if_null_is_expected():
    assert metrics.json_fields(["{}"], ['{"a": null}']) == 0


def test_kl_of_two_known_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    assert metrics.kl_divergence(p.log(), q.log()) == pytest.approx(expected, rel=1e-6)
    assert metrics.kl_divergence(p.log(), p.log()) == 0


def test_perplexity_is_exp_of_the_loss_and_does_not_overflow():
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e4) == math.inf
