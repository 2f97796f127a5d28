"""AdaLoRA: every layer starts with init_r ranks, and the least important ones of all layers are pruned while training.

y = W x + lora_alpha / init_r * B (E * A) x: E (R, 1) takes the place of singular values; a rank whose E is 0 is gone.
Source: Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023 (arXiv:2303.10512).
"""

from __future__ import annotations

import torch

from ..system.errors import InputError
from . import low_rank, peft_model, targets
from .adapter import Sorted, refuse_unknown_settings
from .contract import Description, Schedule, Trainable, one_group

save, fill = peft_model.save, peft_model.fill

# settings of a folder that are followed when it is loaded; those of the schedule have had their effect
_FIELDS = ("lora_alpha", "rank_pattern", "bias", "init_r", "target_r", "total_step")
_SCHEDULE = ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; nothing is read from checkpoint and examples.

    Not made on the meta device where the model is: the forward pass would then allocate less than it does in training
    (PEFT 0.21.2, found by the test of the plan against real steps).
    """
    from peft import AdaLoraConfig

    layers, whole = targets.chosen(model, section, token_ids)
    low_rank.refuse_ranks(model, dict.fromkeys(layers, ("adalora.init_r", section.init_r)))
    low_rank.refuse_biases(model, section, layers)
    torch.manual_seed(seed)
    config = AdaLoraConfig(
        **peft_model.settings(model, layers, whole, token_ids),
        lora_dropout=section.lora_dropout,
        bias=section.bias,
        lora_alpha=section.lora_alpha,
        init_r=section.init_r,
        target_r=section.target_r,
        total_step=1,
    )
    for name in _SCHEDULE:  # tinit and tfinal may be shares, until Ranks knows the number of steps
        setattr(config, name, getattr(section, name))
    attached = peft_model.make(model, config)
    attached.peft_config["default"].init_lora_weights = True
    peft_model.to_dtype(attached, peft_model.dtype_of(model))
    return attached


def trainable(model, section):
    return Trainable(
        f"AdaLoRA, ranks {section.init_r} to {section.target_r} on average",
        first_to_move=peft_model.named(model, ".lora_E."),
        groups=one_group(model),
        schedule=Ranks(model),
    )


def load(model, adapter, token_ids=()):
    from peft import AdaLoraConfig

    return peft_model.load(model, adapter, token_ids, AdaLoraConfig, _FIELDS)


def section_of(folder, config, recorded):
    raise InputError(
        f"adapter {folder}: its ranks have shrunk as AdaLoRA's schedule says; it cannot be trained further"
    )


def describe(config):
    return Description("AdaLoRA", f"r={config.get('target_r')}", "{W} + s B A")


def read(folder, config):
    refuse_unknown_settings(folder, config, {*_FIELDS, *_SCHEDULE, "r", *low_rank.SILENT})
    # its rank_pattern is of another kind: which ranks are left, by the names of tensors
    patterns = {"alpha_pattern": "lora_alpha"}
    low_rank.refuse_settings(folder, config, ("r", "lora_alpha", "init_r"), patterns)
    found = Sorted(folder, config, low_rank.PATTERN, low_rank.MARKER, "LoRA")
    alphas = low_rank.by_module(folder, config, found.own, patterns)
    return found.adapter("AdaLoRA", {module: _update(found, module, *alphas[module]) for module in sorted(found.own)})


def _update(found, module, alpha):
    pair = low_rank.factors(found, module, rank=None, needed=("E",))
    if pair is None:
        return None
    (A_RI, B_OR), E_R1 = pair, found.own[module]["E"]
    if E_R1.shape != (len(A_RI), 1):
        found.problems.append(f"{module}: E is {tuple(E_R1.shape)}, the rank is {len(A_RI)}")
        return None
    # PEFT divides by the rank that the module began with, whatever was pruned since
    return low_rank.LowRank(A_RI.float() * E_R1.float(), B_OR, alpha / (found.config["init_r"] + 1e-5))


class Ranks(Schedule):
    """Which ranks are left, and what their importance is computed from."""

    changes = True

    def __init__(self, attached):
        self.tuner, self.config = attached.base_model, attached.peft_config["default"]

    def begin(self, total_steps):
        """Fix the schedule: tinit and tfinal as numbers of steps.

        Raises:
            InputError: no step is left between them.
        """
        config = self.config
        tinit, tfinal = (int(value * total_steps) if value < 1 else value for value in (config.tinit, config.tfinal))
        if tinit + tfinal >= total_steps:
            raise InputError(
                f"adalora.tinit {tinit} and adalora.tfinal {tfinal} leave none of {total_steps} steps in which ranks shrink; "
                "lower them, or give them as shares of all steps"
            )
        config.tinit, config.tfinal, config.total_step = tinit, tfinal, total_steps

    def penalty(self, named_parameters):
        """Return orth_reg_weight * mean over A and B of |P P' - 1|, the part of AdaLoRA's loss that is no cross entropy.

        PEFT adds it to the loss that the model returns, which trl does not use.
        """
        norms = [
            torch.linalg.norm(factor - torch.eye(len(factor), device=factor.device))
            for name, parameter in named_parameters
            for factor in _grams(name, parameter)
        ]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, step):
        """Take ranks away: the model's E of these becomes 0."""
        self.tuner.update_and_allocate(step)

    def state(self):
        """Return (what importance is computed from, {KEY/NAME: tensor}; {name of an E: which ranks are left}, or None)."""
        allocator = self.tuner.rankallocator
        tensors = {f"{key}/{name}": value for key in _SUMS for name, value in getattr(allocator, key).items()}
        return tensors, self.config.rank_pattern

    def restore(self, tensors, values):
        allocator, device = self.tuner.rankallocator, next(self.tuner.parameters()).device
        for key in _SUMS:
            sums = {name.removeprefix(f"{key}/"): t for name, t in tensors.items() if name.startswith(f"{key}/")}
            setattr(allocator, key, {name: tensor.to(device) for name, tensor in sums.items()})
        self.config.rank_pattern = values

    def measured(self):
        """Return the mean rank of a layer."""
        pattern = self.config.rank_pattern
        return {"mean_rank": sum(map(sum, pattern.values())) / len(pattern) if pattern else float(self.config.init_r)}


def _grams(name, P):
    if ".lora_A." in name:
        return [P @ P.T]
    return [P.T @ P] if ".lora_B." in name else []
