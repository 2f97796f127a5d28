"""Time in evaluations and checkpoints is not time of the steps."""

import time

from qlora.training.objectives import supervised
from tests.training.conftest import UNEVEN, records


def test_tokens_a_second_are_those_of_the_steps(fit, monkeypatch):
    """An evaluation or a checkpoint that takes long makes the run longer, and no step slower."""
    original = supervised.Trainer.evaluation_loop

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return original(*args, **kwargs)

    monkeypatch.setattr(supervised.Trainer, "evaluation_loop", slow)
    _, result, run = fit(held_out=UNEVEN[:2], max_steps=4, eval_steps=1, logging_steps=2)
    assert result.seconds - result.step_seconds > 4 * 0.2
    logged = [record for record in records(run) if "loss" in record]
    # the tokens between two lines by their seconds: those without the evaluations in between
    seconds = sum(
        (record["tokens"] - before) / record["tokens_per_second"]
        for record, before in zip(logged, [0, *(one["tokens"] for one in logged)], strict=False)
    )
    assert seconds < result.step_seconds + 0.2
