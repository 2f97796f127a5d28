"""Full fine-tuning: the weights themselves are trained, all of them or those of some modules.

What is saved is an ordinary model folder, with a file that says how it came to be.
"""

from __future__ import annotations

import contextlib
import types
from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import base_model
from ..system.errors import InputError
from ..system.storage import write_json
from .adapter import Adapter
from .contract import Description, Trainable, one_group
from .folder import WHOLE, refuse_not_finite
from .peft_model import copy_into

_SHARD = "5GB"


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; it starts as the base, so nothing depends on the seed, checkpoint and examples."""
    if token_ids:
        raise InputError(
            "model.new_tokens: trains rows beside a frozen embedding; with full take lora first, or leave it out"
        )
    if base_model.quantized_modules(model):
        raise InputError("full: 4-bit weights cannot be trained; set quantization: null and take a 16-bit model")
    trained = _chosen(model, section)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _chosen(model, section):
    """Return the names of the parameters that are trained."""
    every = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    if section.modules is None:
        return set(every)
    found = {one: [name for name in every if f".{one}." in f".{name}"] for one in section.modules}
    task = base_model.task_of(model)
    if task.HAS_CLASSES:
        found |= {one: [name for name in every if name.startswith(f"{one}.")] for one in task.head_names(model)}
    absent = [f"full.modules: {one!r} is no module of the model" for one, names in found.items() if not names]
    if absent:
        known = sorted({name.split(".")[-2] for name in every})
        raise InputError.listing("the recipe", absent, f"this model has: {', '.join(known)}")
    return {name for names in found.values() for name in names}


def trainable(model, section):
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    what = "all parameters" if section.modules is None else ", ".join(section.modules)
    return Trainable(f"full fine-tuning, {what}", first_to_move=_smallest(named), groups=one_group(model))


def _smallest(named):
    """Return the smallest parameter of each module that holds several modules, such as a layer: enough to see it is trained."""
    found: dict = {}
    for name, parameter in named.items():
        place = name.rsplit(".", 2)[0]
        if place not in found or parameter.numel() < named[found[place]].numel():
            found[place] = name
    return {name: named[name] for name in found.values()}


def save(model, folder, base_name, revision):
    """Write an ordinary model folder; raises TrainingFailed before anything is written if a number is not finite."""
    refuse_not_finite(dict(model.named_parameters()), "tensors")
    task, modules = base_model.task_of(model), model.trained_by.modules
    # images: under the names that the model has in memory, which `read` gives back; the export has those of the files
    model.save_pretrained(folder, max_shard_size=_SHARD, save_original_format=task.HAS_TOKENS)
    if modules is not None and task.HAS_CLASSES:
        modules = [*modules, *task.head_names(model)]
    config = {"peft_type": "FULL", "modules": modules, "base_model_name_or_path": str(base_name),
              "revision": revision}  # fmt: skip
    write_json(Path(folder) / WHOLE, config)


def load(model, adapter, token_ids=()):
    """See contract.Method; the base's own numbers stay on the host, or, where its weights are not held, in its files."""
    named = dict(model.named_parameters())
    adapter.refuse_mismatch({}, {name: parameter.shape for name, parameter in named.items()}, {}, token_ids)
    away = {name: tensor for name, tensor in adapter.replaced.items() if base_model.is_stand_in(named[name])}
    trained = {named[name]: tensor for name, tensor in adapter.replaced.items() if name not in away}
    untrained = {parameter: parameter.detach().to("cpu", copy=True) for parameter in trained}

    @contextlib.contextmanager
    def disable_adapter(self):
        _give(self, untrained, {})
        try:
            yield
        finally:
            _give(self, trained, away)

    _give(model, trained, away)
    model.disable_adapter = types.MethodType(disable_adapter, model)
    return model.requires_grad_(False).eval()


def _give(model, values, away):
    """values: {parameter: its numbers}. away: {name: those of a parameter that is read when it is needed, exporter.streamed}."""
    copy_into(values)
    if hasattr(model, "read_instead"):
        model.read_instead.clear()
        model.read_instead.update(away)


def fill(model, adapter, ends=()):
    raise InputError(f"model.adapter_name_or_path: {adapter.folder} is a model; train it further as model.name_or_path")


def section_of(folder, config, recorded):
    raise InputError(f"{folder} is a model, not an adapter; train it further with model.name_or_path={folder}")


def describe(config):
    modules = config.get("modules")
    return Description("full fine-tuning", ", ".join(modules) if modules else "all parameters", "{W} trained")


def read(folder, config):
    replaced: dict = {}
    for path in sorted(folder.glob("*.safetensors")):
        replaced |= load_file(path)
    modules = config.get("modules")
    if modules is not None:
        replaced = {name: t for name, t in replaced.items() if any(f".{one}." in f".{name}" for one in modules)}
    broken = [f"{name}: contains non-finite values" for name, t in replaced.items() if not torch.isfinite(t).all()]
    if broken or not replaced:
        raise InputError.listing(f"model {folder}", broken or ["no tensors"], "train it again")
    # a tied pair is trained as the one matrix that it is
    return Adapter(folder, config, describe(config).kind, {}, replaced, stays_tied=True)
