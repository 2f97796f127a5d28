"""A PeftModel: made with what it trains, cast, saved, loaded again on the base it was made for, and switched.

New tokens: rows (N, I) that take the place of those N rows of the embedding and of the head.
modules_to_save, bias: weights of the base itself, trained whole.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from .. import base_model
from ..system.errors import InputError
from .folder import PREFIX, WEIGHTS, refuse_not_finite, write_weights

# ---- made ------------------------------------------------------------------------------------------------------------


def settings(model, targets, whole, token_ids=()):
    """Return the arguments of any of PEFT's configs that say where: names of layers, of whole modules, and of tokens.

    A tied head is not named among the modules with tokens: PEFT ties its rows to the embedding's.
    """
    found = {
        "target_modules": targets,
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(map(base_model.is_conv1d, model.modules())),
        "task_type": base_model.task_of(model).PEFT_TYPE,
    }
    if token_ids:
        found["trainable_token_indices"] = {name: list(token_ids) for name in base_model.token_modules(model)}
    return found


def ends(model):
    """Return the weights of the embedding and, where the model answers with words, of the head."""
    return [end.weight for end in base_model.token_ends(model)]


def make(model, config):
    """Return the PeftModel of a config; raises InputError where PEFT refuses the model."""
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    from . import token_rows

    with warnings.catch_warnings():
        # a tied head that is trained apart from the embedding is untied on purpose; and PEFT finds out by itself which
        # layers are Conv1D
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # lora.attach refuses instead
        warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # attach has checked the patterns; in the folder of an AdaLoRA, rank_pattern names tensors
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:  # layers whose forward the model never calls, as in state-space blocks
            key = str(config.peft_type.value).lower()
            remedy = "take lora" if config.is_prompt_learning else f"name such layers in {key}.exclude_modules"
            raise InputError(f"{key}: PEFT refuses {type(model).__name__}: {error}\n  {remedy}") from None
    if base_model.task_of(model).PEFT_TYPE == "SEQ_CLS" and hasattr(config, "modules_to_save"):
        # PEFT adds `classifier` and `score`, whatever the model has
        config.modules_to_save = config.modules_to_save[: len(config.modules_to_save) - 2]
    whole = [n for n, m in peft_model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if getattr(config, "trainable_token_indices", None):
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        assert all(isinstance(end, TrainableTokensWrapper) for end in ends), "PEFT left the embedding or the head out"
        token_rows.install(peft_model)
    tied = set(getattr(config, "modules_to_tie", None) or ())
    assert set(whole) - tied == set(getattr(config, "modules_to_save", None) or ()), (
        "PEFT trains other modules than it was told"
    )
    return peft_model


def to_dtype(peft_model, dtype):
    """Cast what is trained to `dtype`.

    PEFT makes float32 adapters for quantized bases; the model computes in one dtype (training/master_weights.py).
    """
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def dtype_of(model):
    """Return the dtype that a model computes in."""
    if not base_model.task_of(model).HAS_TOKENS:
        return base_model.floating_dtype(model)
    # not .weight: with rows of new tokens that is a copy of the table
    return next(model.get_input_embeddings().parameters()).dtype


def named(peft_model, part):
    """Return {name: parameter} of the parameters with `part` in their names."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if part in name}


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def save(model, folder, base_name, revision):
    """Write PEFT's adapter folder; raises TrainingFailed before anything is written if a number is not finite."""
    refuse_not_finite({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    tensors = _tensors(model)  # first: AdaLoRA's config is made ready for saving there
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.revision, config.inference_mode = str(base_name), revision, True
    if getattr(config, "target_modules", None) is not None:
        config.target_modules = sorted(config.target_modules)  # from a set, whose order is another in each process
    config.save_pretrained(folder)
    # cloned: safetensors takes no two names of one tensor, and a tied head has two
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    write_weights(Path(folder), tensors)


def _tensors(peft_model):
    """Return {key in an adapter folder: tensor}."""
    from peft import get_peft_model_state_dict

    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    return _once(get_peft_model_state_dict(peft_model, state_dict=parameters, save_embedding_layers=False))


def _once(tensors):
    """Leave out what PEFT 0.21 saves again with `bias: all`: the biases of modules_to_save, untrained and trained."""
    return {
        key: tensor for key, tensor in tensors.items() if not re.search(r"\.(original_module|modules_to_save)\.", key)
    }


def load(model, adapter, token_ids, kind, followed):
    """Return a PeftModel: `model` with an Adapter, frozen, in eval mode; `disable_adapter()` gives the base.

    kind: PEFT's class of configs. followed: names of the settings that it gets from the folder.

    Raises:
        InputError: any tensor of the adapter finds no place in the model, or the other way round.
    """
    adapter.refuse_other_tokens(base_model.token_modules(model) if token_ids else [], token_ids)
    said = {key: adapter.config[key] for key in followed if adapter.config.get(key) is not None}
    layers, found = shapes(model), ends(model)
    peft_model = make(model, kind(**said, **_saved_settings(model, adapter)))
    adapter.refuse_left_out(layers)
    untrained = fill(peft_model, adapter, found)
    to_dtype(peft_model, dtype_of(model))
    return _frozen(peft_model, untrained)


def fill(model, adapter, ends=()):
    """Give a PeftModel the numbers of an Adapter; return {parameter of the base that it replaces: what it was}.

    ends: weights of embedding and head, which a folder may hold whole.

    Raises:
        InputError: any tensor of the adapter finds no place in the model, or the other way round.
    """
    from peft import set_peft_model_state_dict

    folder = adapter.folder
    tensors = _once(load_file(folder / WEIGHTS))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    base = {key: parameters[key] for key in tensors if key in parameters}  # biases; embeddings that were saved whole
    expected = _tensors(model)
    for end in ends:
        expected |= {key: place for key, place in base.items() if place is end}
    refuse_misfit(folder, tensors, expected)
    untrained = {place: place.detach().clone() for place in base.values()}
    left = set_peft_model_state_dict(model, tensors).unexpected_keys
    assert not left, f"PEFT found no place for {left}"
    differing = [key for key, place in base.items() if not torch.equal(place, tensors[key].to(place))]
    if differing:
        raise InputError(
            f"adapter {folder}: {_shown(differing[0])} is tied to another weight in the base, not in the adapter"
        )
    return untrained


def refuse_misfit(folder, tensors, expected):
    """Raise InputError unless the tensors of a folder are those that the model expects, {key: tensor}, in name and shape."""
    problems = [f"{_shown(key)}: not in the base" for key in sorted(tensors.keys() - expected.keys())]
    problems += [f"{_shown(key)}: missing" for key in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"{_shown(key)}: {tuple(tensors[key].shape)}, the base needs {tuple(place.shape)}"
        for key, place in sorted(expected.items())
        if key in tensors and tensors[key].shape != place.shape
    ]
    if problems:
        raise InputError.listing(f"adapter {folder}: made for another base; it", problems)


def _shown(key):
    return key.removeprefix(PREFIX)


def _saved_settings(model, adapter):
    """Return `settings` for what a folder holds, by full names: "all-linear" would also attach where nothing was trained."""
    modules = {name for name, _ in model.named_modules()}
    missing = [f"{name}: not in the base" for name in sorted(adapter.updates) if name not in modules]
    if missing or not adapter.updates:
        raise InputError.listing(
            f"adapter {adapter.folder}: made for another base; it", missing or [f"no {adapter.kind} tensors"]
        )
    # as PEFT reads it: every module whose name ends like that
    saved = adapter.config.get("modules_to_save") or ()
    whole = sorted(name for name in modules if any(name.endswith(one) for one in saved))
    indices = {module: ids for module, (ids, _) in adapter.rows.items()}
    found = settings(model, sorted(adapter.updates), whole)
    return found | {"trainable_token_indices": indices} if indices else found


def _frozen(peft_model, untrained):
    """Return `peft_model` in eval mode, requiring no gradients; `disable_adapter` gives the base, always.

    PEFT 0.21 leaves trained biases where they are under disable_adapter, with a warning, and what it enables again
    afterwards requires gradients. untrained: {parameter of the base: its numbers before the adapter was loaded}.
    """
    disable = peft_model.disable_adapter

    @contextlib.contextmanager
    def disable_adapter():
        trained = {parameter: parameter.detach().clone() for parameter in untrained}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            try:
                copy_into(untrained)
                with disable():
                    yield
            finally:
                copy_into(trained)
                peft_model.requires_grad_(False)

    peft_model.disable_adapter = disable_adapter
    peft_model.requires_grad_(False)
    return peft_model.eval()


@torch.no_grad()
def copy_into(values):
    """Give parameters other numbers: {parameter: tensor}."""
    for parameter, value in values.items():
        parameter.copy_(value)  # cast, where the model computes in float32 since


def shapes(model):
    """Return {name: (O, I)} of the layers of a model, plain or with adapters in it, that may carry an update."""
    found = {}
    for name, module in model.named_modules():
        if ".lora_" in name or ".ia3_" in name or name.endswith(".base_layer"):
            continue
        if isinstance(module, torch.nn.Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
        elif base_model.is_conv1d(module):
            found[name] = (module.nf, module.nx)
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):  # PEFT's layers have them too
            found[name] = (module.out_features, module.in_features)
    return found
