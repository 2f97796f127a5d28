"""The sections that say what is trained, one for each file of `methods/`. Fields are named as PEFT names them."""

from __future__ import annotations

import math
import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .fields import Count, Expression, Names, Number, Positive, Section, Share


class Method(Section):
    """A section that says what is trained. key: its name in the recipe, and of its module in methods/. fixed_length: what it
    changes while training goes by the number of steps, so that a run cannot be made longer. saved_in: the folder of a run that
    gets what was trained. trains_a_head: it can train the head of a task with classes whole, beside what it trains."""

    key: ClassVar[str]
    fixed_length: ClassVar[bool] = False
    saved_in: ClassVar[str] = "adapter"
    trains_a_head: ClassVar[bool] = False

    @property
    def num_positions(self):
        """How many of the model's positions it takes before each text."""
        return 0

    @property
    def num_embedded(self):
        """How many of these go through the layers as tokens do."""
        return 0

    def from_zero(self):
        """Return the section with a start that changes nothing, for numbers that come from elsewhere."""
        return self

    @property
    def corrects_quantization(self):
        """True if it starts from what quantization has lost, and is right on the quantized base only."""
        return False


class _OnLayers(Method):
    """What methods that train something beside linear layers have in common."""

    trains_a_head: ClassVar[bool] = True

    target_modules: Expression | Names = "all-linear"
    """every linear layer but the head; or a list of names, or a regular expression"""
    exclude_modules: Expression | Names | None = None
    """names or a regular expression: layers to leave out"""
    layers_to_transform: Annotated[list[Count], Field(min_length=1)] | None = None
    """`[0, 1, 2]`: only in these layers of the model"""
    modules_to_save: Names | None = None
    """modules trained whole: `[embed_tokens, lm_head]`"""

    @model_validator(mode="before")
    @classmethod
    def _a_kind_is_a_section(cls, values):
        if isinstance(values, dict) and "peft_type" in values:
            raise ValueError(
                "peft_type is not a field; AdaLoRA is a section of its own: adalora: {init_r: 12, target_r: 8}"
            )
        return values

    @model_validator(mode="after")
    def _layers_of_a_list(self):
        expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if expression and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform is for a list of target_modules; put it into the expression")
        return self


class _LowRank(_OnLayers):
    """What methods with low-rank adapters have in common."""

    lora_alpha: Number = 32
    """scaling = lora_alpha / r"""
    lora_dropout: Share = 0.0
    """dropout of the adapters' input"""
    bias: Literal["none", "all", "lora_only"] = "none"
    """all, lora_only: the biases of the model, or of layers with an adapter, are trained"""


class Lora(_LowRank):
    key: ClassVar[str] = "lora"

    r: Positive = 16
    """rank of the adapters"""
    rank_pattern: dict[Expression, Positive] = Field({})
    """`{q_proj: 32}`: another r for layers whose name ends with this, or matches it"""
    alpha_pattern: dict[Expression, Number] = Field({})
    """the same for lora_alpha"""
    use_rslora: bool = False
    """scaling = lora_alpha / sqrt(r)"""
    use_dora: bool = False
    """DoRA: the length of each row of W + scaling * B A is trained too"""
    init_lora_weights: Literal[True, "gaussian", "orthogonal", "loftq", "eva", "pissa", "olora", "corda", "lora_ga"] = (
        True
    )
    """gaussian, orthogonal, loftq, eva, pissa, olora, corda, lora_ga ([below](#starts))"""
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1e4)] | None = None
    """LoRA+: B learns this many times faster than A; 16 in the paper, at a lower learning_rate"""
    lora_bias: bool = False
    """B has a bias; for layers that have one"""
    ensure_weight_tying: bool = False
    """keep a tied embedding and head one matrix when one is trained whole"""

    def from_zero(self):
        return self.model_copy(update={"init_lora_weights": True})

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


class Adalora(_LowRank):
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


class Ia3(_OnLayers):
    """(IA)3: a factor for each output of the attention's keys and values, and for each input of the MLP's last layer."""

    key: ClassVar[str] = "ia3"

    target_modules: Expression | Names = "auto"
    """auto: PEFT's for the architecture; all-linear; names; or a regular expression"""
    feedforward_modules: Names | None = None
    """those whose inputs are multiplied, not outputs; null: the MLP's last layer"""


class Oft(_OnLayers):
    """OFT: the inputs of layers are rotated."""

    key: ClassVar[str] = "oft"

    oft_block_size: Annotated[int, Field(ge=2, le=1024)] = 32
    """numbers that are rotated together; must divide the inputs of every layer"""
    module_dropout: Share = 0.0
    """share of the blocks that are not rotated in a training step"""
    use_cayley_neumann: bool = True
    """a series instead of an inverse: faster, and orthogonal to a small error"""


class Hira(_OnLayers):
    """HiRA: weights are multiplied with a low-rank update."""

    key: ClassVar[str] = "hira"

    r: Positive = 32
    """rank of the factors"""
    hira_dropout: Share = 0.0
    """dropout of the inputs"""


class Full(Method):
    """Full fine-tuning: the weights themselves are trained."""

    key: ClassVar[str] = "full"
    saved_in: ClassVar[str] = "model"
    trains_a_head: ClassVar[bool] = True

    modules: Names | None = None
    """modules, such as [layers.31, lm_head]; null: all. Needs `quantization: null`"""


class Bottleneck(Method):
    """Bottleneck adapters: a small network behind the blocks of each layer."""

    key: ClassVar[str] = "bottleneck"
    trains_a_head: ClassVar[bool] = True

    size: Annotated[int, Field(ge=1, le=2**16)] = 64
    """numbers in the middle, between down and up"""
    where: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """pfeiffer: behind the MLP; houlsby: behind attention too"""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """nonlinearity: gelu, relu, silu"""
    dropout: Share = 0.0
    """dropout of the adapters' input"""


class _VirtualTokens(Method):
    """What methods that put something before each text have in common."""

    num_virtual_tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """how many; each takes one of the model's positions"""

    @property
    def num_positions(self):
        return self.num_virtual_tokens


class PrefixTuning(_VirtualTokens):
    """Prefix tuning: keys and values before each text are trained, in every layer."""

    key: ClassVar[str] = "prefix_tuning"

    prefix_projection: bool = False
    """trains a small network that makes them, and saves what it makes; learns far more
    ([measured](methods.md#on-a-small-model-measured))"""
    encoder_hidden_size: Positive | None = None
    """numbers in the middle of that network; null: the model's hidden size"""
    init_weights: Literal["zero"] | None = None
    """null: random numbers; zero: all keys and values are 0"""

    @model_validator(mode="after")
    def _a_network_to_size(self):
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is for prefix_projection: true; set that, or leave it out")
        return self


class PromptTuning(_VirtualTokens):
    """Prompt tuning: embeddings before each text are trained."""

    key: ClassVar[str] = "prompt_tuning"

    @property
    def num_embedded(self):
        return self.num_virtual_tokens

    prompt_tuning_init_text: Annotated[str, Field(min_length=1)] | None = None
    """a text whose embeddings they start as; null: random tokens"""


def divisor(rank, use_rslora):
    """Return what lora_alpha is divided by: the rank, of rsLoRA (arXiv:2312.03732) its root."""
    return math.sqrt(rank) if use_rslora else rank


def pattern_of(patterns, name):
    """Return the key of `patterns` that PEFT applies to the layer `name`, or None; as its get_pattern_key."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)
