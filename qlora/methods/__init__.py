"""Adapters in the model: attach, check that they train, save, load again on the base they were made for.

A (R, I), B (O, R); y = W x + scaling * B A x; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
DoRA: magnitude m (O); W + scaling * B A, each row scaled to the length m
AdaLoRA: E (R, 1); y = W x + lora_alpha / init_r * B (E * A) x
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
from safetensors.torch import load_file, save_file

from .. import base_model
from ..system.errors import InputError, TrainingFailed
from . import start
from .ranks import SCHEDULE, Ranks
from .tensors import (
    ADALORA_FIELDS,
    CONFIG,
    LORA_FIELDS,
    MANIFEST,
    WEIGHTS,
    Adapter,
    base_of,
    kind,
    read,
    read_config,
    seal,
)

__all__ = ["CONFIG", "MANIFEST", "WEIGHTS", "Adapter", "Ranks", "activate", "add", "attach", "base_of", "first_to_move",
           "kind", "load", "read", "read_config", "refuse_unmoved", "save", "seal", "shapes"]  # fmt: skip

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)\b")

# ---- attach ----------------------------------------------------------------------------------------------------------


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """Return a PeftModel: `model` with what recipe section `lora` trains, in the model's own floating dtype.

    seed: of the random numbers it starts from. token_ids: tokens whose rows in embedding and head are trained too; they
    start as the model has them. checkpoint: where the model's 16-bit weights are; examples: what is trained on; LoftQ
    starts from the first, EVA from the second.

    Raises:
        InputError: a name or pattern that matches nothing, with the names that exist; or something that cannot be trained.
    """
    targets = _target_names(model, section)
    whole = _whole_names(model, section, targets, token_ids)
    targets = [name for name in targets if not _is_within(name, whole)]
    _refuse_patterns(section, targets)
    _refuse_ranks(model, section, targets)
    _refuse_biases(model, section, targets)
    start.refuse(model, section, targets)
    common = {"modules_to_save": whole or None, "trainable_token_indices": _token_indices(model, token_ids)}
    torch.manual_seed(seed)
    peft_model = _peft_model(model, _config(section, model, targets, common))
    if section.ensure_weight_tying and model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise InputError(
            "lora.ensure_weight_tying: PEFT only supports it for modules named embed_tokens and lm_head; leave it out"
        )
    start.initialize(peft_model, section, checkpoint, examples)
    to_dtype(peft_model, _dtype(model))
    return peft_model


def _config(section, model, targets, common):
    from peft import AdaLoraConfig, LoraConfig

    common |= {
        "lora_dropout": section.lora_dropout,
        "target_modules": targets,
        "bias": section.bias,
        "fan_in_fan_out": _has_conv1d(model),
        "task_type": "CAUSAL_LM",
    }
    if section.peft_type == "ADALORA":
        ranks = {"init_r": section.init_r, "target_r": section.target_r}
        config = AdaLoraConfig(**common, **ranks, lora_alpha=section.lora_alpha, total_step=1)
        for name in SCHEDULE:  # tinit and tfinal may be shares, until Ranks knows the number of steps
            setattr(config, name, getattr(section, name))
        return config
    return LoraConfig(
        **common,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        lora_bias=section.lora_bias,
        ensure_weight_tying=section.ensure_weight_tying,
        **start.settings(section),
    )


def _token_indices(model, token_ids):
    """Return PEFT's {module: ids}, None for no ids; a tied head is not named, PEFT ties its rows to the embedding's."""
    return {name: list(token_ids) for name in base_model.token_modules(model)} if token_ids else None


def _peft_model(model, config):
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    with warnings.catch_warnings():
        # a tied head that is trained apart from the embedding is untied on purpose; and PEFT finds out by itself which
        # layers are Conv1D
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")  # attach refuses instead
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # attach has checked the patterns; in the folder of an AdaLoRA, rank_pattern names tensors
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:  # layers whose forward the model never calls, as in state-space blocks
            key = str(config.peft_type.value).lower()
            raise InputError(
                f"{key}: PEFT refuses {type(model).__name__}: {error}\n  name such layers in {key}.exclude_modules"
            ) from None
    whole = [n for n, m in peft_model.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if config.trainable_token_indices:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        assert all(isinstance(end, TrainableTokensWrapper) for end in ends), "PEFT left the embedding or the head out"
    tied = set(getattr(config, "modules_to_tie", None) or ())
    assert set(whole) - tied == set(config.modules_to_save or ()), "PEFT trains other modules than it was told"
    return peft_model


def to_dtype(peft_model, dtype):
    """Cast what is trained to `dtype`.

    PEFT makes float32 adapters for quantized bases; the model computes in one dtype, see training.masters for updates.
    """
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _dtype(model):
    return model.get_input_embeddings().weight.dtype


def _has_conv1d(model):
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


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


def _target_names(model, section):
    """Return the full names of the layers that get an adapter."""
    linear = base_model.linear_names(model)
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    targets = leaves if section.target_modules == "all-linear" else section.target_modules
    names = {module: name for name, module in model.named_modules()}
    ends = [names[end] for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    problems = []
    for field, wanted in (("target_modules", targets), ("exclude_modules", section.exclude_modules or [])):
        for one in _one_by_one(wanted):
            end = field == "target_modules" and _matching(one, ends)
            if end:
                problems.append(
                    f"lora.{field}: {_said(one)} cannot have an adapter (trl computes the loss from the head's weight alone); "
                    f"modules_to_save: [{end[0].rpartition('.')[2]}] trains all of it, model.new_tokens trains rows of it"
                )
            elif not _matching(one, linear):
                problems.append(f"lora.{field}: {_said(one)} matches no linear layer")
    if problems:
        raise InputError.listing("the recipe", problems, f"this model has: {', '.join(leaves)}")
    chosen = _matching(targets, linear, exclude_modules=section.exclude_modules)
    if section.layers_to_transform is not None:
        layers = {index: _matching(targets, chosen, layers_to_transform=[index])
                  for index in section.layers_to_transform}  # fmt: skip
        absent = [str(index) for index, found in layers.items() if not found]
        if absent:
            raise InputError(
                f"{section.key}.layers_to_transform: the model has no layer {', '.join(absent)} that can have an adapter"
            )
        chosen = [name for name in chosen if any(name in found for found in layers.values())]
    if not chosen:
        raise InputError(f"{section.key}.exclude_modules: excludes every layer that could have an adapter")
    return chosen


def _whole_names(model, section, targets, token_ids):
    """Return the full names of the modules in modules_to_save."""
    modules = dict(model.named_modules())
    quantized = base_model.quantized_modules(model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    whole, problems = [], []
    for wanted in section.modules_to_save or ():
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        whole += found
        for name in found or [wanted]:
            module = modules.get(name)
            adapted = [target for target in targets if _is_within(target, [name])]
            if module is None:
                problem = "the model has no such module"
            elif any(_is_within(layer, [name]) for layer in quantized):
                problem = "its 4-bit weights cannot be trained; name it in target_modules, or set quantization: null"
            elif adapted and section.target_modules != "all-linear":
                problem = f"target_modules names {adapted[0]} too; name it once"
            elif isinstance(module, torch.nn.ModuleList) or next(module.parameters(), None) is None:
                problem = f"a {type(module).__name__} has no weights of its own"
            elif token_ids and any(end in ends for end in module.modules()):
                problem = "model.new_tokens trains rows of it; leave one of the two out"
            else:
                continue
            problems.append(f"{section.key}.modules_to_save: {name}: {problem}")
    nested = [name for name in whole if _is_within(name, set(whole) - {name})]
    problems += [f"{section.key}.modules_to_save: {name}: is inside another listed module" for name in nested]
    if set(targets) <= {name for name in targets if _is_within(name, whole)}:
        problems.append(f"{section.key}.modules_to_save: leaves no layer that could have an adapter")
    tied = ends[0].weight is ends[1].weight
    if section.ensure_weight_tying and not (tied and any(modules[name] in ends for name in whole)):
        problems.append(
            "lora.ensure_weight_tying: has no effect; it is for modules_to_save that name the embedding or the head of a "
            "model where they are one matrix"
        )
    if problems:
        raise InputError("\n".join(problems))
    return sorted(set(whole))


def _is_within(name, modules):
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _refuse_patterns(section, targets):
    problems = []
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, field):
            matches = any(_pattern_of([pattern], name) for name in targets)
            problems += [] if matches else [f"lora.{field}: {pattern!r} matches no layer that gets an adapter"]
    if problems:
        leaves = sorted({name.rpartition(".")[2] for name in targets})
        raise InputError.listing("the recipe", problems, f"adapters go to: {', '.join(leaves)}")


def _refuse_ranks(model, section, targets):
    """Raise InputError where a rank is above the smaller side of a layer: B A cannot have it, and it costs memory."""
    adaptive = section.peft_type == "ADALORA"
    # EVA may give a layer up to twice the rank, from others that need less
    factor, grown = (2, " (EVA: up to twice that)") if section.init_lora_weights == "eva" else (1, "")
    too_large: dict = {}
    for name in targets:
        pattern = None if adaptive else _pattern_of(section.rank_pattern, name)
        field = "adalora.init_r" if adaptive else "lora.r" if pattern is None else f"lora.rank_pattern {pattern!r}"
        rank = section.init_r if adaptive else section.r if pattern is None else section.rank_pattern[pattern]
        sides = _sides(model.get_submodule(name))
        if rank * factor > min(sides):
            too_large.setdefault((field, rank), []).append((min(sides), name, sides))
    problems = []
    for (field, rank), layers in too_large.items():
        limit, name, (num_out, num_in) = min(layers)
        problems.append(
            f"{field}: {rank}{grown} is above the smaller side of {len(layers)} layers; {name} is {num_out} x {num_in}, "
            f"so at most {limit // factor}"
        )
    if problems:
        raise InputError.listing(
            "the recipe",
            problems,
            "set a lower rank (8 to 64 is usual), or leave the layer out with exclude_modules",
        )


def _pattern_of(patterns, name):
    """Return the key of `patterns` that PEFT applies to the layer `name`, or None; as its get_pattern_key."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def _sides(layer):
    """Return (out_features, in_features) of a linear layer, quantized or not."""
    if base_model.is_conv1d(layer):
        return layer.weight.shape[1], layer.weight.shape[0]
    return layer.out_features, layer.in_features


def _refuse_biases(model, section, targets):
    without = [name for name in targets if getattr(model.get_submodule(name), "bias", None) is None]
    if section.lora_bias and without:
        raise InputError(
            f"lora.lora_bias: {len(without)} of {len(targets)} layers have no bias that it could be merged into "
            f"({without[0]}, ...); name layers that have one in target_modules"
        )
    if section.bias == "lora_only" and len(without) == len(targets):
        raise InputError(f"{section.key}.bias lora_only: no layer that gets an adapter has a bias; leave it out")
    if section.bias == "all" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise InputError(f"{section.key}.bias all: {type(model).__name__} has no bias; leave it out")


# ---- training --------------------------------------------------------------------------------------------------------


def first_to_move(peft_model):
    """Return {name: parameter} of what gets a gradient in the first step: every B, for AdaLoRA every E."""
    factor = ".lora_E." if peft_model.peft_config["default"].peft_type == "ADALORA" else ".lora_B."
    return {name: parameter for name, parameter in peft_model.named_parameters() if factor in name}


def refuse_unmoved(peft_model, before):
    """Raise TrainingFailed unless everything in `before` ({name: tensor}) differs from it now; names what does not.

    B starts at zero (or small) and gets a gradient at the first step. One that stays is cut off from the loss (a repacked
    base weight, checkpointing without input gradients), and would be exported as if it had been trained.
    """
    now = first_to_move(peft_model)
    stuck = [name for name, tensor in before.items() if torch.equal(now[name], tensor)]
    if stuck:
        raise TrainingFailed(
            f"{len(stuck)} of {len(before)} adapters did not move in the first step, so they are not being trained: "
            f"{', '.join(stuck[:3])}{', ...' if len(stuck) > 3 else ''}"
        )


# ---- save and load ---------------------------------------------------------------------------------------------------


def save(peft_model, folder, base_name, revision):
    """Write PEFT's adapter folder; raises TrainingFailed before anything is written if a number is not finite."""
    broken = [n for n, p in peft_model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise TrainingFailed(f"{len(broken)} adapter tensors contain non-finite values ({broken[0]}); not saved")
    tensors = _tensors(peft_model)  # first: AdaLoRA's config is made ready for saving there
    config = copy.copy(peft_model.peft_config["default"])
    config.base_model_name_or_path, config.revision, config.inference_mode = str(base_name), revision, True
    config.target_modules = sorted(config.target_modules)  # from a set, whose order is another in each process
    config.save_pretrained(folder)
    # cloned: safetensors takes no two names of one tensor, and a tied head has two
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    (Path(folder) / WEIGHTS).chmod((Path(folder) / CONFIG).stat().st_mode)  # safetensors ignores the umask: 0600


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


def load(model, folder, token_ids=()):
    """Return a PeftModel: `model` with the adapter in `folder`, frozen, in eval mode.

    The folder may be one of `save`, or one that another tool wrote with PEFT. token_ids: the tokens whose rows were
    trained.

    Raises:
        InputError: any tensor of the adapter finds no place in the model, or the other way round; a setting that this
            version does not follow.
    """
    from peft import set_peft_model_state_dict

    folder, adapter = Path(folder), read(folder)
    adapter.refuse_other_tokens(base_model.token_modules(model) if token_ids else [], token_ids)
    layers = shapes(model)
    tensors = _once(load_file(folder / WEIGHTS))
    peft_model = _peft_model(model, _saved_config(folder, adapter.config, model, tensors, adapter.rows))
    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    base = {key: parameters[key] for key in tensors if key in parameters}  # biases; embeddings that were saved whole
    expected = _tensors(peft_model)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        expected |= {key: place for key, place in base.items() if place is getattr(end, "weight", None)}
    problems = [f"{_shown(key)}: not in the base" for key in sorted(tensors.keys() - expected.keys())]
    problems += [f"{_shown(key)}: missing" for key in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"{_shown(key)}: {tuple(tensors[key].shape)}, the base needs {tuple(place.shape)}"
        for key, place in sorted(expected.items())
        if key in tensors and tensors[key].shape != place.shape
    ]
    if problems:
        raise InputError.listing(f"adapter {folder}: made for another base; it", problems)
    adapter.refuse_left_out(layers)
    untrained = {place: place.detach().clone() for place in base.values()}
    left = set_peft_model_state_dict(peft_model, tensors).unexpected_keys
    assert not left, f"PEFT found no place for {left}"
    differing = [key for key, place in base.items() if not torch.equal(place, tensors[key].to(place))]
    if differing:
        raise InputError(
            f"adapter {folder}: {_shown(differing[0])} is tied to another weight in the base, not in the adapter"
        )
    to_dtype(peft_model, _dtype(model))
    return _frozen(peft_model, untrained)


def _shown(key):
    return key.removeprefix(_PREFIX)


def _saved_config(folder, config, model, tensors, rows):
    """Return PEFT's config for what `tensors` holds, by full names: "all-linear" would also attach where nothing was
    trained, and an initialisation would start again."""
    from peft import AdaLoraConfig, LoraConfig

    keys = [_shown(key) for key in tensors]
    modules = {name for name, _ in model.named_modules()}
    targets = sorted({key[: match.start()] for key in keys for match in [_FACTOR.search(key)] if match})
    missing = [f"{name}: not in the base" for name in targets if name not in modules]
    if missing or not targets:
        raise InputError.listing(f"adapter {folder}: made for another base; it", missing or ["no LoRA tensors"])
    # as PEFT reads it: every module whose name ends like that
    whole = sorted(name for name in modules if any(name.endswith(one) for one in config.get("modules_to_save") or ()))
    followed, kind = (ADALORA_FIELDS, AdaLoraConfig) if config["peft_type"] == "ADALORA" else (LORA_FIELDS, LoraConfig)
    return kind(
        **{key: config[key] for key in followed if config.get(key) is not None},
        target_modules=targets,
        modules_to_save=whole or None,
        trainable_token_indices={module: ids for module, (ids, _) in rows.items()} or None,
        fan_in_fan_out=_has_conv1d(model),
        task_type="CAUSAL_LM",
    )


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
                _give(untrained)
                with disable():
                    yield
            finally:
                _give(trained)
                peft_model.requires_grad_(False)

    peft_model.disable_adapter = disable_adapter
    peft_model.requires_grad_(False)
    return peft_model.eval()


@torch.no_grad()
def _give(values):
    for parameter, value in values.items():
        parameter.copy_(value)  # cast, where the model computes in float32 since


# ---- several on one base ---------------------------------------------------------------------------------------------


def add(peft_model, folder, name):
    """Load the adapter in `folder` beside those that `peft_model` has, under a new `name`; it is not yet active.

    Raises:
        InputError: as `read` does; an adapter for another base; or a kind that cannot lie beside another.
    """
    adapter = read(folder)
    adapter.refuse_more_than_low_rank("cannot be loaded beside another adapter; open it by itself")
    adapter.refuse_mismatch(shapes(peft_model.get_base_model()), {}, {}, ())
    assert name not in peft_model.peft_config, name  # PEFT would load over it
    left = peft_model.load_adapter(str(folder), adapter_name=name).unexpected_keys
    assert not left, f"PEFT found no place for {left}"
    dtype = _dtype(peft_model.get_base_model())
    for key, parameter in peft_model.named_parameters():
        if f".{name}." in key:
            parameter.data = parameter.data.to(dtype)
    peft_model.requires_grad_(False).eval()


def shapes(model):
    """Return {name: (O, I)} of the layers of a model, plain or with adapters in it, that may carry an update."""
    found = {}
    for name, module in model.named_modules():
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        if isinstance(module, torch.nn.Embedding):
            found[name] = (module.num_embeddings, module.embedding_dim)
        elif base_model.is_conv1d(module):
            found[name] = (module.nf, module.nx)
        elif hasattr(module, "in_features") and hasattr(module, "out_features"):  # PEFT's layers have them too
            found[name] = (module.out_features, module.in_features)
    return found


def activate(peft_model, name):
    """Let the adapter that PEFT knows as `name` compute from now on; None: the base alone."""
    if name is None:
        peft_model.base_model.disable_adapter_layers()
    else:
        peft_model.base_model.enable_adapter_layers()
        peft_model.set_adapter(name)
        peft_model.requires_grad_(False)
