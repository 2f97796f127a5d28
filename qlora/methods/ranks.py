"""AdaLoRA during training: every layer starts with init_r ranks, and the least important ones of all layers are pruned.

delta = lora_alpha / init_r * B (E * A): E (R, 1) takes the place of singular values; a rank whose E is 0 is gone.
Source: Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023 (arXiv:2303.10512).
"""

from __future__ import annotations

import torch

from ..system.errors import InputError

SCHEDULE = ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator


class Ranks:
    """What AdaLoRA needs of a training loop beside the forward pass. adaptive: False for every other adapter."""

    def __init__(self, peft_model):
        self.tuner, self.config = peft_model.base_model, peft_model.peft_config["default"]
        self.adaptive = self.config.peft_type == "ADALORA"

    def begin(self, total_steps):
        """Fix the schedule: tinit and tfinal as numbers of steps.

        Raises:
            InputError: no step is left between them.
        """
        if not self.adaptive:
            return
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

    def shrink(self, step):
        """Take ranks away after optimizer step `step` (1, 2, ...): the model's E of these becomes 0.

        The model's parameters must hold what the step has made of them, and the gradients that it was made from.
        """
        self.tuner.update_and_allocate(step)

    def state(self):
        """Return (what importance is computed from, {KEY/NAME: tensor}; {name of an E: which ranks are left}, or None)."""
        if not self.adaptive:
            return {}, None
        allocator = self.tuner.rankallocator
        tensors = {f"{key}/{name}": value for key in _SUMS for name, value in getattr(allocator, key).items()}
        return tensors, self.config.rank_pattern

    def restore(self, tensors, pattern):
        """Go on from a `state`."""
        if not self.adaptive:
            return
        allocator, device = self.tuner.rankallocator, next(self.tuner.parameters()).device
        for key in _SUMS:
            sums = {name.removeprefix(f"{key}/"): t for name, t in tensors.items() if name.startswith(f"{key}/")}
            setattr(allocator, key, {name: tensor.to(device) for name, tensor in sums.items()})
        self.config.rank_pattern = pattern

    def mean(self):
        """Return the mean rank of a layer."""
        pattern = self.config.rank_pattern
        return sum(map(sum, pattern.values())) / len(pattern) if pattern else float(self.config.init_r)


def _grams(name, P):
    if ".lora_A." in name:
        return [P @ P.T]
    return [P.T @ P] if ".lora_B." in name else []
