"""An adapter folder as tensors: what it does to each weight of the base, read and checked without a model.

modules_to_save, trained biases, embeddings saved whole: the tensor takes the place of the base's.
new tokens: rows (N, I) that take the place of those N rows of the embedding and of the head.
What a method does beside is its own: see contract.Update.
"""

from __future__ import annotations

import re
import types
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..system.errors import InputError
from .folder import CONFIG, PREFIX, WEIGHTS, matched

# O out_features, I in_features, V vocab, N new tokens

_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
# Settings of any method that say nothing about what it computes, or say again what the names of the tensors say.
_SILENT = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
           "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "modules_to_save",
           "trainable_token_indices", "runtime_config"}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An adapter folder as tensors, in the dtype that was saved.

    kind: as the field calls it. updates: {module: contract.Update}. replaced: {parameter: tensor}, which takes the place of
    the base's. bias_deltas: {module: (O,)}, added to its bias. own: {name: tensor} that have no place in the base. rows:
    {embedding or head: ([token id, ...], (N, I))}, of new tokens. unmergeable: why it cannot become one with the base, and
    what to do instead; empty where it can. stays_tied: embedding and head of a tied model stay one matrix. beside: PEFT can
    hold its updates beside others' on one base.
    """

    folder: Path
    config: dict
    kind: str
    updates: dict
    replaced: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    bias_deltas: dict = field(default_factory=dict)
    own: dict = field(default_factory=dict)
    unmergeable: str = ""
    stays_tied: bool = False
    beside: bool = False

    @property
    def num_parameters(self):
        """How many numbers the folder holds."""
        tensors = [
            *self.replaced.values(),
            *self.own.values(),
            *self.bias_deltas.values(),
            *(rows for _, rows in self.rows.values()),
        ]
        return sum(tensor.numel() for tensor in tensors) + sum(one.num_parameters for one in self.updates.values())

    @property
    def is_whole(self):
        """True if it is nothing but weights in the place of the base's, as full fine-tuning leaves them."""
        return not (self.updates or self.own or self.rows or self.bias_deltas)

    def refuse_unmergeable(self):
        """Raise InputError if the adapter cannot become one with its base."""
        if self.unmergeable:
            raise InputError(f"adapter {self.folder}: {self.kind} {self.unmergeable}")

    def refuse_untrained(self):
        """Raise InputError if the adapter is updates that all change nothing."""
        others = self.replaced or self.own or self.bias_deltas or self.rows
        if self.updates and not others and all(update.is_zero() for update in self.updates.values()):
            zero = next(iter(self.updates.values())).zero
            raise InputError(
                f"adapter {self.folder}: its update is zero in all {len(self.updates)} layers ({zero}), so it answers as its "
                "base does; it was never trained"
            )

    @property
    def replaces_weights(self):
        """In words, which of the base's own weights it changes in place; empty where all that it adds are modules."""
        modules = tuple(f".{name}" for name in self.config.get("modules_to_save") or ())
        inside = [name for name in self.replaced if not f".{name.rpartition('.')[0]}".endswith(modules)]
        return "trained biases or weights" if inside else ""

    def refuse_more_than_low_rank(self, why):
        """Raise InputError, which ends with `why`, if the adapter is more than LoRA or DoRA updates."""
        others = {self.kind: not self.beside, "new tokens": self.rows,
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
            elif any(side not in (None, there) for side, there in zip(update.shape, shapes[module], strict=True)):
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
        missing = matched(
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


def refuse_unknown_settings(folder, config, followed):
    """Raise InputError if a setting is on that is neither silent nor one of the `followed`."""
    others = sorted(key for key, value in config.items() if value and key not in {*_SILENT, *followed})
    if others:
        raise InputError(f"adapter {folder}: uses {', '.join(others)}, which is not supported")


class Sorted:
    """The tensors of a folder, sorted by what they are; `problems` collects all that is wrong with them.

    own: {module: {part: tensor}} of the method's own, whose names `pattern` matches, with the groups module and part.
    """

    def __init__(self, folder, config, pattern, marker, kind):
        """marker: is in the names of the method's own tensors alone. kind: what messages call them."""
        self.folder, self.config = folder, config
        self._pattern, self._marker, self._kind = pattern, marker, kind
        self.own: dict = defaultdict(dict)
        self.replaced: dict = {}
        self.problems: list = []
        self._rows: dict = {}
        tensors = load_file(folder / WEIGHTS)
        indices = config.get("trainable_token_indices") or {}
        indices = {"embed_tokens": indices} if isinstance(indices, list) else indices
        if not isinstance(indices, dict) or not all(map(_are_ids, indices.values())):
            raise InputError(f"adapter {folder}: trainable_token_indices in {CONFIG} is not {{module: [id, ...]}}")
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                self.problems.append(f"{key}: is {str(tensor.dtype)[6:]}, not floating point")
            elif not torch.isfinite(tensor).all():
                self.problems.append(f"{key}: contains non-finite values")
            if not key.startswith(PREFIX):
                self.problems.append(f"{key}: not a tensor of an adapter")
            else:
                self._sort(key.removeprefix(PREFIX), tensor)
        self.rows = self._checked_rows(indices)

    def _sort(self, name, tensor):
        if match := self._pattern.fullmatch(name):
            self.own[match["module"]][match["part"]] = tensor
        elif match := _ROWS.fullmatch(name):
            self._rows[match["module"]] = tensor
        elif self._marker in name:
            self.problems.append(f"{name}: not a {self._kind} factor")
        else:  # the base's own name, behind whatever wrapper PEFT had put around it
            if ".original_module." in name or name.endswith(".modules_to_save.bias"):
                return  # of `bias: all`, beside the trained copy that is in the file under its own name
            self.replaced[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)] = tensor

    def _checked_rows(self, indices):
        """Return {module: (ids, rows)}, for `indices` ({module: ids}) of the config."""
        indices = {self._full_name(module): ids for module, ids in indices.items()}
        for module in sorted(self._rows.keys() - indices):
            self.problems.append(f"{module}: rows of tokens that {CONFIG} does not name")
        for module, ids in indices.items():
            if module not in self._rows:
                self.problems.append(f"{module}: {CONFIG} names tokens, and their rows are missing")
            elif self._rows[module].dim() != 2 or len(self._rows[module]) != len(ids):
                self.problems.append(
                    f"{module}: rows {tuple(self._rows[module].shape)} do not fit the tokens {ids} in {CONFIG}"
                )
        return {module: (ids, self._rows.get(module)) for module, ids in indices.items()}

    def _full_name(self, name):
        return next((module for module in self._rows if module.endswith(f".{name}")), name)

    def adapter(self, kind, updates, **settings):
        """Return the Adapter with these updates and settings; raises InputError with all problems that were found."""
        if not (updates or self.replaced or self.rows or self.problems):
            self.problems.append(f"no {self._kind} tensors")
        if self.problems:
            raise InputError.listing(f"adapter {self.folder}", sorted(self.problems))
        return Adapter(self.folder, self.config, kind, updates, self.replaced, self.rows, **settings)


def _are_names(value):
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_ids(value):
    return (
        isinstance(value, list)
        and all(type(one) is int and one >= 0 for one in value)
        and len(set(value)) == len(value)
    )


def _said(ids_of_module):
    return ", ".join(f"{sorted(ids)} in {module}" for module, ids in ids_of_module.items()) or "none"
