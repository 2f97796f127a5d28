"""The order of training rows: of like length together."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that is that of the epoch's number, whenever training began."""

    epoch = 0

    def __init__(self, rows_per_step, lengths, seed):
        super().__init__(rows_per_step, lengths=lengths, generator=torch.Generator())
        self.seed = seed

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
