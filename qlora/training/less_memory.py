"""Out of memory in mid-run: what did not fit runs again with less memory, to the same numbers, and so does all after it.

More layers are checkpointed, at last all of them; on a GPU their inputs go to the host; and then the rows of a micro-batch are
run in halves. accelerate's find_executable_batch_size begins the whole training again instead, with another batch size.
"""

from __future__ import annotations

import torch

from ..kernels.checkpointing import Checkpointing
from ..runs.record import LessMemory, to_json
from ..system import memory
from ..system.units import size
from .rehearsal import way_back
from .reserve import Reserve


class Economy:
    """How a training gets by with less memory than was planned.

    layers: the Checkpointing of the model. fixed: the recipe says how many. changes: the LessMemory of this process, in order;
    waiting: those that are not said yet. reserve: what is to stay free. An out-of-memory error of the optimizer is not met: a
    step that is half taken cannot be taken again; what it needs is there before (rehearsal.py). retries: False where other
    processes would have to run again too.
    """

    def __init__(self, layers=None, fixed=False, reserve=None, retries=True):
        self.retries = retries
        self.layers = layers or Checkpointing([], 0)
        self.reserve = reserve or Reserve()
        self.planned, self.fixed = (self.layers.number, self.layers.offload), fixed
        self.changes: list[LessMemory] = []
        self.waiting: list[LessMemory] = []
        # (of trainings, of evaluations): numbers in the largest tensor of the smallest batch that is run in halves
        self.halved_from: list[int | None] = [None, None]

    def state(self):
        """Return what `restore` takes, as JSON: a run that goes on does not run out again. None where all is as planned."""
        if (self.layers.number, self.layers.offload) == self.planned and not any(self.halved_from):
            return None
        return {"layers": self.layers.number, "offload": self.layers.offload, "halved_from": self.halved_from}

    def restore(self, state):
        """Go on with as little memory as a checkpoint says, if that is less; before `layers` is entered."""
        if state:
            self.layers.number = min(max(self.layers.number, state["layers"]), len(self.layers.layers))
            self.layers.offload = self.layers.offload or state["offload"]
            self.halved_from = list(state["halved_from"]) if self.retries else [None, None]

    def run(self, trainer, compute, keep=None, divisible=True):
        """Return [compute(batch)] of the batch that trainer.moment has, or [compute(part), ...] of parts of its rows.

        compute: forward and backward; changes nothing that rehearsal.way_back does not undo, or changes it last. keep(): puts
        away what it left in the model, once for each part. divisible: what it returns may be of parts.

        Raises:
            RuntimeError, MemoryError: as compute raised it; there is nothing left to try.
        """
        moment = trainer.moment
        while not (divisible and self._in_halves(moment, trainer.objective)):
            undo = way_back(trainer)
            try:
                made = compute(dict(moment.inputs))
            except memory.MAY_BE_REFUSALS as error:
                if not self._may_go_on(trainer, error, divisible):
                    raise
                why = memory.refused(error)
                memory.release(error)
            else:
                if keep is not None:
                    keep()
                return [made]
            # not within `except`: there the error would hold all that the forward pass kept
            undo()
            memory.free_cached()
            then = None if moment.evaluates else self.layers.next(trainer.model.device.type == "cuda")
            self._change(trainer, then, why)
        parts = []
        for half in moment.halves(trainer.objective):
            trainer.moment = half
            parts += self.run(trainer, compute, keep)
        trainer.moment = moment
        return parts

    def _in_halves(self, moment, objective):
        smallest = self.halved_from[moment.evaluates]
        return smallest is not None and _size(moment.inputs) >= smallest and bool(objective.halves(moment.inputs))

    def _may_go_on(self, trainer, error, divisible):
        if not memory.is_refusal(error) or not self._may_retry(trainer):
            return False
        more = not trainer.moment.evaluates and self.layers.next(trainer.model.device.type == "cuda") is not None
        return more or (divisible and bool(trainer.objective.halves(trainer.moment.inputs)))

    def _may_retry(self, trainer):
        return self.retries and trainer.accelerator.num_processes == 1  # else others would wait for this one

    def keep_reserve(self, trainer, measured):
        """Take a small step to less memory where too little is left beside the `measured` bytes of a rehearsal.

        Return whether it was taken, so that another rehearsal is due. Rows are not halved for it: that changes rounding.
        """
        left = self.reserve.learn(measured)
        if left is None or left >= self.reserve.bytes or not self._may_retry(trainer):
            return False
        then = self.layers.next(trainer.model.device.type == "cuda", small=True)
        if then is None:
            return False
        memory.free_cached()
        self._change(
            trainer, then, f"{size(max(0, left))} left, {size(self.reserve.bytes)} are to stay free", reserve=True
        )
        return True

    def _change(self, trainer, then, why, reserve=False):
        """Take the step `then` of Checkpointing.next, None: run the batch in halves; and say it. reserve: as of LessMemory."""
        moment, layers = trainer.moment, self.layers
        if then is None:
            self.halved_from[moment.evaluates] = _size(moment.inputs)
            change = "batches of this size run in two halves"
            if not moment.evaluates:
                change += ": the same gradients but for rounding, and dropout draws other numbers"
        else:
            planned = f"memory.gradient_checkpointing={layers.number}" if self.fixed else f"{layers.number}"
            layers.change(*then)
            change = f"{layers.number} of {len(layers.layers)} layers checkpointed instead of {planned}"
            change += ", their inputs offloaded to CPU memory" if layers.offload else ""
        self.changes.append(
            LessMemory(
                step=trainer.state.global_step,
                epoch=trainer.state.epoch or 0.0,
                out_of_memory=f"{moment.when}: {why}; {moment.batch(trainer.objective)}",
                change=change,
                rows=tuple(number + 1 for number in moment.rows),
                checkpointed_layers=layers.number,
                offload=layers.offload,
                time=trainer.clock.elapsed(),
                reserve=reserve,
            )
        )
        self.waiting.append(self.changes[-1])
        trainer.say_less_memory()

    def said(self):
        """Return what memory.json keeps of it."""
        layers = self.layers
        found: dict = {"layers": len(layers.layers), "checkpointed_layers": layers.number, "offload": layers.offload}
        found["reserve_bytes"] = self.reserve.bytes
        return found | ({"less_memory": [to_json(one) for one in self.changes]} if self.changes else {})


def _size(inputs):
    """Return how many numbers the largest tensor of a batch has, padding counted; does not wait for a GPU."""
    return max(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor))
