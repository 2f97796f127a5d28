"""The recipe: YAML in, one frozen value out. Parsed once; each part of the program gets its own section.

Sections and fields, with their documentation, are in sections.py; what goes together across sections is said here.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Literal

from pydantic import ValidationError, model_validator
from ruamel.yaml import YAML

from . import error_messages, reading
from .sections import (
    Adalora,
    Data,
    Export,
    Format,
    Lora,
    Memory,
    Model,
    PathText,
    Quantization,
    Section,
    Source,
    Training,
    parse_size,
)

__all__ = [
    "Adalora", "Data", "Export", "Format", "Lora", "Memory", "Model", "Quantization", "Recipe", "Section", "Source", "Training",
    "as_yaml", "parse_size",
]  # fmt: skip


class Recipe(Section):
    model: Model
    quantization: Quantization | None = Quantization()
    lora: Lora | None = None
    """the default method; null where another is given"""
    adalora: Adalora | None = None
    """instead of lora: ranks that shrink while training"""
    data: Data
    training: Training = Training()
    memory: Memory = Memory()
    export: Export = Export()
    kernels: Literal["auto", "off"] = "auto"
    """faster kernels for parts of the model, with the same results and less memory ([plan.md](plan.md#kernels)); off"""
    output_dir: PathText
    """a new or empty folder"""

    @property
    def method(self):
        """The section that says what is trained."""
        return self.lora or self.adalora

    @model_validator(mode="before")
    @classmethod
    def _lora_by_default(cls, values):
        if isinstance(values, dict) and "lora" not in values and values.get("adalora") is None:
            return {**values, "lora": {}}
        return values

    @model_validator(mode="after")
    def _one_method(self):
        if self.lora is not None and self.adalora is not None:
            raise ValueError("lora and adalora exclude each other; keep one")
        if self.method is None:
            raise ValueError("lora: null leaves nothing to train; leave it out for the defaults, or give adalora")
        return self

    @model_validator(mode="after")
    def _a_start_that_fits_the_base(self):
        start = self.lora and self.lora.init_lora_weights
        if start in ("pissa", "olora") and self.quantization is not None:
            raise ValueError(
                f"lora.init_lora_weights {start} needs a 16-bit base; use loftq, which corrects the quantization error, or "
                "set quantization: null"
            )
        if start == "loftq" and self.quantization is None:
            raise ValueError(
                "lora.init_lora_weights loftq corrects a quantized base; with quantization: null take pissa"
            )
        return self

    @model_validator(mode="after")
    def _one_dtype(self):
        if self.model.dtype != "auto" and self.quantization is not None:
            raise ValueError(
                f"model.dtype is for quantization: null; set quantization.compute_dtype: {self.model.dtype} instead"
            )
        return self

    @model_validator(mode="after")
    def _steps_for_the_ranks_to_shrink_in(self):
        if self.adalora is None:
            return self
        total, ends = self.training.max_steps, (self.adalora.tinit, self.adalora.tfinal)
        if sum(end if end < 1 else end / (total or math.inf) for end in ends) >= 1:
            raise ValueError("adalora.tinit and adalora.tfinal leave no steps in which the ranks could shrink")
        return self

    @model_validator(mode="after")
    def _one_way_to_fill_a_micro_batch(self):
        tokens = self.training.filled_to
        if tokens is not None and tokens < self.data.max_length:
            raise ValueError(
                f"training.tokens_per_micro_batch {tokens} is less than data.max_length {self.data.max_length}; "
                "one row must fit into a micro-batch"
            )
        if tokens is not None and self.training.per_device_train_batch_size != 1:
            raise ValueError(
                "training.tokens_per_micro_batch and per_device_train_batch_size exclude each other; keep one"
            )
        if self.training.group_by_length and (self.data.packing or tokens is not None):
            raise ValueError(
                "training.group_by_length is for whole rows, so many a step; leave it out with data.packing, or with a number "
                "as training.tokens_per_micro_batch"
            )
        return self

    @classmethod
    def load(cls, path, overrides=()) -> Recipe:
        """Return the recipe in the YAML file `path` with `section.field=value` strings laid over it.

        Raises:
            InputError: all problems of the file together, each with its line, field and remedy.
        """
        return cls._validated(path, *reading.from_file(path, overrides))

    @classmethod
    def from_dict(cls, values, overrides=()) -> Recipe:
        """Return the recipe with these nested `values`, `overrides` laid over them; raises InputError like `load`."""
        where = "the recipe"
        return cls._validated(where, *reading.with_overrides(where, copy.deepcopy(values), {}, overrides))

    @classmethod
    def _validated(cls, where, values, lines):
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise error_messages.refusal(where, error, values, lines, cls) from None

    def to_yaml(self) -> str:
        """Return the resolved recipe, every value written out, as YAML that `load` reads back to an equal recipe."""
        return as_yaml(self.model_dump())


def as_yaml(values):
    """Return nested plain values as YAML text."""
    stream = io.StringIO()
    yaml = YAML(pure=True)  # the C dumper writes YAML 1.1
    yaml.width = 1000
    yaml.dump(values, stream)
    return stream.getvalue()
