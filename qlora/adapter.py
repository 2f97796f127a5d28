"""LoRA: attach to a base model, check that it trains, save, read back, hold against the base.

A (R, I), B (O, R); y = W x + scaling * B A x; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
New tokens: rows (N, I) that take the place of those N rows of the embedding and of the head.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from . import base_model
from .errors import InputError, TrainingFailed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_ROWS_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")

# What an adapter config may hold that this version can neither train nor merge: refused by name, never ignored.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication",
                "target_parameters", "exclude_modules", "use_bdlora", "arrow_config",
                "alora_invocation_tokens", "use_qalora", "corda_config", "eva_config")  # fmt: skip


def attach(model, section, seed=0, token_ids=()):
    """Return a PeftModel: `model` with the adapters of recipe section `lora`, in the model's own floating dtype.

    seed: of the random A; B starts at zero. token_ids: tokens whose rows in embedding and head are trained too; they
    start as the model has them.

    Raises:
        InputError: a target that matches no linear layer, or the head; lists the names that exist. Or rows that
            cannot be trained.
    """
    from peft import LoraConfig

    _check_targets(model, section.target_modules)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.target_modules,
        use_rslora=section.use_rslora,
        fan_in_fan_out=_has_conv1d(model),
        bias="none",
        task_type="CAUSAL_LM",
        trainable_token_indices=_token_indices(model, token_ids),
    )
    dtype = _dtype(model)
    torch.manual_seed(seed)
    peft_model = _peft_model(model, config)
    # PEFT makes float32 adapters for quantized bases; the model computes in one dtype, see sft.MasterWeights for updates
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return peft_model


def _token_indices(model, token_ids):
    """Return PEFT's {module: ids}, None for no ids; a tied head is not named, PEFT ties its rows to the embedding's."""
    return {name: list(token_ids) for name in base_model.token_modules(model)} if token_ids else None


def _peft_model(model, config):
    from peft import get_peft_model
    from peft.utils import TrainableTokensWrapper

    peft_model = get_peft_model(model, config)
    if config.trainable_token_indices:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        assert all(isinstance(end, TrainableTokensWrapper) for end in ends), "PEFT left the embedding or the head out"
    return peft_model


def _dtype(model):
    return model.get_input_embeddings().weight.dtype


def _has_conv1d(model):
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _check_targets(model, targets):
    if targets == "all-linear":
        return
    names = base_model.linear_names(model)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if isinstance(targets, str):
        try:
            unmatched = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise InputError(f"lora.target_modules {targets!r}: not a regular expression: {error}") from None
    else:
        unmatched = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unmatched:
        raise InputError(
            f"lora.target_modules: {', '.join(map(repr, unmatched))} matches no linear layer (the head is left out); "
            f"this model has: {', '.join(leaves)}"
        )


def lora_b(peft_model):
    """Return {name: parameter} of every B."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if ".lora_B." in name}


def refuse_unmoved(peft_model, before):
    """Raise TrainingFailed unless every B differs from `before` ({name: tensor}); names those that do not.

    B starts at zero and gets a gradient at the first step. One that stays is cut off from the loss (a repacked base
    weight, checkpointing without input gradients), and would be exported as if it had been trained.
    """
    stuck = [name for name, parameter in lora_b(peft_model).items() if torch.equal(parameter, before[name])]
    if stuck:
        raise TrainingFailed(
            f"{len(stuck)} of {len(before)} adapters did not move in the first step, so they are not being trained: "
            f"{', '.join(stuck[:3])}{', ...' if len(stuck) > 3 else ''}"
        )


def save(peft_model, folder, base_name, revision):
    """Write PEFT's adapter folder; raises TrainingFailed before anything is written if a number is not finite."""
    broken = [n for n, p in peft_model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise TrainingFailed(f"{len(broken)} adapter tensors hold numbers that are not finite ({broken[0]}); not saved")
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path, config.revision = str(base_name), revision
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    (Path(folder) / WEIGHTS).chmod((Path(folder) / CONFIG).stat().st_mode)  # safetensors ignores the umask: 0600


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as tensors, in the dtype that was saved.

    factors: {module name: (A (R, I), B (O, R))}. rows: {embedding or head: ([token id, ...], (N, I))}, of new tokens.
    """

    folder: Path
    config: dict
    scaling: float
    factors: dict
    rows: dict

    def refuse_mismatch(self, shapes, embeddings, token_ids):
        """Raise InputError unless each module is in `shapes` ({module: (O, I)}) and fits; lists all that do not.

        embeddings: {module: (V, I)} where the rows of the tokens `token_ids` belong.
        """
        self.refuse_other_tokens(embeddings, token_ids)
        problems = []
        for module, (A_RI, B_OR) in self.factors.items():
            found = (B_OR.shape[0], A_RI.shape[1])
            if module not in shapes:
                problems.append(f"{module}: the base has no such linear layer")
            elif tuple(shapes[module]) != found:
                problems.append(f"{module}: adapter is {found} (out, in), base is {tuple(shapes[module])}")
        for module, (_, rows_NI) in self.rows.items():
            if rows_NI.shape[1] != embeddings[module][1]:
                problems.append(f"{module}: rows of {rows_NI.shape[1]} numbers, the base has {embeddings[module][1]}")
        if problems:
            raise InputError.listing(f"adapter {self.folder}: made for another base; it", problems)

    def refuse_other_tokens(self, modules, token_ids):
        """Raise InputError unless the rows are those of the tokens `token_ids` in each of `modules`, and no others."""
        expected = {module: set(token_ids) for module in modules} if token_ids else {}
        found = {module: set(ids) for module, (ids, _) in self.rows.items()}
        if found != expected:
            raise InputError(
                f"adapter {self.folder}: holds the rows of tokens {_said(found)}; model.new_tokens and the base's "
                f"tokenizer ask for {_said(expected)}; give both as they were at the training"
            )


def read(folder):
    """Return the Adapter in a PEFT folder.

    Raises:
        InputError: files missing or cut off, an unsupported kind, tensors without a partner or not finite.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt"):
            tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"adapter {folder}: {error}") from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"adapter {folder}: peft_type {config.get('peft_type')!r} is not LORA")
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if unsupported or config.get("bias", "none") != "none":
        raise InputError(f"adapter {folder}: uses {', '.join(unsupported) or 'bias'}, which is not supported yet")
    indices = config.get("trainable_token_indices") or {}
    if not isinstance(indices, dict) or not all(map(_are_ids, indices.values())):
        raise InputError(f"adapter {folder}: trainable_token_indices in {CONFIG} is not {{module: [id, ...]}}")
    rows = {match["module"]: tensors.pop(match[0]) for match in map(_ROWS_KEY.fullmatch, list(tensors)) if match}
    factors = _pair(folder, tensors, config["r"])
    return Adapter(folder, config, _scaling(config), factors, _checked_rows(folder, rows, indices))


def _are_ids(value):
    return (
        isinstance(value, list)
        and all(type(one) is int and one >= 0 for one in value)
        and len(set(value)) == len(value)
    )


def _said(ids_of_module):
    return ", ".join(f"{sorted(ids)} in {module}" for module, ids in ids_of_module.items()) or "none"


def _checked_rows(folder, found, indices):
    """Return {module: (ids, rows)} of the rows `found` ({module: rows}) and `indices` ({module: ids}) of the config."""
    problems = [f"{module}: rows of tokens that {CONFIG} does not name" for module in sorted(found.keys() - indices)]
    for module, ids in indices.items():
        if module not in found:
            problems.append(f"{module}: {CONFIG} names tokens, and their rows are missing")
        elif found[module].dim() != 2 or len(found[module]) != len(ids):
            problems.append(f"{module}: rows {tuple(found[module].shape)} do not fit the tokens {ids} in {CONFIG}")
        elif not torch.isfinite(found[module]).all():
            problems.append(f"{module}: rows hold numbers that are not finite")
    if problems:
        raise InputError.listing(f"adapter {folder}", problems)
    return {module: (ids, found[module]) for module, ids in indices.items()}


def _scaling(config):
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _pair(folder, tensors, rank):
    found, problems = {}, []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{key}: not a LoRA factor")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key}: holds numbers that are not finite")
        else:
            found.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, pair in found.items():
        if set(pair) != {"A", "B"}:
            problems.append(f"{module}: has lora_{''.join(pair)} but not its partner")
        elif pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            problems.append(f"{module}: rank differs from r = {rank} in {CONFIG}")
    if problems or not found:
        raise InputError.listing(f"adapter {folder}", problems or ["no LoRA tensors"])
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(found.items())}


def load(model, folder, token_ids=()):
    """Return a PeftModel: `model` with the adapter in `folder`, frozen, in eval mode.

    token_ids: the tokens whose rows were trained.

    Raises:
        InputError: any tensor of the adapter finds no place in the model, or the other way round.
    """
    from peft import LoraConfig

    adapter, dtype = read(folder), _dtype(model)
    names = set(base_model.linear_names(model))
    missing = sorted(set(adapter.factors) - names)
    if missing:
        raise InputError.listing(
            f"adapter {folder}: made for another base; it", [f"{m}: not in the base" for m in missing]
        )
    adapter.refuse_other_tokens(base_model.token_modules(model) if token_ids else [], token_ids)
    # The modules are named one by one: "all-linear" in the adapter's config would also attach where nothing was trained.
    config = LoraConfig(
        r=adapter.config["r"],
        lora_alpha=adapter.config["lora_alpha"],
        use_rslora=adapter.config.get("use_rslora", False),
        target_modules=list(adapter.factors),
        fan_in_fan_out=_has_conv1d(model),
        task_type="CAUSAL_LM",
        trainable_token_indices={module: ids for module, (ids, _) in adapter.rows.items()} or None,
    )
    peft_model = _peft_model(model, config)
    parameters = dict(peft_model.named_parameters())
    tensors = [
        (module, f"lora_{factor}", f"lora_{factor}.default.weight", tensor)
        for module, pair in adapter.factors.items()
        for factor, tensor in zip("AB", pair, strict=True)
    ]
    for module, (_, rows_NI) in adapter.rows.items():
        tensors.append((module, "rows", "token_adapter.trainable_tokens_delta.default", rows_NI))
    problems = []
    for module, what, name, tensor in tensors:
        place = parameters[f"base_model.model.{module}.{name}"]
        if place.shape != tensor.shape:
            problems.append(f"{module} {what}: {tuple(tensor.shape)}, the base needs {tuple(place.shape)}")
        else:
            place.data = tensor.to(device=place.device, dtype=dtype)
    if problems:
        raise InputError.listing(f"adapter {folder}: made for another base; it", problems)
    peft_model.requires_grad_(False)
    return peft_model.eval()
