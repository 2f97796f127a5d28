"""Bottleneck adapters: h + U f(D h) on the output h of a block, before it is added to the residual; U starts at 0.

D (R, H), U (H, R), both with a bias; f a nonlinearity. The base stays as it is, in 4 bit or not.
pfeiffer    after the MLP of each layer           Pfeiffer et al., AdapterFusion, 2021 (arXiv:2005.00247)
houlsby     after attention and after the MLP     Houlsby et al., Parameter-Efficient Transfer Learning, 2019 (arXiv:1902.00751)
The head of a task with classes is trained beside them. PEFT has none; the folder is our own: adapter_config.json and
adapter_model.safetensors, with the names of the blocks.
"""

from __future__ import annotations

import contextlib
import re
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .. import base_model
from ..recipe import Bottleneck as Section
from ..system.errors import InputError
from ..system.storage import write_json
from . import targets
from .adapter import Adapter, refuse_unknown_settings
from .contract import Description, Trainable, one_group
from .folder import CONFIG, WEIGHTS, refuse_not_finite, write_weights
from .peft_model import copy_into, dtype_of, refuse_misfit

# H hidden size, R size of the bottleneck

_PLACES = {"pfeiffer": ("mlp",), "houlsby": ("attention", "mlp")}
# what classes of these blocks are called in transformers
_BLOCKS = {"attention": re.compile("Attention|Mixer"), "mlp": re.compile("MLP|Mlp|FFN|FeedForward|Moe|MoE|Experts")}
_ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu, "silu": nn.functional.silu}
_FIELDS = ("size", "where", "activation", "dropout")
_NAME = "bottleneck"  # of the module beside the block
_ONE = "default"  # part of the names in checkpoints


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; nothing is read from checkpoint and examples."""
    targets.refuse_token_rows(token_ids, "a bottleneck adapter")
    model.requires_grad_(False)
    for parameter in _head(model).values():
        parameter.requires_grad_(True)
    torch.manual_seed(seed)
    for place in _places(model, section.where):
        _insert(model, place, section)
    return _with_switch(model)


def _places(model, where):
    """Return the full names of the blocks that get an adapter, from the first layer to the last."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for layer in base_model.decoder_layers(model):
        for kind in _PLACES[where]:
            block = _block(layer, kind)
            if block is None:
                raise InputError(
                    f"bottleneck.where {where}: {type(layer).__name__} has no block of its own for its {kind}; take lora"
                )
            found.append(names[block])
    return found


def _block(layer, kind):
    """Return the module of a layer whose output is what the attention or the MLP adds to the residual, None if there is none."""
    blocks = [child for child in layer.children() if _BLOCKS[kind].search(type(child).__name__)]
    block: Any = blocks[0] if blocks else None
    if kind == "mlp" and block is None and hasattr(layer, "intermediate"):  # BERT's: two modules of the layer
        block = layer.output
    elif kind == "attention":
        block = getattr(block, "output", block)
    # BERT's adds the residual itself, and norms; its dropout is what stands before that
    return block.dropout if hasattr(block, "LayerNorm") and hasattr(block, "dropout") else block


def _head(model):
    """Return {name: parameter} of the head of a task with classes."""
    task = base_model.task_of(model)
    if not task.HAS_CLASSES:
        return {}
    return {name: parameter for name, parameter in model.named_parameters() if task.is_of_head(model, name)}


def _insert(model, place, section):
    """Put an adapter behind the block `place`."""
    parent, _, leaf = place.rpartition(".")
    layer, own = model.get_submodule(parent), f"{_NAME}_{leaf}"
    size, device = model.config.get_text_config().hidden_size, next(model.get_input_embeddings().parameters()).device
    layer.add_module(own, Behind(Bottleneck(size, section).to(device, dtype_of(model))))
    layer.get_submodule(leaf).register_forward_hook(_Hook(layer.get_submodule(own)))


class Bottleneck(nn.Module):
    """One adapter: (..., H) -> (..., H), to be added. section: with size, activation and dropout."""

    def __init__(self, hidden_size, section):
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, section.size), nn.Linear(section.size, hidden_size)
        self.activation, self.dropout = _ACTIVATIONS[section.activation], nn.Dropout(section.dropout)
        nn.init.normal_(self.down.weight, std=0.02)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, hidden):
        return self.up(self.activation(self.down(self.dropout(hidden))))


class Behind(nn.Module):
    """The adapter behind one block, which can be switched off."""

    def __init__(self, adapter):
        super().__init__()
        self.adapters, self.is_on = nn.ModuleDict({_ONE: adapter}), True

    def forward(self, hidden):
        return hidden + self.adapters[_ONE](hidden) if self.is_on else hidden


class _Hook:
    """A hook behind a block; not a closure, so that a copy of the model has its own."""

    def __init__(self, behind):
        self.behind = behind

    def __call__(self, module, arguments, output):
        if isinstance(output, tuple):  # of attention: hidden states and weights
            return self.behind(output[0]), *output[1:]
        return self.behind(output)


def _with_switch(model, untrained=()):
    """Return `model` with `disable_adapter`, which a PeftModel has. untrained: {parameter of the head: its numbers then}."""

    @contextlib.contextmanager
    def disable_adapter(self):
        trained = {parameter: parameter.detach().clone() for parameter in untrained}
        behind = {module: module.is_on for module in self.modules() if isinstance(module, Behind)}
        copy_into(dict(untrained))
        for module in behind:
            module.is_on = False
        try:
            yield
        finally:
            copy_into(trained)
            for module, was in behind.items():
                module.is_on = was

    model.disable_adapter = types.MethodType(disable_adapter, model)
    model._hf_peft_config_loaded = True  # transformers' Trainer refuses a 4-bit model without adapters, and asks this
    return model


def trainable(model, section):
    found = [name for name, module in model.named_modules() if isinstance(module, Behind)]
    parameters = dict(model.named_parameters())
    return Trainable(
        f"bottleneck adapters of {section.size}, {section.where}, {len(found)} blocks",
        first_to_move={name: p for name, p in parameters.items() if f".{_NAME}_" in name and ".up." in name},
        groups=one_group(model),
    )


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def save(model, folder, base_name, revision):
    """Write {BLOCK.down.weight, HEAD.weight, ...: tensor}; raises TrainingFailed, with nothing written, if one is not finite."""
    tensors = {
        f"{_block_of(name)}.{part}": parameter.detach().cpu().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, Behind)
        for part, parameter in module.adapters[_ONE].named_parameters()
    }
    tensors |= {name: parameter.detach().cpu().contiguous() for name, parameter in _head(model).items()}
    refuse_not_finite(tensors)
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    config = {"peft_type": _NAME.upper(), "base_model_name_or_path": str(base_name), "revision": revision}
    task = base_model.task_of(model)
    whole = {"modules_to_save": task.head_names(model)} if task.HAS_CLASSES else {}
    write_json(folder / CONFIG, config | {key: getattr(model.trained_by, key) for key in _FIELDS} | whole)
    write_weights(folder, tensors)


def _block_of(name):
    """Return the name of the block that the adapters `name` stand behind."""
    parent, _, own = name.rpartition(".")
    return f"{parent}.{own.removeprefix(f'{_NAME}_')}"


def read(folder, config):
    refuse_unknown_settings(folder, config, (*_FIELDS, "modules_to_save"))
    try:
        Section(**{key: config[key] for key in _FIELDS})
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder / CONFIG}: {str(error).splitlines()[0]}; copy or download it again") from None
    tensors = load_file(folder / WEIGHTS)
    broken = [f"{name}: contains non-finite values" for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken or not tensors:
        raise InputError.listing(f"adapter {folder}", broken or ["no tensors"])
    why = (
        "adapters have a nonlinearity, so no weight of the base can take them up. Serve them beside the base: `qlora chat RUN`, "
        "or qlora.open in Python"
    )
    head = tuple(f"{one}." for one in config.get("modules_to_save") or ())
    whole = {name: tensor for name, tensor in tensors.items() if name.startswith(head)}
    own = {name: tensor for name, tensor in tensors.items() if name not in whole}
    return Adapter(folder, config, "Bottleneck", {}, whole, own=own, unmergeable=why, beside=True)


def load(model, adapter, token_ids=()):
    section = _section_of(adapter)
    places = _places(model, section.where)
    _refuse_misfit(model, adapter, section, places)
    for place in places:
        _insert(model, place, section)
    untrained = {parameter: parameter.detach().clone() for parameter in _head(model).values()}
    _give(model, adapter, places)
    return _with_switch(model, untrained).requires_grad_(False).eval()


def fill(model, adapter, ends=()):
    section = _section_of(adapter)
    places = _places(model, section.where)
    _refuse_misfit(model, adapter, section, places)
    _give(model, adapter, places)


def _section_of(adapter):
    return Section(**{key: adapter.config[key] for key in _FIELDS})


def _refuse_misfit(model, adapter, section, places):
    size = model.config.get_text_config().hidden_size
    shapes = {"down.weight": (section.size, size), "down.bias": (section.size,),
              "up.weight": (size, section.size), "up.bias": (size,)}  # fmt: skip
    # on the meta device: of their shapes alone
    expected = {
        f"{place}.{part}": torch.empty(shape, device="meta") for place in places for part, shape in shapes.items()
    }
    refuse_misfit(adapter.folder, adapter.own | adapter.replaced, expected | _head(model))


def _give(model, adapter, places):
    for place in places:
        parent, _, leaf = place.rpartition(".")
        own = model.get_submodule(f"{parent}.{_NAME}_{leaf}").adapters[_ONE]
        prefix = f"{place}."
        own.load_state_dict({key.removeprefix(prefix): t for key, t in adapter.own.items() if key.startswith(prefix)})
    head = _head(model)
    copy_into({head[name]: tensor for name, tensor in adapter.replaced.items()})


def describe(config):
    return Description(
        "Bottleneck", f"size {config.get('size')}, {config.get('where')}", "{W}, and h + U f(D h) behind it", peft=False
    )
