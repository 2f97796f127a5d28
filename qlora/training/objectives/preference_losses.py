"""The loss and the rewards of preference pairs, from log probabilities. Names and formulas are trl's, whose source names papers.

c and r: log p of the chosen and of the rejected answer, less that of the reference; n_c and n_r: their trained tokens.

# P pairs
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

_LEAST = 1e-7  # nats: an answer is not taken to be surer, because the odds of a certain one are infinite


def of(section, logps_P2, reference_P2, counts_P2):
    """Return (losses (P), rewards (P, 2)) by the recipe's section dpo or orpo. counts: trained tokens of the answers."""
    if section.key == "orpo":
        return orpo(section, logps_P2, counts_P2)
    return dpo(section, logps_P2, reference_P2, counts_P2)


def dpo(section, logps_P2, reference_P2, counts_P2):
    ratios_P2, counts_P2 = logps_P2 - reference_P2, counts_P2.clamp(min=1)
    of_tokens = -logps_P2[:, 0] / counts_P2[:, 0]
    losses = [
        weight * (of_tokens if name == "sft" else _DPO[name](section, *ratios_P2.unbind(1), *counts_P2.unbind(1)))
        for name, weight in section.losses
    ]
    return torch.stack(losses).sum(0), section.beta * ratios_P2


def unpaired(section, ratios_P, good_P, kl_P):
    """Return the losses (P) of answers without pairs, by the recipe's section kto. ratios: log p less that of the
    reference; kl: the distance from the reference that they are compared with, 0 of apo_zero_unpaired."""
    signs_P = torch.where(good_P, 1.0, -1.0)
    weights_P = torch.where(good_P, section.desirable_weight, section.undesirable_weight)
    return weights_P * (-section.beta * signs_P * (ratios_P - kl_P)).sigmoid()


def orpo(section, logps_P2, counts_P2):
    """Cross entropy of the chosen answer, and the odds of both: -log sigmoid(log odds(c) - log odds(l)).

    trl's ORPOTrainer has the prompt's tokens in the cross entropy too; here it is that of supervised training.
    """
    mean_P2 = logps_P2 / counts_P2.clamp(min=1)
    sure_P2 = mean_P2.clamp(max=-_LEAST)
    odds_P2 = sure_P2 - _log1mexp(sure_P2)
    losses_P = -mean_P2[:, 0] - section.beta * logsigmoid(odds_P2[:, 0] - odds_P2[:, 1])
    return losses_P, section.beta * mean_P2


def _log1mexp(x):
    """log(1 - exp(x)) of x < 0: near 0 by expm1, which keeps its digits."""
    near = x > -0.6931472
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


def _sigmoid(section, c, r, *_):
    return -logsigmoid(section.beta * (c - r))


def _hinge(section, c, r, *_):
    return torch.relu(1 - section.beta * (c - r))


def _ipo(section, c, r, n_c, n_r):
    return (c / n_c - r / n_r - 1 / (2 * section.beta)) ** 2


def _sigmoid_norm(section, c, r, n_c, n_r):
    return -logsigmoid(section.beta * (c / n_c - r / n_r))


def _robust(section, c, r, *_):
    d, e = section.beta * (c - r), section.label_smoothing
    return (-(1 - e) * logsigmoid(d) + e * logsigmoid(-d)) / (1 - 2 * e)


def _exo_pair(section, c, r, *_):
    d, e = section.beta * (c - r), torch.tensor(section.label_smoothing)
    return d.sigmoid() * (logsigmoid(d) - torch.log1p(-e)) + (-d).sigmoid() * (logsigmoid(-d) - e.log())


def _nca_pair(section, c, r, *_):
    c, r = section.beta * c, section.beta * r
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


def _bco_pair(section, c, r, *_):
    return -logsigmoid(section.beta * c) - logsigmoid(-section.beta * r)


def _sppo_hard(section, c, r, *_):
    return (c - 0.5 / section.beta) ** 2 + (r + 0.5 / section.beta) ** 2


def _apo_zero(section, c, r, *_):
    return 1 - (section.beta * c).sigmoid() + (section.beta * r).sigmoid()


def _apo_down(section, c, r, *_):
    return (section.beta * c).sigmoid() + 1 - (section.beta * (c - r)).sigmoid()


_DPO = {
    "sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "sigmoid_norm": _sigmoid_norm, "robust": _robust,
    "exo_pair": _exo_pair, "nca_pair": _nca_pair, "bco_pair": _bco_pair, "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero, "apo_down": _apo_down,
}  # fmt: skip
