"""How likely a model thinks a continuation of a text is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..system.events import progress
from . import metrics
from .batches import in_batches


def log_likelihoods(
    model, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, what="scoring"
) -> list[float]:
    """Return log p(continuation | context) in nats of each pair (context, continuation) of token ids, neither empty.

    Pairs that give the model the same tokens are one row, as are the letters of one question: the last token is only predicted.
    The longest go first, so that what does not fit shows at the beginning. what: the progress is of.

    Raises:
        DoesNotFit: there is no memory for one row by itself.
    """
    numbers: dict[tuple, list[int]] = {}  # what the model is given -> pairs
    for number, (context, continuation) in enumerate(pairs):
        numbers.setdefault((*context, *continuation[:-1]), []).append(number)
    rows = sorted(numbers, key=len, reverse=True)
    found = [0.0] * len(pairs)
    with progress(what, len(rows), "rows") as advance:

        def score(some):
            first = [min(len(pairs[number][0]) for number in numbers[row]) - 1 for row in some]
            columns = [range(begin, len(row)) for begin, row in zip(first, some, strict=True)]
            for begin, row, logits_TV in zip(first, some, metrics.logits(model, some, columns), strict=True):
                for number in numbers[row]:
                    context, continuation = pairs[number]
                    found[number] = _summed(logits_TV[len(context) - 1 - begin :], continuation)
            advance(len(some))

        in_batches(score, rows, batch_size)
    return found


def _summed(logits_TV, continuation):
    """Return the summed log probability of token ids in float32, T of them."""
    ids_T = torch.tensor(continuation, device=logits_TV.device)
    picked_T = logits_TV.gather(-1, ids_T[:, None])[:, 0] - logits_TV.logsumexp(-1)
    return float(picked_T.sum())
