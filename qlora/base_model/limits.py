"""What a model cannot take, whichever verb asks: rows beyond its positions, tokens beyond its embeddings."""

from __future__ import annotations

from ..system.errors import InputError
from . import tasks

# whose positions begin behind the number of the pad token: 514 in config.json are 512 tokens
_AFTER_PADDING = ("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "roberta", "roberta-prelayernorm",
                  "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip


def num_positions(config):
    """Return how many tokens the model can take at once, as its config says; None where it sets no limit."""
    config = config.get_text_config()
    if getattr(config, "alibi", False):  # distances instead of positions, whatever else the config says
        return None
    found = getattr(config, "max_position_embeddings", None)
    if found is not None and config.model_type in _AFTER_PADDING:
        return found - config.pad_token_id - 1
    return found


def said_of_positions(limit, taken):
    """Return in words how many positions a model has, of which virtual tokens take the first `taken`."""
    return f"the model has {limit:,} positions" + (f", {taken:,} of them for virtual tokens" if taken else "")


def refuse_rows(rows, config, taken=0):
    """Raise InputError if the model cannot take one of `rows` (data.Rows): too many tokens, or one that it does not have.

    taken: positions that the method takes before each row.

    Beyond its positions, a model with learned ones ends in an IndexError, and one with rotary ones answers rubbish.
    """
    if not tasks.of_config(config).HAS_TOKENS:  # every image is made as large as the model takes it
        return
    num_embeddings, largest = config.get_text_config().vocab_size, rows.largest_token
    if largest >= num_embeddings:
        raise InputError(
            f"the tokenizer makes token {largest}, the model has {num_embeddings} embeddings; "
            "tokenizer and model do not belong together"
        )
    limit = num_positions(config)
    lengths = rows.longest
    too_long = (lengths + taken > limit).nonzero()[0] if limit is not None else ()
    if len(too_long):
        said = said_of_positions(limit, taken)
        raise InputError.listing(
            "the data",
            [f"{rows.where(at)}: {lengths[at]:,} tokens, {said}" for at in too_long[:20]],
            f"shorten these rows or leave them out, or set data.max_length={limit - taken} (and data.overlong)"
            if limit - taken > 0
            else "take fewer virtual tokens",
            total=len(too_long),
        )
