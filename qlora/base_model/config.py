"""config.json as a transformers config: read, refused where the task has no model for it, grown to the new tokens."""

from __future__ import annotations

import dataclasses
import functools

from ..system.errors import InputError
from . import multimodal, prequantized, tasks
from .messages import said
from .tokenizer import load_tokenizer


def load_config(checkpoint, section):
    """Return the transformers config, its vocab_size grown to hold the checkpoint's new tokens.

    Raises:
        InputError: not a known model for the checkpoint's task in 16 or 32 bit or NF4; or rows would have to be made up for
            tokens that are not trained.
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
    path = checkpoint.folder / "config.json"
    config, task = config_of_files(checkpoint, section), checkpoint.task
    _refuse_another_task(config, task, path)
    text_half = multimodal.text_config(config, checkpoint.folder, task.name)
    if text_half is not None:
        return text_half
    pads = task.file.HAS_CLASSES and task.file.HAS_TOKENS
    task.file.settle_config(config, task, checkpoint, _pad_token_id(checkpoint, section) if pads else None)
    prequantized.refuse_unsupported(config, path)
    return config


def config_of_files(checkpoint, section):
    """Return the transformers config that config.json is, whatever it is of; raises InputError where it is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # its class computes with what the file says, and divides by zero heads
        raise InputError(f"{checkpoint.folder / 'config.json'}: {said(error)}") from None


def _refuse_another_task(config, task, path):
    """Raise InputError if the files are of a model with classes, and the task has none."""
    found = tasks.of_config(config)
    if found.HAS_CLASSES and found is not task.file:
        raise InputError(
            f"{path}: a model for {found.NAME} ({config.architectures[0]}), not for {task.name}; set task: {found.NAME}, or take "
            "another model"
        )


def as_its_files_say(checkpoint, section):
    """Return the Checkpoint opened for the task that its config.json is of, with the classes that it names."""
    task = tasks.of_config(config_of_files(checkpoint, section))
    return dataclasses.replace(checkpoint, task=tasks.Task(task.NAME))


def own_labels(checkpoint, section):
    """Return the names of the classes that the files have a head for, in order; () where they have none, or no names."""
    config, task = config_of_files(checkpoint, section), checkpoint.task.file
    if tasks.of_config(config) is not task:
        return ()
    labels = task.labels_of(config)
    return () if all(label.startswith("LABEL_") for label in labels) else labels


def _pad_token_id(checkpoint, section):
    """Return the id of the token that fills up short rows, None where there is no tokenizer, which a plan does without.

    Raises:
        InputError: the tokenizer has none.
    """
    path = checkpoint.folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    found = _read_pad_token_id(checkpoint.folder, section, path.stat().st_mtime_ns)
    if found is None:
        raise InputError(
            f"{path}: the tokenizer has no pad_token and no eos_token, so rows of unlike "
            "length cannot go together; name a pad_token in that file"
        )
    return found


@functools.lru_cache(maxsize=4)  # every verb reads the config some times, and a tokenizer takes up to a second
def _read_pad_token_id(folder, section, stamp):
    return load_tokenizer(folder, section).pad_token_id
