"""What is to stay free for all that the rehearsal has not seen: learned from how far off the plan was, and from the allocator."""

from __future__ import annotations

from dataclasses import dataclass

from ..system import memory

# of the memory that a training may have; other micro-batches, an evaluation and the optimizer make other holes
FLOOR = 0.02


@dataclass
class Reserve:
    """limit_bytes: what the training may hold at most, predicted_bytes: what the plan expects, both in the terms of memory.Peak;
    None: nobody knows. bytes: what is to stay free, once there was a rehearsal."""

    limit_bytes: int | None = None
    predicted_bytes: int | None = None
    bytes: int | None = None

    def learn(self, measured):
        """Take in the peak of a rehearsal; return the bytes that are left beside it, None where there is no limit.

        A plan that was too low for the rehearsal is likely too low for what was not rehearsed. One that was too high may have
        its peak there: nothing is learned from that.
        """
        if self.limit_bytes is None:
            return None
        holes = memory.fragmented_bytes()
        missed = measured - (measured if self.predicted_bytes is None else self.predicted_bytes)
        self.bytes = round(max(FLOOR * self.limit_bytes, missed, holes))
        return self.limit_bytes - measured - holes
