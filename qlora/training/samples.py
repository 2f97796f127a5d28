"""Answers while it trains: of the model as an evaluation has it, and without a trace."""

from __future__ import annotations

from .. import base_model
from ..system import memory
from ..system.events import note


def answered(ask, model, go_on):
    """Return the samples of ask(go_on), a tuple; empty where there is no memory for an answer beside the training.

    ask: yields samples, see runs.record.Samples. go_on: is called now and then, and raises where training is to stop.
    None: there are none.
    """
    if ask is None:
        return ()
    training = model.training
    model.eval()
    try:
        return tuple(ask(go_on))
    except memory.MAY_BE_REFUSALS as error:
        if not memory.is_refusal(error) or base_model.is_gathered(
            model
        ):  # the others would still gather weights for theirs
            raise
        memory.release(error)
        memory.free_cached()
        note(
            "samples   left out: there is no memory for an answer beside the training; set a lower training.num_samples"
        )
        return ()
    finally:
        model.train(training)
