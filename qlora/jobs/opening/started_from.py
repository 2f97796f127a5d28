"""Training an adapter further: what model.adapter_name_or_path names, and what the recipe takes over from it."""

from __future__ import annotations

from pathlib import Path

from ... import methods
from ...base_model import text_generation
from ...recipe.objectives import DROPOUTS
from ...runs.folder import RunDir
from ...system.errors import InputError
from ...system.events import note
from .opened_model import refuse_other_base

_FREE = {
    "lora_dropout",
    "loraplus_lr_ratio",
    "hira_dropout",
    "module_dropout",
    "dropout",
}  # say how, not what, is trained


def folder_of(model_section):
    """Return the folder of the adapter that a recipe starts from, None for none; raises InputError where there is none."""
    named = model_section.adapter_name_or_path
    if named is None:
        return None
    if RunDir.is_run(named):
        return RunDir.open(named).adapter
    if not (Path(named) / methods.CONFIG).is_file():
        raise InputError(f"model.adapter_name_or_path: {named} is neither a finished run nor an adapter folder")
    return Path(named)


def settle(recipe, checkpoint):
    """Return `recipe` with the method of the adapter that it starts from.

    Raises:
        InputError: the adapter was trained on another base, or in another way than the recipe asks for.
    """
    folder, named = folder_of(recipe.model), recipe.model.adapter_name_or_path
    if folder is None:
        return recipe
    run = RunDir(named) if RunDir.is_run(named) else None
    recorded = None if run is None else run.recipe()
    section = methods.section_of(folder, recorded and recorded.method)
    _refuse_changes(recipe.method, section, recorded and recorded.method, named)
    if recorded is not None:
        _refuse_other_task(recipe, recorded, named)
    elif recipe.task != text_generation.NAME:
        raise InputError(
            f"model.adapter_name_or_path: {named} is an adapter alone; the names of its classes are in its run, so name that"
        )
    if recorded is not None and _codes(recorded.quantization) != _codes(recipe.quantization):
        raise InputError(
            f"quantization: {_said(recipe.quantization)}, but {named} was trained on a base with {_said(recorded.quantization)}; "
            "an adapter goes on on the base that it was trained on"
        )
    base = methods.base_of(folder)
    if base is None:
        note(f"adapter   {named}: does not say what it was trained on; {checkpoint.name_or_path} is taken for it")
    else:
        refuse_other_base(named, base, checkpoint, "model.name_or_path=FOLDER")
    ours = recipe.method
    free = {name: getattr(ours, name) for name in _FREE & ours.model_fields_set if name in type(section).model_fields}
    if recipe.objective is not None and recipe.objective.has_reference:  # which has none
        free |= {name: 0.0 for name in DROPOUTS if name in type(section).model_fields}
    taken = {recipe.method.key: None, section.key: section.model_copy(update=free)}
    return recipe.model_copy(update=taken)


def _refuse_other_task(ours, theirs, named):
    """Raise InputError if an adapter was trained for another task than the recipe's, or for other classes."""
    if ours.task != theirs.task:
        raise InputError(f"task: {ours.task}, but {named} was trained for {theirs.task}")
    if ours.data.labels != theirs.data.labels:
        now, then = (", ".join(one.data.labels) for one in (ours, theirs))
        raise InputError(
            f"{named}: its classes are {then}, and those of this training {now}; train from the base instead"
        )


def _refuse_changes(ours, theirs, recorded, named):
    """Raise InputError if the recipe asks for something else than the adapter has, by its folder or as its run was asked for."""
    if not ours.model_fields_set:
        return
    if ours.key != theirs.key:
        raise InputError(f"{ours.key}: {named} was trained with {theirs.key}; leave the section out to go on with that")
    changed = [
        f"{ours.key}.{name}: {getattr(ours, name)}, but {named} has {getattr(theirs, name)}"
        for name in sorted(ours.model_fields_set - _FREE)
        if getattr(ours, name) not in (getattr(theirs, name), getattr(recorded, name, None))
    ]
    if changed:
        raise InputError.listing(
            "the recipe starts from an adapter, and", changed, "leave these out: they are taken over from it"
        )


def _codes(quantization):
    """Return what of a quantization decides the codes: what it computes in may be another."""
    return None if quantization is None else (quantization.quant_type, quantization.use_double_quant)


def _said(quantization):
    return "null" if quantization is None else ", ".join(f"{k} {v}" for k, v in quantization.model_dump().items())
