"""The processes that train together, one a card: what each holds, what it sends in a step, how long that takes at least.

Communication is bytes by the speed of the link: a lower bound, without latency. See docs/several_cards.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data import dealt_out

NETWORK = 0.8 * 1.25e9  # bytes a second: 10 Gb/s less a fifth, assumed between machines of which nobody has said more
NCCL_BYTES = 256 * 2**20  # buffers of its channels on each card: assumed, not measured
_LAYERS_WHOLE = (
    3  # of shares: the one at work, the next that is gathered already, and the copy that it is gathered into
)
_GATHERS = 2  # a micro-batch: forward, backward; a checkpointed layer is computed again while it is whole


@dataclass(frozen=True)
class Together:
    """count: how many. shares: memory.sharding, each holds a share of the codes and of the masters. offload: the codes are in CPU
    memory. link: bytes a second that a card sends, None where it is not known; host_link: that it gets from CPU memory."""

    count: int = 1
    shares: bool = False
    offload: bool = False
    link: float | None = None
    host_link: float | None = None

    def held_elsewhere(self, codes):
        """Return by how many bytes each holds less of the codes at its peak, below 0 for a model of few layers. codes: bytes
        of each 4-bit weight, layer by layer."""
        if not self.shares:
            return 0
        layers = [sum(layer) for layer in codes]
        kept = 0 if self.offload else sum(layers) / self.count
        return round(sum(layers) - kept - _LAYERS_WHOLE * max(layers))

    def pinned_bytes(self, codes):
        """Return the bytes of CPU memory that the codes of each take: torch rounds a pinned tensor up to a power of two."""
        shares = [-(-one // self.count) for layer in codes for one in layer] if self.offload else []
        return sum(1 << (share - 1).bit_length() for share in shares if share)

    def mastered(self, trained):
        """Return those of the tensors with `trained` numbers each that the process with most has masters of."""
        if not self.shares:
            return trained
        owners = dealt_out(trained, self.count)
        return trained[owners == np.bincount(owners, weights=trained).argmax()]


ALONE = Together()


@dataclass(frozen=True)
class Step:
    """A step of the process with most micro-batches. Seconds are at least that, None where a card or link is not known; what is
    sent beside the computation is in communication_seconds and not in seconds."""

    micro_batches: float
    sent_bytes: int
    compute_seconds: float | None
    communication_seconds: float | None
    seconds: float | None


def step_of(together: Together, outline, micro_batches, seconds) -> Step:
    """Return the Step of so many `micro_batches` of all processes, each of which takes `seconds` (None: not known)."""
    count, numbers = together.count, float(outline.trained.sum())
    if count == 1:
        compute = None if seconds is None else micro_batches * seconds
        return Step(micro_batches, 0, compute, compute and 0.0, compute)
    many = -(-round(micro_batches) // count)
    codes = sum(map(sum, outline.codes))
    gathered, summed, after = 0, 0, all_reduce_bytes(numbers, count)
    if together.shares:  # gradients go to the owners of the masters, and their new weights to all
        gathered, summed = _GATHERS * gather_bytes(codes, count), gather_bytes(4 * numbers, count)
        after = gather_bytes(outline.trained_bytes, count)
    sent = many * (gathered + summed) + after
    if seconds is None or not together.link:
        return Step(many, sent, None if seconds is None else many * seconds, None, None)
    gathering = gathered / together.link
    if together.offload:  # from CPU memory first, by the same lanes most often
        gathering += _GATHERS * codes / count / (together.host_link or together.link)
    later = summed / together.link
    communication = many * (gathering + later) + after / together.link
    # gathered while the layer before computes
    whole = many * (max(seconds, gathering) + later) + after / together.link
    return Step(many, sent, many * seconds, communication, whole)


def all_reduce_bytes(numbers, count):
    """Return the bytes that each of `count` processes sends to sum so many float32 numbers over all, around a ring."""
    return round(4 * numbers * 2 * (count - 1) / count)


def gather_bytes(num_bytes, count):
    """Return the bytes that each of `count` processes sends to give all their equal shares of `num_bytes` to all, once; or to
    sum as many, so that each has the sum of its share."""
    return round(num_bytes * (count - 1) / count)
