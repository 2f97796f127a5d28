"""The objectives of preference pairs: DPO and its relatives, ORPO; by transformers' Trainer.

A pair is two sequences, its prompt with the chosen and with the rejected answer; log p of an answer is the sum over its trained
tokens. The reference of DPO is the model as it is when training begins: its log probabilities are computed once (reference.py),
and no second model is in memory. Losses are preference_losses.py's; equality with trl's trainers is a test.

trl's DPOTrainer of 1.16 pads all rows of a micro-batch, and runs the reference forward pass in every step or tokenizes and
caches by itself; here rows are joined, and masks are the house's.

# P pairs, B = 2 P sequences, T tokens, N trained positions, V vocabulary
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from ... import data
from ...data import IGNORE_INDEX
from ...kernels import loss as kernel
from .. import reference
from ..plain_trainer import Numbered, PlainTrainer
from ..private_names import on_one_device
from . import Objective, preference_losses
from .classification import lengths_of
from .supervised import join_rows, scored_positions

_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
_OF_ROWS = ("reference", "good", "kl")  # of a batch: a number or more for each row, of which a sequence or two are


@dataclass(frozen=True)
class Preference(Objective):
    """section: the recipe's, such as dpo. pad_token_id: of padded rows. joined, lean, tokens, parts: as of Supervised. seen: what
    was measured since the last log.

    A batch holds the sequences of a pair one after the other, the chosen one first. As in Supervised, `trained` (B, T) and
    `lengths` (B) are arrays on the host.
    """

    section: Any
    pad_token_id: int
    joined: bool = False
    lean: bool = False
    tokens: int | None = None
    parts: int = 1
    seen: Seen = field(default_factory=lambda: Seen())
    watched_name = "the loss of the chosen answers"

    each: ClassVar[int] = 2  # sequences of a row

    def trainer(self, model, rows, arguments, reliability):
        """rows: training.Rows of sequences of data.Pair."""
        self.without_dropout(model)
        return self.kind(
            model,
            self,
            dataclasses.replace(reliability, lengths=lengths_of(rows.train)),
            args=on_one_device(transformers.TrainingArguments(**arguments)),
            train_dataset=self.referred(rows.train),
            eval_dataset=self.referred(rows.held_out) if rows.held_out else None,
            data_collator=self.collate,
        )

    @property
    def kind(self):
        return Trainer

    def referred(self, rows):
        """Return the Referred of a sequence of rows."""
        return Referred(rows, self.each)

    def compared(self, trainer):
        """Return {name: Referred} of all whose log probabilities by the reference are to be known."""
        found = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
        return {name: rows for name, rows in found.items() if rows is not None}

    def without_dropout(self, model):
        """As trl does: a reference has none, and the difference would be noise."""
        for module in model.modules() if self.section.has_reference else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def begin(self, trainer):
        if self.section.has_reference:
            reference.settle(trainer, self)

    def collate(self, rows):
        """Return a batch of Referred rows: input_ids and labels (B, T), attention_mask where there is padding; joined: (1, T),
        with position_ids and segments. reference: (P, 2); rows: their numbers."""
        numbers, pairs, known = zip(*rows, strict=True)
        return self.batch_of([one for pair in pairs for one in (pair.chosen, pair.rejected)], numbers, known)

    def batch_of(self, sequences, numbers, known):
        batch = self._joined(sequences) if self.joined else self._padded(sequences)
        trained = (batch["labels"] != IGNORE_INDEX).numpy()
        return {**batch, "trained": trained, "reference": torch.stack(known), "rows": list(numbers)}

    def _joined(self, examples):
        return join_rows([{"input_ids": one.input_ids, "labels": one.labels} for one in examples])

    def _padded(self, examples):
        lengths = np.array([len(one.input_ids) for one in examples])
        ids = torch.full((len(examples), int(lengths.max())), self.pad_token_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, one in enumerate(examples):
            ids[row, : lengths[row]], labels[row, : lengths[row]] = (
                torch.tensor(one.input_ids),
                torch.tensor(one.labels),
            )
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "lengths": lengths}

    def micro_batches(self, inputs, rows):
        """As data.joined_parts makes them: a pair stays together."""
        if self.tokens is None:
            return [(inputs, rows)]
        parts = data.joined_parts(self.lengths(inputs), self.tokens, self.parts)
        if len(parts) == 1:
            return [(inputs, rows)]
        return [(self.some(inputs, part), [rows[at] for at in part] if rows else rows) for part in parts]

    def cut(self, inputs, tokens):
        """At least the first row whole; of the last one so much of each of its sequences that it is full."""
        lengths = self.lengths(inputs)
        whole = max(1, int(np.searchsorted(np.cumsum(lengths), tokens, side="right")))
        left = tokens - sum(lengths[:whole])
        if whole == len(lengths) or left < self.each:
            return self.some(inputs, range(whole))
        batch = self.some(inputs, range(whole + 1))
        before, (first, *second) = batch["segments"][: -self.each], batch["segments"][-self.each :]
        kept = min(max(1, left * first // sum([first, *second])), left - len(second))
        start = sum(before)
        columns = np.concatenate([np.arange(start + kept), start + first + np.arange(left - kept)])
        return _of_columns(batch, columns) | {"segments": [*before, *[kept, left - kept][: self.each]]}

    def num_items(self, inputs):
        """The pairs."""
        return torch.tensor(float(len(inputs["reference"])))

    def num_tokens(self, inputs):
        return sum(self.lengths(inputs))

    def lengths(self, inputs):
        """Of each pair the tokens of both sequences."""
        each = inputs["segments"] if "segments" in inputs else inputs["lengths"].tolist()
        return [sum(each[at : at + self.each]) for at in range(0, len(each), self.each)]

    def halves(self, inputs):
        many = len(inputs["reference"])
        if many < 2:
            return ()
        return self.some(inputs, range(many // 2)), self.some(inputs, range(many // 2, many))

    def loss(self, model, inputs, num_items):
        logps_P2, counts_P2 = self.log_probabilities(model, inputs)
        reference_P2 = inputs["reference"].to(logps_P2.device)
        losses_P, rewards_P2 = preference_losses.of(self.section, logps_P2, reference_P2, counts_P2)
        self.seen.add(rewards_P2.detach(), logps_P2.detach(), counts_P2)
        return losses_P.sum() / (len(losses_P) if num_items is None else num_items)

    def log_probabilities(self, model, inputs):
        """Return (log p of each answer (P, 2), float32; its trained tokens (P, 2))."""
        body = {name: value for name, value in inputs.items() if name not in _OF_ROWS}
        counts = _counts(inputs)
        scored, targets, head = scored_positions(model, body, self.lean)
        if self.lean:  # in pieces, because the gradient of each answer's log probability has a factor of its own
            pieces = zip(scored.split(counts), targets.split(counts), strict=True)
            nats_B = torch.stack([kernel.cross_entropy(hidden, head, ids) for hidden, ids in pieces])
        else:
            nats_N = F.cross_entropy(scored.float(), targets, reduction="none")
            nats_B = torch.stack([piece.sum() for piece in nats_N.split(counts)])
        return -nats_B.view(-1, self.each), torch.tensor(counts, device=nats_B.device).view(-1, self.each)

    def some(self, inputs, rows):
        """Return the batch of some of its rows, by their numbers in it."""
        rows = list(rows)
        sequences = [self.each * row + at for row in rows for at in range(self.each)]
        if "segments" not in inputs:
            return {name: value[rows if name in _OF_ROWS else sequences] for name, value in inputs.items()}
        segments = inputs["segments"]
        ends = np.cumsum(segments)
        columns = np.concatenate([np.arange(ends[one] - segments[one], ends[one]) for one in sequences])
        of_rows = {name: inputs[name][rows] for name in _OF_ROWS if name in inputs}
        return {**_of_columns(inputs, columns), "segments": [segments[one] for one in sequences], **of_rows}

    def watched(self, loss):
        """The loss goes to 0 where both answers get unlikely (hinge, sigmoid), or is no number of nats (ipo, sppo_hard)."""
        return self.seen.chosen_nats()

    def measured(self):
        return self.seen.of_step()

    def agree(self, sums):
        self.seen.agree(sums)

    def metrics(self, logs):
        found = {name: logs.get(name, logs.get(f"eval_{name}")) for name in self.seen.NAMES}
        return {name: value for name, value in found.items() if value is not None}

    def state(self):
        return None if self.seen.sums is None else self.seen.sums.tolist()

    def restore(self, state):
        self.seen.sums = None if state is None else torch.tensor(state, dtype=torch.float64)


class Seen:
    """Sums over pairs since the last log, on the device: of NAMES, and the number of pairs; None for none. step: of the step
    at hand, the log probabilities of the chosen answers and their tokens, and these sums; before: the sums when it began."""

    NAMES = _METRICS
    NUM_SUMS = len(_METRICS) + 1

    def __init__(self):
        self.sums: Any = None
        self.step: Any = None
        self.before: Any = None

    def begin_step(self):
        self.before, self.step = self.sums, None

    def add(self, rewards_P2, logps_P2, counts_P2, *_):
        """Pairs whose numbers are not finite are left out: their step is too."""
        chosen, rejected = rewards_P2.double().unbind(1)
        parts = [chosen, rejected, chosen - rejected, (chosen > rejected).double(), *logps_P2.double().unbind(1)]
        found = torch.stack([*parts, torch.ones_like(chosen)])
        found = torch.where(found.isfinite().all(0), found, 0.0).sum(1)
        self._add([logps_P2[:, 0], counts_P2[:, 0]], found)

    def _add(self, chosen, found):
        """Add the log probabilities of chosen answers and their tokens to those of the step; found: to all sums."""
        step = torch.cat([torch.stack([one.double().sum() for one in chosen]), found])
        self.step = step if self.step is None else self.step + step
        self.sums = found if self.sums is None else self.sums.to(found.device) + found

    def of_step(self):
        """Return `step` as numbers, whether or not anything was added; waits for a GPU."""
        return [0.0] * (2 + self.NUM_SUMS) if self.step is None else self.step.tolist()

    def agree(self, numbers):
        """Make `numbers`, the sums of `of_step` over all processes, those of the step at hand."""
        self.step = torch.tensor(numbers, dtype=torch.float64)
        self.sums = self.step[2:] if self.before is None else self.before.cpu() + self.step[2:]

    def chosen_nats(self):
        """Return the loss of the chosen answers of the step at hand, nats a token; None where it has none; waits for a GPU."""
        logp, tokens = self.of_step()[:2]
        return -logp / tokens if tokens else None

    def take(self, over_all=list):
        """Return {name: mean} of what was added, and begin anew; waits for a GPU. over_all: returns the sums over all processes
        of numbers, where these are not agreed on yet."""
        sums, self.sums = self.sums, None
        return self.means(*over_all([0.0] * self.NUM_SUMS if sums is None else sums.tolist()))

    def means(self, *sums):
        *found, many = sums
        return {name: value / many for name, value in zip(_METRICS, found, strict=True)} if many else {}


class Trainer(PlainTrainer):
    """A PlainTrainer that logs what the objective has seen."""

    objective: Preference

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.objective.loss(model, inputs, None)
        return loss, {"loss": loss}

    def training_step(self, *args, **kwargs):
        if not self.micro_batches:
            self.objective.seen.begin_step()
        return super().training_step(*args, **kwargs)

    def log(self, logs, start_time=None):
        super().log({**logs, **self.objective.seen.take()} if "loss" in logs else logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        seen = self.objective.seen
        kept, seen.sums = (seen.sums, seen.step), None
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = seen.take(self.processes.sums)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        finally:
            seen.sums, seen.step = kept
        return output

    def counters(self):
        return super().counters() | {"seen": (self.objective.seen.sums, self.objective.seen.step)}

    def restore_counters(self, counters):
        self.objective.seen.sums, self.objective.seen.step = counters["seen"]
        super().restore_counters({name: value for name, value in counters.items() if name != "seen"})


class Referred(Numbered):
    """Rows as (number, row, log probabilities of its sequences by the reference): 0 until these are known. each: sequences."""

    def __init__(self, rows, each=2):
        super().__init__(rows)
        self.logps_NE = torch.zeros(len(rows), each)

    def __getitem__(self, index):
        return *super().__getitem__(index), self.logps_NE[int(index)]


# ---- parts of a batch ------------------------------------------------------------------------------------------------


def _counts(inputs):
    """Return the trained tokens of each sequence of a batch; all of which have one but where a batch is cut."""
    trained_BT = inputs["trained"]
    if "segments" not in inputs:
        return trained_BT[:, 1:].sum(1).tolist()
    starts = np.cumsum([0, *inputs["segments"][:-1]])
    return np.add.reduceat(trained_BT[0], starts).tolist()


def _of_columns(inputs, columns):
    """Return a joined batch with only these of its tokens."""
    whole = ("segments", *_OF_ROWS)
    found = {name: value[:, columns] for name, value in inputs.items() if name not in whole}
    return found | {name: inputs[name] for name in _OF_ROWS if name in inputs}
