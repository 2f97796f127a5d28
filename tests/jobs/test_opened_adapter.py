"""What export opens carries the sections that it needs, of a run or of an adapter that has no recipe."""

import pytest

from qlora import quiet, train
from qlora.jobs.opening.opened_adapter import open_trained
from qlora.system import events
from qlora.system.errors import InputError


@pytest.fixture
def run(make_recipe):
    with quiet():
        return train(make_recipe(training={"max_steps": 1}, data={"max_length": 100}))


def test_of_a_run_they_are_those_it_was_trained_with(run):
    with open_trained([run.path], overrides=["export.dtype=float32"]) as trained:
        recipe = run.recipe()
        assert (trained.model, trained.quantization) == (recipe.model, recipe.quantization)
        assert trained.export.dtype == "float32"
        assert trained.data["max_length"] == 100
        assert trained.live_model == "recorded"


def test_of_an_adapter_they_are_what_is_laid_over_the_defaults(run, tiny_model):
    base, heard = tiny_model("llama"), []
    dtype = "quantization.compute_dtype=float32"  # what auto is here may be said in a line
    asked = ["quantization.use_double_quant=false", "export.base=original", dtype]
    with events.heard_by(heard.append), open_trained([run.adapter], base, overrides=asked) as trained:
        assert trained.model.name_or_path == str(base)
        assert (trained.quantization.quant_type, trained.quantization.use_double_quant) == ("nf4", False)
        assert trained.export.base == "original"
        assert trained.live_model == "declared"
        assert trained.rows_from == "built-in sentences"
    assert not [event for event in heard if isinstance(event, events.Note)]  # nothing was assumed

    with events.heard_by(heard.append), open_trained([run.adapter], base) as trained:
        assert trained.live_model == "assumed"
    (note,) = [event for event in heard if isinstance(event, events.Note) and not event.text.startswith("dtype")]
    assert "assumed to be quantized to nf4 and double quantization" in note.text


def test_what_is_neither_a_run_nor_an_adapter_is_said(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        open_trained([tmp_path])
