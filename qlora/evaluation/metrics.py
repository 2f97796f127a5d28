"""What is measured of a model: loss on held-out rows, and distance between two models. Answers: answer_metrics.py."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ..data import IGNORE_INDEX
from ..system.events import progress

# B batch, T tokens, V vocab, N positions of all rows, P of one piece

POSITIONS_AT_ONCE = 16  # where copies of (positions, V) are made


def perplexity(loss):
    """Return exp(loss), and infinity where that overflows a float."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def losses(model, examples):
    """Return [(summed cross entropy in nats, trained tokens)] of each example, one at a time in float32."""
    found = []
    with progress("measuring the loss", len(examples), "rows") as advance:
        for example in examples:
            labels = torch.tensor(example.labels[1:], device=model.device)
            columns = (labels != IGNORE_INDEX).nonzero().flatten()
            ids = torch.tensor([example.input_ids], device=model.device)
            logits_TV = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits[0].float()
            found.append((F.cross_entropy(logits_TV, labels[columns], reduction="sum").item(), len(columns)))
            advance(1)
    return found


@torch.no_grad()
def log_probabilities(model, examples, columns):
    """Return, for each of `examples`, log softmax of the next-token logits after its positions `columns`, in order.

    (T, V) float32 on the CPU each, all from one forward pass.
    """
    found = []
    for logits_TV in logits(model, [example.input_ids for example in examples], columns):
        for piece_PV in logits_TV.split(POSITIONS_AT_ONCE):  # in place: there is no larger tensor
            piece_PV.copy_(F.log_softmax(piece_PV, -1))
        found.append(logits_TV.cpu())
    return found


@torch.no_grad()
def logits(model, rows, columns):
    """Return the next-token logits after the positions `columns` (ascending) of each of `rows` (token ids): (T, V) float32 each.

    One forward pass: shorter rows are padded on the right, where a causal model does not look, and only the wanted positions
    reach the head.
    """
    lengths = [len(row) for row in rows]
    ids_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    wanted_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    for number, (row, positions) in enumerate(zip(rows, columns, strict=True)):
        ids_BT[number, : lengths[number]] = torch.tensor(row)
        wanted_BT[number, list(positions)] = True
    ids_BT, wanted_BT = ids_BT.to(model.device), wanted_BT.to(model.device)
    head, width = model.get_output_embeddings(), ids_BT.shape[1]
    hook = head.register_forward_pre_hook(
        lambda module, args: args[0][:, -width:][wanted_BT][None]
    )  # behind virtual tokens
    try:
        logits_NV = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    return logits_NV.split([len(positions) for positions in columns])


def kl_divergence(live_TV, other_TV):
    """Return the summed KL(live || other) in nats of two sets of log probabilities, computed in float64.

    float64 because the terms cancel: at a KL of 1e-6 a float32 sum over 49,152 words keeps no digit.
    """
    total = 0.0
    for live_PV, other_PV in zip(live_TV.split(POSITIONS_AT_ONCE), other_TV.split(POSITIONS_AT_ONCE), strict=True):
        live_PV, other_PV = live_PV.double(), other_PV.double()
        total += (live_PV.exp() * (live_PV - other_PV)).sum().item()
    return total
