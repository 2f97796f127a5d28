"""The proof of a model with classes: the written folder, reloaded by plain transformers, against the live model, on logits.

Two-sided as proof.py is, with its names: the folder must be the model that was trained, and not the base under a new head.

# N rows, C classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .. import base_model
from ..data import KeptImage, Labelled, LabelledImage
from ..evaluation import classes, metrics
from ..system.errors import InputError
from .proof import BASE_FACTOR, KL_LIMIT, MOST_ROWS, TOP1_LIMIT, loss_limit

# |logits - live| / |live|, as norms over all rows. Measured in float16: SmolLM2-135M 1.3e-3, tiny models of five families 2e-6 to
# 2e-5; of the base under a new head 0.5 to 1. bfloat16 has an eighth of the digits.
LOGITS_LIMIT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Scores:
    """Of one model on the proof rows. The others are against the live model, and None for the live model itself.

    logits: the norm of the difference of all logits, relative to that of the live ones.
    """

    loss: float
    kl: float | None = None
    top1: float | None = None
    logits: float | None = None


def proof_rows(examples, vocab_size=None):
    """Return the first rows, at most MOST_ROWS."""
    return [examples[index] for index in range(min(MOST_ROWS, len(examples)))]


def to_json(rows, which):
    """Return what proof_rows.json holds: the rows, of images small copies, and where they come from in words."""
    kept = [KeptImage.of(row) if isinstance(row, LabelledImage) else row for row in rows]
    return {"from": which, "rows": [vars(row) for row in kept]}


def from_json(content):
    """Return (rows, where they come from) of proof_rows.json; raises InputError if it is something else."""
    try:
        rows = [KeptImage(**row) if "jpeg" in row else Labelled(**row) for row in content["rows"]]
        return rows, content["from"]
    except (KeyError, TypeError):
        raise InputError("proof_rows.json of the run holds no rows with a class; the run folder is damaged") from None


class Live:
    """The trained model's logits (N, C) on `rows`, and those of its base with the head that training began with.

    pad: makes a batch of rows.
    """

    def __init__(self, peft_model, rows, pad):
        base_model.to_float32(peft_model)
        self.rows, self.pad = rows, pad
        self.labels = torch.tensor([row.label for row in rows])
        self.logits_NC = self._logits(peft_model)
        self.scores = Scores(F.cross_entropy(self.logits_NC, self.labels).item())
        with peft_model.disable_adapter():
            self.base_scores = self.compare(peft_model)

    @property
    def num_positions(self):
        return len(self.rows)

    @property
    def num_trained(self):
        """How many rows the losses are means over."""
        return len(self.rows)

    def _logits(self, model):
        return classes.logits_of(model, self.pad, self.rows, "proof: classifying")

    def compare(self, model):
        """Return the Scores of `model` against the live one."""
        logits_NC = self._logits(model)
        live, other = (F.log_softmax(one, -1) for one in (self.logits_NC, logits_NC))
        return Scores(
            F.cross_entropy(logits_NC, self.labels).item(),
            metrics.kl_divergence(live, other) / len(self.rows),
            (live.argmax(-1) == other.argmax(-1)).float().mean().item(),
            ((logits_NC - self.logits_NC).norm() / self.logits_NC.norm()).item(),
        )


def failures(live, merged, base, dtype, num_trained):
    """Return what is wrong, as sentences; none means proven. num_trained: rows that the losses are means over."""
    if not all(map(math.isfinite, (merged.loss, merged.kl, merged.logits))):
        return [f"its logits are not finite in {dtype}; export with --dtype bfloat16 or float32"]
    found = []
    if merged.logits > LOGITS_LIMIT[dtype]:
        found.append(f"the logits differ by {merged.logits:.1e}, the limit for {dtype} is {LOGITS_LIMIT[dtype]:.0e}")
    if merged.kl > KL_LIMIT[dtype]:
        found.append(
            f"KL(trained, exported) is {merged.kl:.2e} nats a row, the limit for {dtype} is {KL_LIMIT[dtype]:.0e}"
        )
    if merged.top1 < TOP1_LIMIT[dtype]:
        found.append(f"{merged.top1:.2%} of rows get the same class, the limit for {dtype} is {TOP1_LIMIT[dtype]:.0%}")
    if abs(merged.loss - live.loss) > loss_limit(dtype, num_trained):
        found.append(f"the loss is {merged.loss:.4f}, the trained model's {live.loss:.4f}")
    if not base.logits > BASE_FACTOR * merged.logits:
        found.append(
            f"the export is no closer to the trained model (logits {merged.logits:.1e} apart) than the base under a new head is "
            f"({base.logits:.1e}): the training is lost in {dtype}"
        )
    return found
