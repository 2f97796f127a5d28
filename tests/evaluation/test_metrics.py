"""Metrics against closed forms."""

import math

import pytest
import torch

from qlora.evaluation import metrics


def test_kl_of_two_known_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    assert metrics.kl_divergence(p.log(), q.log()) == pytest.approx(expected, rel=1e-6)
    assert metrics.kl_divergence(p.log(), p.log()) == 0


def test_perplexity_is_exp_of_the_loss_and_does_not_overflow():
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e4) == math.inf
