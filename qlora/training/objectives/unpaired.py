"""The objective of unpaired answers: KTO, and APO without pairs; by transformers' Trainer. One sequence a row.

KTO compares the reward of an answer with how far the model is from its reference: the mean of log p less that of the reference
over prompts with answers to other prompts, at least 0. trl takes it over a micro-batch, so that its loss depends on how rows are
put together; here it is over all rows of the step, measured before its first backward pass. With the whole step as one
micro-batch the two are equal, which is a test.

# P rows
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ... import data
from ..out_of_memory import Moment
from . import preference_losses
from .preference import Preference, Referred, Seen, Trainer


@dataclass(frozen=True)
class UnpairedPreference(Preference):
    """A batch has "good" (P), whether the answer of each row is, and "kl" (P), the distance that it is compared with."""

    seen: Seen = field(default_factory=lambda: SeenUnpaired())

    each: ClassVar[int] = 1
    watched_name = "the loss of the good answers"

    @property
    def kind(self):
        return UnpairedTrainer

    @property
    def needs_kl(self):
        return self.section.loss_type == "kto"

    def referred(self, rows):
        """rows: data.Rows of data.Unpaired."""
        return ReferredUnpaired(rows, self.needs_kl)

    def compared(self, trainer):
        found = super().compared(trainer)
        others = {f"{name}_mismatched": rows.mismatched for name, rows in found.items() if self.needs_kl}
        return found | others

    def collate(self, rows):
        """As of Preference, with good and kl."""
        numbers, examples, known = zip(*rows, strict=True)
        kl = torch.zeros(len(examples))
        return self.batch_of(examples, numbers, known) | {
            "good": torch.tensor([one.good for one in examples]),
            "kl": kl,
        }

    def loss(self, model, inputs, num_items):
        logps_P1, counts_P1 = self.log_probabilities(model, inputs)
        logps_P, good_P = logps_P1[:, 0], inputs["good"].to(logps_P1.device)
        ratios_P = logps_P - inputs["reference"][:, 0].to(logps_P.device)
        kl_P = inputs["kl"].to(logps_P.device)
        losses_P = preference_losses.unpaired(self.section, ratios_P, good_P, kl_P)
        self.seen.add(self.section.beta * ratios_P.detach(), logps_P.detach(), counts_P1[:, 0], good_P, kl_P)
        return losses_P.sum() / (len(losses_P) if num_items is None else num_items)

    @torch.no_grad()
    def distance(self, trainer, rows, numbers, evaluates=False):
        """Return the mean over these rows of how much likelier an answer to another prompt is than to the reference, in nats, at
        least 0; 0 where the loss needs none.

        rows: ReferredUnpaired. numbers: of rows in it.
        """
        if not self.needs_kl:
            return 0.0
        model, mismatched, found = trainer.model, rows.mismatched, []
        training, moment = model.training, trainer.moment
        model.eval()
        try:
            together = self._together(np.asarray(mismatched.examples.lengths)[numbers], trainer, evaluates)
            for place, some in enumerate(together):
                rows_of_it = [int(numbers[at]) for at in some]
                batch = self.collate([mismatched[number] for number in rows_of_it])
                batch.pop("rows")
                batch = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
                when = f"in the distance from the reference, step {trainer.state.global_step + 1}"
                trainer.moment = Moment(when, batch, rows_of_it, evaluates)
                if trainer.processes.owns(place):
                    found += trainer.economy.run(trainer, lambda part: self._summed_ratios(model, part))
            if trainer.processes.lacks_one_of(len(together)):
                self._summed_ratios(model, dict(trainer.moment.inputs))
        finally:
            model.train(training)
            trainer.moment = moment
        (total,) = trainer.processes.sums([float(torch.stack(found).sum()) if found else 0.0])
        mean = total / len(numbers)
        return max(0.0, mean) if math.isfinite(mean) else math.nan  # a step whose loss is not finite is skipped

    def _together(self, lengths, trainer, evaluates):
        """Return lists of the places of rows that go through the model at once."""
        if self.tokens is not None:
            return data.joined_parts(lengths, self.tokens, self.parts)
        size = trainer.args.per_device_eval_batch_size if evaluates else trainer.args.per_device_train_batch_size
        return [range(at, min(at + size, len(lengths))) for at in range(0, len(lengths), size)]

    def _summed_ratios(self, model, part):
        logps_P1, _ = self.log_probabilities(model, part)
        return (logps_P1 - part["reference"].to(logps_P1.device)).sum()


class ReferredUnpaired(Referred):
    """Referred rows of one sequence. mismatched: the same of their prompts with other rows' answers; None where not needed."""

    def __init__(self, rows, needs_kl):
        super().__init__(rows, 1)
        self.mismatched = Referred(data.Mismatched(rows), 1) if needs_kl else None


class UnpairedTrainer(Trainer):
    """A Trainer that measures the distance from the reference before a step, and before an evaluation."""

    objective: Any
    held_out_distance = 0.0

    def get_batch_samples(self, *args, **kwargs):
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        numbers = [number for inputs in samples for number in inputs["rows"]]
        if numbers:
            distance = self.objective.distance(self, self.train_dataset, numbers)
            for inputs in samples:
                inputs["kl"] = torch.full_like(inputs["kl"], distance)
        return samples, num_items

    def evaluation_loop(self, *args, **kwargs):
        numbers = list(range(len(self.eval_dataset)))
        self.held_out_distance = self.objective.distance(self, self.eval_dataset, numbers, evaluates=True)
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # of an evaluation
            inputs = {**inputs, "kl": torch.full_like(inputs["kl"], self.held_out_distance)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class SeenUnpaired(Seen):
    """Sums since the last log, on the device: rewards, log probabilities and numbers of good rows, the same of bad ones, the
    distance of each row; None for none. step: of the good rows, as of Seen."""

    NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl")
    NUM_SUMS = 7

    def add(self, rewards_P, logps_P, counts_P, good_P, kl_P):
        """Rows whose numbers are not finite are left out: their step is too."""
        finite_P = rewards_P.isfinite() & logps_P.isfinite() & kl_P.isfinite()
        parts = []
        for of_P in (good_P & finite_P, ~good_P & finite_P):
            parts += [torch.where(of_P, one.double(), 0.0).sum() for one in (rewards_P, logps_P)] + [
                of_P.double().sum()
            ]
        found = torch.stack([*parts, torch.where(finite_P, kl_P.double(), 0.0).sum()])
        self._add([torch.where(good_P, one, 0) for one in (logps_P, counts_P)], found)

    def means(self, *sums):
        reward, logp, good, reward_bad, logp_bad, bad, kl = sums
        found = {}
        if good:
            found |= {"rewards/chosen": reward / good, "logps/chosen": logp / good}
        if bad:
            found |= {"rewards/rejected": reward_bad / bad, "logps/rejected": logp_bad / bad}
        if good and bad:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found | ({"kl": kl / (good + bad)} if good + bad else {})
