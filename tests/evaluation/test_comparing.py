"""Which variant is best: said where the difference is more than chance, on rows and seeds with known means."""

import numpy as np
import pytest

from qlora.evaluation import comparing


def ratio(sums):
    return sums[0] / sums[1]


def runs(variant, *values_of_seeds, **settings):
    """Return the Runs of a variant whose rows have these values, a list for each seed."""
    return comparing.Runs(
        variant, settings, np.array([[(value, 1.0) for value in values] for values in values_of_seeds])
    )


def right(share, count=200):
    return [1.0] * round(share * count) + [0.0] * (count - round(share * count))


def test_means_and_spread_are_those_of_the_seeds():
    [one] = comparing.summary([runs("a", right(0.5), right(0.7))], ratio, False)
    assert one["mean"] == pytest.approx(0.6)
    assert one["spread"] == pytest.approx(0.1 * 2**0.5)
    assert one["low"] < 0.5 + 0.02  # seeds are drawn again too
    assert one["high"] > 0.7 - 0.02
    [alone] = comparing.summary([runs("a", right(0.5))], ratio, False)
    assert (alone["spread"], alone["best"]) == (None, True)


def test_the_best_is_marked_where_it_is_ahead_by_more_than_chance():
    a, b = comparing.summary([runs("a", right(0.9), right(0.91)), runs("b", right(0.5), right(0.52))], ratio, False)
    assert (a["best"], b["best"]) == (True, False)
    assert b["behind"]["value"] == pytest.approx(0.905 - 0.51)
    assert 0 < b["behind"]["low"] < b["behind"]["value"] < b["behind"]["high"]
    a, b = comparing.summary([runs("a", right(0.52)), runs("b", right(0.5)[::-1])], ratio, False)
    assert a["best"] == b["best"] == comparing.NO_DIFFERENCE


def test_a_small_difference_on_every_row_is_more_than_chance():
    hard = np.random.default_rng(0).normal(3, 2, 100)
    a, b = comparing.summary([runs("a", hard), runs("b", hard + 0.05)], ratio, True)
    assert (a["best"], b["best"]) == (True, False)


def test_a_difference_less_than_that_between_seeds_is_none():
    values = np.full(100, 1.0)
    a, b = comparing.summary([runs("a", values, values + 1), runs("b", values + 0.1, values + 0.9)], ratio, True)
    assert a["best"] == b["best"] == comparing.NO_DIFFERENCE


def test_each_variant_stands_with_its_best_setting():
    found = comparing.summary(
        [runs("a", right(0.2), rate=1), runs("a", right(0.8), rate=2), runs("b", right(0.5), rate=1)], ratio, False
    )
    assert [one["chosen"] for one in found] == [False, True, True]
    assert [one["best"] for one in found] == [False, True, False]
    found = comparing.summary([runs("a", right(0.2), rate=1), runs("a", right(0.8), rate=2)], ratio, True)
    assert [one["chosen"] for one in found] == [True, False]


def test_of_a_few_rows_no_difference_is_shown():
    for num_rows, best in ((4, comparing.NO_DIFFERENCE), (5, True)):
        a, _ = comparing.summary([runs("a", np.full(num_rows, 0.9)), runs("b", np.full(num_rows, 0.5))], ratio, False)
        assert a["best"] == best
