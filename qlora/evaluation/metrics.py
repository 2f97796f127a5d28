"""What is measured of a model: loss on held-out rows, distance between two models, and whether answers are right."""

from __future__ import annotations

import json
import math

import torch
from torch.nn import functional as F

from ..data import IGNORE_INDEX

# B batch, T tokens, V vocab, N positions of all rows, P of one piece

POSITIONS_AT_ONCE = 16  # where copies of (positions, V) are made


def exact_match(answers, references):
    """Return the share of answers equal to their reference, white space at the ends aside."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(references)


def json_fields(answers, references):
    """Return the share of the references' fields that the answers have right, or None if a reference is no object.

    Compared as JSON values, so the order of keys and white space do not matter; an answer that is not an object has
    no field right.
    """
    expected = [_object(reference) for reference in references]
    if not all(expected):
        return None
    right = total = 0
    for answer, fields in zip(answers, expected, strict=True):
        found = _object(answer)
        right += sum(key in found and found[key] == value for key, value in fields.items())
        total += len(fields)
    return right / total


def _object(text):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def task_metrics(answers, references):
    """Return {name: value in 0..1} of the metrics that fit the references."""
    found = {"exact_match": exact_match(answers, references), "json_fields": json_fields(answers, references)}
    return {name: value for name, value in found.items() if value is not None}


def perplexity(loss):
    """Return exp(loss), and infinity where that overflows a float."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def mean_loss(model, examples):
    """Return (mean cross entropy in nats over the trained tokens, their count), one row at a time in float32."""
    total, count = 0.0, 0
    for example in examples:
        labels = torch.tensor(example.labels[1:], device=model.device)
        columns = (labels != IGNORE_INDEX).nonzero().flatten()
        ids = torch.tensor([example.input_ids], device=model.device)
        logits_TV = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits[0].float()
        total += F.cross_entropy(logits_TV, labels[columns], reduction="sum").item()
        count += len(columns)
    return total / count, count


@torch.no_grad()
def log_probabilities(model, examples, columns):
    """Return, for each of `examples`, log softmax of the next-token logits after its positions `columns` (a range).

    (T, V) float32 on the CPU each, all from one forward pass: shorter rows are padded on the right, where a causal model
    does not look, and only the wanted positions reach the head.
    """
    lengths = [len(example.input_ids) for example in examples]
    ids_BT = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    wanted_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for row, (example, positions) in enumerate(zip(examples, columns, strict=True)):
        ids_BT[row, : lengths[row]] = torch.tensor(example.input_ids)
        wanted_BT[row, positions.start : positions.stop] = True
    ids_BT, wanted_BT = ids_BT.to(model.device), wanted_BT.to(model.device)
    head, width = model.get_output_embeddings(), ids_BT.shape[1]
    hook = head.register_forward_pre_hook(
        lambda module, args: args[0][:, -width:][wanted_BT][None]
    )  # behind virtual tokens
    try:
        logits_NV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    for piece_PV in logits_NV.split(POSITIONS_AT_ONCE):  # in place: there is no larger tensor
        piece_PV.copy_(F.log_softmax(piece_PV, -1))
    return logits_NV.cpu().split([len(positions) for positions in columns])


def kl_divergence(live_TV, other_TV):
    """Return the summed KL(live || other) in nats of two sets of log probabilities, computed in float64.

    float64 because the terms cancel: at a KL of 1e-6 a float32 sum over 49,152 words keeps no digit.
    """
    total = 0.0
    for live_PV, other_PV in zip(live_TV.split(POSITIONS_AT_ONCE), other_TV.split(POSITIONS_AT_ONCE), strict=True):
        live_PV, other_PV = live_PV.double(), other_PV.double()
        total += (live_PV.exp() * (live_PV - other_PV)).sum().item()
    return total
