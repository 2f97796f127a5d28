"""transformers' Trainer, reliable, for objectives that compute their loss themselves."""

from __future__ import annotations

from typing import Any

import transformers
from torch.utils.data import Dataset

from .reliable_trainer import Reliable


class PlainTrainer(Reliable, transformers.Trainer):
    """The loss of a micro-batch is divided by the items of the whole step, as the objective counts them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, *args, **kwargs):
        samples, _ = super().get_batch_samples(*args, **kwargs)
        return samples, sum(self.objective.num_items(inputs) for inputs in samples).to(self.args.device)


class Numbered(Dataset):
    """A sequence of examples as (number, example), for a DataLoader."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index) -> Any:
        return int(index), self.examples[int(index)]
