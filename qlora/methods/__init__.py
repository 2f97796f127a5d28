"""What is trained. One file a method, named like its section of the recipe, with what contract.Method says; here by section,
model or folder. The other files are what methods share.
"""

from __future__ import annotations

import importlib
import pkgutil
import types
from pathlib import Path
from typing import Any

import torch

from .. import base_model
from ..system.errors import InputError, TrainingFailed
from . import peft_model
from .adapter import Adapter
from .contract import Description, Group, Method, Schedule, Trainable
from .folder import CONFIG, MANIFEST, WEIGHTS, base_of, read_config, seal, weight_hashes
from .peft_model import shapes

__all__ = ["CONFIG", "MANIFEST", "WEIGHTS", "Adapter", "Description", "Group", "Method", "Schedule", "Trainable", "attach",
           "base_of", "describe", "load", "names", "num_positions", "of", "read", "read_config",
           "refuse_unmoved", "save", "seal", "shapes", "trainable", "weight_hashes"]  # fmt: skip


def of(section) -> Method:
    """Return the method of a section of the recipe: the module of this package that is called like its key."""
    return _module(section.key)


def names():
    """Return the names of all methods: the modules of this package that can attach."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if hasattr(_module(found.name), "attach"))


def _module(name) -> Any:
    return importlib.import_module(f"{__name__}.{name.lower()}")


def _kinds():
    """Return peft_type of all methods."""
    return [name.upper() for name in names()]


def _of_folder(folder, config):
    """Return the method of an adapter_config.json."""
    kind = config.get("peft_type")
    if kind not in _kinds():
        *others, last = _kinds()
        raise InputError(f"adapter {folder}: peft_type {kind!r} is not {', '.join(others)} or {last}")
    return _module(kind)


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=(), start=None):
    """Return `model` with what a section of the recipe trains in it, as contract.Method says; `trainable` is of it.

    start: a folder of `save` whose numbers it starts with, None for those of the section.
    """
    if start is None:
        attached = of(section).attach(model, section, seed, token_ids, checkpoint, examples)
    else:
        adapter, ends = read(start), peft_model.ends(model)
        adapter.refuse_other_tokens(base_model.token_modules(model) if token_ids else [], token_ids)
        attached = of(section).attach(model, section.from_zero(), seed, token_ids)
        of(section).fill(attached, adapter, ends)
    attached.trained_by = section
    return _with_base(attached)


def _with_base(model):
    """Return `model`, which answers to PEFT's question for the model inside it where it is that model itself."""
    if not hasattr(model, "get_base_model"):
        model.get_base_model = types.MethodType(lambda self: self, model)
    return model


def trainable(model) -> Trainable:
    """Return the Trainable of a model that `attach` has returned."""
    return of(model.trained_by).trainable(model, model.trained_by)


def num_positions(model):
    """Return how many of its positions a model with a method in it takes before each text, as it is switched now."""
    return getattr(model, "num_virtual_tokens", 0)


def refuse_unmoved(now, before):
    """Raise TrainingFailed unless everything in `before` ({name: tensor}) is there `now` and differs; names what does not.

    B starts at zero (or small) and gets a gradient at the first step. One that stays is cut off from the loss (a repacked
    base weight, checkpointing without input gradients), and would be exported as if it had been trained.
    """
    stuck = [name for name, tensor in before.items() if name not in now or torch.equal(now[name], tensor)]
    if stuck:
        raise TrainingFailed(
            f"{len(stuck)} of {len(before)} adapters did not move in the first step, so they are not being trained: "
            f"{', '.join(stuck[:3])}{', ...' if len(stuck) > 3 else ''}"
        )


def save(model, folder, base_name, revision):
    """Write what was trained into `folder`, as contract.Method says."""
    of(model.trained_by).save(model, folder, base_name, revision)


def section_of(folder, recorded=None):
    """Return the section of the recipe with which the adapter in a folder goes on. recorded: the one it was trained with.

    Raises:
        InputError: it cannot be told, or it cannot go on.
    """
    config = read_config(folder)
    method = _of_folder(folder, config)
    if hasattr(method, "section_of"):
        return method.section_of(folder, config, recorded)
    if recorded is None:
        raise InputError(
            f"adapter {folder}: how a {describe(config).kind} was trained is known of a run only; name the run"
        )
    return recorded


def read(folder) -> Adapter:
    """Return the Adapter in a folder of `save`, or one that another tool wrote with PEFT.

    Raises:
        InputError: files missing or cut off, an unsupported kind, tensors without a partner or not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    return _of_folder(folder, config).read(folder, config)


def load(model, folder, token_ids=()):
    """Return `model` with the adapter in `folder`, frozen, in eval mode; `disable_adapter()` gives the base.

    folder: or what `read` has read of it. token_ids: the tokens whose rows were trained.

    Raises:
        InputError: as `read` does; or any tensor finds no place in the model, or the other way round.
    """
    adapter = folder if isinstance(folder, Adapter) else read(folder)
    return _with_base(_of_folder(adapter.folder, adapter.config).load(model, adapter, token_ids))


def describe(config) -> Description:
    """Return the Description of an adapter folder with this config; of a kind that is not known, its name alone."""
    kind = config["peft_type"]
    return _module(kind).describe(config) if kind in _kinds() else Description(str(kind), "")
