"""Tiny real models: every family is built at random here, saved as an ordinary folder, and goes the product's way."""

import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the suite needs no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported: workers that share the cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite in the background; what it starts must not inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qlora import base_model, methods, planner
from qlora.commands.train import train
from qlora.data import masked_examples
from qlora.data.conversation import Conversation
from qlora.recipe import Model, Quantization, Recipe
from qlora.runs.folder import RunDir
from tests import outlines
from tests.classifiers import classify_recipe, tiny_base  # noqa: F401 (fixtures)

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Begin with the whole ways, tests/test_*.py: the longest tests. At the end no worker waits for another's."""
    items.sort(key=lambda item: item.path.parent != TESTS)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
VOCAB_SIZE = 512
AUTO = "bfloat16" if base_model.computer(torch.device("cpu")).has_bfloat16 else "float32"  # compute_dtype: auto, here
# of tests that compute minutes long where bfloat16 is emulated
slow_where_emulated = pytest.mark.slow if AUTO == "float32" else lambda test: test

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 3,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# name -> config; the families that the issue names, with tied and untied heads, biases, Conv1D, and a fused projection
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, tie_word_embeddings=False, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16, sliding_window=256),
    "phi": lambda: transformers.PhiConfig(**{**SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=False),
    "phi3": lambda: transformers.Phi3Config(**SHAPE, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=3, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip

# mixtures of experts: files with a tensor an expert, which transformers joins into one parameter
MIXTURES = {
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=False),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16, tie_word_embeddings=False
    ),
}

# what cannot be planned without numbers, or whose rows cannot be joined: they train all the same
ODD = {
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=2, n_head=4, eos_token_id=2
    ),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE, tie_word_embeddings=False),
    "lfm2": lambda: transformers.Lfm2Config(**SHAPE, full_attn_idxs=[1], block_auto_adjust_ff_dim=False),
}

# parameters that are no layer's weight: biases of experts in a matrix, state-space matrices
LOOSE = {
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SHAPE,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # 64 x 2,048: an adapter of it can have the 100,000 numbers from which bitsandbytes pages the optimizer's states
    "wide": lambda: transformers.LlamaConfig(**(SHAPE | {"intermediate_size": 2048})),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=2, state_size=8, bos_token_id=3, eos_token_id=2
    ),
}

CONVERSATIONS = [
    [("user", f"What is {a} plus {b}?"), ("assistant", f"{a} plus {b} is {a + b}.")] for a in range(6) for b in range(4)
]


def some_slow(cases, slow=(), but=()):
    """Return `cases` for parametrize; those in `slow`, or all but those in `but`, are of the slow tier.

    They are more of what the others test, or join what others have alone. A case of several arguments is a tuple.
    """
    cases, named = list(cases), [*slow, *but]
    assert named
    assert all(case in cases for case in named)
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    is_slow = [(case in named) == bool(slow) for case in cases]
    return [
        pytest.param(*one, marks=pytest.mark.slow if late else ()) for one, late in zip(values, is_slow, strict=True)
    ]


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def encode(tokenizer, turns, train_on="assistant"):
    """Return the one Example of a list of messages."""
    (example,) = masked_examples.encode(tokenizer, Conversation(turns), train_on)
    return example


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_json():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for turns in CONVERSATIONS for _, text in turns), trainer)
    return tokenizer


@pytest.fixture
def tokenizer(tokenizer_json):
    return make_tokenizer(tokenizer_json)


def make_tokenizer(tokenizer_json, chat_template=CHATML):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json.to_str()),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer_json):
    """Return make(family, max_shard_size="5GB") -> folder of a model with random weights; made once, do not write to it."""
    made = {}

    def make(family="llama", max_shard_size="5GB"):
        key = (family, max_shard_size)
        if key not in made:
            torch.manual_seed(0)
            config = (FAMILIES | MIXTURES | ODD | LOOSE)[family]()
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            with torch.no_grad():  # initialised at 0.02 and zero bias, a tiny model says nearly nothing; make it speak
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(0, 0.1)
                    elif parameter.dim() == 2:
                        parameter.mul_(5)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            make_tokenizer(tokenizer_json).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def load_model(tiny_model):
    """Return load(family, quantization=Quantization()) -> the frozen model, as training loads it."""

    def load(family="llama", quantization=Quantization()):  # noqa: B008 (frozen)
        section = Model(name_or_path=str(tiny_model(family)))
        return base_model.load(base_model.find(section), section, quantization)

    return load


@pytest.fixture(scope="session", autouse=True)
def cache_of_tokenized_rows(tmp_path_factory):
    """Keep the suite's tokenized rows out of the user's cache."""
    os.environ["QLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def files_need_not_survive_a_power_cut():
    """Tests end processes, not the machine; fsync waits 2 ms for the disk, some 30 times a training."""
    original, os.fsync = os.fsync, lambda descriptor: None
    yield
    os.fsync = original


frozen = {"modules": 0}


@pytest.fixture(autouse=True)
def imported_libraries_are_no_garbage():
    """Keep the garbage collector off a million objects of libraries: a training ends with a collection, 0.3 s with them."""
    if len(sys.modules) > frozen["modules"] + 50:
        gc.collect()
        gc.freeze()
        frozen["modules"] = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def outlines_are_made_once(tmp_path_factory):
    """Go through a model without numbers once for all trainings of it: 2 s each, in some hundred tests."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    original, planner.outline = planner.outline, outlines.kept(planner.outline, shared)
    yield
    planner.outline = original


@pytest.fixture
def unplanned(monkeypatch):
    """Train as a model does that cannot be planned, where the plan is not what is tested: an outline takes 2 s and more."""
    monkeypatch.setattr(planner, "outline", no_plan)


def no_plan(*args, **kwargs):
    raise planner.NoPlan("this test is about something else")


@pytest.fixture
def make_recipe(tiny_model, tmp_path):
    """Return make(family="llama", **sections) -> a Recipe that trains a tiny model for two steps."""
    return lambda family="llama", **sections: recipe_in(tmp_path, tiny_model(family), sections)


@pytest.fixture(scope="session")
def trained_once(tiny_model, tmp_path_factory):
    """Return trained(family="llama") -> the finished RunDir of make_recipe(family); made once, do not write to it."""
    made = {}

    def trained(family="llama"):
        if family not in made:
            made[family] = train(recipe_in(tmp_path_factory.mktemp("trained"), tiny_model(family), {}))
        return made[family]

    return trained


@pytest.fixture
def own_run(trained_once, tmp_path):
    """A finished run that the test may write to: a copy of trained_once's in tmp_path. Its rows are not copied."""
    return RunDir(shutil.copytree(trained_once().path, tmp_path / "run"))


def recipe_in(folder, model, sections):
    rows = folder / "train.jsonl"
    if not rows.exists():
        write_jsonl(rows, [{"messages": messages(turns)} for turns in CONVERSATIONS])
    values = {
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"train": str(rows), "max_length": 128, "eval_fraction": 0.25},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "warmup_ratio": 0.0,
        },
        "output_dir": str(folder / "run"),
    }
    if sections.keys() & {*methods.names()} - {"lora"}:
        del values["lora"]
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.from_dict(values)


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe().to_yaml())
    return path
