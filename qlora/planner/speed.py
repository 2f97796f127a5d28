"""An upper bound of tokens/s on a card: a roofline of compute and memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What a model computes. Numbers of weights: base (quantized or not, without head), lora, head; layers; and of
    attention, a layer: width, heads times head dim. positions: how many a row of images has in the mean, each of which every
    weight meets; 1 where rows are tokens."""

    base: int
    lora: int
    head: int
    layers: int
    attention_width: int
    quantized: bool
    positions: float = 1.0


def seconds(work, card, rows, length, scored, recomputed, attended=None):
    """Return the least seconds of a micro-batch forward and backward. recomputed: the share of layers that is checkpointed;
    attended: tokens of the document that a token is in, None for all of its row.

    A weight costs 2 FLOPs a token forward and 2 for the gradient of its input; the adapters' own gradients cost 2 more.
    Attention, causal: 2 T width forward for QK and PV, 2.5 times that backward (arXiv:2307.08691, sec. 4). A 4-bit weight is
    unpacked for the forward and once for the backward pass, by a kernel of its own: half a byte read, two written.
    """
    tokens, forwards = rows * length * work.positions, 1 + recomputed
    length = length * work.positions
    weights = work.base * (forwards + 1) + work.lora * (forwards + 2)
    flops = 2 * weights * tokens + 3 * 2 * work.head * scored
    flops += 2 * (attended or length) * work.attention_width * work.layers * tokens * (forwards + 2.5)
    unpacking = 2 * 2.5 * work.base if work.quantized else 0
    reading = 2 * work.base * (forwards + 1)
    return unpacking / card.bandwidth + max(flops / card.flops, reading / card.bandwidth)
