"""The sections of the recipe, those of methods apart, and what each field means; docs/recipe.md is made from this.

A field is named as the library that consumes it names it, so its documentation can be looked up there:
`lora` as `peft.LoraConfig`, `training` as `transformers.TrainingArguments`, `quantization` as
`transformers.BitsAndBytesConfig` without `bnb_4bit_`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from ..system.errors import InputError
from . import error_messages, optimizers
from .fields import LARGEST, Attention, Name, PathText, Positive, Section, Share, Size


class Model(Section):
    name_or_path: PathText
    """a folder, or OWNER/NAME on the hub"""
    revision: Name | None = None
    """hub: commit, tag or branch; the commit is recorded"""
    adapter_name_or_path: PathText | None = None
    """a run or an adapter folder that is trained further: same base; its ranks and layers are taken over"""
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
    float16, on processors without it float32 ([plan.md](plan.md#cards-and-processors-without-bfloat16))"""


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
    "text_pair",
    "image",
    "label",
    "chosen",
    "rejected",
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
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """draws the rows of eval_fraction and of max_rows; null: training.seed"""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] = 2048
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
    labels: Annotated[list[Name], Field(min_length=2)] | None = None
    """of a task with classes: their names, in the order of their numbers; null: those of the training rows
    ([tasks.md](tasks.md#classes))"""
    class_weights: Literal["balanced"] | dict[Name, Annotated[float, Field(gt=0, le=1e6)]] | None = None
    """of a task with classes: how much a row counts in the loss, by its class: `{rare: 5}`, others 1; balanced: each class as
    much as any other"""
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

    @field_validator("class_weights", mode="before")
    @classmethod
    def _balanced_or_by_name(cls, values):
        """One message for what would be two, one for each type."""
        if not (values is None or values == "balanced" or isinstance(values, dict)):
            raise ValueError("should be balanced, null or {class: weight, ...}")
        for name, weight in values.items() if isinstance(values, dict) else ():
            if type(weight) not in (int, float) or not 0 < weight <= 1e6:
                raise ValueError(f"the weight of {name} should be a number above 0")
        return values

    @field_validator("labels", "class_weights", mode="before")
    @classmethod
    def _numbers_are_names(cls, values):
        """YAML reads 0 and 1 as numbers, and a class may be called that."""
        named = lambda value: str(value) if type(value) is int else value  # noqa: E731
        if isinstance(values, dict):
            return {named(key): value for key, value in values.items()}
        return [named(value) for value in values] if isinstance(values, list) else values

    @field_validator("labels")
    @classmethod
    def _each_class_once(cls, labels):
        twice = sorted({label for label in labels or () if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is listed more than once")
        return labels

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
        or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST)
    ):
        return value
    raise ValueError("should be auto, null or a number of tokens")


def _names_or_none(value):
    """One name is a list of it, as in transformers."""
    return {"none": [], None: []}.get(value, [value]) if value is None or isinstance(value, str) else value


class Training(Section):
    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """passes over the training rows"""
    max_steps: Positive | None = None
    """instead of epochs"""
    per_device_train_batch_size: Positive = 1
    """rows in a micro-batch"""
    tokens_per_micro_batch: Annotated[Literal["auto"] | Positive | None, BeforeValidator(_auto_or_tokens)] = "auto"
    """auto: the rows of a step are joined without padding ([below](#tokens-of-a-micro-batch)); null: a micro-batch is
    per_device_train_batch_size rows; a number of tokens, padding included: filled with rows of similar length instead; with
    packing, the length of a packed row"""
    group_by_length: bool = False
    """put rows of similar length into one step; not with packing, or a number as tokens_per_micro_batch"""
    per_device_eval_batch_size: Positive = 1
    """rows in a micro-batch of an evaluation"""
    gradient_accumulation_steps: Positive = 16
    """a step has this many times per_device_train_batch_size rows, however they are joined; the loss is the mean over
    the step's trained tokens"""
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-4
    """the highest, after the warmup"""
    optim: optimizers.Name = optimizers.DEFAULT
    """or paged_adamw_32bit, adamw_8bit, adamw_torch, adamw_torch_fused, paged_lion_8bit, paged_lion_32bit"""
    lr_scheduler_type: optimizers.Schedule = "cosine"
    """linear, constant, constant_with_warmup"""
    warmup_ratio: Share = 0.03
    """share of the steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """of the optimizer"""
    max_grad_norm: Annotated[float, Field(ge=0)] | None = 1.0
    """null or 0: gradients are not clipped"""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """noise on the embeddings while training, of size alpha / sqrt(tokens of the document * width); paper: 5 to 15"""
    report_to: Annotated[
        list[Literal["tensorboard", "trackio", "wandb", "mlflow"]], BeforeValidator(_names_or_none)
    ] = Field(default=["tensorboard"])
    """beside metrics.jsonl: tensorboard, trackio, wandb, mlflow, or several, `[tensorboard, wandb]`; none
    ([watching.md](watching.md#trackers))"""
    logging_steps: Positive = 1
    """a line in metrics.jsonl every so many steps"""
    eval_steps: Positive | None = None
    """held-out loss every so many steps; always at the end"""
    num_samples: Annotated[int, Field(ge=0, le=100)] = 0
    """at each evaluation, greedy answers to so many of the first held-out rows, beside the expected ones
    ([evaluation.md](evaluation.md#while-it-trains)); 0: none"""
    early_stopping_patience: Positive | None = None
    """training ends once so many evaluations in a row are no better than the best before them; null: never"""
    load_best_model_at_end: bool = False
    """the adapter is that of the best evaluation, not of the last step; its checkpoint is kept"""
    metric_for_best_model: Literal["eval_loss", "eval_accuracy"] = "eval_loss"
    """what the best evaluation is the best in; eval_accuracy, of tasks with classes"""
    save_steps: Positive | None = 100
    """a checkpoint every so many steps, and at the end; null: only when the run is stopped. See
    [reliability.md](reliability.md)"""
    save_total_limit: Positive | None = 2
    """checkpoints to keep; null: all"""
    watchdog_steps: Positive | None = 50
    """training ends when the median loss of this many steps is 1 nat above its lowest value, and the mean has risen by
    more than noise; null: never"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """of every other draw: order of the rows, dropout, initial values"""

    @property
    def looks_for_best(self):
        """Whether evaluations are compared, to stop early or to keep the best."""
        return self.early_stopping_patience is not None or self.load_best_model_at_end

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


def _auto_or_layers(value):
    """One message for what would be three, one for each type."""
    if value == "auto" or (isinstance(value, int) and 0 <= value <= LARGEST):
        return value
    raise ValueError("should be auto, true, false or a number of layers")


class Memory(Section):
    budget: Size | None = None
    """memory that training may use, such as 23.5GiB; null: what is free, on the GPU if there is one ([plan.md](plan.md))"""
    gradient_checkpointing: Annotated[Literal["auto"] | bool | int, BeforeValidator(_auto_or_layers)] = "auto"
    """layers whose activations are recomputed: true (all), false, or how many ([below](#memory)); auto: as few as the
    budget needs"""
    offload: Literal["auto"] | bool = "auto"
    """offload the inputs of checkpointed layers to CPU memory: true, false; auto: where checkpointing all layers is
    not enough"""
    sharding: Literal["fsdp", "fsdp_offload"] | None = None
    """fsdp: each process holds a share of the base's weights (several processes); fsdp_offload: in CPU memory; null: the
    whole base"""

    @property
    def offloads_codes(self):
        """Whether the 4-bit codes of the base are in CPU memory."""
        return self.sharding == "fsdp_offload"


class Export(Section):
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """bfloat16, float32"""
    base: Literal["dequantized", "original"] = "dequantized"
    """merge into the dequantized NF4 weights used in training; original: into the weights of the files, see
    [export.md](export.md)"""
    verify: Literal["auto", "full", "layers", "off"] = "auto"
    """full, layers, off; auto: full where both models fit into memory, else layers"""
    int8: bool = False
    """write the model in dynamic int8 for CPUs (torchao) instead, see [serving.md](serving.md#int8-for-cpus)"""
    max_shard_size: Size = "5GB"
    """of a safetensors file"""
