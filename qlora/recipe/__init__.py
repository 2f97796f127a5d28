"""The recipe: YAML in, one frozen value out. Parsed once; each part of the program gets its own section.

A field is named as the library that consumes it names it, so its documentation can be looked up there:
`lora` as `peft.LoraConfig`, `training` as `transformers.TrainingArguments`, `quantization` as
`transformers.BitsAndBytesConfig` without `bnb_4bit_`.
"""

from __future__ import annotations

import copy
import io
import math
import re
import unicodedata
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from ..system import files, secrets
from ..system.errors import InputError
from . import document, explain, moved

_LARGEST = 2**31 - 1  # a count that the libraries can take
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Share = Annotated[float, Field(ge=0, lt=1)]
Number = Annotated[float, Field(gt=0)]


def _one_line(text):
    """A name: not blank, and without line ends and other characters that nobody sees."""
    strange = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Zl", "Zp")), None)
    if not text.strip():
        raise ValueError("should not be blank")
    if strange is not None:
        raise ValueError(f"should be one line of plain text, without the character U+{ord(strange):04X}")
    return text


def _path(text):
    """A name or path, of which `~` is no part: it is the shell that knows whose home it is."""
    if text.startswith("~"):
        raise ValueError("should be a full path; ~ is not expanded (write ./~ for a folder of that name)")
    return _one_line(text)


def _expression(text):
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"should be a regular expression ({error})") from None
    return _one_line(text)


def _size(text):
    parse_size(text)
    return text


Name = Annotated[str, AfterValidator(_one_line)]
Expression = Annotated[str, AfterValidator(_expression)]
PathText = Annotated[str, AfterValidator(_path)]
Size = Annotated[str, AfterValidator(_size)]
Names = Annotated[list[Name], Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    name_or_path: PathText
    revision: Name | None = None
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # auto: sdpa where there is one
    trust_remote_code: bool = False
    new_tokens: Annotated[list[str], Field(min_length=1)] | None = None

    @field_validator("new_tokens")
    @classmethod
    def _each_once_and_visible(cls, tokens):
        blank = sorted({token for token in tokens or () if not token.strip()})
        twice = sorted({token for token in tokens or () if tokens.count(token) > 1} - set(blank))
        if blank:
            raise ValueError(f"{', '.join(map(repr, blank))} cannot be a token; leave it out")
        if twice:
            raise ValueError(f"{', '.join(map(repr, twice))} is listed more than once")
        return tokens


class Quantization(Section):
    quant_type: Literal["nf4", "fp4"] = "nf4"
    use_double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Lora(Section):
    peft_type: Literal["LORA", "ADALORA"] = "LORA"
    r: Positive = 16
    lora_alpha: Number = 32
    lora_dropout: Share = 0.0
    target_modules: Expression | Names = "all-linear"
    exclude_modules: Expression | Names | None = None
    layers_to_transform: Annotated[list[Count], Field(min_length=1)] | None = None
    rank_pattern: dict[Expression, Positive] = {}
    alpha_pattern: dict[Expression, Number] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "loftq", "eva", "pissa", "olora"] = True
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: Names | None = None
    ensure_weight_tying: bool = False
    init_r: Positive = 12
    target_r: Positive = 8
    tinit: Count | Share = 0.1
    tfinal: Count | Share = 0.3
    deltaT: Positive = 1
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5

    def changed(self, *names):
        """Return those of the fields `names` that do not have their default."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @model_validator(mode="after")
    def _fields_of_one_kind(self):
        adaptive = self.peft_type == "ADALORA"
        of_lora = ("r", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "lora_bias",
                   "ensure_weight_tying")  # fmt: skip
        of_adalora = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
        strange = self.changed(*(of_lora if adaptive else of_adalora))
        if strange:
            instead = "use init_r and target_r" if adaptive else "set peft_type: ADALORA"
            raise ValueError(f"{', '.join(strange)}: not supported with peft_type {self.peft_type}; {instead}")
        if adaptive and self.target_r >= self.init_r:
            raise ValueError(
                f"target_r {self.target_r} must be less than init_r {self.init_r}, because ranks shrink from there"
            )
        return self

    @model_validator(mode="after")
    def _what_goes_together(self):
        start = self.init_lora_weights
        expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if expression and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform is for a list of target_modules; put it into the expression")
        if self.use_dora and self.lora_bias:
            raise ValueError("use_dora and lora_bias exclude each other; keep one")
        if self.use_dora and start == "loftq":
            raise ValueError("use_dora and init_lora_weights loftq exclude each other; keep one")
        if start == "orthogonal" and any(rank % 2 for rank in (self.r, *self.rank_pattern.values())):
            raise ValueError("init_lora_weights orthogonal needs even ranks; change r or rank_pattern")
        if self.ensure_weight_tying and self.modules_to_save is None:
            raise ValueError("ensure_weight_tying is for modules_to_save; name the embedding there, or leave it out")
        return self


Column = Literal[
    "messages",
    "conversations",
    "system",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "text",
    "tools",
]


class Source(Section):
    """Where rows come from: local files (`path`), or a data set on the hub (`name`, as `datasets.load_dataset` takes it)."""

    path: PathText | None = None
    name: Name | None = None
    subset: Name | None = None
    split: Name = "train"
    revision: Name | None = None
    format: Literal["auto", "messages", "alpaca", "completion", "sharegpt", "text"] = "auto"
    columns: dict[Column, Annotated[str, Field(min_length=1)]] | None = None
    sample_by: Literal["document", "paragraph", "line"] = "document"
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_rows: Positive | None = None

    @model_validator(mode="after")
    def _one_place(self):
        if (self.path is None) == (self.name is None):
            raise ValueError("give either path (a file, glob or folder) or name (a data set on the hub)")
        hub_only = {"subset", "revision", "split"} & self.model_fields_set
        if self.path is not None and any(getattr(self, key) not in (None, "train") for key in hub_only):
            raise ValueError(f"{', '.join(sorted(hub_only))} belong to a hub data set (name), not to a path")
        return self


def _as_sources(value):
    """A path, a source, or a list of both."""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, dict, Source)) for item in items):
        raise ValueError("should be a path, {path: ...} or {name: ...}, or a list of these")
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], Field(min_length=1), BeforeValidator(_as_sources)]


class Data(Section):
    train: Sources
    eval: Sources | None = None
    columns: dict[Column, Annotated[str, Field(min_length=1)]] | None = None
    eval_fraction: Share = 0.0
    max_length: Annotated[int, Field(ge=8, le=_LARGEST)] = 2048
    overlong: Literal["error", "drop", "truncate_prompt", "truncate", "split"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    ignore_keys: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    packing: bool = False
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    thoughts: Literal["keep", "drop", "mask"] = "keep"
    chat_template: PathText | None = None
    system_as_user: bool = False
    num_proc: Positive | None = None

    @classmethod
    def of_file(cls, path, settings):
        """Return the section with these `settings` for the one file `path`, which is given as --data.

        Raises:
            InputError: `path` is no path.
        """
        try:
            return cls.model_validate({**settings, "train": str(path)})
        except ValidationError as error:
            raise InputError(
                f"--data {explain.shown(str(path))}: {explain.said(error.errors(include_url=False)[0])}"
            ) from None

    @model_validator(mode="after")
    def _one_eval_source(self):
        if self.eval is not None and self.eval_fraction > 0:
            raise ValueError("eval and eval_fraction exclude each other; keep one")
        return self


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    max_steps: Positive | None = None
    per_device_train_batch_size: Positive = 1
    tokens_per_micro_batch: Positive | None = None
    group_by_length: bool = False
    per_device_eval_batch_size: Positive = 1
    gradient_accumulation_steps: Positive = 16
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-4
    optim: Literal[
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adamw_8bit",
        "adamw_torch",
        "adamw_torch_fused",
        "paged_lion_8bit",
        "paged_lion_32bit",
    ] = "paged_adamw_8bit"
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] | None = 1.0
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    logging_steps: Positive = 1
    eval_steps: Positive | None = None
    save_steps: Positive | None = 100
    save_total_limit: Positive | None = 2
    watchdog_steps: Positive | None = 50
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text):
    """Return bytes of "5GB" (10**9) or "5GiB" (2**30); raises ValueError otherwise."""
    text = text.strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    count = float(number) * _UNITS[unit] if unit and re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", number) else 0
    if not 1 <= count < 2**63:
        raise ValueError("give a size such as 5GB or 23.5GiB")
    return int(count)


def _auto_or_layers(value):
    """One message for what would be three, one for each type."""
    if value == "auto" or (isinstance(value, int) and 0 <= value <= _LARGEST):
        return value
    raise ValueError("should be auto, true, false or a number of layers")


class Memory(Section):
    budget: Size | None = None
    gradient_checkpointing: Annotated[Literal["auto"] | bool | int, BeforeValidator(_auto_or_layers)] = "auto"
    offload: Literal["auto"] | bool = "auto"


class Export(Section):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    base: Literal["dequantized", "original"] = "dequantized"
    verify: Literal["auto", "full", "layers", "off"] = "auto"
    max_shard_size: Size = "5GB"


class Recipe(Section):
    model: Model
    quantization: Quantization | None = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training = Training()
    memory: Memory = Memory()
    export: Export = Export()
    kernels: Literal["auto", "off"] = "auto"
    output_dir: PathText

    @model_validator(mode="after")
    def _a_start_that_fits_the_base(self):
        start = self.lora.init_lora_weights
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
    def _steps_for_the_ranks_to_shrink_in(self):
        total, ends = self.training.max_steps, (self.lora.tinit, self.lora.tfinal)
        share = sum(end if end < 1 else end / (total or math.inf) for end in ends)
        if self.lora.peft_type == "ADALORA" and share >= 1:
            raise ValueError("lora.tinit and lora.tfinal leave no steps in which the ranks could shrink")
        return self

    @model_validator(mode="after")
    def _one_way_to_fill_a_micro_batch(self):
        tokens = self.training.tokens_per_micro_batch
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
                "training.group_by_length is for padded rows; leave it out with packing or tokens_per_micro_batch"
            )
        return self

    @classmethod
    def load(cls, path, overrides=()) -> Recipe:
        """Return the recipe in the YAML file `path` with `section.field=value` strings laid over it.

        A recipe that lies in a run folder means that folder, wherever it was moved or copied (moved.py).

        Raises:
            InputError: all problems of the file together, each with its line, field and remedy.
        """
        try:
            text = files.read(path, "the recipe")
        except FileNotFoundError:
            raise InputError(f"no recipe at {path}; give the path of a YAML file") from None
        values, lines = document.parse(text, path)
        if not isinstance(values, dict):
            raise InputError(f"{path}: a recipe is one YAML mapping with sections model, data, output_dir, ...")
        moved.settle(values, path)
        _override(values, lines, overrides)
        return cls._validated(values, lines, path)

    @classmethod
    def from_dict(cls, values, overrides=()) -> Recipe:
        """Return the recipe with these nested `values`, `overrides` laid over them; raises InputError like `load`."""
        values, lines = copy.deepcopy(values), {}
        _override(values, lines, overrides)
        return cls._validated(values, lines, "the recipe")

    @classmethod
    def _validated(cls, values, lines, where):
        explain.refuse_secrets(where, values, lines)
        explain.refuse_half_characters(where, values, lines)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain.refusal(where, error, values, lines, cls) from None

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


def _override(values, lines, overrides):
    """Lay each `section.field=value` over `values`; the value is read as YAML."""
    before: set[tuple] = set()
    for override in overrides:
        key, sign, text = override.partition("=")
        parts, shown = tuple(key.split(".")), f"override {explain.dotted((key,))}"
        if not sign or not all(parts):
            raise InputError(f"{shown} is not of the form section.field=value")
        if any(secrets.names_secret(part) for part in parts):
            raise InputError(f"{shown}: {explain.NO_SECRETS}")
        if overridden := next((other for other in before if other[: len(parts)] == parts), None):
            again = (
                "is given twice"
                if overridden == parts
                else f"would undo {explain.dotted(overridden)}, which is given too"
            )
            raise InputError(f"{shown} {again}; keep one")
        before.add(parts)
        if "\n" in text or "\r" in text:
            raise InputError(f'{shown}: the value has more than one line; write a line end as "\\n", in double quotes')
        # the space keeps what begins with % or --- from being more than a value
        value = document.parse(f" {text}", shown)[0] if text.strip() else None
        node = values
        for index, part in enumerate(parts[:-1]):
            if isinstance(node.get(part), list):
                raise InputError(f"{shown}: {explain.dotted(parts[: index + 1])} is a list; give the whole list")
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
            lines.setdefault(parts[: index + 1], "override")
        node[parts[-1]] = value
        for inner in [at for at in lines if at[: len(parts)] == parts]:
            del lines[inner]
        lines[parts] = "override"
