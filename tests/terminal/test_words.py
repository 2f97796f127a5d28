"""Lines that a person reads of micro-batches and limits: singular and plural, nothing twice, no row of 0 tokens."""

import dataclasses

import pytest

from qlora.jobs.planning.planned_training import Planned
from qlora.kernels import OFF
from qlora.system.events import heard_by
from qlora.terminal.plan import limits_in_words
from qlora.terminal.training import say_micro_batches

JOINED = dataclasses.replace(OFF, joined=True)


@dataclasses.dataclass(frozen=True)
class Chosen(Planned):
    tokens_per_micro_batch: int | None = None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rows", "steps", "tokens", "installed", "expected"),
    [
        (2, 8, 2048, JOINED, "16 rows a step, joined into micro-batches of at most 2,048 tokens"),
        (1, 1, 99, JOINED, "one row a step: micro-batches of at most 99 tokens"),
        (1, 1, None, OFF, "1 micro-batch of 1 row a step: without a plan"),
        (2, 8, None, JOINED, "8 micro-batches of 2 rows a step: without a plan"),
    ],
)
def test_micro_batches_are_said_in_words(make_recipe, rows, steps, tokens, installed, expected):
    training = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
    said = []
    with heard_by(said.append):
        say_micro_batches(
            make_recipe(training=training), Chosen(0, False, None, tokens_per_micro_batch=tokens), installed
        )
    assert [line.text for line in said] == [f"batches   {expected}"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_length": 0, "tokens_per_micro_batch": 0, "r": 0}, "none: not even one token fits"),
        (
            {"max_length": 4096, "tokens_per_micro_batch": 4096, "r": 64},
            "rows, or micro-batches of joined rows, up to 4,096 tokens; or r up to 64",
        ),
        (
            {"max_length": 4000, "tokens_per_micro_batch": 4096},
            "rows up to 4,000 tokens; or joined micro-batches up to 4,096 tokens",
        ),
        ({"max_length": 512, "micro_batch": 3}, "rows up to 512 tokens; or 3 rows per micro-batch"),
    ],
)
def test_limits_are_said_once(limits, expected):
    assert limits_in_words(limits) == expected
