"""Whose settings file this is, and the draft of a recipe that says the same."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..system import files
from ..system.errors import InputError
from . import axolotl, llama_factory, yaml_document
from .foreign import Draft


def read(path) -> Draft:
    """Return the Draft of a YAML file of axolotl or LLaMA-Factory.

    Raises:
        InputError: it is not there, is of neither, is no YAML, or trains something else than answers.
    """
    try:
        values, _ = yaml_document.parse(files.read(path, "the file of settings"), path)
    except FileNotFoundError:
        raise InputError(f"no file at {path}; give a YAML file of axolotl or LLaMA-Factory") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a file of settings is one YAML mapping")
    try:
        if axolotl.KEY in values:
            return axolotl.read(values)
        if "model_name_or_path" in values and any(key in values for key in llama_factory.KEYS):
            return llama_factory.read(values, Path(path).parent)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a value cannot be read: {error}; correct it there") from None
    if isinstance(values.get("model"), dict):
        raise InputError(f"{path}: is a recipe of qlora already; train it: qlora train {shlex.quote(str(path))}")
    raise InputError(
        f"{path}: neither a file of axolotl (it has base_model) nor of LLaMA-Factory (model_name_or_path, stage, dataset)"
    )
