"""The sections of the recipe and what each of their fields means; docs/recipe.md is made from this.

A field is named as the library that consumes it names it, so its documentation can be looked up there:
`lora` as `peft.LoraConfig`, `training` as `transformers.TrainingArguments`, `quantization` as
`transformers.BitsAndBytesConfig` without `bnb_4bit_`.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, ClassVar, Literal

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

from ..system.errors import InputError
from . import error_messages, optimizers

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


def _attention(name):
    """One of transformers' implementations, or a kernel of the hub that transformers 5.23 loads: code, so of one owner only."""
    if name in ATTENTION or re.fullmatch(r"kernels-community/\w[\w.-]*(@[\w.-]+)?(:\w+)?", name):
        return name
    if "/" in name:
        raise ValueError(
            "should be kernels-community/NAME or kernels-community/NAME@REVISION, if it is a kernel of the hub: those of "
            "other owners are code that nobody has looked at, and are not run"
        )
    raise ValueError(f"should be one of {', '.join(ATTENTION)}, kernels-community/NAME")


ATTENTION = "auto sdpa eager flex_attention flash_attention_2 flash_attention_3 flash_attention_4".split()
Name = Annotated[str, AfterValidator(_one_line)]
Attention = Annotated[str, AfterValidator(_attention)]
Expression = Annotated[str, AfterValidator(_expression)]
PathText = Annotated[str, AfterValidator(_path)]
Size = Annotated[str, AfterValidator(_size)]
Names = Annotated[list[Name], Field(min_length=1)]


class Section(BaseModel):
    """A section of the recipe. The words below a field are its documentation, of which docs/recipe.md is made."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    name_or_path: PathText
    """a folder, or OWNER/NAME on the hub"""
    revision: Name | None = None
    """hub: commit, tag or branch; the commit is recorded"""
    attn_implementation: Attention = "auto"
    """auto (sdpa where the architecture has it), sdpa, eager; on a GPU also flex_attention, flash_attention_2 to 4, or a
    kernel of the hub by its name, such as kernels-community/flash-attn2@REVISION ([below](#attention))"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """with `quantization: null`, what quantization.compute_dtype says otherwise"""
    new_tokens: Annotated[list[str], Field(min_length=1)] | None = None
    """a list of tokens to add, whose rows in embedding and head are trained ([below](#new-tokens))"""

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
    """nf4, fp4; `quantization: null` trains plain 16-bit LoRA; a model folder that is 4-bit already decides itself"""
    use_double_quant: bool = True
    """4.127 instead of 4.5 bits a number"""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """dtype of the computation and of everything that is not quantized; auto: bfloat16, on cards without it (T4, 2080 Ti, V100)
    float16 ([plan.md](plan.md#cards-without-bfloat16)); float32 for checks"""


class Method(Section):
    """A section that says what is trained. key: its name in the recipe, and of its module in methods/. fixed_length: what it
    changes while training goes by the number of steps, so that a run cannot be made longer."""

    key: ClassVar[str]
    fixed_length: ClassVar[bool] = False

    @property
    def corrects_quantization(self):
        """True if it starts from what quantization has lost, and is right on the quantized base only."""
        return False


class _OnLayers(Method):
    """What methods with low-rank adapters on linear layers have in common."""

    lora_alpha: Number = 32
    """scaling = lora_alpha / r"""
    lora_dropout: Share = 0.0
    """dropout of the adapters' input"""
    target_modules: Expression | Names = "all-linear"
    """every linear layer but the head; or a list of names, or a regular expression"""
    exclude_modules: Expression | Names | None = None
    """names or a regular expression: layers to leave out"""
    layers_to_transform: Annotated[list[Count], Field(min_length=1)] | None = None
    """`[0, 1, 2]`: only in these layers of the model"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """all, lora_only: the biases of the model, or of layers with an adapter, are trained"""
    modules_to_save: Names | None = None
    """modules trained whole: `[embed_tokens, lm_head]`"""

    @model_validator(mode="before")
    @classmethod
    def _a_kind_is_a_section(cls, values):
        if isinstance(values, dict) and "peft_type" in values:
            raise ValueError(
                "peft_type is no field; AdaLoRA is a section of its own: adalora: {init_r: 12, target_r: 8}"
            )
        return values

    @model_validator(mode="after")
    def _layers_of_a_list(self):
        expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if expression and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform is for a list of target_modules; put it into the expression")
        return self


class Lora(_OnLayers):
    key: ClassVar[str] = "lora"

    r: Positive = 16
    """rank of the adapters"""
    rank_pattern: dict[Expression, Positive] = {}
    """`{q_proj: 32}`: another r for layers whose name ends with this, or matches it"""
    alpha_pattern: dict[Expression, Number] = {}
    """the same for lora_alpha"""
    use_rslora: bool = False
    """scaling = lora_alpha / sqrt(r)"""
    use_dora: bool = False
    """DoRA: the length of each row of W + scaling * B A is trained apart from its direction"""
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "loftq", "eva", "pissa", "olora"] = True
    """gaussian, orthogonal, loftq, eva, pissa, olora ([below](#starts))"""
    lora_bias: bool = False
    """B has a bias; for layers that have one"""
    ensure_weight_tying: bool = False
    """embedding and head of a tied model stay one matrix when one of them is trained whole"""

    @property
    def corrects_quantization(self):
        return self.init_lora_weights == "loftq"

    @model_validator(mode="after")
    def _what_goes_together(self):
        start = self.init_lora_weights
        if self.use_dora and self.lora_bias:
            raise ValueError("use_dora and lora_bias exclude each other; keep one")
        if self.use_dora and start == "loftq":
            raise ValueError("use_dora and init_lora_weights loftq exclude each other; keep one")
        if start == "orthogonal" and any(rank % 2 for rank in (self.r, *self.rank_pattern.values())):
            raise ValueError("init_lora_weights orthogonal needs even ranks; change r or rank_pattern")
        if self.ensure_weight_tying and self.modules_to_save is None:
            raise ValueError("ensure_weight_tying is for modules_to_save; name the embedding there, or leave it out")
        return self


class Adalora(_OnLayers):
    """AdaLoRA: ranks that shrink while training."""

    key: ClassVar[str] = "adalora"
    fixed_length: ClassVar[bool] = True

    init_r: Positive = 12
    """rank of each layer at the start"""
    target_r: Positive = 8
    """mean rank of a layer at the end"""
    tinit: Count | Share = 0.1
    """steps before ranks begin to shrink; a value below 1 is a share of the steps"""
    tfinal: Count | Share = 0.3
    """steps at the end without shrinking, counted the same way"""
    deltaT: Positive = 1
    """steps between two reductions"""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """smoothing of the importance of a rank"""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """smoothing of its uncertainty"""
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    """weight of the penalty that keeps A and B orthogonal"""

    @model_validator(mode="after")
    def _ranks_shrink(self):
        if self.target_r >= self.init_r:
            raise ValueError(
                f"target_r {self.target_r} must be less than init_r {self.init_r}, because ranks shrink from there"
            )
        return self


# data/formats has a file of each, and looks for their keys in a row in this order
Format = Literal["messages", "alpaca", "completion", "sharegpt", "text"]
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
    """a file, a glob, or a folder (every data file in it)"""
    name: Name | None = None
    """or a data set on the hub, as `datasets.load_dataset` takes it"""
    subset: Name | None = None
    """of a hub data set"""
    split: Name = "train"
    """of a hub data set"""
    revision: Name | None = None
    """of a hub data set: commit, tag or branch"""
    format: Literal["auto", Format] = "auto"
    """auto: row by row; or the one that every row must have"""
    columns: dict[Column, Annotated[str, Field(min_length=1)]] | None = None
    """`data.columns` for this source only"""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """.txt files: a row is the document, a paragraph, or a line"""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """how often the rows are seen an epoch; 2.5: each twice, a random half three times"""
    max_rows: Positive | None = None
    """take this many, drawn over all files of the source"""

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
    """a file, a glob, a folder, a hub data set, or a list of these; see [data.md](data.md)"""
    eval: Sources | None = None
    """held-out rows, in files of their own"""
    columns: dict[Column, Annotated[str, Field(min_length=1)]] | None = None
    """where rows use other names: `{prompt: question, completion: answer}`; or Jinja templates of them"""
    eval_fraction: Share = 0.0
    """or a share of the training rows; duplicates of training rows are never held out"""
    max_length: Annotated[int, Field(ge=8, le=_LARGEST)] = 2048
    """tokens"""
    overlong: Literal["error", "drop", "truncate_prompt", "truncate", "split"] = "error"
    """rows over max_length: error, drop, truncate_prompt, truncate, split; all counted"""
    on_bad_row: Literal["error", "skip"] = "error"
    """rows that are malformed or that the template refuses: error, skip (counted)"""
    ignore_keys: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """keys of rows or messages that are labels: `[id, mood]`; their values are left out and counted"""
    packing: bool = False
    """join short rows into rows of max_length tokens; each document sees only itself"""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """assistant, last_assistant, completion, all"""
    thoughts: Literal["keep", "drop", "mask"] = "keep"
    """keep, drop, mask: what the loss sees of an answer's thoughts"""
    chat_template: PathText | None = None
    """a Jinja file, or chatml; null: the model's own, or a built-in one for base models"""
    system_as_user: bool = False
    """the system message becomes the beginning of the first question, for templates without that role"""
    num_proc: Positive | None = None
    """processes that tokenize; null: one per core"""

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
                f"--data {error_messages.shown(str(path))}: {error_messages.said(error.errors(include_url=False)[0])}"
            ) from None

    @model_validator(mode="after")
    def _one_eval_source(self):
        if self.eval is not None and self.eval_fraction > 0:
            raise ValueError("eval and eval_fraction exclude each other; keep one")
        return self


def _auto_or_tokens(value):
    """One message for what would be two, one for each type."""
    if (
        value is None
        or value == "auto"
        or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST)
    ):
        return value
    raise ValueError("should be auto, null or a number of tokens")


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """passes over the training rows"""
    max_steps: Positive | None = None
    """instead of epochs"""
    per_device_train_batch_size: Positive = 1
    """rows in a micro-batch"""
    tokens_per_micro_batch: Annotated[Literal["auto"] | Positive | None, BeforeValidator(_auto_or_tokens)] = "auto"
    """auto: the rows of a step are joined without padding into as few micro-batches as is fastest in the memory there is
    ([below](#tokens-of-a-micro-batch)); null: a micro-batch is per_device_train_batch_size rows; a number of tokens, padding
    included: filled with rows of similar length instead, or the length of a packed row"""
    group_by_length: bool = False
    """put rows of similar length into one step; not with packing, or a number as tokens_per_micro_batch"""
    per_device_eval_batch_size: Positive = 1
    """rows in a micro-batch of an evaluation"""
    gradient_accumulation_steps: Positive = 16
    """micro-batches a step, so a step has this many times per_device_train_batch_size rows, however they are joined; the loss
    is the mean over the step's trained tokens"""
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-4
    """the highest, after the warmup"""
    optim: optimizers.Name = optimizers.DEFAULT
    """or paged_adamw_32bit, adamw_8bit, adamw_torch, adamw_torch_fused, paged_lion_8bit, paged_lion_32bit"""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """linear, constant, constant_with_warmup"""
    warmup_ratio: Share = 0.03
    """share of the steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """of the optimizer"""
    max_grad_norm: Annotated[float, Field(ge=0)] | None = 1.0
    """null or 0: gradients are not clipped"""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """noise on the embeddings while training, of size alpha / sqrt(tokens of the document * width); 5 to 15 in the
    paper"""
    logging_steps: Positive = 1
    """a line in metrics.jsonl every so many steps"""
    eval_steps: Positive | None = None
    """held-out loss every so many steps; always at the end"""
    save_steps: Positive | None = 100
    """a checkpoint every so many steps, and at the end; null: only when the run is stopped. See
    [reliability.md](reliability.md)"""
    save_total_limit: Positive | None = 2
    """checkpoints to keep; null: all"""
    watchdog_steps: Positive | None = 50
    """training ends when the median loss of this many steps is 1 nat above its lowest value, and the mean has risen by
    more than noise; null: never"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """of every draw: order of the rows, dropout, initial values"""

    @property
    def joins_steps(self):
        """Whether the rows of a step are joined into as few micro-batches as the memory allows."""
        return self.tokens_per_micro_batch == "auto"

    @property
    def filled_to(self):
        """The tokens that a micro-batch is filled to, whatever step its rows would be in; None where that is not asked for."""
        return None if self.tokens_per_micro_batch == "auto" else self.tokens_per_micro_batch

    @property
    def rows_per_step(self):
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


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
    """memory that training may use, such as 23.5GiB; null: that of the GPU, or the free memory if there is none. See
    [plan.md](plan.md)"""
    gradient_checkpointing: Annotated[Literal["auto"] | bool | int, BeforeValidator(_auto_or_layers)] = "auto"
    """layers whose activations are recomputed: true (all), false, or how many ([below](#memory)); auto: as few as the
    budget needs"""
    offload: Literal["auto"] | bool = "auto"
    """offload the inputs of checkpointed layers to CPU memory: true, false; auto: where checkpointing all layers is
    not enough"""


class Export(Section):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """bfloat16, float32"""
    base: Literal["dequantized", "original"] = "dequantized"
    """merge into the dequantized NF4 weights used in training; original: into the weights of the files, see
    [export.md](export.md)"""
    verify: Literal["auto", "full", "layers", "off"] = "auto"
    """full, layers, off; auto: full where both models fit into memory, else layers"""
    max_shard_size: Size = "5GB"
    """of a safetensors file"""
