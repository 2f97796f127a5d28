"""An adapter folder as tensors: what it does to each weight of the base, read and checked without a model.

A (R, I), B (O, R)
LoRA, rsLoRA   W + s B A                       s = lora_alpha / r, or lora_alpha / sqrt(r); patterns give r and alpha by module
DoRA           m * (W + s B A) / |W + s B A|   m (O,), the norm of each row            arXiv:2402.09353
AdaLoRA        W + s B diag(E) A               s = lora_alpha / (init_r + 1e-5)        arXiv:2303.10512
modules_to_save, trained biases, embeddings saved whole: the tensor takes the place of the base's
new tokens     rows (N, I) that take the place of those N rows of the embedding and of the head
"""

from __future__ import annotations

import math
import re
import types
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..system import bounded, files
from ..system.errors import InputError
from ..system.storage import listed, write_json
from .ranks import SCHEDULE

# O out_features, I in_features, R rank, V vocab, N new tokens

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
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
_LARGEST = {"r": 2**16, "lora_alpha": 1e6, "init_r": 2**16, "target_r": 2**16}
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

    def refuse_untrained(self):
        """Raise InputError if the adapter is LoRA updates that are all zero: B still is, or B A is what it started from."""
        others = self.replaced or self.bias_deltas or self.rows
        if self.updates and not others and all(map(_is_zero, self.updates.values())):
            raise InputError(
                f"adapter {self.folder}: its update is zero in all {len(self.updates)} layers (lora_B is 0, or B A is still "
                "what it started from), so it answers as its base does; it was never trained"
            )

    def refuse_more_than_low_rank(self, why):
        """Raise InputError, which ends with `why`, if the adapter is more than LoRA or DoRA updates."""
        others = {"AdaLoRA": self.config["peft_type"] != "LORA", "new tokens": self.rows,
                  "trained biases or modules": self.replaced or self.bias_deltas}  # fmt: skip
        found = [name for name, there in others.items() if there]
        if found:
            raise InputError(f"adapter {self.folder}: has {', '.join(found)}, so it {why}")

    def refuse_mismatch(self, shapes, parameters, embeddings, token_ids):
        """Raise InputError unless everything in the adapter has its place in the base; lists all that has not.

        shapes: {module: (O, I)} of what may carry an update. parameters: {parameter: shape}. embeddings: {module:
        (V, I)} where the rows of the tokens `token_ids` belong.
        """
        self.refuse_other_tokens(embeddings, token_ids)
        problems: list = []
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
        self.refuse_left_out(shapes)

    def refuse_left_out(self, layers):
        """Raise InputError if one of `layers`, names in the base, was trained by what the config says, and has no tensors.

        PEFT would leave it as it is in the base, and an export would be proven to be just that.
        """
        from peft.tuners.tuners_utils import check_target_module_exists

        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        said = {name: self.config.get(name) for name in names}
        wanted = said["target_modules"]
        if wanted is None or wanted == "all-linear":
            return  # PEFT writes what it found instead
        if not isinstance(wanted, str) and not _are_names(wanted):
            raise InputError(
                f"{self.folder / CONFIG}: target_modules {wanted!r} is neither a pattern nor a list of names"
            )
        config = types.SimpleNamespace(**said, target_parameters=None)
        missing = _match(
            self.folder,
            ", ".join(names),
            lambda: [one for one in layers if one not in self.updates and check_target_module_exists(config, one)],
        )
        if missing:
            raise InputError.listing(
                f"adapter {self.folder}: incomplete; it",
                [f"{name}: target_modules in {CONFIG} names it, and {WEIGHTS} has nothing for it" for name in missing],
                "copy or download it again",
            )

    def refuse_other_tokens(self, modules, token_ids):
        """Raise InputError unless the rows are those of the tokens `token_ids` in each of `modules`, and no others."""
        expected = {module: set(token_ids) for module in modules} if token_ids else {}
        found = {module: set(ids) for module, (ids, _) in self.rows.items()}
        if found != expected:
            raise InputError(
                f"adapter {self.folder}: has embedding rows for tokens {_said(found)}, but model.new_tokens and the base's "
                f"tokenizer need {_said(expected)}; restore both as they were in training"
            )


def _is_zero(update):
    """True if B A is zero but for what the float32 sums of its parts leave; DoRA's magnitude may be all that was trained."""
    if update.magnitude_O is not None:
        return False
    A_RI, B_OR = update.A_RI.float(), update.B_OR.float()
    x_I = torch.linspace(1, 2, A_RI.shape[1])
    delta_O, size_O = B_OR @ (A_RI @ x_I), B_OR.abs() @ (A_RI.abs() @ x_I)
    return bool(delta_O.abs().max() <= 1e-6 * size_O.max())


def read(folder):
    """Return the Adapter in a PEFT folder.

    Raises:
        InputError: files missing or cut off, an unsupported kind, tensors without a partner or not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    _refuse_unsupported(folder, config)
    tensors = load_file(folder / WEIGHTS)
    indices = config.get("trainable_token_indices") or {}
    indices = {"embed_tokens": indices} if isinstance(indices, list) else indices
    if not isinstance(indices, dict) or not all(map(_are_ids, indices.values())):
        raise InputError(f"adapter {folder}: trainable_token_indices in {CONFIG} is not {{module: [id, ...]}}")
    return _Sorted(tensors).adapter(folder, config, indices)


def read_config(folder):
    """Return what the adapter_config.json of an adapter folder says, once its files are found whole.

    Raises:
        InputError: files missing, cut off, changed since the training, or something else than their names say.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS
    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter {folder}: no {CONFIG}; not an adapter folder")
    config = files.read_object(folder / CONFIG)
    _refuse_changed(folder)
    if not weights.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"adapter {folder}: adapter_model.bin is a pickle, which is never read; "
                "open it with the tool that made it and save it as safetensors"
            )
        raise InputError(f"adapter {folder}: no {WEIGHTS}; copy or download it again")
    files.refuse_instead(weights)
    try:
        with safe_open(weights, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights} is not a complete safetensors file ({error}); copy or download it again") from None
    return config


def kind(config):
    """Return what an adapter of this config is called."""
    return {"ADALORA": "AdaLoRA"}.get(config["peft_type"], "DoRA" if config.get("use_dora") else "LoRA")


def seal(folder, base):
    """Write down what is in an adapter folder that is finished, so that `read` can tell whether it still is.

    base: {file name: sha256} of what it was trained on.
    """
    folder = Path(folder)
    found = {path.name: listed(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"files": found, "base": base})


def base_of(folder):
    """Return {file name: sha256} of the base that a sealed adapter was trained on, None of one that is not sealed."""
    path = Path(folder) / MANIFEST
    return files.read_object(path).get("base") if path.is_file() else None


def _refuse_changed(folder):
    """Raise InputError if a file is not as it was when the folder was sealed; that of another tool never was."""
    if not (folder / MANIFEST).is_file():
        return
    entries = files.read_object(folder / MANIFEST).get("files")
    if not isinstance(entries, dict):
        raise InputError(f"{folder / MANIFEST}: lists no files; copy the folder again")
    changed = [
        name for name, entry in entries.items() if not (folder / name).is_file() or entry != listed(folder / name)
    ]
    if changed:
        raise InputError(
            f"adapter {folder}: {', '.join(sorted(changed))} changed since the training; copy the folder again, or, if you "
            f"changed it on purpose, remove {folder / MANIFEST}"
        )


def _refuse_unsupported(folder, config):
    kind = config.get("peft_type")
    if not (isinstance(kind, str) and kind in ("LORA", "ADALORA")):
        raise InputError(f"adapter {folder}: peft_type {kind!r} is not LORA or ADALORA")
    followed = {*_SILENT, *((*ADALORA_FIELDS, *SCHEDULE, "r") if kind == "ADALORA" else LORA_FIELDS)}
    others = sorted(key for key, value in config.items() if value and key not in followed)
    if others:
        raise InputError(f"adapter {folder}: uses {', '.join(others)}, which is not supported")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASE):
        raise InputError(
            f"adapter {folder}: init_lora_weights {start!r} changed the base weights, which the folder does not contain; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        )
    values = {key: config.get(key) for key in ("r", "lora_alpha", *(("init_r",) if kind == "ADALORA" else ()))}
    wrong = [f"{key} is {value!r}" for key, value in values.items() if not _is_usable(key, value)]
    for key, of in (("alpha_pattern", "lora_alpha"), *((("rank_pattern", "r"),) if kind == "LORA" else ())):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            wrong.append(f"{key} is {pattern!r}")
            continue
        wrong += [
            f"{key} gives {one!r} the value {value!r}" for one, value in pattern.items() if not _is_usable(of, value)
        ]
    if wrong:
        raise InputError.listing(
            f"{folder / CONFIG}", wrong, "no adapter has such a setting; copy or download it again"
        )


def _is_usable(key, value):
    """True if `value` can be the setting `key`: a rank, whole, or an alpha."""
    kinds = (int, float) if key == "lora_alpha" else (int,)
    return type(value) in kinds and 0 < value <= _LARGEST[key]  # false for NaN


class _Sorted:
    """The tensors of a folder, sorted by what they are; `problems` collects all that is wrong with them."""

    def __init__(self, tensors):
        self.factors = defaultdict(dict)
        self.replaced, self.bias_deltas, self.rows, self.problems = {}, {}, {}, []
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                self.problems.append(f"{key}: is {str(tensor.dtype)[6:]}, not floating point")
            elif not torch.isfinite(tensor).all():
                self.problems.append(f"{key}: contains non-finite values")
            if not key.startswith(_PREFIX):
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
        self.settings = _match(
            folder,
            "rank_pattern, alpha_pattern",
            lambda: {module: _settings(config, module) for module in self.factors},
        )
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
        rank, alpha = self.settings[module]
        rank = len(A_RI) if adalora else rank
        if A_RI.dim() != 2 or B_OR.dim() != 2 or not A_RI.shape[0] == B_OR.shape[1] == rank:
            self.problems.append(
                f"{module}: A {tuple(A_RI.shape)} and B {tuple(B_OR.shape)}: the rank differs from r = {rank} in {CONFIG}"
            )
            return None
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


def _match(folder, fields, function):
    """Return function(), which goes by regular expressions in these fields of the config."""
    try:
        return bounded.call(function)
    except bounded.TookTooLong:
        raise InputError(
            f"{folder / CONFIG}: a regular expression in {fields} takes more than {bounded.SECONDS} seconds; "
            "the folder cannot be trusted"
        ) from None
    except (re.error, TypeError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG}: {fields}: {error}; copy or download it again") from None


def _are_names(value):
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _settings(config, module):
    """Return (rank, alpha) of a module of an adapter that is not AdaLoRA's, whose rank_pattern is of another kind."""
    ranks = None if config["peft_type"] == "ADALORA" else config.get("rank_pattern")
    return _of(ranks, module, config["r"]), _of(config.get("alpha_pattern"), module, config["lora_alpha"])


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
