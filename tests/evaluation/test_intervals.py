"""Intervals against closed forms, and against what they promise: the truth lies in 95 % of them."""

import numpy as np
import pytest

from qlora.evaluation import intervals
from qlora.jobs.reporting import verdicts


def ratio(sums):
    return sums[0] / sums[1]


def shares(right, total):
    return np.array([[1.0, 1.0]] * right + [[0.0, 1.0]] * (total - right))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998, table I, method 3 (score, without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_a_share_is_wilsons(right, total, low, high):
    assert intervals.interval(ratio, shares(right, total)) == pytest.approx((low, high), abs=5e-5)


def test_a_share_of_all_reaches_one_and_no_further():
    low, high = intervals.interval(ratio, shares(50, 50))
    assert high == 1
    assert 0.92 < low < 0.94


def test_a_bootstrapped_mean_has_the_interval_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = intervals.interval(ratio, np.stack([values, np.ones(400)], 1))
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08 * half)


def test_shares_means_and_ratios_have_scipys_intervals():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for right, total in ((7, 40), (40, 40), (1, 250)):
        expected = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
        assert intervals.interval(ratio, shares(right, total)) == pytest.approx((expected.low, expected.high), rel=1e-9)
    generator = np.random.default_rng(4)
    nats, tokens = generator.gamma(2.0, 3.0, 60), generator.integers(1, 40, 60).astype(float)
    asked = {"n_resamples": 2000, "vectorized": True, "paired": True, "method": "percentile", "rng": generator}
    expected = stats.bootstrap((nats, tokens), lambda x, n, axis: x.sum(axis) / n.sum(axis), **asked)
    low, high = intervals.interval(ratio, np.stack([nats, tokens], 1))
    # the ends of a bootstrap are random themselves: of 2,000 resamples some 3 % of the width
    width = high - low
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.1 * width)
    better = nats - generator.gamma(1.0, 0.5, 60)
    expected = stats.bootstrap((better - nats,), np.mean, **asked).confidence_interval
    parts = [np.stack([values, np.ones(60)], 1) for values in (nats, better)]
    assert intervals.difference(ratio, *parts) == pytest.approx(
        tuple(expected), abs=0.1 * (expected.high - expected.low)
    )


def test_the_truth_lies_in_about_95_of_100_intervals():
    generator, inside = np.random.default_rng(2), 0
    for _ in range(100):
        values = generator.exponential(1.0, 80)
        low, high = intervals.interval(ratio, np.stack([values, np.ones(80)], 1))
        inside += low <= 1 <= high
    assert 88 <= inside <= 99


def test_what_differs_between_rows_alone_does_not_hide_a_difference():
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 5, 60)  # rows differ much
    before = np.stack([hard, np.ones(60)], 1)
    after = np.stack([hard - 0.5 + generator.normal(0, 0.1, 60), np.ones(60)], 1)  # all a little better
    low, high = intervals.difference(ratio, before, after)
    assert -0.6 < low < high < -0.4
    assert intervals.difference(ratio, before, before) == (0, 0)


def test_resampling_many_rows_takes_little_memory_at_a_time():
    sizes = [counts.shape for counts in intervals.draws(10_000)]
    assert sum(rows for rows, _ in sizes) == intervals.RESAMPLES
    assert max(rows * columns for rows, columns in sizes) <= 2**22


def test_a_change_of_a_share_is_in_points_and_that_of_a_loss_in_nats():
    change = {"value": 0.0571, "low": -0.012, "high": 0.126}
    assert intervals.change_in_columns("exact_match", change) == ("+5.7 points", "-1.2 to +12.6")
    assert intervals.change_in_columns("loss", change) == ("+0.0571", "-0.0120 to +0.1260")
    assert intervals.change_in_columns("loss", change | {"low": None, "high": None}) == ("+0.0571", "")


def test_a_change_of_a_share_has_an_interval_where_no_row_has_changed():
    before = np.array([[1.0, 1.0], [0.0, 1.0]] * 3)
    low, high = intervals.difference(intervals.ratio, before, before)
    # Bonett and Price: (0 + 1) / (6 + 2) each way
    assert (low, high) == pytest.approx((-1.959964 * (0.25 / 8) ** 0.5, 1.959964 * (0.25 / 8) ** 0.5))
    gained = before.copy()
    gained[:, 0] = 1
    low, high = intervals.difference(intervals.ratio, before, gained)
    assert low < 0.5 < high < 1


def test_the_true_change_of_a_share_lies_in_about_95_of_100_intervals():
    generator, hits = np.random.default_rng(0), 0
    for _ in range(400):
        kind = generator.choice(4, size=60, p=[0.5, 0.25, 0.2, 0.05])  # right in both, neither, gained, lost
        before, after = np.isin(kind, (0, 3)).astype(float), np.isin(kind, (0, 2)).astype(float)
        low, high = intervals.paired(before, after)
        hits += low <= 0.15 <= high
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_a_few_rows_that_are_drawn_again_are_no_interval(num_rows):
    losses = np.stack([np.arange(1.0, num_rows + 1) * 1.1, np.full(num_rows, 3.0)], 1)
    found = [
        intervals.interval(intervals.ratio, losses),
        intervals.difference(intervals.ratio, losses, losses - [0.1, 0]),
        intervals.of_two_kinds(lambda one, other: one[0] - other[0], losses, losses),
    ]
    assert [None in ends for ends in found] == [num_rows < 5] * 3
    change = intervals.change(intervals.ratio, losses, losses - [0.1, 0])
    assert ("too few rows for an interval" in verdicts.change_in_words("loss", change)) == (num_rows < 5)
    assert (verdicts._direction("loss", change) == verdicts.NOT_SHOWN) == (num_rows < 5)


@pytest.mark.parametrize(("right", "expected"), [(0, (0, 0.3244)), (3, (0.6756, 1))])
def test_fields_of_which_all_or_none_are_right_have_an_interval(right, expected):
    """8 rows with 3 fields each: 0 % to 0 % would be sure of what 8 rows do not say."""
    parts = np.tile([float(right), 3.0], (8, 1))
    assert intervals.interval(intervals.ratio, parts) == pytest.approx(expected, abs=1e-4)
