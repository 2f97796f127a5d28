"""LoRA: attach to a base model, check that it trains, save, read back, hold against the base.

A (R, I), B (O, R); y = W x + scaling * B A x; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
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

# What an adapter config may hold that this version can neither train nor merge: refused by name, never ignored.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "lora_bias",
                "layer_replication", "target_parameters", "exclude_modules", "use_bdlora", "arrow_config",
                "alora_invocation_tokens", "use_qalora", "corda_config", "eva_config")  # fmt: skip


def attach(model, section, seed=0):
    """Return a PeftModel: `model` with the adapters of recipe section `lora`, in the model's own floating dtype.

    seed: of the random A; B starts at zero.

    Raises:
        InputError: a target that matches no linear layer, or the head; lists the names that exist.
    """
    from peft import LoraConfig, get_peft_model

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
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config)
    # PEFT makes float32 adapters for quantized bases; the model computes in one dtype, see sft.MasterWeights for updates
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(_dtype(model))
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
    """An adapter folder as tensors: `factors` is {module name: (A (R, I), B (O, R))}, in the dtype that was saved."""

    folder: Path
    config: dict
    scaling: float
    factors: dict

    def refuse_mismatch(self, shapes):
        """Raise InputError unless each module is in `shapes` ({module: (O, I)}) and fits; lists all that do not."""
        problems = []
        for module, (A_RI, B_OR) in self.factors.items():
            found = (B_OR.shape[0], A_RI.shape[1])
            if module not in shapes:
                problems.append(f"{module}: the base has no such linear layer")
            elif tuple(shapes[module]) != found:
                problems.append(f"{module}: adapter is {found} (out, in), base is {tuple(shapes[module])}")
        if problems:
            raise InputError.listing(f"adapter {self.folder}: made for another base; it", problems)


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
    return Adapter(folder, config, _scaling(config), _pair(folder, tensors, config["r"]))


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


def load(model, folder):
    """Return a PeftModel: `model` with the adapter in `folder`, frozen, in eval mode.

    Raises:
        InputError: any tensor of the adapter finds no place in the model, or the other way round.
    """
    from peft import LoraConfig, get_peft_model

    adapter = read(folder)
    names = set(base_model.linear_names(model))
    missing = sorted(set(adapter.factors) - names)
    if missing:
        raise InputError.listing(
            f"adapter {folder}: made for another base; it", [f"{m}: not in the base" for m in missing]
        )
    # The modules are named one by one: "all-linear" in the adapter's config would also attach where nothing was trained.
    config = LoraConfig(
        r=adapter.config["r"],
        lora_alpha=adapter.config["lora_alpha"],
        use_rslora=adapter.config.get("use_rslora", False),
        target_modules=list(adapter.factors),
        fan_in_fan_out=_has_conv1d(model),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    parameters = dict(peft_model.named_parameters())
    problems = []
    for module, pair in adapter.factors.items():
        for factor, tensor in zip("AB", pair, strict=True):
            place = parameters[f"base_model.model.{module}.lora_{factor}.default.weight"]
            if place.shape != tensor.shape:
                problems.append(f"{module} lora_{factor}: {tuple(tensor.shape)}, the base needs {tuple(place.shape)}")
            else:
                place.data = tensor.to(device=place.device, dtype=_dtype(model))
    if problems:
        raise InputError.listing(f"adapter {folder}: made for another base; it", problems)
    peft_model.requires_grad_(False)
    return peft_model.eval()
