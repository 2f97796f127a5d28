"""Where a method trains: the layers that its section names, and the modules that it trains whole."""

from __future__ import annotations

import torch

from .. import base_model
from ..system.errors import InputError


def refuse_token_rows(token_ids, who):
    """Raise InputError where rows of new tokens are to be trained by a method, called `who` in words, that trains none."""
    if token_ids:
        raise InputError(f"model.new_tokens: {who} trains no rows of an embedding; take lora, or leave new_tokens out")


def chosen(model, section, token_ids):
    """Return (full names of the layers that the method changes, full names of the modules in modules_to_save).

    section: with target_modules, exclude_modules, layers_to_transform and modules_to_save.

    Raises:
        InputError: a name or pattern that matches nothing, with the names that exist; or a module that cannot be trained.
    """
    layers = _layers(model, section)
    whole = _whole(model, section, layers, token_ids)
    return [name for name in layers if not _is_within(name, whole)], whole


def _matching(wanted, names, **restrictions):
    """Return those of `names` that `wanted` (a regular expression, or a list of names) means, by PEFT's own rules."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=wanted, **restrictions)
    return [name for name in names if check_target_module_exists(config, name)]


def _one_by_one(wanted):
    return [wanted] if isinstance(wanted, str) else [[one] for one in wanted]


def _said(entry):
    return repr(entry if isinstance(entry, str) else entry[0])


def _layers(model, section):
    linear = base_model.linear_names(model)
    if not linear:
        raise InputError(
            f"{section.key}: {type(model).__name__} has no linear layer that could have an adapter; take full"
        )
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    targets = leaves if section.target_modules == "all-linear" else section.target_modules
    _refuse_unmatched(model, section, linear, leaves, targets)
    found = _matching(targets, linear, exclude_modules=section.exclude_modules)
    if section.layers_to_transform is not None:
        layers = {index: _matching(targets, found, layers_to_transform=[index])
                  for index in section.layers_to_transform}  # fmt: skip
        absent = [str(index) for index, there in layers.items() if not there]
        if absent:
            raise InputError(
                f"{section.key}.layers_to_transform: the model has no layer {', '.join(absent)} that can have an adapter"
            )
        found = [name for name in found if any(name in there for there in layers.values())]
    if not found:
        raise InputError(f"{section.key}.exclude_modules: excludes every layer that could have an adapter")
    return found


def _refuse_unmatched(model, section, linear, leaves, targets):
    names = {module: name for name, module in model.named_modules()}
    ends = [names[end] for end in base_model.token_ends(model)]
    problems = []
    for field, wanted in (("target_modules", targets), ("exclude_modules", section.exclude_modules or [])):
        for one in _one_by_one(wanted):
            end = field == "target_modules" and _matching(one, ends)
            if end:
                problems.append(
                    f"{section.key}.{field}: {_said(one)} cannot have an adapter (trl computes the loss from the head's "
                    f"weight alone); modules_to_save: [{end[0].rpartition('.')[2]}] trains all of it, model.new_tokens trains "
                    "rows of it"
                )
            elif not _matching(one, linear):
                problems.append(f"{section.key}.{field}: {_said(one)} matches no linear layer")
    if problems:
        raise InputError.listing("the recipe", problems, f"this model has: {', '.join(leaves)}")


def _whole(model, section, layers, token_ids):
    modules, task = dict(model.named_modules()), base_model.task_of(model)
    whole, problems = [*(task.head_names(model) if task.HAS_CLASSES else ())], []
    for wanted in section.modules_to_save or ():
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        whole += found
        for name in found or [wanted]:
            problem = _why_not_whole(model, section, modules.get(name), name, layers, token_ids)
            problems += [f"{section.key}.modules_to_save: {name}: {problem}"] if problem else []
    nested = [name for name in whole if _is_within(name, set(whole) - {name})]
    problems += [f"{section.key}.modules_to_save: {name}: is inside another listed module" for name in nested]
    if set(layers) <= {name for name in layers if _is_within(name, whole)}:
        problems.append(f"{section.key}.modules_to_save: leaves no layer that could have an adapter")
    if problems:
        raise InputError("\n".join(problems))
    return sorted(set(whole))


def _why_not_whole(model, section, module, name, layers, token_ids):
    """Return why a module cannot be trained whole, None if it can."""
    adapted = [layer for layer in layers if _is_within(layer, [name])]
    ends = base_model.token_ends(model)
    if module is None:
        return "the model has no such module"
    if any(_is_within(layer, [name]) for layer in base_model.quantized_modules(model)):
        return "its 4-bit weights cannot be trained; name it in target_modules, or set quantization: null"
    if adapted and section.target_modules != "all-linear":
        return f"target_modules names {adapted[0]} too; name it once"
    if isinstance(module, torch.nn.ModuleList) or next(module.parameters(), None) is None:
        return f"a {type(module).__name__} has no weights of its own"
    if token_ids and any(end in ends for end in module.modules()):
        return "model.new_tokens trains rows of it; leave one of the two out"
    return None


def _is_within(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)
