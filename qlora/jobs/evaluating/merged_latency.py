"""How long an answer's token takes in a merged model: the base without quantization, whose shapes every merged model has."""

from __future__ import annotations

from ... import base_model
from ...data import masked_examples
from ...evaluation import latency
from ...system import memory
from ...system.events import note, progress
from ..opening.opened_model import open_tokenizer, unquantized


def seconds_a_token(run, messages) -> float | None:
    """Return the seconds of one token of an answer to `messages`; None where that model does not fit into memory.

    run: a finished RunDir, for base and tokenizer.
    """
    recipe = run.recipe()
    checkpoint = base_model.find(recipe.model)
    try:
        with progress(f"loading {checkpoint.name_or_path} without quantization"):
            model = base_model.load(checkpoint, unquantized(checkpoint, recipe.model), None)
        tokenizer, _ = open_tokenizer(run.adapter, recipe.model, model.generation_config)
        return latency.seconds_of(model, tokenizer, masked_examples.encode_prompt(tokenizer, messages))["token"]
    except memory.MAY_BE_REFUSALS as error:
        if not memory.is_refusal(error):
            raise
        note(f"no latency of a merged model: {memory.refused(error)}")
        return None
