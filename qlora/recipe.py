"""The recipe: YAML in, one frozen value out. Parsed once; each part of the program gets its own section.

A field is named as the library that consumes it names it, so its documentation can be looked up there:
`lora` as `peft.LoraConfig`, `training` as `transformers.TrainingArguments`, `quantization` as
`transformers.BitsAndBytesConfig` without `bnb_4bit_`.
"""

from __future__ import annotations

import copy
import difflib
import io
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from .errors import InputError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Number = Annotated[float, Field(gt=0)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]

# YAML 1.2 (ruamel) reads 2e-4 as a number and `on:` as a word; YAML 1.1 (PyYAML) does neither.


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
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
            raise ValueError(f"{', '.join(map(repr, twice))} stands there more than once")
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
    target_modules: str | Names = "all-linear"
    exclude_modules: str | Names | None = None
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    rank_pattern: dict[str, Positive] = {}
    alpha_pattern: dict[str, Number] = {}
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "loftq", "eva", "pissa", "olora"] = True
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    modules_to_save: Names | None = None
    ensure_weight_tying: bool = False
    init_r: Positive = 12
    target_r: Positive = 8
    tinit: Annotated[int, Field(ge=0)] | Share = 0.1
    tfinal: Annotated[int, Field(ge=0)] | Share = 0.3
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
            instead = "init_r and target_r are its ranks" if adaptive else "set peft_type: ADALORA"
            raise ValueError(f"{', '.join(strange)}: not for peft_type {self.peft_type}; {instead}")
        if adaptive and self.target_r >= self.init_r:
            raise ValueError(
                f"target_r {self.target_r} must be less than init_r {self.init_r}, which ranks shrink from"
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

    path: str | None = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["auto", "messages", "alpaca", "completion", "sharegpt", "text"] = "auto"
    columns: dict[Column, str] | None = None
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
    return [
        {"path": item} if isinstance(item, str) else item for item in (value if isinstance(value, list) else [value])
    ]


Sources = Annotated[list[Source], Field(min_length=1), BeforeValidator(_as_sources)]


class Data(Section):
    train: Sources
    eval: Sources | None = None
    columns: dict[Column, str] | None = None
    eval_fraction: Share = 0.0
    max_length: Annotated[int, Field(ge=8)] = 2048
    overlong: Literal["error", "drop", "truncate_prompt", "truncate", "split"] = "error"
    on_bad_row: Literal["error", "skip"] = "error"
    packing: bool = False
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    chat_template: str | None = None
    num_proc: Positive | None = None

    @model_validator(mode="after")
    def _one_eval_source(self):
        if self.eval is not None and self.eval_fraction > 0:
            raise ValueError("eval and eval_fraction exclude each other; keep one")
        return self


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    per_device_train_batch_size: Positive = 1
    tokens_per_micro_batch: Positive | None = None
    group_by_length: bool = False
    per_device_eval_batch_size: Positive = 1
    gradient_accumulation_steps: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
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
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    logging_steps: Positive = 1
    eval_steps: Positive | None = None
    save_steps: Positive | None = 100
    save_total_limit: Positive | None = 2
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text):
    """Return bytes of "5GB" (10**9) or "5GiB" (2**30); raises ValueError otherwise."""
    text = text.strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    if unit is None or not number.replace(".", "", 1).isdigit() or float(number) * _UNITS[unit] < 1:
        raise ValueError("give a size such as 5GB or 23.5GiB")
    return int(float(number) * _UNITS[unit])


def _auto_or_layers(value):
    """One message for what would be three, one for each type."""
    if value == "auto" or (isinstance(value, int) and value >= 0):
        return value
    raise ValueError("should be auto, true, false or a number of layers")


class Memory(Section):
    budget: str | None = None
    gradient_checkpointing: Annotated[Literal["auto"] | bool | int, BeforeValidator(_auto_or_layers)] = "auto"
    offload: Literal["auto"] | bool = "auto"

    @field_validator("budget")
    @classmethod
    def _a_size(cls, text):
        if text is not None:
            parse_size(text)
        return text


class Export(Section):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    base: Literal["dequantized", "original"] = "dequantized"
    verify: Literal["auto", "full", "layers", "off"] = "auto"
    max_shard_size: str = "5GB"


class Recipe(Section):
    model: Model
    quantization: Quantization | None = Quantization()
    lora: Lora = Lora()
    data: Data
    training: Training = Training()
    memory: Memory = Memory()
    export: Export = Export()
    kernels: Literal["auto", "off"] = "auto"
    output_dir: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _a_start_that_fits_the_base(self):
        start = self.lora.init_lora_weights
        if start in ("pissa", "olora") and self.quantization is not None:
            raise ValueError(
                f"lora.init_lora_weights {start} is for a base in 16 bit; loftq starts from what quantization has lost, or "
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
            raise ValueError("lora.tinit and lora.tfinal leave none of the steps for the ranks to shrink in")
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

        Raises:
            InputError: all problems of the file together, each with its line, field and remedy.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise InputError(f"no recipe at {path}; give the path of a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the recipe {path}: {error}") from None
        values, lines = _parse(text, path)
        for override in overrides:
            _apply(values, lines, override)
        return cls._validated(values, lines, path)

    @classmethod
    def from_dict(cls, values, overrides=()) -> Recipe:
        """Return the recipe with these nested `values`, `overrides` laid over them; raises InputError like `load`."""
        values, lines = copy.deepcopy(values), {}
        for override in overrides:
            _apply(values, lines, override)
        return cls._validated(values, lines, "the recipe")

    @classmethod
    def _validated(cls, values, lines, where):
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError.listing(where, [_explain(problem, lines) for problem in error.errors()]) from None

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


def _parse(text, path):
    """Return (nested plain values, {(key, ...): line})."""
    yaml = YAML(typ="rt", pure=True)
    try:
        documents = list(yaml.load_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InputError(f"{path}: a recipe is one YAML mapping with sections model, data, output_dir, ...")
    lines: dict[tuple, int] = {}
    return _plain(documents[0], (), lines, path), lines


def _plain(node: Any, at, lines, path):
    if isinstance(node, dict):
        result = {}
        for key, value in node.items():
            lines[(*at, key)] = node.lc.key(key)[0] + 1  # type: ignore[attr-defined]
            result[key] = _plain(value, (*at, key), lines, path)
        return result
    if isinstance(node, list):
        return [_plain(value, (*at, index), lines, path) for index, value in enumerate(node)]
    for kind in (bool, int, float, str):  # ruamel's ScalarInt, ScalarFloat, ... carry formatting we do not need
        if isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    raise InputError(f"{path} line {lines.get(at, '?')}: {'.'.join(map(str, at))}: unsupported YAML value {node!r}")


def _apply(values, lines, override):
    """Lay one `section.field=value` over `values`; the value is read as YAML."""
    key, sign, text = override.partition("=")
    parts = tuple(key.split("."))
    if not sign or not all(parts):
        raise InputError(f"override {override!r} is not of the form section.field=value")
    value, _ = _parse(f"value: {text}", f"override {override!r}")
    node = values
    for index, part in enumerate(parts[:-1]):
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
        lines.setdefault(parts[: index + 1], "override")
    node[parts[-1]] = value["value"]
    lines[parts] = "override"


def _explain(problem, lines):
    """Return one line for one pydantic error: line, dotted field, what was found, what to do."""
    location: tuple = tuple(part for part in problem["loc"] if not _is_union_tag(part))
    field = ".".join(map(str, location)) or "recipe"
    known = next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), None)
    place = {None: "", "override": "override  "}.get(known, f"line {known}  ")
    kind, found = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{place}{field}: unknown field{_did_you_mean(location)}"
    if kind == "missing":
        return f"{place}{field}: required, but not given"
    if kind == "literal_error":
        return f"{place}{field}: {found!r} is not one of {problem['ctx']['expected'].replace(' or ', ', ')}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{place}{field}: {message}" + ("" if isinstance(found, dict) else f", found {found!r}")


def _is_union_tag(part):
    # pydantic adds the tried member of a union to the location: ("data", "train", "list[...]") or "str"
    return isinstance(part, str) and (part in {"str", "bool"} or "[" in part or part.startswith("literal"))


def _fields(section):
    """Return {dotted name: section class or None} of a section class's own fields."""
    return {
        name: next((kind for kind in _kinds(field.annotation) if issubclass(kind, Section)), None)
        for name, field in section.model_fields.items()
    }


def _kinds(annotation):
    """Return the classes that an annotation is made of: those in list[...] and X | None, too."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return [annotation] if isinstance(annotation, type) else []
    return [kind for argument in arguments for kind in _kinds(argument)]


# what other tools call it
_SYNONYMS = {
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "train_on_inputs": "data.train_on",
    "neat_packing": "data.packing",
    "sample_packing": "data.packing",
    "base_model": "model.name_or_path",
}


def _did_you_mean(location):
    section: Any = Recipe
    for part in location[:-1]:
        section = section if isinstance(part, int) else _fields(section).get(part) or section
    name, prefix = str(location[-1]), "".join(f"{part}." for part in location[:-1])
    sections = {parent: kind for parent, kind in _fields(Recipe).items() if kind}
    elsewhere = {field: f"{parent}.{field}" for parent, kind in sections.items() for field in kind.model_fields}
    known = _SYNONYMS | elsewhere
    if name in known:
        return f"; did you mean {known[name]}?"
    here = {field: f"{prefix}{field}" for field in section.model_fields}
    here |= {other: field for other, field in _SYNONYMS.items() if field in here.values()}
    near = difflib.get_close_matches(name, here, n=1, cutoff=0.4)
    return f"; did you mean {here[near[0]]}?" if near else f"; known here: {', '.join(section.model_fields)}"
