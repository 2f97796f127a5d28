"""An adapter folder as tensors: what a merge adds to each weight, read and checked without the model.

A (R, I), B (O, R); delta = scaling * B A; scaling = lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA
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

from ..errors import InputError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_ROWS_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")

# What an adapter config may hold that this version can neither train nor merge: refused by name, never ignored.
_UNSUPPORTED = ("layer_replication", "target_parameters", "use_bdlora", "arrow_config",
                "alora_invocation_tokens", "use_qalora", "corda_config")  # fmt: skip


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
    if config.get("peft_type") not in ("LORA", "ADALORA"):
        raise InputError(f"adapter {folder}: peft_type {config.get('peft_type')!r} is not LORA")
    unsupported = [key for key in _UNSUPPORTED if config.get(key)]
    if unsupported:
        raise InputError(f"adapter {folder}: uses {', '.join(unsupported)}, which is not supported yet")
    indices = config.get("trainable_token_indices") or {}
    if not isinstance(indices, dict) or not all(map(_are_ids, indices.values())):
        raise InputError(f"adapter {folder}: trainable_token_indices in {CONFIG} is not {{module: [id, ...]}}")
    rows = {match["module"]: tensors.pop(match[0]) for match in map(_ROWS_KEY.fullmatch, list(tensors)) if match}
    new = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
    if config["peft_type"] == "ADALORA" or config.get("bias", "none") != "none" or any(map(config.get, new)):
        return Adapter(folder, config, math.nan, {}, _checked_rows(folder, rows, indices))
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
