"""float32 masters that several processes share: each trained parameter has one process that keeps its master, the sum of its
gradients and the optimizer's states of it, and takes its steps.

Whole parameters, so that blockwise 8-bit states are those of one process, and a checkpoint is the same whatever the number of
processes. torch's ZeroRedundancyOptimizer shares the states alone: every process would keep all masters and gradients, and it
does not go on with another number of processes (pytorch #65650). fully_shard of the adapter would cut parameters, reduce
gradients in 16 bit, and gather the adapter beside the codes in each layer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..data import dealt_out
from ..kernels import groups
from .master_weights import MasterWeights
from .private_names import copy_all


class SharedMasters(MasterWeights):
    """The masters of which `processes` have some each. All must call the methods that take gradients or give weights equally
    often.

    Gradients go to their owner after each micro-batch, so that no process keeps a float32 sum of all of them; the owners'
    new weights go to all, in 16 bit, after each step. A process has 2 bytes of each trained parameter, and 8 more of its own.
    """

    def __init__(self, live, held, processes):
        self.processes = processes
        self.owners = dealt_out([parameter.numel() for parameter in live], processes.count).tolist()
        super().__init__(live, held, [at for at, owner in enumerate(self.owners) if owner == processes.rank])
        self.given = [False] * len(live)  # whether this process had a gradient of it in the step at hand

    @torch.no_grad()
    def take_gradients(self):
        """Add the sum over all processes of the model's gradients to the masters', and clear them: zeros where there is none."""
        masters = dict(zip(self.mine, self.masters, strict=True))
        for owner, chunk in self._chunks():
            live = [self.everything[at] for at in chunk]
            flat = torch.zeros(sum(p.numel() for p in live), device=live[0].device)
            parts = flat.split([parameter.numel() for parameter in live])
            there = [
                (part.view_as(parameter), parameter.grad)
                for part, parameter in zip(parts, live, strict=True)
                if parameter.grad is not None
            ]
            if there:
                copy_all(*map(list, zip(*there, strict=True)))
            for at, parameter in zip(chunk, live, strict=True):
                self.given[at] |= parameter.grad is not None
                parameter.grad = None
            del there
            dist.reduce(flat, dst=owner)
            if owner == self.processes.rank:
                for at, part in zip(chunk, parts, strict=True):
                    self._add(masters[at], part.view_as(masters[at]), self.held[self.mine.index(at)])

    @staticmethod
    def _add(master, gradient, held):
        if held is not None:
            gradient[held] = 0
        if master.grad is None:
            master.grad = gradient.clone()
        else:
            master.grad += gradient

    def drop_absent(self):
        """Leave no gradient for a master that no process has had one for in this step."""
        there = self.processes.sums(self.given)
        for at, master in zip(self.mine, self.masters, strict=True):
            if not there[at]:
                master.grad = None
        self.given = [False] * len(self.given)

    @torch.no_grad()
    def give_weights(self):
        """Round the masters into the models of all processes."""
        super().give_weights()
        for owner, chunk in self._chunks():
            live = [self.everything[at] for at in chunk]
            flat = torch.cat([parameter.flatten() for parameter in live])
            dist.broadcast(flat, src=owner)
            if owner != self.processes.rank:
                parts = flat.split([parameter.numel() for parameter in live])
                copy_all(live, [part.view_as(one) for part, one in zip(parts, live, strict=True)])

    def over_all(self, norm):
        """Return the norm of all gradients, where `norm` is that of this process's."""
        squares = norm.double().square()
        dist.all_reduce(squares)
        return squares.sqrt().to(norm.dtype)

    def collected(self, tensors, numbers):
        """Return ({name: tensor}, {name: value}) of all processes in the first one, the tensors on the CPU; in others their own.

        A tensor at a time, between CPUs: no GPU has more than its own.
        """
        mine = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        said: list = [None] * self.processes.count
        dist.all_gather_object(said, (mine, numbers))
        if not self.processes.is_first:
            for tensor in tensors.values():
                dist.send(tensor.detach().cpu().contiguous(), dst=0)
            return tensors, numbers
        for rank, (theirs, more) in enumerate(said[1:], 1):
            numbers = numbers | more
            for name, dtype, shape in theirs:
                tensors[name] = torch.empty(shape, dtype=dtype)
                dist.recv(tensors[name], src=rank)
        return tensors, numbers

    def _chunks(self):
        """Yield (owner, numbers of parameters of its), of about groups.SENT numbers each."""
        for owner in range(self.processes.count):
            theirs = [at for at, one in enumerate(self.owners) if one == owner]
            for part in groups.of([self.everything[at].numel() for at in theirs], True, groups.SENT):
                yield owner, theirs[part]
