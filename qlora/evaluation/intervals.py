"""How sure a number is: 95 % intervals over rows.

A metric is a function of sums over rows (right answers and answers, nats and tokens), so that each row has a few numbers, its
parts, and a resampled metric costs a product of matrices. N rows, K parts, R resamples.

Shares of rows have Wilson's interval (Wilson 1927), which is right at 0 % and 100 % too, and changes of them Bonett and Price's
(2012), which is right where no row has changed; all else the percentile bootstrap (Efron 1979). Two things measured on the same
rows are resampled together: what differs between rows and not between the two does not hide a difference. A few rows that are
drawn again say nothing of others: below FEWEST_ROWS a bootstrap is no interval, and both ends are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

RESAMPLES = 2000
FEWEST_ROWS = 5
OF_LOSS = ("loss", "perplexity", "bits_per_byte")  # lower is better
MARGIN = "preference_margin"  # nats
JUDGED_MARGIN = "desirable_margin"  # nats a token
_AT_ONCE = 2**22  # counts in memory: 32 MiB
_Z = 1.959963984540054  # of 95 %, two-sided


Ends = tuple[float | None, float | None]  # both None: there are too few rows for an interval


def ratio(sums) -> float:
    """Return the ratio of two sums: a share of right answers, nats a token, bits a byte."""
    return float(sums[0] / sums[1])


def wilson(right: float, total: int) -> tuple[float, float]:
    """Return the interval of the share right / total."""
    share, square = right / total, _Z * _Z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = _Z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    # exactly 0 and 1 at the ends, where rounding may leave them to the wrong side of the share
    return (0.0 if right == 0 else middle - half), (1.0 if right == total else middle + half)


def paired(before_N: np.ndarray, after_N: np.ndarray) -> Ends:
    """Return the interval of the change of a share, of what is right (1) or not (0) in the same rows before and after."""
    total, change = len(before_N) + 2, after_N - before_N
    lost, gained = (int((change < 0).sum()) + 1) / total, (int((change > 0).sum()) + 1) / total
    middle = gained - lost
    half = _Z * math.sqrt((gained + lost - middle * middle) / total)
    return max(-1.0, middle - half), min(1.0, middle + half)


def of_error(value: float, error: float) -> tuple[float, float]:
    """Return the interval of a number with this standard error."""
    return value - _Z * error, value + _Z * error


def of_share(parts_N2: np.ndarray) -> bool:
    """True if parts are (right or not, 1) for each row, so that Wilson's interval is that of their ratio."""
    return parts_N2.shape[1] == 2 and bool((parts_N2[:, 1] == 1).all() and np.isin(parts_N2[:, 0], (0, 1)).all())


def _is_all_or_none(parts_NK: np.ndarray) -> bool:
    """True if parts are counts, (right, of so many) for each row, and all are right or none is."""
    if parts_NK.shape[1] != 2 or (parts_NK % 1).any():
        return False
    right_N, count_N = parts_NK.T
    return bool(count_N.any() and ((right_N == count_N).all() or (right_N == 0).all()))


def interval(value: Callable, parts_NK: np.ndarray) -> Ends:
    """Return (low, high) of `value`, a function of the K sums over rows."""
    if of_share(parts_NK):
        right, total = parts_NK.sum(0)
        return wilson(right, int(total))
    if len(parts_NK) < FEWEST_ROWS:
        return None, None
    if _is_all_or_none(parts_NK):  # resampled rows would all say the same
        right = bool(parts_NK[:, 0].any())
        return wilson(right * len(parts_NK), len(parts_NK))
    return percentiles([value(sums) for sums in resampled(parts_NK)])


def difference(value: Callable, before_NK: np.ndarray, after_NK: np.ndarray) -> Ends:
    """Return (low, high) of value(after) - value(before), both on the same rows in the same order."""
    if of_share(before_NK) and of_share(after_NK):
        return paired(before_NK[:, 0], after_NK[:, 0])
    if len(before_NK) < FEWEST_ROWS:
        return None, None
    num_parts = before_NK.shape[1]
    both = resampled(np.concatenate([before_NK, after_NK], axis=1))
    return percentiles([value(sums[num_parts:]) - value(sums[:num_parts]) for sums in both])


def change(value: Callable, before_NK: np.ndarray, after_NK: np.ndarray) -> dict[str, float | None]:
    """Return {"value", "low", "high"} of value(after) - value(before), both on the same rows in the same order."""
    ends = difference(value, before_NK, after_NK)
    return with_interval(value(summed(after_NK)) - value(summed(before_NK)), *ends)


def summed(parts_NK: np.ndarray) -> np.ndarray:
    """Return the sums over rows, one row after another: what a loss was before there were parts, to the bit."""
    return np.add.accumulate(parts_NK)[-1]


def with_interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def is_share(name) -> bool:
    """True if the metric `name` is a share of 1, shown in percent: all are but losses and margins, and lm-eval's TASK.METRIC,
    which are of all kinds."""
    return name not in (*OF_LOSS, MARGIN, JUDGED_MARGIN, "forgetting") and "." not in name


def change_in_columns(name, change) -> tuple[str, str]:
    """Return a change of the metric `name` and its interval as text; that of a share is in points, as 50 % to 55 % is no rise
    by 5 %."""
    of_share = is_share(name)
    value, low, high = (
        "" if change[key] is None else f"{100 * change[key]:+.1f}" if of_share else f"{change[key]:+.4f}"
        for key in ("value", "low", "high")
    )
    return value + " points" * of_share, f"{low} to {high}" if low else ""


def in_words(metric, digits=1, name=""):
    """Return a metric, a number or {"value", "low", "high"} of one, in words: 93.1%, or 93.1% (92.0% to 94.1%). name: of the
    metric, which may be no share."""
    form = f".{digits}%" if is_share(name) else ".4f"
    if not isinstance(metric, dict):
        return format(metric, form)
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    if low is None:  # of a loss, or written by an older version
        return format(value, form)
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def resampled(parts_NK: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield RESAMPLES times the K sums over N rows that are drawn with replacement; the same draws for the same N."""
    for counts in draws(len(parts_NK), seed):
        yield from counts @ parts_NK


def draws(num_rows: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield arrays (some, N) of how often each row is drawn, RESAMPLES in all."""
    generator = np.random.default_rng(seed)
    left, some = RESAMPLES, max(1, _AT_ONCE // num_rows)
    while left > 0:
        yield generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=min(some, left))
        left -= some


def percentiles(values) -> tuple[float, float]:
    """Return the ends of the middle 95 % of `values`."""
    low, high = np.percentile(np.asarray(values, float), (2.5, 97.5))
    return float(low), float(high)


def of_two_kinds(value: Callable, one_NK: np.ndarray, other_MK: np.ndarray) -> Ends:
    """Return (low, high) of value(sums of one, sums of other): two kinds of rows, each resampled by itself."""
    if min(len(one_NK), len(other_MK)) < FEWEST_ROWS:
        return None, None
    both = zip(resampled(one_NK), resampled(other_MK, seed=1), strict=True)
    return percentiles([value(*sums) for sums in both])


# ---- several runs: S seeds, each measured on the same N rows ---------------------------------------------------------


def of_runs(value: Callable, parts_SNK: np.ndarray) -> np.ndarray:
    """Return (RESAMPLES, S): `value` of each seed's run on the same resampled rows."""
    sums_RSK = (np.einsum("rn,snk->rsk", some, parts_SNK) for some in draws(parts_SNK.shape[1]))
    return np.array([[value(sums) for sums in sums_SK] for some in sums_RSK for sums_SK in some])


def over_seeds(of_runs_RS: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return (RESAMPLES,): the mean over seeds drawn with replacement, a draw for each resample."""
    num_resamples, num_seeds = of_runs_RS.shape
    chosen = np.random.default_rng(seed).integers(num_seeds, size=(num_resamples, num_seeds))
    return np.take_along_axis(of_runs_RS, chosen, axis=1).mean(axis=1)
