"""The small files of an export say to transformers 4 what they say to transformers 5: same numbers, same text."""

import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer

from qlora import base_model
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.exporter import configs
from qlora.recipe import Model
from qlora.system.errors import InputError, ProofFailed
from qlora.system.events import heard_by
from tests import forked
from tests.conftest import CHATML, CONVERSATIONS
from tests.test_layout import ROOT

READERS_CHECK = ROOT / "scripts" / "readers_check.py"
OLD = ["transformers==4.57.3", "tokenizers==0.22.1", "huggingface-hub==0.36.0"]


@pytest.fixture(scope="module")
def older():
    """A folder with transformers 4.57.3, installed once into the user's cache."""
    folder = Path.home() / ".cache" / "qlora" / "transformers-4.57.3"
    if not (folder / "transformers").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(made), *OLD]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            shutil.rmtree(made, ignore_errors=True)
            pytest.skip(f"transformers 4.57.3 cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
        if folder.is_dir():
            shutil.rmtree(made)
        else:
            made.rename(folder)
    return folder


def hub_style(folder, out):
    """Return `out`, the model in `folder` with config and tokenizer files as transformers 4 wrote them."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    scaling = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    config |= {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "bfloat16", "some_other": [1, 2]}
    (out / "config.json").write_text(json.dumps(config, indent=4))
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
    }
    (out / "chat_template.jinja").unlink()
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (out / "tokenizer.model").write_bytes(b"kept as it is")
    generation = {
        "_from_model_config": True,
        "do_sample": False,
        "temperature": 0.6,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=4))
    return out


def test_the_bases_own_files_are_kept(make_recipe, tiny_model, tmp_path):
    base = hub_style(tiny_model("llama"), tmp_path / "base")
    out = tmp_path / "out"
    export(train(make_recipe(model={"name_or_path": str(base)})).path, out, dtype="float32")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    assert {name: value for name, value in after.items() if before.get(name) != value}.keys() == {
        "dtype", "torch_dtype", "rope_parameters"
    }  # fmt: skip
    assert before.keys() <= after.keys()
    assert after["rope_parameters"]["rope_theta"] == after["rope_theta"] == 500000


def read(*words, older=None):
    """Run scripts/readers_check.py, here or with the transformers in the folder `older`; return (its code, what it printed)."""
    if older is None:
        done = forked.run(READERS_CHECK, *map(str, words))
    else:
        command = [sys.executable, READERS_CHECK, *map(str, words)]
        variables = os.environ | {"PYTHONPATH": str(older)}
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert not done.returncode or done.stdout, done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def exports(make_recipe, tiny_model, classify_recipe, tmp_path):
    """Return {name: folder} of exports that say something that the two versions spell, or read, otherwise."""
    (tmp_path / "template.jinja").write_text("Chat:\n" + CHATML)
    bases = {name: hub_style(tiny_model(f"llama{name}"), tmp_path / f"base{name}") for name in ("", "-tied")}
    recipes = {
        "hub": lambda: make_recipe(model={"name_or_path": str(bases[""])}),
        "new": lambda: make_recipe("llama-tied", data={"chat_template": str(tmp_path / "template.jinja")}),
        "tokens": lambda: make_recipe(model={"name_or_path": str(bases["-tied"]), "new_tokens": ["<tool>", "plus"]}),
        **{family: partial(make_recipe, family) for family in ("phi", "gemma2", "qwen2", "qwen3-moe")},
        # last: these write other rows into the same file
        **{f"classes-{family}": partial(classify_recipe, family) for family in ("bert", "modernbert")},
    }
    outs = {}
    for name, make in recipes.items():
        outs[name] = tmp_path / name / "out"
        recipe = make().model_copy(update={"output_dir": str(tmp_path / name / "run")})
        in_shards = ["export.max_shard_size=200KB"] if name == "new" else []
        export(train(recipe).path, outs[name], dtype="float32", overrides=in_shards)
    assert len(list(outs["new"].glob("model-*.safetensors"))) > 1
    return outs


@pytest.mark.slow  # it installs transformers 4
@pytest.mark.usefixtures("unplanned")
def test_transformers_4_reads_what_transformers_5_does(older, exports, tmp_path):
    kept = tmp_path / "read.json"
    assert read(*exports.values(), "--save", kept)[0] == 0
    code, said = read(*exports.values(), "--compare", kept, older=older)
    assert code == 0, said
    assert said.count(": the same\n") == len(exports)
    assert said.endswith(f"transformers 4.57.3, compared with {transformers.__version__}\n")
    found = json.loads(kept.read_text())["folders"]
    assert found[str(exports["new"])]["prompt"].startswith("Chat:")
    assert found[str(exports["classes-bert"])]["classes"] == {"0": "neg", "1": "pos"}
    # it sees what is otherwise
    settings = json.loads((exports["hub"] / "config.json").read_text())
    (exports["hub"] / "config.json").write_text(json.dumps(settings | {"rope_theta": 20000.0}))
    code, said = read(exports["hub"], "--compare", kept, older=older)
    assert (code, "DIFFERS" in said, "logits: " in said) == (1, True, True), said


@pytest.mark.slow
def test_transformers_4_opens_the_tokenizer_of_an_adapter(older, trained_once):
    folder = trained_once().adapter
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"is_local", "local_files_only"}  # of the machine that trained
    code = "import sys, transformers; print(transformers.AutoTokenizer.from_pretrained(sys.argv[1])('<|im_start|> 2').input_ids)"
    variables = os.environ | {"PYTHONPATH": str(older), "USE_TORCH": "0"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == transformers.AutoTokenizer.from_pretrained(folder)("<|im_start|> 2").input_ids


@pytest.mark.usefixtures("unplanned")
def test_whoever_takes_tokenizer_json_as_it_is_gets_the_tokens_of_the_training(make_recipe, tiny_model, tmp_path):
    # a Qwen2 model: transformers 5 splits text as Qwen's own tokenizers do, whatever the file says
    base = tiny_model("qwen2")
    notes = []
    with heard_by(lambda event: notes.append(str(getattr(event, "text", "")))):
        run = train(make_recipe("qwen2"))
    assert len([note for note in notes if "makes other tokens than" in note]) == 1
    export(run.path, tmp_path / "out", dtype="float32")
    text = "What is 2 plus 3? 650841823"
    as_base, as_out = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for folder in (base, tmp_path / "out")
    )
    expected = transformers.AutoTokenizer.from_pretrained(base)(text).input_ids
    assert as_out == expected != as_base
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == expected


def test_what_version_4_calls_otherwise_is_written_too():
    experts = transformers.Qwen3MoeConfig(num_experts=4).to_dict()
    assert configs.model_config(experts, experts, experts, "float16")["num_experts"] == 4
    modern = transformers.ModernBertConfig(num_hidden_layers=6, global_attn_every_n_layers=2, global_rope_theta=5e4,
                                           local_rope_theta=2e4).to_dict()  # fmt: skip
    for name in ("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers"):
        modern.pop(name, None)
    found = configs.model_config(modern, modern, modern, "float16")
    assert (found["global_rope_theta"], found["local_rope_theta"], found["global_attn_every_n_layers"]) == (5e4, 2e4, 2)
    sections = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = transformers.Qwen2VLTextConfig(rope_parameters=sections).to_dict()
    whole = {"model_type": "qwen2_vl", "text_config": text}
    for tied in (True, False):
        settings = text | {"tie_word_embeddings": tied}
        found = configs.model_config_of_whole(whole, settings, settings, "float16")
        assert found["text_config"]["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 3, 3]}
        assert (found["text_config"]["rope_theta"], found["text_config"]["tie_word_embeddings"]) == (1e6, tied)
    newer = (
        transformers.Gemma4TextConfig().to_dict()
    )  # version 4 has no such models, and 5 refuses the older spelling of them
    found = configs.model_config(newer, newer, newer, "float16")
    assert found["rope_parameters"] == newer["rope_parameters"]
    assert not {"rope_scaling", "rope_theta", "partial_rotary_factor"} & (found.keys() - newer.keys())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"rope_theta": 20000.0, "rope_parameters": None}, "rope_parameters reads as"),
        ("config.json", {"rms_norm_eps": 1e-3}, "rms_norm_eps reads as 0.001"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "the chat template differs"),
    ],
)
def test_files_that_say_something_else_end_the_export(tiny_model, tmp_path, name, change, said):
    section = Model(name_or_path=str(tiny_model("llama")))
    checkpoint = base_model.find(section)
    config, tokenizer = (load(checkpoint, section) for load in (base_model.read_config, tokenizer_of))
    configs.write(tmp_path, checkpoint, section, config, tokenizer, "float16")
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / name).read_text()) | change
    (tmp_path / name).write_text(json.dumps(settings))
    with pytest.raises(ProofFailed, match=said):
        configs.refuse_misread(tmp_path, section, config, tokenizer)


def tokenizer_of(checkpoint, section):
    return base_model.load_tokenizer(checkpoint.folder, section)


@pytest.fixture
def without_tokenizer_json(tiny_model, tmp_path):
    """Return make(model) -> a copy of the tiny Llama whose tokenizer is a SentencePiece model: these bytes, nothing else."""

    def make(model):
        base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
        (base / "tokenizer.json").unlink()
        (base / "tokenizer.model").write_bytes(model)
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        (base / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "</s>"))
        return base

    return make


def test_the_package_that_reads_a_sentencepiece_model_is_named(without_tokenizer_json, make_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    base = without_tokenizer_json(b"a model")
    with pytest.raises(InputError, match=r"SentencePiece model \(tokenizer.model, .*pip install 'sentencepiece"):
        train(make_recipe(model={"name_or_path": str(base)}))


@pytest.mark.filterwarnings("ignore:builtin type [Ss]wig:DeprecationWarning")
def test_a_sentencepiece_model_is_kept_in_the_export(without_tokenizer_json, make_recipe, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    texts, model = (text for turns in CONVERSATIONS * 20 for _, text in turns), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=290, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    base = without_tokenizer_json(model.getvalue())
    export(train(make_recipe(model={"name_or_path": str(base)})).path, tmp_path / "out", dtype="float32")
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    one, other = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    assert one("1 plus 2 is 3.").input_ids == other("1 plus 2 is 3.").input_ids
