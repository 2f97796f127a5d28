"""A GGUF file holds the folder's weights and tokenizer, and llama.cpp says what transformers says; or it is refused."""

import importlib.util
import json
import math
import os
import random
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora import base_model
from qlora.data import chat
from qlora.exporter.gguf import converter as export_gguf
from qlora.exporter.gguf import proof as gguf_proof
from qlora.exporter.gguf import tensors, vocabulary
from qlora.exporter.gguf.architectures import ARCHITECTURES
from qlora.recipe import Model
from qlora.system.errors import InputError, ProofFailed
from tests.conftest import CHATML, CONVERSATIONS, FAMILIES, SPECIAL, encode, make_tokenizer, messages
from tests.data.families import BY_NAME

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import quickstart_model

gguf = pytest.importorskip("gguf", reason="no gguf; pip install '.[gguf]'")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python; pip install '.[gguf]'"
)
SMOLLM2 = quickstart_model.cache_folder() / "SmolLM2-135M-Instruct"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no model; python scripts/quickstart_model.py makes it")

QUESTIONS = ["What is 3 plus 4?", "naïve café, 漢字 🙂\n\n  1234  'S they'RE"]


@pytest.fixture(autouse=True)
def no_llama_cpp_of_the_user(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)


@pytest.fixture
def written(tiny_model, tmp_path):
    """Return write(family, kind="f16", **config) -> (folder, file); the model is made anew where its config differs."""

    def write(family, kind="f16", **config):
        folder = tiny_model(family)
        if config:
            folder = changed(folder, tmp_path / "model", **config)
        out = tmp_path / f"{family}-{kind}.gguf"
        export_gguf.write(folder, out, kind)
        return folder, out

    return write


def changed(source, folder, **config):
    """Return `folder`: a model of the same kind with `config` changed and random weights, and the same tokenizer."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    values["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() == 2 else 1)
    model.save_pretrained(folder)
    return folder


def tokenizer_of(folder):
    return base_model.load_tokenizer(folder, Model(name_or_path=str(folder)))


def prompts(folder):
    return [chat.render(tokenizer_of(folder), [{"role": "user", "content": text}], True) for text in QUESTIONS]


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def rows_in_llama_cpp(num_rows, num_heads):
    """Return, for each row there, which row of the folder it is: pairs (i, i + half) of a head become neighbours."""
    width = num_rows // num_heads
    return [
        head * width + i + part * width // 2 for head in range(num_heads) for i in range(width // 2) for part in (0, 1)
    ]


def expected(name, tensor, config):
    """Return the tensor of the folder as the file should hold it, float32."""
    tensor = tensor.float()
    if config.model_type in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return tensor[rows_in_llama_cpp(len(tensor), heads)]
    if config.model_type.startswith("gemma") and "norm" in name:
        return tensor + 1
    if config.model_type == "gpt2" and tensor.dim() == 2 and ".h." in name:
        return tensor.T
    return tensor


def both(folder, file):
    """Yield (name in the folder, tensor of the folder as expected, tensor of the file)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        yield name, expected(name, tensor, config), reader.pop(names.get_name(name, (".weight", ".bias")))
    assert not reader


# --- weights


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_in_the_file_as_float16_of_the_folder(written, family):
    folder, out = written(family)
    for name, tensor, found in both(folder, out):
        stored = torch.from_numpy(found.data.copy())
        assert stored.dtype == (torch.float32 if tensor.dim() == 1 or "wpe" in name else torch.float16), name
        assert torch.equal(stored, tensor.to(stored.dtype)), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_q8_0_is_within_half_a_step_of_every_weight(written, family):
    folder, out = written(family, "q8_0")
    quantized = 0
    for name, tensor, found in both(folder, out):
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        if found.tensor_type.name != "Q8_0":
            assert torch.equal(values.float(), tensor.to(torch.from_numpy(found.data.copy()).dtype).float()), name
            continue
        quantized += 1
        steps = tensor.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
        # half a step, and 127 steps that float16 rounds by 2^-11 each
        assert ((values - tensor).reshape(-1, 32).abs() <= steps * (0.5 + 127 * 2**-11) + 1e-9).all(), name
        assert not torch.equal(values, tensor)
    assert quantized > 5


@needs_smollm2
@pytest.mark.slow
def test_every_weight_of_smollm2_is_in_the_file(tmp_path):
    export_gguf.write(SMOLLM2, tmp_path / "out.gguf", "f16")
    count = 0
    for name, tensor, found in both(SMOLLM2, tmp_path / "out.gguf"):
        stored = torch.from_numpy(found.data.copy())
        assert torch.equal(stored, tensor.to(stored.dtype)), name
        count += 1
    assert count == 272


def test_llama_3_rope_factors_are_those_of_the_formula(written):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    _, out = written("llama", rope_parameters=rope, max_position_embeddings=512)
    (found,) = [tensor.data for tensor in gguf.GGUFReader(out).tensors if tensor.name == "rope_freqs.weight"]
    for i, factor in enumerate(found):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 16)
        smooth = min(max((64 / wavelength - 1) / (4 - 1), 0), 1)
        assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)
    assert found.min() == 1  # fast ones stay
    assert found.max() == pytest.approx(8)


# --- metadata


def test_llama_cpp_is_told_the_shape_of_the_model(written):
    _, out = written("llama-tied")
    found = fields(out)
    assert found["general.architecture"] == "llama"
    expected = {"context_length": 512, "block_count": 2, "embedding_length": 64, "feed_forward_length": 128, "vocab_size": 512,
                "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16,
                "rope.dimension_count": 16, "rope.freq_base": 10000.0}  # fmt: skip
    assert {key: found[f"llama.{key}"] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_the_tokenizer_in_the_file_is_the_folders(written):
    folder, out = written("llama")
    tokenizer, found = tokenizer_of(folder), fields(out)
    assert found["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(found["tokenizer.ggml.tokens"]) == 512
    kinds = found["tokenizer.ggml.token_type"]
    assert {tokenizer.convert_ids_to_tokens(i) for i in range(512) if kinds[i] == gguf.TokenType.CONTROL} == set(
        SPECIAL
    )
    assert all(kind == gguf.TokenType.UNUSED for kind in kinds[len(tokenizer) :])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert found["tokenizer.chat_template"] == CHATML
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [3, 2, 0]


def test_a_window_narrower_than_the_context_becomes_the_context(written):
    assert fields(written("mistral", sliding_window=128)[1])["llama.context_length"] == 128
    found = fields(written("gemma2")[1])  # knows windows
    assert (found["gemma2.context_length"], found["gemma2.attention.sliding_window"]) == (512, 256)


@pytest.mark.parametrize(
    ("family", "adds"),
    [("llama-3.1", True), ("gemma-2", True), ("mistral-style", True), ("qwen2.5", False), ("phi-3.5", False),
     ("smollm2", False)],
)  # fmt: skip
def test_the_server_adds_the_start_token_where_training_saw_it(family, adds):
    tokenizer = BY_NAME[family].tokenizer()
    assert vocabulary.adds_bos(tokenizer) == adds
    tokenizer.chat_template = CHATML  # has none, so training saw none, whatever the tokenizer adds to other text
    assert not vocabulary.adds_bos(tokenizer)


def test_an_answer_ends_at_every_stop_token_of_the_folder(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    values = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": [2, 7, 9]}))
    export_gguf.write(folder, tmp_path / "out.gguf", "f16")
    found = fields(tmp_path / "out.gguf")
    assert {found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")} == {2, 7, 9}
    assert found["tokenizer.ggml.eos_token_id"] == 2


# --- refusals


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "layer_types"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tiny_model, tmp_path, family, config, why):
    folder = changed(tiny_model(family), tmp_path / "model", **config)
    with pytest.raises(InputError, match=f"(?s){why}.*LLAMA_CPP"):
        export_gguf.write(folder, tmp_path / "out.gguf", "f16")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def gpt_neox(tmp_path, tokenizer):
    """Return the folder of a model that only llama.cpp's own converter takes."""
    config = transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_architecture_that_is_not_known_is_refused(tmp_path, gpt_neox):
    with pytest.raises(InputError, match=r"gpt_neox cannot be converted here .*llama.*LLAMA_CPP"):
        export_gguf.write(gpt_neox, tmp_path / "out.gguf", "f16")


def test_nothing_is_overwritten_and_no_other_kind_is_known(tiny_model, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(InputError, match="is not overwritten"):
        export_gguf.write(tiny_model("llama"), out, "f16")
    assert out.read_text() == "mine"
    with pytest.raises(InputError, match="f16, q8_0, q4_k_m"):
        export_gguf.write(tiny_model("llama"), tmp_path / "new", "q5")


def test_a_weight_beyond_float16_is_refused_and_fits_q8_0(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 2**17
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj.weight contains 1\.31e\+05.*q8_0"):
        export_gguf.write(folder, tmp_path / "out.gguf", "f16")
    assert not list(tmp_path.glob("out*"))
    export_gguf.write(folder, tmp_path / "out.gguf", "q8_0")


def test_nothing_is_left_when_writing_is_cut_short(tiny_model, tmp_path):
    counts = []

    def stop(count):
        counts.append(count)
        if len(counts) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf.write(tiny_model("llama"), tmp_path / "out.gguf", "f16", stop)
    assert not list(tmp_path.iterdir())
    counts.clear()
    size = export_gguf.write(tiny_model("llama"), tmp_path / "out.gguf", "f16", lambda count: counts.append(count * 2))
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert sum(counts) / 2 < size == (tmp_path / "out.gguf").stat().st_size < sum(counts) / 2 + 40_000


# --- tokenizers


def refused(data, why, **names):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)
    with pytest.raises(InputError, match=f"(?s){why}.*LLAMA_CPP"):
        vocabulary.add(gguf.GGUFWriter(None, "llama"), tokenizer, 4096, [tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "pre-tokenizer",
        ),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "pre-tokenizer",
        ),
        ("pre_tokenizer", None, "not byte-level"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tokenizer_json, part, value, why):
    refused(
        json.loads(make_tokenizer(tokenizer_json).backend_tokenizer.to_str()) | {part: value},
        why,
        eos_token="<|im_end|>",
    )


@pytest.mark.parametrize(("key", "value"), [("lstrip", True), ("single_word", True), ("rstrip", True)])
def test_an_added_token_that_swallows_white_space_is_refused(tokenizer_json, key, value):
    data = json.loads(make_tokenizer(tokenizer_json).backend_tokenizer.to_str())
    data["added_tokens"][1][key] = value
    refused(data, "added token|white space", eos_token="<|im_end|>")


def byte_level(pre, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return make_tokenizer(tokenizer)


def split(pattern):
    from tokenizers import Regex

    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def corpus():
    return [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]


def sentencepiece(prefix):
    """Return a tokenizer as SentencePiece's become: every pair that makes a piece is a merge, in the order of pieces."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=["▁"])
    trained.train_from_iterator(corpus(), trainer)
    learnt = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    pieces = [piece for piece in learnt if len(piece) > 1]
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *pieces,
        *(p for p in learnt if len(p) == 1),
    ]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    return made


def test_merges_that_are_not_in_the_order_of_pieces_are_refused():
    data = json.loads(sentencepiece(True).backend_tokenizer.to_str())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    merges = data["model"]["merges"]
    pieces = ["".join(pair) for pair in merges]
    doubled = next(at for at, piece in enumerate(pieces) if pieces.count(piece) > 1)
    moved = {**data["model"], "merges": [*merges[:doubled], *merges[doubled + 1 :], merges[doubled]]}
    refused(data | {"model": moved}, "ordered by piece", **names)
    lacking = {**data["model"], "merges": [*merges[:doubled], *merges[doubled + 1 :]]}
    refused(data | {"model": lacking}, "never joins", **names)


def phi_3():
    """Return a tokenizer with Phi-3's special tokens, which take the white space after them along; all but three."""
    data = json.loads(sentencepiece(True).backend_tokenizer.to_str())
    for token in ("<|endoftext|>", "<|user|>", "<|end|>"):
        data["added_tokens"].append(
            {**data["added_tokens"][0], "id": 4000 + len(data["added_tokens"]), "content": token}
        )
    for token in data["added_tokens"]:
        token["rstrip"] = token["content"] in ("</s>", "<|user|>", "<|end|>")
        token["id"] = data["model"]["vocab"].setdefault(token["content"], len(data["model"]["vocab"]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="<|end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}<|user|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    return tokenizer


def test_a_start_token_that_only_the_template_knows_is_refused(tokenizer):
    tokenizer.chat_template, tokenizer.bos_token = "{{ bos_token }}" + CHATML, None
    with pytest.raises(InputError, match="start token"):
        vocabulary.add(gguf.GGUFWriter(None, "llama"), tokenizer, 4096, [2])


TOKENIZERS = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(False)),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "llama-bpe": lambda: byte_level(split(vocabulary._LLAMA_3), ignore_merges=True),
    "smaug-bpe": lambda: byte_level(split(vocabulary._LLAMA_3)),
    "qwen2": lambda: byte_level(split(vocabulary._QWEN_2)),
    "sentencepiece, space before": lambda: sentencepiece(True),
    "sentencepiece, no space": lambda: sentencepiece(False),
    "phi-3": phi_3,
}


@needs_llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_makes_the_same_tokens_of_random_text(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    served = vocabulary_in_llama_cpp(tokenizer, tmp_path / "out.gguf")
    rng, texts = random.Random(0), corpus()
    start = "<s>" if "sentencepiece" in name else "<|user|>\n" if name == "phi-3" else "<|im_start|>"
    for _ in range(300):
        text = rng.choice([text for text in texts if len(text) > 300])
        at = rng.randrange(len(text) - 200)
        text = text[at : at + rng.randrange(1, 200)] + rng.choice(["", "   ", "漢字🙂é 12345", "\n\n \t", "it'S I'LL"])
        prompt = f"{start}{text}{start} {text[::-1]}"
        if any(token in text + text[::-1] for token in (*SPECIAL, "</s>", "<|user|>", "<|end|>", "-" * 16)):
            continue  # a control token in the source text; tokens over 32 characters are cut by llama-cpp-python
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert served.tokenize(prompt.encode(), add_bos=False, special=True) == ids, prompt
        said = served.detokenize(ids, special=True).decode(errors="replace")
        assert "".join(said.split()) == "".join(prompt.split())


def vocabulary_in_llama_cpp(tokenizer, file):
    from llama_cpp import Llama

    writer = gguf.GGUFWriter(file, "llama")
    name = vocabulary.add(writer, tokenizer, len(tokenizer) + 3, [tokenizer.eos_token_id])
    assert name == ("phi-3" if "<|user|>" in tokenizer.get_vocab() else None)
    if name is not None:
        writer.add_name(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Llama(str(file), vocab_only=True, verbose=False)


# --- llama.cpp's own tools


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


CONVERTER = (
    "import sys, pathlib; "
    "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('GGUF ' + ' '.join(sys.argv[1:4]))"
)
# a small converter of the kind that llama.cpp has: every tensor of the folder under its own name
REAL_CONVERTER = """
import argparse, gguf
from pathlib import Path
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--outtype")
parser.add_argument("--outfile")
args = parser.parse_args()
writer = gguf.GGUFWriter(args.outfile, "gptneox")
writer.add_tokenizer_model("gpt2")
writer.add_add_bos_token(False)
for name, tensor in load_file(args.folder / "model.safetensors").items():
    writer.add_tensor(name, tensor.half().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.mark.slow
def test_what_we_refuse_is_converted_by_llama_cpps_own_converter(tmp_path, monkeypatch, gpt_neox):
    script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", REAL_CONVERTER)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    section = Model(name_or_path=str(gpt_neox))
    config = base_model.load_config(base_model.find(section), section)
    export_gguf.refuse(gpt_neox, config, base_model.load_tokenizer(gpt_neox, section), [0], "f16")
    out = tmp_path / "out.gguf"
    assert export_gguf.write(gpt_neox, out, "f16") == out.stat().st_size
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(out).tensors}
    weights = load_file(gpt_neox / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name].flatten(), weights[name].half().flatten()) for name in weights)
    assert not export_gguf.adds_bos(out)


def test_the_users_own_converter_and_quantizer_are_used(tmp_path, monkeypatch, tiny_model):
    script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", CONVERTER)
    script(tmp_path / "llama.cpp" / "build" / "bin" / "llama-quantize", '#!/bin/sh\necho "$3 of $(cat "$1")" > "$2"\n')
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    folder = tiny_model("llama")
    export_gguf.write(folder, tmp_path / "a.gguf", "q8_0")
    assert (tmp_path / "a.gguf").read_text() == f"GGUF {folder} --outtype q8_0"
    export_gguf.write(folder, tmp_path / "b.gguf", "q4_k_m")
    assert (tmp_path / "b.gguf").read_text() == f"Q4_K_M of GGUF {folder} --outtype f16\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "llama.cpp"]


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(tmp_path, monkeypatch, tiny_model):
    script(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py", CONVERTER + "; sys.exit('Model X is not supported')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    with pytest.raises(InputError, match=r"(?s)convert_hf_to_gguf.py failed:.*Model X is not supported"):
        export_gguf.write(tiny_model("llama"), tmp_path / "a.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "ended without an error, but wrote no file"),
        ("open(__import__('sys').argv[-1], 'w').write('<html>')", "begins with b'<htm', not with GGUF"),
    ],
)
def test_a_converter_that_writes_something_else_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, tiny_model, text, why
):
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script(converter, text)
    monkeypatch.setenv("LLAMA_CPP", str(converter.parent))
    with pytest.raises(InputError, match=why) as refused:
        export_gguf.write(tiny_model("llama"), tmp_path / "a.gguf", "q8_0")
    assert str(converter) in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_a_folder_without_llama_cpps_programs_is_an_error(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"LLAMA_CPP is .*elsewhere, where neither convert_hf_to_gguf.py nor"):
        export_gguf.write(tiny_model("llama"), tmp_path / "a.gguf", "f16")
    script(tmp_path / "elsewhere" / "llama-quantize", "")
    export_gguf.write(tiny_model("llama"), tmp_path / "a.gguf", "f16")  # theirs for one, ours for the other


def without(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    monkeypatch.setenv("PATH", os.devnull)


def test_without_llama_cpp_nothing_is_claimed(tmp_path, monkeypatch, tiny_model):
    without(monkeypatch, "llama_cpp")
    folder = tiny_model("llama")
    with pytest.raises(InputError, match=r"q4_k_m needs llama.cpp's quantizer: pip install 'gguf.*'llama-cpp-python"):
        export_gguf.write(folder, tmp_path / "a.gguf", "q4_k_m")
    export_gguf.write(folder, tmp_path / "a.gguf", "f16")
    proof = gguf_proof.prove(folder, tmp_path / "a.gguf", "f16", prompts(folder))
    assert not proof.proven
    assert "not proven: llama-cpp-python is not installed" in proof.why_not


def test_without_the_gguf_package_it_is_named(tmp_path, monkeypatch, tiny_model):
    without(monkeypatch, "gguf")
    with pytest.raises(InputError, match=r"pip install 'gguf[<>=.,\d]+' 'llama-cpp-python[<>=.,\d]+'"):
        export_gguf.write(tiny_model("llama"), tmp_path / "a.gguf", "f16")


# --- what llama.cpp says


def test_prompts_are_what_stands_before_the_answer(tokenizer):
    rows = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS[:12]]
    assert gguf_proof.prompts_of(tokenizer, rows) == [
        f"<|im_start|>user\nWhat is {a} plus {b}?<|im_end|>\n<|im_start|>assistant\n"
        for a in range(2)
        for b in range(4)
    ]


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_says_the_same_greedy_tokens(written, family):
    folder, out = written(family)
    proof = gguf_proof.prove(folder, out, "f16", prompts(folder))
    assert proof.proven
    assert proof.num_tokens == 64
    assert proof.same_top1 == 1
    assert proof.kl < 1e-6  # measured 6e-8 to 1.7e-7: activations in float16


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("qwen2", {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("gemma2", {"sliding_window": 16}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
        ("gpt2", {"n_inner": 96, "tie_word_embeddings": False}),
    ],
    ids=["biases", "head_dim", "llama3 rope", "linear rope", "untied", "window", "partial rotary", "n_inner"],
)  # fmt: skip
def test_llama_cpp_agrees_in_every_setting_that_is_let_through(written, family, config):
    folder, out = written(family, **config)
    assert gguf_proof.prove(folder, out, "f16", prompts(folder)).kl < 1e-6


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_quantized_files_are_near_and_not_the_same(written, kind):
    folder, out = written("llama", kind)
    proof = gguf_proof.prove(folder, out, kind, prompts(folder))
    assert proof.proven
    assert 1e-6 < proof.kl < {"q8_0": 1e-3, "q4_k_m": 2e-2}[kind]  # measured 2e-4 and 6e-3
    with pytest.raises(ProofFailed, match="the limit for f16"):
        gguf_proof.prove(folder, out, "f16", prompts(folder))


@needs_llama_cpp
@pytest.mark.parametrize("fault", ["rows as transformers has them", "norms one too small", "another base frequency"])
def test_a_wrong_conversion_is_not_proven(written, monkeypatch, fault):
    if fault == "rows as transformers has them":
        monkeypatch.setattr(tensors, "permuted", lambda tensor, num_heads: tensor)
    elif fault == "norms one too small":
        monkeypatch.setattr(tensors, "as_llama_cpp", lambda name, tensor, *rest: tensor)
    else:
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_rope_freq_base",
            lambda self, value: self.add_float32("llama.rope.freq_base", 2 * value),
        )
    folder, out = written("gemma" if fault.startswith("norms") else "llama")
    with pytest.raises(ProofFailed, match="is not the exported model"):
        gguf_proof.prove(folder, out, "f16", prompts(folder))


@needs_llama_cpp
def test_a_tokenizer_that_cuts_otherwise_is_not_proven(written, monkeypatch):
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tokenizer_pre", lambda self, name: self.add_string("tokenizer.ggml.pre", "qwen2")
    )
    folder, out = written("llama")
    with pytest.raises(ProofFailed, match=r"llama\.cpp tokenizes a prompt differently"):
        gguf_proof.prove(folder, out, "f16", ["<|im_start|>the plus    \n\n\n  2  plus"])


@needs_llama_cpp
@pytest.mark.parametrize("adds", [True, False])
def test_the_start_token_stands_there_once(tiny_model, tmp_path, adds):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = tokenizer_of(folder)
    if adds:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(folder)
    export_gguf.write(folder, tmp_path / "out.gguf", "f16")
    assert export_gguf.adds_bos(tmp_path / "out.gguf") is adds
    assert prompts(folder)[0].startswith("<s><|im_start|>")
    assert gguf_proof.prove(folder, tmp_path / "out.gguf", "f16", prompts(folder)).proven


@needs_llama_cpp
@needs_smollm2
@pytest.mark.parametrize("kind", export_gguf.KINDS)
def test_smollm2_is_proven(tmp_path, kind):
    export_gguf.write(SMOLLM2, tmp_path / "out.gguf", kind)
    proof = gguf_proof.prove(SMOLLM2, tmp_path / "out.gguf", kind, prompts(SMOLLM2), max_new_tokens=16)
    assert proof.proven
    assert proof.same_top1 == 1 if kind == "f16" else 0.7 < proof.same_top1 <= 1
    assert proof.kl < {"f16": 1e-5, "q8_0": 1e-2, "q4_k_m": 0.1}[kind]  # measured 1.2e-6, 0.004, 0.041
