"""What the loss is: one file an objective. Here is the contract between an objective and the trainer (reliable_trainer.py)."""

from __future__ import annotations

from typing import Any


class Objective:
    """One objective of a training. `inputs` is a batch as its collator makes it: {name: tensor, or a list of numbers}.

    A trainer is built by `trainer` and asks the others. Where the class of trl or transformers that it builds on computes
    the loss, `loss` is left as it is here, and the objective says only what that loss is a mean of.

    tokens: a batch is a whole step, which is computed as micro-batches of at most so many tokens; None: a batch is one.
    """

    tokens: int | None = None
    watched_name = "the loss"

    def trainer(self, model, rows, arguments, reliability) -> Any:
        """Return a reliable_trainer.Reliable of `model`: rows to columns, the collator and the Trainer class.

        rows: a training.Rows. arguments: {name: value} of transformers.TrainingArguments. reliability: a Reliability,
        without the lengths of the rows, which the objective adds.
        """
        raise NotImplementedError

    def counts(self) -> str:
        """Return what num_tokens is a number of."""
        return "tokens"

    def micro_batches(self, inputs, rows) -> list[tuple]:
        """Return [(inputs, rows)] of what a batch is computed as, one after another: most often the batch itself.

        rows: the numbers of its rows. The loss of each is divided by the items of all.
        """
        return [(inputs, rows)]

    def cut(self, inputs, tokens) -> dict[str, Any]:
        """Return the first `tokens` of a batch of joined rows: the largest of its micro-batches that there can be."""
        raise NotImplementedError

    def num_items(self, inputs) -> Any:
        """Return how many items the loss of a batch is a mean of, such as trained tokens or rows: a tensor, shape ()."""
        raise NotImplementedError

    def num_tokens(self, inputs) -> Any:
        """Return the tokens that are computed for a batch, padding excluded: a tensor, shape ()."""
        raise NotImplementedError

    def lengths(self, inputs) -> list[int]:
        """Return the tokens of each row of a batch, in order; waits for a GPU."""
        raise NotImplementedError

    def loss(self, model, inputs, num_items) -> Any:
        """Return the summed loss over `num_items` (a tensor; None: those of this batch), shape (); None to have the Trainer
        class compute it."""
        return None

    def halves(self, inputs) -> tuple:
        """Return (first, second) half of the rows of a batch, each a batch; () where it has one row, or no parts."""
        return ()

    def watched(self, loss) -> float | None:
        """Return what divergence.Watch judges of a step that was taken, in nats a token; watched_name: what it is; None: nothing.
        loss: of the step, a number."""
        return loss

    def measured(self) -> list[float]:
        """Return what was measured of the step at hand beside the loss: numbers, which are summed over all processes."""
        return []

    def agree(self, sums):
        """Go on with these sums over all processes of what each has `measured`."""

    def metrics(self, logs) -> dict[str, float]:
        """Return what of a log of the Trainer class is kept in metrics.jsonl beside the loss."""
        return {}

    def begin(self, trainer):
        """Do what is left between the rehearsal and the first step."""

    def state(self) -> Any:
        """Return, as JSON, what it has summed since the last log, for a checkpoint."""
        return None

    def restore(self, state):
        """Go on from the `state` of a checkpoint; None: it has none."""
