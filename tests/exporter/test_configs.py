"""The small files of an export say to transformers 4 what they say to transformers 5: same numbers, same text."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from qlora import base_model
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.exporter import configs
from qlora.recipe import Model
from qlora.system.errors import InputError, ProofFailed
from tests import forked
from tests.conftest import CHATML, CONVERSATIONS

OLD = ["transformers==4.57.3", "tokenizers==0.22.1", "huggingface-hub==0.36.0"]

# Prints, for each folder, what this version of transformers makes of it.
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is 2 plus 3?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model.eval()(torch.arange(4, 260)[None]).logits[0, -1].tolist()
    eos = model.generation_config.eos_token_id
    found[folder] = {"logits": logits, "text": text, "ids": ids, "eos": eos, "special": sorted(tokenizer.all_special_tokens)}
print(json.dumps(found))
"""


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


def read(folders, older=None):
    """Return what transformers, or that in the folder `older`, reads in `folders`."""
    command = ["-c", READ, *map(str, folders)]
    if older is None:
        done = forked.run(*command)
    else:
        variables = os.environ | {"PYTHONPATH": str(older)}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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


@pytest.mark.slow  # it installs transformers 4
def test_transformers_4_reads_what_transformers_5_does(older, make_recipe, tiny_model, tmp_path, unplanned):
    (tmp_path / "template.jinja").write_text("Chat:\n" + CHATML)
    outs = {}
    for name, base, sections in (
        ("hub", hub_style(tiny_model("llama"), tmp_path / "base"), {}),
        ("new", tiny_model("llama-tied"), {"data": {"chat_template": str(tmp_path / "template.jinja")}}),
        (
            "tokens",
            hub_style(tiny_model("llama-tied"), tmp_path / "tied"),
            {"model": {"new_tokens": ["<tool>", "plus"]}},
        ),
        ("phi", tiny_model("phi"), {}),
        ("gemma2", tiny_model("gemma2"), {}),
    ):
        sections["model"] = {"name_or_path": str(base), **sections.get("model", {})}
        recipe = make_recipe(**sections, output_dir=str(tmp_path / name / "run"))
        outs[name] = tmp_path / name / "out"
        export(train(recipe).path, outs[name], dtype="float32")
    new, old = read(outs.values()), read(outs.values(), older)
    assert (new.pop("version"), old.pop("version")) == (transformers.__version__, "4.57.3")
    for folder, found in new.items():
        torch.testing.assert_close(torch.tensor(old[folder].pop("logits")), torch.tensor(found.pop("logits")),
                                   atol=1e-5, rtol=1e-5, msg=lambda text, folder=folder: f"{folder}: {text}")  # fmt: skip
        assert old[folder] == found
    assert new[str(outs["new"])]["text"].startswith("Chat:")


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
