"""The best evaluation so far, and whether training ends because nothing has been better for long."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs import checkpoints, record

_HIGHER_IS_BETTER = {"eval_loss": False, "eval_accuracy": True}


@dataclass
class Best:
    """metric: of an evaluation, "eval_loss" or "eval_accuracy". patience: so many evaluations in a row that are no better end the
    training; None: never. load: the adapter is to be that of the best.

    step, value: of the best evaluation, None before the first; of equal ones the first is the best. loss: its held-out loss.
    waited: how many evaluations there were since. last_loss: of the last evaluation.
    """

    metric: str = "eval_loss"
    patience: int | None = None
    load: bool = False
    step: int | None = None
    value: float | None = None
    loss: float | None = None
    waited: int = 0
    last_loss: float | None = None

    def take(self, step, metrics):
        """Count an evaluation after `step`, {name: number}; return whether it is the best so far."""
        value = metrics[self.metric]
        self.last_loss = metrics["eval_loss"]
        sign = 1 if _HIGHER_IS_BETTER[self.metric] else -1
        if self.value is not None and sign * value <= sign * self.value:
            self.waited += 1
            return False
        self.step, self.value, self.loss, self.waited = step, value, metrics["eval_loss"], 0
        return True

    @property
    def is_over(self):
        """Whether training is to end."""
        return self.patience is not None and self.waited >= self.patience

    def state(self):
        """Return what a checkpoint keeps, as JSON. `runs/checkpoints.py` reads "step": that checkpoint is kept too."""
        return {name: getattr(self, name) for name in ("metric", *_STATE)}

    def restore(self, state):
        """Go on from a `state`; None, or one of another metric: evaluations are compared from here on."""
        if state is not None and state["metric"] == self.metric:
            for name in _STATE:
                setattr(self, name, state[name])


_STATE = ("step", "value", "loss", "waited", "last_loss")


def best_of(section):
    """Return the Best that a recipe's section `training` asks for, or None."""
    if not section.looks_for_best:
        return None
    return Best(section.metric_for_best_model, section.early_stopping_patience, section.load_best_model_at_end)


def end_with_best(trainer):
    """Give the model of a Reliable trainer the weights of its best evaluation, where it is to have them; return a record.Best."""
    best, state = trainer.best, trainer.state
    if best.load and best.step != state.global_step:
        path = trainer.saving.to.of_step(best.step)
        trainer.trained.restore(checkpoints.read_tensors(path), checkpoints.read_state(path))
    return record.Best(
        state.global_step,
        state.epoch,
        best_step=best.step,
        metric=best.metric,
        value=best.value,
        loaded=best.load,
        eval_loss=best.loss if best.load else best.last_loss,
        stopped_after=best.waited if best.is_over and state.global_step < state.max_steps else None,
        time=trainer.clock.elapsed(),
    )
