"""Tiny base models for classification: encoders with their masked language head, and a decoder; one tokenizer for all."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from qlora.recipe import Recipe

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("good", "great", "fine", "很好", "不错"), ("bad", "awful", "poor", "很差", "无聊")
ROWS = [{"text": f"film number {n} is {word}", "label": "pos" if word in GOOD else "neg"}
        for n in range(8) for word in (*GOOD, *BAD)]  # fmt: skip

_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODERS = {
    "bert": lambda: transformers.BertConfig(**_SHAPE, max_position_embeddings=64),
    # positions begin behind the pad token's number: 64 of these
    "roberta": lambda: transformers.RobertaConfig(**_SHAPE, **_IDS, max_position_embeddings=65, type_vocab_size=2),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=320, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_SHAPE, **_IDS, cls_token_id=2, sep_token_id=3, max_position_embeddings=64, global_attn_every_n_layers=2
    ),
}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE, num_key_value_heads=2, max_position_embeddings=64),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
}
FAMILIES = ENCODERS | DECODERS


def make_tokenizer(has_types=True):
    """Return a tokenizer of words and single Chinese characters, with [CLS] text [SEP] pair [SEP]."""
    words = sorted(
        {word for row in ROWS for word in row["text"].split()}
        | {"is", "it", "a", "the", "review", ":", "word", "thing"}
    )
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz0123456789,.!"))
    vocabulary = [
        *SPECIAL,
        *words,
        *(one for one in letters if one not in words),
        *(f"##{letter}" for letter in letters),
    ]
    backend = Tokenizer(models.WordPiece({token: number for number, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    inputs = ["input_ids", *(["token_type_ids"] if has_types else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs, **dict(zip(names, SPECIAL, strict=True))
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Return make(family) -> folder of a base model with random weights that speak; made once, do not write to it."""
    made = {}

    def make(family="bert"):
        if family not in made:
            torch.manual_seed(0)
            auto = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
            model = auto.from_config(FAMILIES[family](), dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(3)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            make_tokenizer(has_types=family == "bert").save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def classify_recipe(tiny_base, tmp_path):
    """Return make(family="bert", rows=ROWS, **sections) -> a Recipe that trains a tiny classifier for a few steps."""

    def make(family="bert", rows=ROWS, **sections):
        train = tmp_path / "train.jsonl"
        train.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        values = {
            "task": "text-classification",
            "model": {"name_or_path": str(tiny_base(family))},
            "data": {"train": str(train), "max_length": 32, "eval_fraction": 0.25},
            "training": {"max_steps": 6, "learning_rate": 1e-2, "warmup_ratio": 0.0},
            "output_dir": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return Recipe.from_dict(values)

    return make
