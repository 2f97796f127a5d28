"""Tiny tokenizers with the special tokens of real model families, and those families' chat templates."""

import functools
from dataclasses import dataclass
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

TEMPLATES = Path(__file__).parent / "templates"

# how Qwen, and nearly so Llama 3, cut a text into words before they merge
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# merges across words, line ends and tags, so that a token can straddle a border that a template draws
_TEXT = [
    "Hello there. Hi Bye Ciao! assistant user system model\n\nassistant\n\nuser\n\n\n",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} <tool_call>\n</tool_call>\n <think>\n\n</think>\n\n',
]


@dataclass(frozen=True)
class Family:
    """What a model family's tokenizer and template have; `special` and `plain` are added tokens (special=True, False)."""

    name: str
    special: tuple[str, ...]
    eos: str
    pad: str
    end: str  # the token that ends an assistant's turn, not always eos
    bos: str | None = None
    leading_bos: bool = False  # the template writes bos, once, at the start
    adds_bos: bool = False  # so does the tokenizer, unless told not to
    plain: tuple[str, ...] = ()
    swallows: bool = False  # the special tokens take the whitespace after them along (rstrip=True)
    system: bool = True
    tools: bool = False

    def __str__(self):
        return self.name

    @property
    def template(self):
        with open(TEMPLATES / f"{self.name}.jinja", encoding="utf-8", newline="") as file:
            return file.read()

    def tokenizer(self):
        """Return a new tokenizer: byte-level BPE with the family's added tokens and template."""
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_byte_level_bpe()),
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token=self.pad,
            clean_up_tokenization_spaces=False,
        )
        special = [AddedToken(token, rstrip=self.swallows, normalized=False, special=True) for token in self.special]
        tokenizer.add_tokens(special, special_tokens=True)
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in self.plain])
        if self.adds_bos:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, tokenizer.convert_tokens_to_ids(self.bos))]
            )
        tokenizer.chat_template = self.template
        return tokenizer


@functools.cache
def _byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer.to_str()


_QWEN = "<|endoftext|> <|im_start|> <|im_end|>".split()
_QWEN_PLAIN = "<tool_call> </tool_call>".split()
_GEMMA = "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn>".split()

FAMILIES = [
    Family(
        name="llama-3.1",
        special=(
            *"<|begin_of_text|> <|end_of_text|> <|finetune_right_pad_id|> <|start_header_id|> <|end_header_id|>".split(),
            *"<|eom_id|> <|eot_id|> <|python_tag|>".split(),
        ),
        bos="<|begin_of_text|>", leading_bos=True, adds_bos=True,
        eos="<|eot_id|>", pad="<|finetune_right_pad_id|>", end="<|eot_id|>", tools=True,
    ),
    Family(
        name="qwen2.5", special=(*_QWEN,), plain=(*_QWEN_PLAIN,),
        eos="<|im_end|>", pad="<|endoftext|>", end="<|im_end|>", tools=True,
    ),
    Family(
        name="qwen3", special=(*_QWEN,), plain=(*_QWEN_PLAIN, *"<tool_response> </tool_response> <think> </think>".split()),
        eos="<|im_end|>", pad="<|endoftext|>", end="<|im_end|>", tools=True,
    ),
    Family(
        name="gemma-2", special=(*_GEMMA,), bos="<bos>", leading_bos=True, adds_bos=True,
        eos="<eos>", pad="<pad>", end="<end_of_turn>", system=False,
    ),
    Family(
        name="gemma-3", special=(*_GEMMA, "<start_of_image>"), bos="<bos>", leading_bos=True, adds_bos=True,
        eos="<eos>", pad="<pad>", end="<end_of_turn>",
    ),
    Family(
        name="phi-3.5", special=(*"<|assistant|> <|system|> <|end|> <|user|>".split(),), swallows=True,
        bos="<s>", eos="<|endoftext|>", pad="<|endoftext|>", end="<|end|>",
    ),
    Family(
        name="deepseek-r1-distill", special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>", leading_bos=True, adds_bos=True,
        eos="<｜end▁of▁sentence｜>", pad="<｜end▁of▁sentence｜>", end="<｜end▁of▁sentence｜>",
    ),
    # its bos opens every turn
    Family(
        name="smollm2", special=(*_QWEN,), bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", end="<|im_end|>",
    ),
    Family(
        name="mistral-style", special=(*"<unk> <s> </s> [INST] [/INST] [TOOL_CALLS]".split(),),
        bos="<s>", leading_bos=True, adds_bos=True, eos="</s>", pad="<unk>", end="</s>",
    ),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
