"""An adapter folder as tensors: what it does to each weight of the base, read and checked without a model.

A (R, I), B (O, R)
LoRA, rsLoRA   W + s B A                       s = lora_alpha / r, or lora_alpha / sqrt(r); patterns give r and alpha by module
DoRA           m * (W + s B A) / |W + s B A|   m (O,), the norm of each row            arXiv:2402.09353
AdaLoRA        W + s B diag(E) A               s = lora_alpha / (init_r + 1e-5)        arXiv:2303.10512
modules_to_save, trained biases, embeddings saved whole: the tensor takes the place of the base's
new tokens     rows (N, I) that take the place of those N rows of the embedding and of the head
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..errors import InputError
from .ranks import SCHEDULE

# O out_features, I in_features, R rank, V vocab, N new tokens

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B|E|embedding_A|embedding_B|magnitude_vector)(\.weight)?")
_LORA_BIAS = re.compile(r"(?P<module>.+)\.lora_B\.bias")
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")

# Settings of an adapter folder that are followed here, and those that say nothing about what the adapter computes, or say
# again what the names of the tensors say. Any other that is set is refused by name.
LORA_FIELDS = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias",
         "ensure_weight_tying")  # fmt: skip
ADALORA_FIELDS = ("lora_alpha", "rank_pattern", "bias", "init_r", "target_r", "total_step")
_SILENT = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
           "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
           "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "init_lora_weights", "eva_config",
           "loftq_config", "runtime_config", "megatron_core", "qalora_group_size"}  # fmt: skip
# As PEFT makes these starts, they put something else than the base's weights under the adapter, and the folder does not
# hold what. Those of qlora (start.py) leave the base alone, and say so in the config.
_CHANGED_BASE = ("loftq", "pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class Update:
    """A low-rank update of one weight (O, I): A (R, I), B (O, R), and DoRA's magnitude (O,) or None."""

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    scaling: float
    magnitude_O: torch.Tensor | None = None

    @property
    def shape(self):
        return (self.B_OR.shape[0], self.A_RI.shape[1])

    def merged(self, base_OI, rows=slice(None)):
        """Return `rows` of the merged weight, float32, for those rows of the base.

        Source: LoRA (arXiv:2106.09685) eq. 3; QLoRA (arXiv:2305.14314) sec. 3; DoRA (arXiv:2402.09353) eq. 5.
        """
        device = base_OI.device
        A_RI, B_OR = self.A_RI.to(device).float(), self.B_OR[rows].to(device).float()
        merged = torch.addmm(base_OI, B_OR, A_RI, alpha=self.scaling)
        if self.magnitude_O is not None:
            merged *= (self.magnitude_O[rows].to(device).float() / merged.norm(dim=1))[:, None]
        return merged


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as tensors, in the dtype that was saved.

    updates: {module: Update}. replaced: {parameter: tensor}, which takes the place of the base's. bias_deltas: {module:
    (O,)}, added to its bias (`lora_bias`). rows: {embedding or head: ([token id, ...], (N, I))}, of new tokens.
    """

    folder: Path
    config: dict
    updates: dict
    replaced: dict
    bias_deltas: dict
    rows: dict

    @property
    def num_parameters(self):
        """How many numbers the folder holds."""
        tensors = [*self.replaced.values(), *self.bias_deltas.values(), *(rows for _, rows in self.rows.values())]
        factors = [factor for update in self.updates.values() for factor in (update.A_RI, update.B_OR)]
        return sum(tensor.numel() for tensor in [*tensors, *factors])

    def refuse_more_than_low_rank(self, why):
        """Raise InputError, which ends with `why`, if the adapter is more than LoRA or DoRA updates."""
        others = {"AdaLoRA": self.config["peft_type"] != "LORA", "new tokens": self.rows,
                  "trained biases or modules": self.replaced or self.bias_deltas}  # fmt: skip
        found = [name for name, there in others.items() if there]
        if found:
            raise InputError(f"adapter {self.folder}: with {', '.join(found)} it {why}")

    def refuse_mismatch(self, shapes, parameters, embeddings, token_ids):
        """Raise InputError unless everything in the adapter has its place in the base; lists all that has not.

        shapes: {module: (O, I)} of what may carry an update. parameters: {parameter: shape}. embeddings: {module:
        (V, I)} where the rows of the tokens `token_ids` belong.
        """
        self.refuse_other_tokens(embeddings, token_ids)
        problems = []
        for module, update in self.updates.items():
            if module not in shapes:
                problems.append(f"{module}: the base has no such layer")
            elif tuple(shapes[module]) != update.shape:
                problems.append(f"{module}: adapter is {update.shape} (out, in), base is {tuple(shapes[module])}")
        for name, tensor in self.replaced.items():
            if name not in parameters:
                problems.append(f"{name}: the base has no such parameter")
            elif tuple(parameters[name]) != tuple(tensor.shape):
                problems.append(f"{name}: adapter is {tuple(tensor.shape)}, base is {tuple(parameters[name])}")
        for module, delta_O in self.bias_deltas.items():
            if f"{module}.bias" not in parameters:
                problems.append(
                    f"{module}: lora_bias adds to a bias, and this layer has none that could be exported; train without it"
                )
            elif tuple(parameters[f"{module}.bias"]) != tuple(delta_O.shape):
                problems.append(
                    f"{module}: lora_bias has {len(delta_O)} numbers, the bias {parameters[f'{module}.bias']}"
                )
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
        if (folder / WEIGHTS).is_file() or not (folder / "adapter_model.bin").is_file():
            with safe_open(folder / WEIGHTS, "pt"):
                tensors = load_file(folder / WEIGHTS)
        else:
            raise InputError(
                f"adapter {folder}: adapter_model.bin is a pickle, which is never read; "
                "open it with the tool that made it and save it as safetensors"
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"adapter {folder}: {error}") from None
    _refuse_unsupported(folder, config)
    indices = config.get("trainable_token_indices") or {}
    indices = {"embed_tokens": indices} if isinstance(indices, list) else indices
    if not isinstance(indices, dict) or not all(map(_are_ids, indices.values())):
        raise InputError(f"adapter {folder}: trainable_token_indices in {CONFIG} is not {{module: [id, ...]}}")
    return _Sorted(tensors).adapter(folder, config, indices)


def _refuse_unsupported(folder, config):
    if not isinstance(config, dict):
        raise InputError(f"adapter {folder}: {CONFIG} is not a mapping")
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise InputError(f"adapter {folder}: peft_type {kind!r} is not LORA or ADALORA")
    followed = {*_SILENT, *((*ADALORA_FIELDS, *SCHEDULE, "r") if kind == "ADALORA" else LORA_FIELDS)}
    others = sorted(key for key, value in config.items() if value and key not in followed)
    if others:
        raise InputError(f"adapter {folder}: uses {', '.join(others)}, which is not supported")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASE):
        raise InputError(
            f"adapter {folder}: init_lora_weights {start!r} trained on a changed base, which the folder does not hold; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it"
        )
    wrong = [key for key in ("r", "lora_alpha") if not _is_positive(config.get(key))]
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            wrong.append(key)
    if wrong:
        raise InputError(
            f"adapter {folder}: {', '.join(wrong)} in {CONFIG} {'is' if len(wrong) == 1 else 'are'} not usable"
        )


def _is_positive(value):
    return type(value) in (int, float) and value > 0


class _Sorted:
    """The tensors of a folder, sorted by what they are; `problems` collects all that is wrong with them."""

    def __init__(self, tensors):
        self.factors = defaultdict(dict)
        self.replaced, self.bias_deltas, self.rows, self.problems = {}, {}, {}, []
        for key, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                self.problems.append(f"{key}: holds numbers that are not finite")
            elif not key.startswith(_PREFIX):
                self.problems.append(f"{key}: not a tensor of an adapter")
            else:
                self._sort(key.removeprefix(_PREFIX), tensor)

    def _sort(self, name, tensor):
        if match := _FACTOR.fullmatch(name):
            self.factors[match["module"]][match["factor"]] = tensor
        elif match := _LORA_BIAS.fullmatch(name):
            self.bias_deltas[match["module"]] = tensor
        elif match := _ROWS.fullmatch(name):
            self.rows[match["module"]] = tensor
        elif "lora_" in name:
            self.problems.append(f"{name}: not a LoRA factor")
        else:  # the base's own name, behind whatever wrapper PEFT had put around it
            if ".original_module." in name or name.endswith(".modules_to_save.bias"):
                return  # of `bias: all`, beside the trained copy that is in the file under its own name
            self.replaced[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)] = tensor

    def adapter(self, folder, config, indices):
        updates = {module: self._update(module, factors, config) for module, factors in sorted(self.factors.items())}
        rows = self._checked_rows(indices)
        for module in self.bias_deltas.keys() - updates.keys():
            self.problems.append(f"{module}: has lora_bias and no LoRA factors")
        if not (updates or self.replaced or rows or self.problems):
            self.problems.append("no LoRA tensors")
        if self.problems:
            raise InputError.listing(f"adapter {folder}", sorted(self.problems))
        bias_deltas = {module: updates[module].scaling * delta.float() for module, delta in self.bias_deltas.items()}
        return Adapter(folder, config, updates, self.replaced, bias_deltas, rows)

    def _update(self, module, factors, config):
        """Return the Update of a module, or None after noting what is wrong with it."""
        embedding = "embedding_A" in factors or "embedding_B" in factors
        names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        optional = (
            {"magnitude_vector"} if config.get("use_dora") else {"E"} if config["peft_type"] == "ADALORA" else set()
        )
        missing, extra = {*names, *optional} - factors.keys(), factors.keys() - {*names, *optional}
        if missing:
            self.problems.append(f"{module}: has {_listed(factors)} but not its partner {_listed(missing)}")
            return None
        if extra or (embedding and optional):
            self.problems.append(f"{module}: {_listed(extra or optional)} does not belong to this kind of adapter")
            return None
        A_RI, B_OR = factors[names[0]], factors[names[1]]
        if embedding:  # E[id] = A[:, id]^T B^T: the weight is (V, I), and A has a column a token
            A_RI, B_OR = B_OR.T, A_RI.T
        adalora = config["peft_type"] == "ADALORA"
        rank = len(A_RI) if adalora else _of(config.get("rank_pattern"), module, config["r"])
        if A_RI.dim() != 2 or B_OR.dim() != 2 or not A_RI.shape[0] == B_OR.shape[1] == rank:
            self.problems.append(
                f"{module}: A {tuple(A_RI.shape)} and B {tuple(B_OR.shape)}: the rank differs from r = {rank} in {CONFIG}"
            )
            return None
        alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
        if adalora:
            if factors["E"].shape != (rank, 1):
                self.problems.append(f"{module}: E is {tuple(factors['E'].shape)}, the rank is {rank}")
                return None
            # PEFT divides by the rank that the module began with, whatever was pruned since
            return Update(A_RI.float() * factors["E"].float(), B_OR, alpha / (config["init_r"] + 1e-5))
        magnitude = factors.get("magnitude_vector")
        if magnitude is not None and magnitude.shape != (len(B_OR),):
            self.problems.append(f"{module}: magnitude is {tuple(magnitude.shape)}, the weight has {len(B_OR)} rows")
            return None
        return Update(A_RI, B_OR, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)

    def _checked_rows(self, indices):
        """Return {module: (ids, rows)}, for `indices` ({module: ids}) of the config."""
        indices = {self._full_name(module): ids for module, ids in indices.items()}
        for module in sorted(self.rows.keys() - indices):
            self.problems.append(f"{module}: rows of tokens that {CONFIG} does not name")
        for module, ids in indices.items():
            if module not in self.rows:
                self.problems.append(f"{module}: {CONFIG} names tokens, and their rows are missing")
            elif self.rows[module].dim() != 2 or len(self.rows[module]) != len(ids):
                self.problems.append(
                    f"{module}: rows {tuple(self.rows[module].shape)} do not fit the tokens {ids} in {CONFIG}"
                )
        return {module: (ids, self.rows.get(module)) for module, ids in indices.items()}

    def _full_name(self, name):
        return next((module for module in self.rows if module.endswith(f".{name}")), name)


def _of(pattern, module, default):
    """Return the value of the key of `pattern` that is, ends or matches the module's name, as PEFT reads it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _listed(names):
    return ", ".join(f"lora_{name}" for name in sorted(names))


def _are_ids(value):
    return (
        isinstance(value, list)
        and all(type(one) is int and one >= 0 for one in value)
        and len(set(value)) == len(value)
    )


def _said(ids_of_module):
    return ", ".join(f"{sorted(ids)} in {module}" for module, ids in ids_of_module.items()) or "none"
