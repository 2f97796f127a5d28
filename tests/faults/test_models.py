"""Model folders and chat templates that are broken or hostile: refused by every verb, with one message that says what to do."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.commands.chat import chat
from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.train import train
from qlora.data import chat as templates
from qlora.recipe import Recipe
from qlora.system import bounded
from qlora.system.errors import InputError
from tests.conftest import CHATML, CONVERSATIONS, make_tokenizer, messages, some_slow, write_jsonl
from tests.faults.folders import (
    DEEP,
    POINTER,
    WEB_PAGE,
    all_of,
    cutting,
    digests,
    refused,
    removing,
    setting,
    with_tensors,
    writing,
)

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
UP = "model.layers.0.mlp.up_proj.weight"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rows = [{"messages": messages(turns)} for turns in CONVERSATIONS]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", rows)


def recipe_of(model, rows, out, **data):
    return Recipe.from_dict(
        {
            "model": {"name_or_path": str(model)},
            "lora": {"r": 4, "lora_alpha": 8},
            "data": {"train": str(rows), "max_length": 128, "eval_fraction": 0.25, **data},
            "training": {"max_steps": 1, "per_device_train_batch_size": 4, "warmup_ratio": 0.0},
            "output_dir": str(out),
        }
    )


@pytest.fixture(scope="module")
def adapter(tiny_model, rows, tmp_path_factory):
    """An adapter of the tiny Llama without a tokenizer, so that export needs that of the base."""
    run = train(recipe_of(tiny_model("llama"), rows, tmp_path_factory.mktemp("trained") / "run"))
    folder = tmp_path_factory.mktemp("adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.adapter / name, folder)
    return folder


VERBS = {
    "data": lambda model, rows, adapter, out: inspect_data(recipe_of(model, rows, out)),
    "plan": lambda model, rows, adapter, out: plan(recipe_of(model, rows, out)),
    "train": lambda model, rows, adapter, out: train(recipe_of(model, rows, out)),
    "chat": lambda model, rows, adapter, out: chat(model, "What is 1 plus 2?", max_new_tokens=2),
    "eval": lambda model, rows, adapter, out: evaluate(model, rows, max_rows=2),
    "export": lambda model, rows, adapter, out: export(adapter, out, model=model),
}
ALL = "data plan train chat export"  # eval opens what chat opens
WITH_WEIGHTS = "train chat export"


def number(name, value):
    """Return a function that sets one number of a weight."""

    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return with_tensors(WEIGHTS, change)


def shards(change=lambda listed: listed, twice=None):
    """Return a function that splits the weights in two files, and changes what the index lists. twice: a tensor for both."""

    def split(folder):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        parts = {
            "a.safetensors": sorted(tensors)[:9],
            "b.safetensors": sorted(tensors)[9:] + ([twice] if twice else []),
        }
        for file, names in parts.items():
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        listed = {name: file for file, names in parts.items() for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": change(listed)}))

    return split


def header(change):
    """Return a function that changes the header of the weights and leaves their bytes."""

    def rewrite(folder):
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        made = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])

    return rewrite


def code(folder):
    """Code that leaves a file beside the model folder when it is imported."""
    canary = folder.parent / "canary"
    (folder / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    )


def pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def link(name, to):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return change


def fifo(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


FIELDS = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}

# how it is broken: (what does it, verbs, what the message says)
BROKEN = {
    "weights cut": (cutting(WEIGHTS, 1), WITH_WEIGHTS, r"model.safetensors is not a complete safetensors file.*download"),
    "weights cut in the header": (writing(WEIGHTS, b"\x40" + bytes(7) + b'{"a'), "train", "is not a complete safetensors"),
    "weights empty": (writing(WEIGHTS, b""), "train export", "model.safetensors is empty; download it again"),
    "weights of zeros": (writing(WEIGHTS, bytes(9999)), "train", "contains only zeros.*download it again"),
    "weights a web page": (writing(WEIGHTS, WEB_PAGE), WITH_WEIGHTS, "model.safetensors is a web page.*download it again"),
    "weights a pointer": (writing(WEIGHTS, POINTER), WITH_WEIGHTS, r"is a Git LFS pointer.*`git lfs pull`"),
    "config a pointer": (writing(CONFIG, POINTER), ALL, r"config.json is a Git LFS pointer.*`git lfs pull`"),
    "config a web page": (writing(CONFIG, WEB_PAGE), "data chat", "config.json is a web page"),
    "tokenizer a pointer": (writing(TOKENIZER, POINTER), ALL, r"tokenizer.json is a Git LFS pointer.*`git lfs pull`"),
    "tokenizer config a pointer": (writing(TOKENIZER_CONFIG, POINTER), "data chat", "tokenizer_config.json is a Git LFS"),
    "generation config a pointer": (writing(GENERATION, POINTER), ALL, "generation_config.json is a Git LFS pointer"),
    "index a pointer": (all_of(shards(), writing(INDEX, POINTER)), "train", "index.json is a Git LFS pointer"),
    "NaN in a linear layer": (number(UP, NAN), WITH_WEIGHTS, rf"{UP}: contains non-finite values"),
    "infinity in a linear layer": (number(UP, -INF), "chat export", rf"{UP}: contains non-finite values"),
    "NaN in the embedding": (number("model.embed_tokens.weight", NAN), "chat export", "embed_tokens.weight: contains non-finite"),
    "NaN in a norm": (number("model.norm.weight", NAN), "chat eval", "norm.weight: contains non-finite"),
    "tensor missing": (
        with_tensors(WEIGHTS, lambda found: {key: found[key] for key in found if key != "model.norm.weight"}),
        WITH_WEIGHTS,
        "model.norm.weight",
    ),
    "tensor of another shape": (
        with_tensors(WEIGHTS, lambda found: {**found, UP: found["lm_head.weight"].clone()}),
        "chat export",
        rf"{UP} is \(512, 64\) in the files, \(128, 64\) by config.json",
    ),
    "tensor too many": (
        with_tensors(WEIGHTS, lambda found: {**found, "model.layers.7.x": torch.ones(3)}),
        WITH_WEIGHTS,
        "not used by this architecture: model.layers.7.x",
    ),
    "tensor in two shards": (shards(twice="lm_head.weight"), "train export", "lm_head.weight is both in a.saf.*in b.saf"),
    "index that leads out": (
        shards(lambda listed: {key: f"../model/{file}" for key, file in listed.items()}),
        WITH_WEIGHTS,
        r"'../model/a.safetensors' is not a plain safetensors file name",
    ),
    "index with absolute names": (shards(lambda listed: dict.fromkeys(listed, "/a.safetensors")), "train", "not a plain"),
    "index of a missing file": (shards(lambda listed: dict.fromkeys(listed, "c.safetensors")), "train", "but missing"),
    "index of numbers": (shards(lambda listed: dict.fromkeys(listed, 3)), WITH_WEIGHTS, "weight_map is not {tensor: file"),
    "index of lists": (shards(lambda listed: {key: ["a"] for key in listed}), "train", "weight_map is not {tensor: file"),
    "index that is a list": (all_of(shards(), writing(INDEX, "[]")), "train export", "contains a list, not a JSON object"),
    "index nested deeply": (all_of(shards(), writing(INDEX, DEEP)), "train", "index.json is nested too deeply"),
    "index without most": (shards(lambda listed: {UP: listed[UP]}), "chat", "has 1[0-9] problems"),
    "offsets that overlap": (header(lambda e: e[UP].update(data_offsets=[0, 16384])), "train export", "invalid offset"),
    "offsets beyond the file": (
        header(lambda e: e[UP].update(data_offsets=[0, 2**62], shape=[2**31, 2**30])), "train export", "invalid offset"
    ),
    "header of 2**60 bytes": (writing(WEIGHTS, (2**60).to_bytes(8, "little") + b"x" * 99), "train", "header too large"),
    "pickled weights": (pickle, WITH_WEIGHTS, "pickled weights are not read; take a copy or a revision in safetensors"),
    "weights a broken link": (link(WEIGHTS, "nowhere"), "train chat", "no model.safetensors and no"),
    "weights a pipe": (fifo(WEIGHTS), "train", "no model.safetensors and no"),
    "config a pipe": (fifo(CONFIG), "train", "no config.json"),
    "code in the config": (
        all_of(code, setting(CONFIG, model_type="evil", **FIELDS)), ALL, "which is not run.*model.trust_remote_code=true"
    ),
    "code in the tokenizer": (
        all_of(code, setting(TOKENIZER_CONFIG, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})),
        ALL,
        "which is not run.*model.trust_remote_code=true",
    ),
    "code from the hub": (
        setting(CONFIG, _attn_implementation="evil/kernel"), ALL, "_attn_implementation 'evil/kernel' names code on the hub"
    ),
    "adapter inside": (
        writing("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "other/base"}'),
        ALL,
        r"there is an adapter in it .*give the model that it was trained on \(other/base\)",
    ),
    "no config": (removing(CONFIG), "data train", "no config.json; not a model folder"),
    "config cut": (cutting(CONFIG, 9), ALL, "config.json is not JSON: .*download it again"),
    "config a list": (writing(CONFIG, "[]"), "data chat export", "config.json contains a list, not a JSON object"),
    "config empty": (writing(CONFIG, b""), "data chat", "config.json is empty"),
    "config nested deeply": (writing(CONFIG, DEEP), "data chat", "config.json is nested too deeply"),
    "config in Latin-1": (writing(CONFIG, b'{"a": "\xe9"}'), "data", "config.json is not JSON: 'utf-8' codec"),
    "config with a byte order mark": (writing(CONFIG, b"\xef\xbb\xbf{}"), "data chat", "config.json is not JSON: .*BOM"),
    "config with NaN": (setting(CONFIG, rms_norm_eps=NAN), ALL, "config.json is not JSON: NaN, which is not a number"),
    "a billion layers": (setting(CONFIG, num_hidden_layers=10**9), ALL, "num_hidden_layers: 1000000000 is not a whole .* 1 to"),
    "layers below zero": (setting(CONFIG, num_hidden_layers=-1), "data train", "num_hidden_layers: -1 is not"),
    "half a layer": (setting(CONFIG, num_hidden_layers=2.5), "data train", "num_hidden_layers: 2.5 is not"),
    "hidden size 0": (setting(CONFIG, hidden_size=0), "data train", "hidden_size: 0 is not a whole number"),
    "vocabulary as text": (setting(CONFIG, vocab_size="512"), ALL, "vocab_size: '512' is not a whole number"),
    "no vocabulary": (setting(CONFIG, vocab_size=0), "data chat", "vocab_size: 0 is not"),
    "heads that do not divide": (setting(CONFIG, num_attention_heads=3), ALL, r"config.json: .*\(64\) is not a multiple"),
    "no heads": (setting(CONFIG, num_attention_heads=0), "data", "num_attention_heads: 0 is not"),
    "pad token beyond the vocabulary": (setting(CONFIG, pad_token_id=9999), "plan train chat export", "Padding_idx"),
    "end tokens that are text": (setting(CONFIG, eos_token_id=["a"]), "data chat", "eos_token_id"),
    "dtype of no such name": (setting(CONFIG, dtype="evil"), "data chat", "no attribute 'evil'"),
    "quantized already": (setting(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}), ALL, "quantized alr"),
    "unknown model type": (setting(CONFIG, model_type="nope"), ALL, "model type `nope`"),
    "model type that is a list": (setting(CONFIG, model_type=[4]), "data chat", "unhashable"),
    "not a causal model": (writing(CONFIG, '{"model_type": "t5"}'), ALL, "'t5' is not a causal language model"),
    "config of an encoder": (writing(CONFIG, '{"model_type": "bert"}'), "plan train chat export", "bert|not supported"),
    "tokenizer cut": (cutting(TOKENIZER, 200), ALL, "tokenizer.json is not JSON.*fix it or download it again"),
    "tokenizer of nothing": (writing(TOKENIZER, "{}"), "data chat", r"no usable tokenizer.*KeyError: 'added_tokens'"),
    "no tokenizer": (removing(TOKENIZER, TOKENIZER_CONFIG), "data train chat export", "no usable tokenizer"),
    "tokenizer config a list": (writing(TOKENIZER_CONFIG, "[]"), "data chat", "tokenizer_config.json contains a list"),
    "a template that is a number": (
        all_of(removing("chat_template.jinja"), setting(TOKENIZER_CONFIG, chat_template=3)), "data chat",
        "chat_template cannot be 3",
    ),
    "a template that is a pointer": (writing("chat_template.jinja", POINTER), "data chat", "chat_template.jinja is a Git LFS"),
    "a length that is text": (setting(TOKENIZER_CONFIG, model_max_length="x"), "data chat", "model_max_length cannot be 'x'"),
    "end token that is a number": (setting(TOKENIZER_CONFIG, eos_token=7), "data chat", "eos_token"),
    "generation config cut": (writing(GENERATION, "{"), ALL, "generation_config.json is not JSON"),
    "generation config a list": (writing(GENERATION, "[]"), "data chat", "generation_config.json contains a list"),
    "stop token that is text": (writing(GENERATION, '{"eos_token_id": "x"}'), ALL, "eos_token_id 'x' is neither a token id"),
    "stop token below zero": (writing(GENERATION, '{"eos_token_id": [2, -1]}'), "data chat export", r"eos_token_id \[2, -1\]"),
}  # fmt: skip
CASES = [(how, verb) for how, (_, verbs, _) in BROKEN.items() for verb in verbs.split()]


# each fault by one of its verbs in turn, and one of them by all
IN_CI = [(how, verbs.split()[at % len(verbs.split())]) for at, (how, (_, verbs, _)) in enumerate(BROKEN.items())]
IN_CI += [("generation config cut", verb) for verb in ALL.split()]


@pytest.mark.parametrize(("how", "verb"), some_slow(CASES, but=IN_CI), ids=[f"{how}, {verb}" for how, verb in CASES])
def test_a_broken_model_folder_is_refused(tiny_model, rows, adapter, tmp_path, how, verb):
    break_it, _, expected = BROKEN[how]
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    break_it(model)
    with refused(f"(?s){expected}", [model, adapter], [tmp_path / "out"], tmp_path / "canary"):
        VERBS[verb](model, rows, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.write_text("x"), "is a file; give the model folder"),
        (lambda path: path.mkdir(), "no config.json; not a model folder"),
        (lambda path: path.symlink_to("nowhere"), "no such folder|neither a run nor a model"),
    ],
    ids=["file", "empty", "broken link"],
)
@pytest.mark.parametrize("verb", ["data", "chat", "export"])
def test_what_is_no_model_folder_is_refused(rows, adapter, tmp_path, make, expected, verb):
    make(tmp_path / "model")
    with refused(expected, [adapter], [tmp_path / "out"], tmp_path / "canary"):
        VERBS[verb](tmp_path / "model", rows, adapter, tmp_path / "out")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model, tokenizer_json, rows, adapter, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = make_tokenizer(tokenizer_json)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(600)])
    tokenizer.save_pretrained(model)
    turns = [messages([("user", f"<extra{number}>"), ("assistant", "x")]) for number in range(590, 600)]
    text = write_jsonl(tmp_path / "rows.jsonl", [{"messages": one} for one in turns])
    for verb in ("data", "train"):
        with refused("tokenizer and model do not belong together", [model], [tmp_path / "out"], tmp_path / "canary"):
            VERBS[verb](model, text, adapter, tmp_path / "out")


# ---- what looks wrong and is not -------------------------------------------------------------------------------------


def cached(folder):
    """The layout of the hub's cache: a snapshot whose files are links to where the contents lie."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../blobs/{path.name}")


SOUND = {
    "links into the hub's cache": cached,
    "shards": shards(),
    "code that is not needed": all_of(code, setting(CONFIG, **FIELDS)),
    "a vocabulary file elsewhere": setting(TOKENIZER_CONFIG, vocab_file="../secret", merges_file="/etc/passwd"),
    "no end token": setting(TOKENIZER_CONFIG, eos_token=None, pad_token=None),
    "pickled weights beside safetensors": writing("pytorch_model.bin", b"cos\nsystem\n"),
}


@pytest.mark.parametrize("how", SOUND)
def test_a_folder_that_is_only_unusual_is_read_and_left_as_it_is(tiny_model, rows, tmp_path, how):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    SOUND[how](model)
    before = digests(model)
    as_ever = chat(tiny_model("llama"), "What is 1 plus 2?", max_new_tokens=2)
    assert chat(model, "What is 1 plus 2?", max_new_tokens=2) == as_ever
    inspect_data(recipe_of(model, rows, tmp_path / "run"))
    assert digests(model) == before
    assert not (tmp_path / "canary").exists()


def test_no_file_beside_the_model_gets_into_an_export(tiny_model, adapter, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "secret").write_text("TOKEN=hf_secret")
    setting(TOKENIZER_CONFIG, vocab_file="../secret", merges_file="../secret", chat_template="../secret")(model)
    assert export(adapter, tmp_path / "out", model=model)["verified"]
    assert not any(b"hf_secret" in path.read_bytes() for path in (tmp_path / "out").iterdir())


# ---- chat templates --------------------------------------------------------------------------------------------------


def doubling(start, following, shown=""):
    """Return a template that goes from `start` to `following` 60 times."""
    loop = f"{{% for i in range(60) %}}{{% set ns.s = {following} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(s={start}) %}}{loop}{{{{ ns.s{shown} }}}}"


TREE = "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% else %}x{% endif %}{% endmacro %}{{ m(40) }}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
RUNS, TAKES, MAKES = (
    "was still running after",
    "needs more than 64 MiB",
    "turns one conversation into [0-9,]+ characters",
)
OUT_OF_THE_SANDBOX = "does something a template must not do: access to attribute '__class__'"

TEMPLATES = {
    "nested loops": (LOOPS, RUNS),
    "loops in rows that are not the probe": (f"{{% if messages[0].content | length > 5 %}}{LOOPS}{{% endif %}}{CHATML}", RUNS),
    "macros that call themselves twice": (TREE, RUNS),
    "a list of itself as JSON": (doubling("[1]", "[ns.s, ns.s]", " | tojson"), RUNS),
    "lorem ipsum": ("{{ lipsum(n=10000000) }}", RUNS),
    "a large power": ("{{ (messages | length) and 7 ** (7 ** 11) > 3 }}", RUNS),
    "a long text": ("{{ 'A' * (5 * 10**6) }}", MAKES),
    "a longer one": ("{{ 'A' * 10**10 }}", TAKES),
    "a text that doubles": (doubling("'A'", "ns.s + ns.s"), f"{TAKES}|{RUNS}"),
    "a list that doubles": (doubling("[1]", "ns.s + ns.s"), f"{TAKES}|{RUNS}"),
    "a wide number": ("{{ '%10000000000d' % 1 }}", TAKES),
    "many replacements": ("{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}", TAKES),
    "a macro that calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", f"RecursionError|{RUNS}"),
    "brackets in brackets": ("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", "RecursionError"),
    "a range too long": ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
    "a class": ("{{ ''.__class__.__mro__ }}", OUT_OF_THE_SANDBOX),
    "a change of the messages": ("{{ messages.append(1) }}", "does something a template must not do: .*'append' of 'list'"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a module": ("{% import 'os' as os %}{{ os }}", "no loader"),
    "half a block": ("one\n{% for x in %}", "is not a Jinja template: line 2: Expected an expression"),
    "a filter that is none": ("{{ messages | nofilter }}", "is not a Jinja template: line 1: No filter named 'nofilter'"),
    "a refusal": ("{{ raise_exception('Only even things') }}", "refuses this conversation: Only even things"),
    "a name that is none": ("{{ foo.bar }}", "refuses this conversation: 'foo' is undefined"),
    "a message that is none": ("{{ messages[99].content }}", "refuses this conversation: list object has no element 99"),
    "a division by zero": ("{{ 1 // 0 }}", "refuses this conversation: ZeroDivisionError"),
    "no contents": ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves message 0 \\(user\\) out"),
    "always the same": ("hello", "leaves message 0 \\(user\\) out"),
}  # fmt: skip
SOURCES = ["data, own", "data, recipe", "chat, own"]
EVERYWHERE = ["nested loops", "a longer one", "a class", "half a block", "a refusal", "no contents"]
RENDERED = [(what, source) for what in TEMPLATES for source in (SOURCES if what in EVERYWHERE else SOURCES[:1])]


@pytest.fixture
def little_allowed(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.1)
    monkeypatch.setattr(bounded, "BYTES", 2**26)


@pytest.mark.parametrize(("what", "source"), RENDERED, ids=[f"{what}, {source}" for what, source in RENDERED])
def test_a_template_that_never_ends_or_reaches_out_is_refused(tiny_model, rows, tmp_path, little_allowed, what, source):
    template, expected = TEMPLATES[what]
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    file = model / "chat_template.jinja" if source.endswith("own") else tmp_path / "mine.jinja"
    file.write_text(template)
    start = time.process_time()
    with refused(f"(?s)chat template .*({expected})", [model], [tmp_path / "out"], tmp_path / "canary"):
        if source.startswith("chat"):
            chat(model, "What is 1 plus 2?", max_new_tokens=2)
        else:
            inspect_data(
                recipe_of(model, rows, tmp_path / "out", **({"chat_template": str(file)} if "recipe" in source else {}))
            )
    assert time.process_time() - start < 20


@pytest.mark.parametrize("verb", ["train", "eval", "plan"])
@pytest.mark.parametrize("what", ["nested loops", "a longer one", "a refusal"])
def test_the_other_verbs_refuse_it_too(tiny_model, rows, tmp_path, little_allowed, what, verb):
    template, expected = TEMPLATES[what]
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    with refused(f"(?s)chat template .*({expected})", [model], [tmp_path / "out"], tmp_path / "canary"):
        VERBS[verb](model, rows, None, tmp_path / "out")


def test_a_row_that_the_template_refuses_is_named_by_its_line(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system messages') }}{% endif %}" + CHATML
    )
    good = messages([("user", "a"), ("assistant", "b")])
    text = [{"messages": good}, {"messages": [{"role": "system", "content": "s"}, *good]}, {"messages": good}]
    with pytest.raises(InputError, match="line 2  the chat template refuses this conversation: No system messages"):
        inspect_data(recipe_of(model, write_jsonl(tmp_path / "rows.jsonl", text), tmp_path / "out", eval_fraction=0.0))


@pytest.mark.parametrize("first", ["{{ range(99999) | random }}", "{{ strftime_now('%f') }}"])
def test_a_template_that_is_never_the_same_twice_is_not_trained_on(tiny_model, rows, tmp_path, first):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(first + CHATML)
    with pytest.raises(InputError, match="does not continue the prompt that chat shows with message 1"):
        inspect_data(recipe_of(model, rows, tmp_path / "out"))


def test_an_endless_template_ends_the_processes_that_tokenize_too(tiny_model, tmp_path, little_allowed):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATES["loops in rows that are not the probe"][0])
    long = [{"messages": messages([("user", "x" * 2000), ("assistant", "b")])}] * 600  # more than a MB: in a pool
    with refused(RUNS, [model], [tmp_path / "out"], tmp_path / "canary"):
        inspect_data(recipe_of(model, write_jsonl(tmp_path / "rows.jsonl", long), tmp_path / "out", num_proc=2))


def test_after_a_template_that_was_stopped_time_and_memory_are_as_before(tokenizer_json, little_allowed):
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS)
    for what in ("nested loops", "a longer one", "a refusal"):
        with pytest.raises((InputError, ValueError)):
            templates.render(make_tokenizer(tokenizer_json, TEMPLATES[what][0]), messages([("user", "a")]))
        assert resource.getrlimit(resource.RLIMIT_AS) == before
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    end = time.process_time() + 1.2  # longer than the timer's second try
    while time.process_time() < end:
        pass
    assert len(bytearray(2 * bounded.BYTES)) > bounded.BYTES


def test_a_long_conversation_is_no_runaway_template(tokenizer_json):
    # 8 MB of text: longer than what a template may make of a short one
    tokenizer, long = make_tokenizer(tokenizer_json), "x" * 2**23
    assert templates.render(tokenizer, messages([("user", long)])) == f"<|im_start|>user\n{long}<|im_end|>\n"
