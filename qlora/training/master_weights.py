"""float32 master weights of 16-bit adapters."""

from __future__ import annotations

import contextlib

import torch

from ..kernels import groups
from ..system.errors import InputError
from .private_names import add_all, copy_all, multiply_all, norm_of_each


class MasterWeights:
    """float32 copies of 16-bit adapters: gradients are summed and steps taken in the copies, the model gets them rounded.

    A bf16 number has 8 bits: an update under 1/256 of a weight is lost when it is added to the weight itself, and so is
    a micro-batch's gradient beside the sum of those before. docs/log.md has the measurement. Cost: 8 bytes a trained
    parameter (320 MB for r=16 on 7B).

    everything: all that is trained. held: for each parameter the index of numbers that it keeps, or None; see
    methods.Trainable. mine: which of them have a master here, None for all; `live`, `held` and `masters` are of these.
    """

    def __init__(self, live, held=None, mine=None):
        self.everything = live
        self.mine = list(range(len(live))) if mine is None else mine
        self.live = [live[at] for at in self.mine]
        self.held = [None if held is None else held[at] for at in self.mine]
        self.masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in self.live]

    @torch.no_grad()
    def take_gradients(self):
        """Add the model's gradients to the masters' and clear them."""
        there = [each for each in zip(self.masters, self.live, self.held, strict=True) if each[1].grad is not None]
        on_gpu = bool(there) and there[0][0].is_cuda
        for part in groups.of([master.numel() for master, *_ in there], on_gpu):
            masters, live, helds = zip(*there[part], strict=True)
            gradients = [torch.empty_like(master) for master in masters]
            copy_all(gradients, [parameter.grad for parameter in live])
            for gradient, parameter, held in zip(gradients, live, helds, strict=True):
                if held is not None:
                    gradient[held] = 0
                parameter.grad = None
            sums = [(m.grad, g) for m, g in zip(masters, gradients, strict=True) if m.grad is not None]
            if sums:
                add_all(*map(list, zip(*sums, strict=True)))
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient if master.grad is None else master.grad

    @torch.no_grad()
    def restore(self, names, tensors):
        """Take over `tensors`, {name: float32}, and give them to the model. names: of everything.

        Raises:
            InputError: they are of other parameters, or of other shapes.
        """
        here, there = ({name: tuple(tensor.shape) for name, tensor in pairs}
                       for pairs in (zip(names, self.everything, strict=True), tensors.items()))  # fmt: skip
        if here != there:
            differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            name = differing[0]
            raise InputError(
                f"the checkpoint has another adapter: {len(differing)} tensors differ, {name} is {there.get(name)} there "
                f"and {here.get(name)} here; resume with the lora section of the run"
            )
        for name, parameter in zip(names, self.everything, strict=True):
            parameter.copy_(tensors[name])
        for at, master in zip(self.mine, self.masters, strict=True):
            master.copy_(tensors[names[at]])

    @torch.no_grad()
    def give_weights(self):
        """Round the masters into the model."""
        for master, parameter, held in zip(self.masters, self.live, self.held, strict=True):
            if held is not None:
                master[held] = parameter[held].to(master.dtype)
        if self.masters:
            copy_all(self.live, self.masters)

    @torch.no_grad()
    def clip_gradients(self, most):
        """Scale the masters' gradients so that their norm is at most `most`; return the norm before, shape (), on the device.

        To the bit what torch.nn.utils.clip_grad_norm_ does, in a few launches and without a question to the device.
        """
        gradients = self._gradients()
        norm = torch.zeros((), device=self.everything[0].device)
        if gradients:
            norm = torch.linalg.vector_norm(torch.stack(norm_of_each(gradients)))
        norm = self.over_all(norm)
        if gradients:
            multiply_all(gradients, torch.clamp(most / (norm + 1e-6), max=1.0))
        return norm

    def over_all(self, norm):
        """Return the norm of all gradients, where `norm` is that of those here: the same."""
        return norm

    def multiply_gradients(self, factor):
        """Multiply the masters' gradients by a number, in place."""
        if gradients := self._gradients():
            multiply_all(gradients, factor)

    def _gradients(self):
        return [master.grad for master in self.masters if master.grad is not None]

    def clear_gradients(self):
        for master in self.masters:
            master.grad = None

    @contextlib.contextmanager
    def in_the_model(self):
        """Let the model hold the masters themselves, with their gradients, while the block runs."""
        rounded = [parameter.data for parameter in self.live]
        for master, parameter in zip(self.masters, self.live, strict=True):
            parameter.data = master.data
            parameter.grad = torch.zeros_like(master) if master.grad is None else master.grad
        try:
            yield
        finally:
            for parameter, data in zip(self.live, rounded, strict=True):
                parameter.grad = None
                parameter.data = data
