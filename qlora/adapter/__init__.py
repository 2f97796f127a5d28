"""LoRA: attach to a base model, check that it trains, save, read back, hold against the base.

A (R, I), B (O, R); y = W x + scaling * B A x; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
New tokens: rows (N, I) that take the place of those N rows of the embedding and of the head.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from .. import base_model
from ..errors import InputError, TrainingFailed
from .tensors import CONFIG, WEIGHTS, Adapter, read

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "attach", "load", "lora_b", "read", "refuse_unmoved", "save"]


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


def load(model, folder, token_ids=()):
    """Return a PeftModel: `model` with the adapter in `folder`, frozen, in eval mode.

    token_ids: the tokens whose rows were trained.

    Raises:
        InputError: any tensor of the adapter finds no place in the model, or the other way round.
    """
    from peft import LoraConfig

    adapter, dtype = read(folder), _dtype(model)
    names = set(base_model.linear_names(model))
    missing = sorted(set(adapter.updates) - names)
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
        target_modules=list(adapter.updates),
        fan_in_fan_out=_has_conv1d(model),
        task_type="CAUSAL_LM",
        trainable_token_indices={module: ids for module, (ids, _) in adapter.rows.items()} or None,
    )
    peft_model = _peft_model(model, config)
    parameters = dict(peft_model.named_parameters())
    tensors = [
        (module, f"lora_{factor}", f"lora_{factor}.default.weight", tensor)
        for module, update in adapter.updates.items()
        for factor, tensor in (("A", update.A_RI), ("B", update.B_OR))
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
