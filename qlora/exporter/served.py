"""What a model keeps in a form that it is served in: its loss, and how far its next tokens are from those that were trained."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..data import IGNORE_INDEX
from ..evaluation import metrics
from ..system.events import progress

# T trained tokens of a row, V vocab


def trained_at(row):
    """Return the positions of the trained tokens of an Example, without the first token, which nothing predicts."""
    return [at for at, label in enumerate(row.labels) if at and label != IGNORE_INDEX]


def of_model(model):
    """Return answers(row) -> log probabilities (T, V) of each trained token of it, float32 on the CPU."""

    def answers(row):
        (log_p_TV,) = metrics.log_probabilities(model, [row], [[at - 1 for at in trained_at(row)]])
        return log_p_TV

    return answers


def of_llama(served):
    """Return the same of a model that llama.cpp has opened, see gguf.proof.opened."""

    def answers(row):
        served.reset()
        served.eval(row.input_ids)
        return torch.from_numpy(served.scores[[at - 1 for at in trained_at(row)]].copy()).log_softmax(-1)

    return answers


class Reference:
    """The trained model at each trained token of `rows`: its distributions are kept in `file`, V float32 a token.

    answers: of the trained model, as `of_model` has it. loss: its mean, nats a token.
    """

    def __init__(self, answers, rows, file):
        self.rows, self.file = rows, file
        self.num_tokens = sum(len(trained_at(row)) for row in rows)
        total = 0.0
        with open(file, "wb") as out, progress("the trained model", len(rows), "rows") as advance:
            for row in rows:
                log_p_TV = answers(row)
                log_p_TV.numpy().tofile(out)
                total += _nats(row, log_p_TV)
                advance(1)
        self.loss, self.width = total / self.num_tokens, log_p_TV.shape[1]

    def scores(self, answers, what) -> dict:
        """Return {"loss", "kl"} of another model, in nats a trained token: KL(trained, other). what: it is, for the progress.

        Not finite is None, with a "message".
        """
        stored = np.memmap(self.file, np.float32, "r", shape=(self.num_tokens, self.width))
        total = kl = 0.0
        start = 0
        with progress(what, len(self.rows), "rows") as advance:
            for row in self.rows:
                other_TV = answers(row)
                live_TV = torch.from_numpy(np.array(stored[start : start + len(other_TV)]))
                total += _nats(row, other_TV)
                kl += metrics.kl_divergence(live_TV, other_TV)
                start += len(other_TV)
                advance(1)
        found = {"loss": total / self.num_tokens, "kl": kl / self.num_tokens}
        if not all(map(math.isfinite, found.values())):
            return dict.fromkeys(found) | {"message": "its logits are not finite"}
        return found


def _nats(row, log_p_TV):
    """Return the summed cross entropy of the trained tokens of a row."""
    labels = torch.tensor([row.labels[at] for at in trained_at(row)])
    return -log_p_TV.double().gather(-1, labels[:, None]).sum().item()
