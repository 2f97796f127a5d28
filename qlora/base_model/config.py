"""config.json as a transformers config: read, refused where the task has no model for it, grown to the new tokens."""

from __future__ import annotations

from ..system.errors import InputError
from . import multimodal, prequantized, text_generation
from .messages import said
from .tokenizer import load_tokenizer


def load_config(checkpoint, section):
    """Return the transformers config, its vocab_size grown to hold the checkpoint's new tokens.

    Raises:
        InputError: not a known causal language model in 16 or 32 bit or NF4; or rows would have to be made up for tokens
            that are not trained.
    """
    config = read_config(checkpoint, section)
    if checkpoint.new_tokens:
        text_config, ids = config.get_text_config(), set(checkpoint.new_tokens.values())
        needed = set(range(text_config.vocab_size, max(ids) + 1))
        if needed - ids:
            raise InputError(
                f"{checkpoint.folder}: the model has {text_config.vocab_size} embeddings, and its tokenizer has tokens "
                f"beyond them ({_names(checkpoint, section, needed - ids)}); list these in model.new_tokens too"
            )
        text_config.vocab_size += len(needed)
    return config


def _names(checkpoint, section, ids):
    tokens = load_tokenizer(checkpoint.folder, section).convert_ids_to_tokens(sorted(ids)[:5])
    return ", ".join(map(repr, tokens)) + (", ..." if len(ids) > 5 else "")


def read_config(checkpoint, section):
    """Return the transformers config as the files have it, of a multimodal model that of its text half.

    Raises:
        InputError: as `load_config` does.
    """
    from transformers import AutoConfig

    path = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # its class computes with what the file says, and divides by zero heads
        raise InputError(f"{path}: {said(error)}") from None
    text_half = multimodal.text_config(config, checkpoint.folder)
    if text_half is not None:
        return text_half
    if not text_generation.is_known(config):
        raise InputError(f"{checkpoint.folder / 'config.json'}: {config.model_type!r} is not a causal language model")
    prequantized.refuse_unsupported(config, path)
    return config
