"""Which of several variants is best, and whether that can be said: means over seeds, their spread, paired intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import intervals


@dataclass(frozen=True)
class Runs:
    """The finished runs of one variant with one setting, one for each of S seeds, on the same N rows.

    settings: {field: value}. parts_SNK: of the metric, see answer_metrics.
    """

    variant: str
    settings: Mapping[str, Any]
    parts_SNK: np.ndarray


def summary(all_runs: Sequence[Runs], value: Callable, lower_is_better: bool) -> list[dict]:
    """Return {"variant", "settings", "seeds", "mean", "spread", "low", "high", "chosen", "behind", "best"} of each of `all_runs`.

    mean: of the metric over seeds; spread: its standard deviation over seeds, None with one seed; low, high: of 95 %, rows
    and seeds resampled. chosen: this setting has the best mean of its variant. Of chosen ones, behind is the {"value", "low",
    "high"} of what is missing to the variant with the best mean, on the same resampled rows, None for that one; best is
    True for that one if it is ahead of all others by more than chance, "no difference shown" for it and for those that may be
    as good if not, else False. Of fewer rows than intervals.FEWEST_ROWS no difference is shown.
    """
    sign = -1.0 if lower_is_better else 1.0
    drawn = [intervals.of_runs(value, runs.parts_SNK) for runs in all_runs]
    # other seeds than another variant's: those are independent
    means_R = [intervals.over_seeds(values_RS, number) for number, values_RS in enumerate(drawn)]
    exact = [[value(parts.sum(0)) for parts in runs.parts_SNK] for runs in all_runs]
    found: list[dict] = []
    for runs, values, resampled in zip(all_runs, exact, means_R, strict=True):
        low, high = intervals.percentiles(resampled)
        found.append(
            {
                "variant": runs.variant,
                "settings": dict(runs.settings),
                "seeds": len(values),
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "low": low,
                "high": high,
                "chosen": False,
                "behind": None,
                "best": False,
            }
        )
    by_variant: dict[str, int] = {}
    for number, one in enumerate(found):
        before = by_variant.get(one["variant"])
        if before is None or sign * one["mean"] > sign * found[before]["mean"]:
            by_variant[one["variant"]] = number
    chosen = list(by_variant.values())
    first = max(chosen, key=lambda number: sign * found[number]["mean"])
    enough = all(runs.parts_SNK.shape[1] >= intervals.FEWEST_ROWS for runs in all_runs)
    apart = enough
    for number in chosen:
        found[number]["chosen"] = True
        if number != first:
            low, high = intervals.percentiles(sign * (means_R[first] - means_R[number]))
            missing = sign * (found[first]["mean"] - found[number]["mean"])
            found[number]["behind"] = intervals.with_interval(missing, low, high)
            behind = low > 0 and enough
            found[number]["best"] = False if behind else NO_DIFFERENCE
            apart = apart and behind
    found[first]["best"] = True if apart else NO_DIFFERENCE
    return found


NO_DIFFERENCE = "no difference shown"
