"""Whose settings file this is, and the draft of a recipe that says the same."""

from __future__ import annotations

from pathlib import Path

from ..system.errors import InputError
from . import axolotl, llama_factory, reading
from .foreign import Draft


def read(path) -> Draft:
    """Return the Draft of a YAML file of axolotl or LLaMA-Factory.

    Raises:
        InputError: it is of neither, is no YAML, holds a token or password, or trains something else than answers.
    """
    values, _ = reading.from_file(path, (), what="file to read settings from")
    try:
        if axolotl.KEY in values:
            return axolotl.read(values)
        if "model_name_or_path" in values and any(key in values for key in llama_factory.KEYS):
            return llama_factory.read(values, Path(path).parent)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a value cannot be read: {error}; correct it there") from None
    if isinstance(values.get("model"), dict):
        raise InputError(f"{path}: is a recipe of qlora already; train it: qlora train {path}")
    raise InputError(
        f"{path}: neither a file of axolotl (it has base_model) nor of LLaMA-Factory (model_name_or_path, stage, dataset)"
    )
