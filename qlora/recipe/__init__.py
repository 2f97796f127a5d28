"""The recipe: YAML in, one frozen value out. Parsed once; each part of the program gets its own section.

Sections and fields, with their documentation, are in sections.py and methods.py; what goes together across sections is said here.
"""

from __future__ import annotations

import copy
import math
from typing import Literal, get_args

from pydantic import ValidationError, model_validator

from . import error_messages, objectives, reading, tasks
from .fields import PathText, Section, parse_size
from .methods import Adalora, Bottleneck, Full, Hira, Ia3, Lora, Method, Oft, PrefixTuning, PromptTuning
from .objectives import Dpo, Kto, Objective, Orpo
from .sections import Data, Export, Format, Memory, Model, Quantization, Source, Training
from .yaml_writing import as_yaml, on_one_line

__all__ = [
    "Adalora", "Bottleneck", "Data", "Dpo", "Export", "Format", "Full", "Hira", "Ia3", "Lora", "Memory", "Method", "Model",
    "Objective", "Oft", "Orpo", "PrefixTuning", "PromptTuning", "Quantization", "Recipe", "Section", "Source", "Training",
    "as_yaml", "on_one_line", "parse_size",
]  # fmt: skip


class Recipe(Section):
    task: Literal["text-generation", "text-classification", "image-classification"] = "text-generation"
    """what the model answers, as transformers calls its pipelines: text-classification, image-classification
    ([tasks.md](tasks.md))"""
    model: Model
    quantization: Quantization | None = Quantization()
    lora: Lora | None = None
    """the default method; null where another is given"""
    adalora: Adalora | None = None
    """instead of lora: ranks that shrink while training"""
    ia3: Ia3 | None = None
    """instead of lora: a factor for each output of some layers"""
    oft: Oft | None = None
    """instead of lora: the inputs of layers are rotated"""
    hira: Hira | None = None
    """instead of lora: weights are multiplied with a low-rank update"""
    full: Full | None = None
    """instead of lora: the weights themselves are trained"""
    bottleneck: Bottleneck | None = None
    """instead of lora: a small network behind the blocks of each layer"""
    prefix_tuning: PrefixTuning | None = None
    """instead of lora: keys and values before each text"""
    prompt_tuning: PromptTuning | None = None
    """instead of lora: embeddings before each text"""
    dpo: Dpo | None = None
    """rows are pairs, of which one answer is preferred: DPO and its relatives ([preferences.md](preferences.md))"""
    kto: Kto | None = None
    """rows have one answer and a label, whether it is a good one: for thumbs up and down"""
    orpo: Orpo | None = None
    """pairs, with supervised training of the preferred answer in one"""
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
        return next(iter(self._methods.values()))

    @property
    def objective(self):
        """The section that says what the loss is; None: that of supervised training."""
        return next(iter(self._of_kind(Objective).values()), None)

    @property
    def seed_of_rows(self):
        """The seed of which rows are held out, and which are taken of a source with max_rows."""
        return self.training.seed if self.data.seed is None else self.data.seed

    @property
    def _methods(self):
        """{name: section} of the methods that are given."""
        return self._of_kind(Method)

    def _of_kind(self, kind):
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if isinstance(section, kind)}

    @classmethod
    def names_of_methods(cls):
        """Return the names of the fields that may be a Method, lora first."""
        return list(cls._kinds_of(Method))

    @classmethod
    def names_of_objectives(cls):
        """Return the names of the fields that may be an Objective."""
        return list(cls._kinds_of(Objective))

    @classmethod
    def _kinds_of(cls, kind):
        """{name: class} of the fields that may be a section of this kind."""
        found = {name: get_args(field.annotation) for name, field in cls.model_fields.items()}
        return {
            name: one for name, some in found.items() for one in some if isinstance(one, type) and issubclass(one, kind)
        }

    @model_validator(mode="before")
    @classmethod
    def _lora_by_default(cls, values):
        given = isinstance(values, dict) and [name for name in cls.names_of_methods() if values.get(name) is not None]
        return {**values, "lora": {}} if given == [] and "lora" not in values else values

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_task(cls, values):
        return tasks.with_defaults(values)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, values):
        return objectives.with_defaults(values, cls._kinds_of(Objective))

    @model_validator(mode="after")
    def _one_method(self):
        given = list(self._methods)
        if len(given) > 1:
            raise ValueError(f"{', '.join(given[:-1])} and {given[-1]} exclude each other; keep one")
        if not given:
            others = " or ".join(name for name in self.names_of_methods() if name != "lora")
            raise ValueError(f"lora: null leaves nothing to train; leave it out for the defaults, or give {others}")
        return self

    @model_validator(mode="after")
    def _what_the_task_has(self):
        tasks.refuse(self)
        return self

    @model_validator(mode="after")
    def _one_objective(self):
        given = list(self._of_kind(Objective))
        if len(given) > 1:
            raise ValueError(f"{', '.join(given[:-1])} and {given[-1]} exclude each other; keep one")
        objectives.refuse(self)
        return self

    @model_validator(mode="after")
    def _full_weights(self):
        if self.full is not None and self.quantization is not None:
            raise ValueError(
                "full trains the weights themselves, and 4-bit ones cannot be: set quantization: null, or take lora"
            )
        return self

    @model_validator(mode="after")
    def _rows_that_can_be_joined(self):
        before = [name for name, section in self._methods.items() if section.num_positions]
        if before and self.data.packing:
            raise ValueError(
                f"data.packing joins rows, and {before[0]} puts something before each: set data.packing: false"
            )
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

    @model_validator(mode="after")
    def _what_evaluations_need(self):
        training, held_out = self.training, self.data.eval is not None or self.data.eval_fraction > 0
        wanted = {
            "num_samples": training.num_samples > 0,
            "early_stopping_patience": training.early_stopping_patience is not None,
            "load_best_model_at_end": training.load_best_model_at_end,
        }
        for name in [name for name, is_wanted in wanted.items() if is_wanted]:
            if not held_out:
                raise ValueError(f"training.{name} needs held-out rows; set data.eval or data.eval_fraction")
            if name != "num_samples" and training.eval_steps is None:
                raise ValueError(f"training.{name} needs evaluations while it trains; set training.eval_steps")
        if training.metric_for_best_model != "eval_loss" and not training.looks_for_best:
            raise ValueError(
                "training.metric_for_best_model is for load_best_model_at_end and early_stopping_patience; set one of them"
            )
        return self

    @classmethod
    def load(cls, path, overrides=()) -> Recipe:
        """Return the recipe in the YAML file `path` with `section.field=value` strings laid over it.

        Raises:
            InputError: all problems of the file together, each with its line, field and remedy.
        """
        return cls.of_values(path, *reading.from_file(path, overrides))

    @classmethod
    def from_dict(cls, values, overrides=()) -> Recipe:
        """Return the recipe with these nested `values`, `overrides` laid over them; raises InputError like `load`."""
        where = "the recipe"
        return cls.of_values(where, *reading.with_overrides(where, copy.deepcopy(values), {}, overrides))

    @classmethod
    def of_values(cls, where, values, lines) -> Recipe:
        """Return the recipe with these nested `values`; raises InputError like `load`.

        where: what they are read from, for messages. lines: {place in them: line}, as far as they are known.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise error_messages.refusal(where, error, values, lines, cls) from None

    def to_yaml(self) -> str:
        """Return the resolved recipe, every value written out, as YAML that `load` reads back to an equal recipe."""
        return as_yaml(self.model_dump())
