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
    """a run or an adapter folder that is trained further, on the same base"""
    attn_implementation: Attention = "auto"
    """auto, sdpa, eager; on a GPU also flex_attention, flash_attention_2 to 4, or a kernel of the hub ([below](#attention))"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """as quantization.compute_dtype, for `quantization: null`"""
    new_tokens: Annotated[list[str], Field(min_length=1)] | None = None
    """tokens to add, whose rows in embedding and head are trained ([below](#new-tokens))"""

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
    """nf4, fp4; `quantization: null` trains 16-bit LoRA; a 4-bit model folder decides itself"""
    use_double_quant: bool = True
    """4.127 instead of 4.5 bits a number"""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """dtype of the computation and of what is not quantized; auto: bfloat16; without it float16 on cards, float32 on processors
    ([plan.md](plan.md#cards-and-processors-without-bfloat16))"""


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
    """a file, a glob, a folder, a hub data set, or a list of these ([data.md](data.md))"""
    eval: Sources | None = None
    """held-out rows, in files of their own"""
    columns: dict[Column, Annotated[str, Field(min_length=1)]] | None = None
    """other names, or Jinja templates of them: `{prompt: question, completion: answer}`"""
    eval_fraction: Share = 0.0
    """share of the training rows to hold out; never duplicates of others"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """draws the rows of eval_fraction and of max_rows; null: training.seed"""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] = 2048
    """tokens"""
    overlong: Literal["error", "drop", "truncate_prompt", "truncate", "split"] = "error"
    """rows over max_length: error, drop, truncate_prompt, truncate, split; all counted"""
    on_bad_row: Literal["error", "skip"] = "error"
    """rows that are malformed or that the template refuses: error, skip (counted)"""
    ignore_keys: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """keys of rows or messages to leave out: `[id, mood]`"""
    packing: bool = False
    """join short rows into rows of max_length tokens; each document sees only itself"""
    train_on: Literal["assistant", "last_assistant", "completion", "all"] = "assistant"
    """assistant, last_assistant, completion, all"""
    thoughts: Literal["keep", "drop", "mask"] = "keep"
    """keep, drop, mask: what the loss sees of an answer's thoughts"""
    chat_template: PathText | None = None
    """a Jinja file, or chatml; null: the model's own, else a built-in one"""
    system_as_user: bool = False
    """put the system message before the first question, for templates without that role"""
    labels: Annotated[list[Name], Field(min_length=2)] | None = None
    """names of the classes, in the order of their numbers; null: those of the training rows ([tasks.md](tasks.md#classes))"""
    class_weights: Literal["balanced"] | dict[Name, Annotated[float, Field(gt=0, le=1e6)]] | None = None
    """weight of a row in the loss by its class: `{rare: 5}`, others 1; balanced: all classes alike"""
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
    """passes over the training rows; rounded up to whole steps"""
    max_steps: Positive | None = None
    """instead of epochs"""
    per_device_train_batch_size: Positive = 1
    """rows in a micro-batch"""
    tokens_per_micro_batch: Annotated[Literal["auto"] | Positive | None, BeforeValidator(_auto_or_tokens)] = "auto"
    """auto: the rows of a step are joined without padding ([below](#tokens-of-a-micro-batch)); null: per_device_train_batch_size
    rows; a number: filled with rows of similar length to so many tokens; with packing, the length of a packed row"""
    group_by_length: bool = False
    """put rows of similar length into one step; not with packing, or a number as tokens_per_micro_batch"""
    per_device_eval_batch_size: Positive = 1
    """rows in a micro-batch of an evaluation"""
    gradient_accumulation_steps: Positive = 16
    """a step has this many times per_device_train_batch_size rows; the loss is the mean over its trained tokens"""
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
    """noise on the embeddings, of size alpha / sqrt(tokens of the document * width); paper: 5 to 15"""
    report_to: Annotated[
        list[Literal["tensorboard", "trackio", "wandb", "mlflow"]], BeforeValidator(_names_or_none)
    ] = Field(default=["tensorboard"])
    """tensorboard, trackio, wandb, mlflow, or a list; none ([watching.md](watching.md#trackers))"""
    logging_steps: Positive = 1
    """a line in metrics.jsonl every so many steps"""
    eval_steps: Positive | None = None
    """held-out loss every so many steps; always at the end"""
    num_samples: Annotated[int, Field(ge=0, le=100)] = 0
    """answers to so many held-out rows at each evaluation ([evaluation.md](evaluation.md#while-it-trains))"""
    early_stopping_patience: Positive | None = None
    """evaluations in a row that are no better before training ends; null: never"""
    load_best_model_at_end: bool = False
    """keep the adapter of the best evaluation, not of the last step"""
    metric_for_best_model: Literal["eval_loss", "eval_accuracy"] = "eval_loss"
    """or eval_accuracy, of tasks with classes"""
    save_steps: Positive | None = 100
    """a checkpoint every so many steps, and at the end ([reliability.md](reliability.md)); null: only when the run is stopped"""
    save_total_limit: Positive | None = 2
    """checkpoints to keep; null: all"""
    watchdog_steps: Positive | None = 50
    """steps over which a diverged loss is looked for ([reliability.md](reliability.md#what-is-promised)); null: never"""
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
