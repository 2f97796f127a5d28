"""What was trained, as files: its config, whole and unchanged; the seal that says what it was trained on.

An adapter folder, as PEFT has it, or a model folder with a file WHOLE.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import base_model
from ..system import bounded, files
from ..system.adapter_files import CONFIG, MANIFEST, WEIGHTS
from ..system.errors import InputError, TrainingFailed
from ..system.storage import listed, write_json

WHOLE = "full.json"  # beside a model: how it was trained
PREFIX = "base_model.model."  # PEFT's, before a module's own name


def read_config(folder):
    """Return what the adapter_config.json of an adapter folder says, once its files are found whole.

    Raises:
        InputError: files missing, cut off, changed since the training, or something else than their names say.
    """
    folder = Path(folder)
    if (folder / WHOLE).is_file():
        _refuse_changed(folder)
        return files.read_object(folder / WHOLE)
    weights = folder / WEIGHTS
    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter {folder}: no {CONFIG}; not an adapter folder")
    config = files.read_object(folder / CONFIG)
    _refuse_changed(folder)
    if not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"adapter {folder}: adapter_model.bin is a pickle, which is never read; "
                "open it with the tool that made it and save it as safetensors"
            )
        raise InputError(f"adapter {folder}: no {WEIGHTS}; copy or download it again")
    base_model.tensor_names(weights)
    return config


def refuse_not_finite(tensors, what="adapter tensors"):
    """Raise TrainingFailed, before anything is written, if a number in {name: tensor} is not finite. what: they are, in words."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise TrainingFailed(f"{len(broken)} {what} contain non-finite values ({broken[0]}); not saved")


def write_weights(folder, tensors):
    """Write {name: tensor} as the weights of an adapter folder whose config is there already."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors ignores the umask: 0600


def seal(folder, base):
    """Write down what is in an adapter folder that is finished, so that `read_config` can tell whether it still is.

    base: {file name: sha256} of what it was trained on.
    """
    folder = Path(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]  # a tokenizer may have a folder of templates
    found = {path.relative_to(folder).as_posix(): listed(path) for path in paths}
    write_json(folder / MANIFEST, {"files": found, "base": base})


def base_of(folder):
    """Return {file name: sha256} of the base that a sealed adapter was trained on, None of one that is not sealed."""
    path = Path(folder) / MANIFEST
    return files.read_object(path).get("base") if path.is_file() else None


def weight_hashes(folder):
    """Return {file name: sha256} of the weights in a sealed folder, by which an export knows what it was made of; else None."""
    path = Path(folder) / MANIFEST
    entries = files.read_object(path).get("files") if path.is_file() else None
    if not isinstance(entries, dict):
        return None
    return {name: entry["sha256"] for name, entry in entries.items() if name.endswith(".safetensors")}


def _refuse_changed(folder):
    """Raise InputError if a file is not as it was when the folder was sealed; that of another tool never was."""
    if not (folder / MANIFEST).is_file():
        return
    entries = files.read_object(folder / MANIFEST).get("files")
    if not isinstance(entries, dict):
        raise InputError(f"{folder / MANIFEST}: lists no files; copy the folder again")
    changed = [
        name for name, entry in entries.items() if not (folder / name).is_file() or entry != listed(folder / name)
    ]
    if changed:
        raise InputError(
            f"adapter {folder}: {', '.join(sorted(changed))} changed since the training; copy the folder again, or, if you "
            f"changed it on purpose, remove {folder / MANIFEST}"
        )


def matched(folder, fields, function):
    """Return function(), which goes by regular expressions in these fields of the config.

    Raises:
        InputError: one of them is none, or takes too long.
    """
    try:
        return bounded.call(function)
    except bounded.TookTooLong:
        raise InputError(
            f"{folder / CONFIG}: a regular expression in {fields} takes more than {bounded.SECONDS} seconds; "
            "the folder cannot be trusted"
        ) from None
    except (re.error, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: {fields}: {error}; copy or download it again") from None
