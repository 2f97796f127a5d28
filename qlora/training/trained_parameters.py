"""What is trained: the model's trainable parameters with their float32 masters, and what the method does to them in a step.

This file alone asks the method of a training.
"""

from __future__ import annotations

import torch

from .. import methods
from ..runs.checkpoints import under
from .master_weights import MasterWeights
from .processes import ALONE
from .shared_masters import SharedMasters


class Trained:
    """What a method trains of `model`. masters: its MasterWeights; names: of the parameters that have a master here, in the
    optimizer's order. processes: where they share the base, each has some of the masters."""

    def __init__(self, model, processes=ALONE):
        self.model, self.method, self.processes = model, methods.trainable(model), processes
        names, parameters = self.method.names, dict(model.named_parameters())
        live, held = [parameters[name] for name in names], [self.method.held.get(name) for name in names]
        self.masters = SharedMasters(live, held, processes) if processes.sharded else MasterWeights(live, held)
        self.names = [names[at] for at in self.masters.mine]
        # until the first step that is taken; an adapter that is a frozen reference, as trl makes for DPO, does not move
        first = [name for name, one in self.method.first_to_move.items() if one.requires_grad and name in self._named()]
        self.before: dict | None = {name: self._named()[name].detach().clone() for name in first}

    def begin(self, total_steps):
        """Tell the method how many steps come; raises InputError where its schedule does not fit into them."""
        self.method.schedule.begin(total_steps)

    def groups(self, learning_rate, weight_decay):
        """Return the optimizer's groups of parameters: the masters."""
        return self.method.optimizer_groups(self._named(), learning_rate, weight_decay)

    def add_penalty(self):
        """Add the gradient of the method's own part of the loss, if it has one: once a step, however many micro-batches."""
        if self.method.schedule.changes:
            self.method.schedule.penalty(self._named().items()).backward()

    def finish_step(self, step):
        """After the optimizer: the model gets the new weights, and the method may change them.

        Raises:
            TrainingFailed: the first step that was taken has not moved everything that it should, here or in another process.
        """
        self.masters.give_weights()
        taken = any(master.grad is not None for master in self.masters.masters)
        if self.before is not None and any(self.processes.sums([taken])):
            with self.processes.failing_together():
                methods.refuse_unmoved(self._arrived(), self.before)
            self.before = None
        if self.method.schedule.changes:
            with self.masters.in_the_model():
                self.method.schedule.after_step(step)
            self.masters.give_weights()
        self.masters.clear_gradients()

    def _arrived(self):
        """Return {name: master} of `before` that the model has got: a small step may leave its 16-bit numbers as they were."""
        live, masters = dict(self.model.named_parameters()), self._named()
        names = [name for name in self.before or () if torch.equal(live[name], masters[name].to(live[name].dtype))]
        return {name: masters[name] for name in names}

    def metrics(self):
        """Return {name: number} that the method adds to a logged step."""
        return self.method.schedule.measured()

    def state(self):
        """Return ({name: tensor}, JSON) for a checkpoint, the optimizer's apart; of the masters that are here."""
        ranks, pattern = self.method.schedule.state()
        tensors = {f"weights/{name}": master for name, master in self._named().items()}
        tensors |= {f"ranks/{name}": tensor for name, tensor in ranks.items()}
        return tensors, {"rank_pattern": pattern, "all_moved": self.before is None}

    def restore(self, tensors, state):
        """Go on from a `state`; raises InputError if it is of other parameters."""
        self.masters.restore(self.method.names, under("weights", tensors))
        self.method.schedule.restore(under("ranks", tensors), state["rank_pattern"])
        if state["all_moved"]:
            self.before = None

    def _named(self):
        return dict(zip(self.names, self.masters.masters, strict=True))


def not_finite(tensors):
    """Return the names of those of {name: tensor} in which a number is not finite."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
