"""Adapter folders that are broken or hostile, and arguments that are swapped: refused by every verb that reads them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import methods
from qlora.commands.adapters import adapters
from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.jobs.opening.opened_adapter import open_trained
from qlora.jobs.opening.routed import open_routed
from qlora.system import bounded
from qlora.system.errors import InputError
from tests.conftest import CONVERSATIONS, messages, some_slow, write_jsonl
from tests.faults.folders import (
    DEEP,
    POINTER,
    WEB_PAGE,
    cutting,
    digests,
    refused,
    removing,
    setting,
    with_tensors,
    writing,
)
from tests.faults.test_models import recipe_of

WEIGHTS, CONFIG, MANIFEST = methods.WEIGHTS, methods.CONFIG, methods.MANIFEST
UP = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rows = [{"messages": messages(turns)} for turns in CONVERSATIONS]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def trained(tiny_model, rows, tmp_path_factory):
    return train(recipe_of(tiny_model("llama"), rows, tmp_path_factory.mktemp("trained") / "run")).path


@pytest.fixture(scope="module")
def routed(trained):
    """A run that is open, for what is to be laid beside its adapter."""
    return open_routed(trained)


@pytest.fixture
def broken(trained, tmp_path):
    """Return broken(how) -> a copy of the run whose adapter is broken so, and no longer sealed: as of another tool."""

    def make(how, sealed=False):
        run = shutil.copytree(trained, tmp_path / "run")
        if not sealed:
            (run / "adapter" / MANIFEST).unlink()
        how(run / "adapter")
        return run

    return make


def loading(run, routed, **_):
    before = routed.default, routed.adapters
    try:
        routed.load("other", run)
    finally:
        assert (routed.default, routed.adapters) == before, "something changed"


VERBS = {
    "chat": lambda run, **_: chat(run, "What is 1 plus 2?", max_new_tokens=2),
    "eval": lambda run, **_: evaluate(run, max_rows=2),
    "export": lambda run, out, **_: export(run, out),
    "export of the folder": lambda run, out, model, **_: export(run / "adapter", out, model=model),
    "export of a sum": lambda run, out, trained, **_: export([f"{trained}:0.5", f"{run}:0.5"], out),
    "load": loading,
}


def tensors(change):
    return with_tensors(WEIGHTS, change)


def config(**changes):
    return setting(CONFIG, **changes)


def number(value):
    def change(found):
        found[UP.format("A")][0, 0] = value

    return tensors(change)


def without(part):
    return tensors(lambda found: {key: found[key] for key in found if part not in key})


def pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def fifo(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def layer_7(found):
    return found | {key.replace("layers.0", "layers.7"): found[key].clone() for key in map(UP.format, "AB")}


# how it is broken: (what does it, what the message says)
BROKEN = {
    "no weights": (removing(WEIGHTS), f"no {WEIGHTS}; copy or download it again"),
    "weights cut": (cutting(WEIGHTS, 1), f"{WEIGHTS} is not a complete safetensors file .*copy or download it again"),
    "weights empty": (writing(WEIGHTS, b""), f"{WEIGHTS} is empty"),
    "weights a web page": (writing(WEIGHTS, WEB_PAGE), f"{WEIGHTS} is a web page"),
    "weights a pointer": (writing(WEIGHTS, POINTER), f"{WEIGHTS} is a Git LFS pointer.*`git lfs pull`"),
    "weights a pipe": (fifo, f"no {WEIGHTS}"),
    "a pickle only": (pickle, "adapter_model.bin is a pickle, which is never read"),
    "NaN": (number(float("nan")), "up_proj.lora_A.weight: contains non-finite values"),
    "infinity": (number(float("-inf")), "up_proj.lora_A.weight: contains non-finite values"),
    "whole numbers": (tensors(lambda found: {k: v.to(torch.int32) for k, v in found.items()}), "is int32, not floating"),
    "no tensors": (lambda folder: save_file({}, folder / WEIGHTS), "no LoRA tensors"),
    "names that match nothing": (
        tensors(lambda found: {key.replace("layers", "blocks"): found[key] for key in found}),
        r"made for another base; it has 14 problems\n  model.blocks.0.mlp.down_proj",
    ),
    "a layer that the base has not": (tensors(layer_7), "made for another base; it has 1 problem\n  model.layers.7.mlp.up_proj"),
    "a tensor of something else": (tensors(lambda found: {**found, "hello": torch.ones(3)}), "hello: not a tensor of an adap"),
    "every A gone": (without("lora_A"), "has lora_B but not its partner lora_A"),
    "one layer gone": (
        without("layers.1.mlp.up_proj"),
        f"incomplete; it has 1 problem\n  model.layers.1.mlp.up_proj: target_modules in {CONFIG} names it",
    ),
    "half the layers gone": (without("layers.1."), "incomplete; it has 7 problems"),
    "another shape": (
        tensors(lambda found: {**found, UP.format("A"): torch.ones(4, 32)}), r"made for another base.*up_proj.*32\).*64\)"
    ),
    "three dimensions": (tensors(lambda found: {k: v[None].clone() for k, v in found.items()}), "the rank differs from r = 4"),
    "another rank": (config(r=8), rf"A \(4, 128\) and B \(64, 4\): the rank differs from r = 8 in {CONFIG}"),
    "config cut": (cutting(CONFIG, 9), f"{CONFIG} is not JSON"),
    "config a list": (writing(CONFIG, "[]"), f"{CONFIG} contains a list, not a JSON object"),
    "config a pointer": (writing(CONFIG, POINTER), f"{CONFIG} is a Git LFS pointer"),
    "config nested deeply": (writing(CONFIG, DEEP), f"{CONFIG} is nested too deeply"),
    "r below zero": (config(r=-1), f"{CONFIG} has 1 problem\n  r is -1"),
    "half an r": (config(r=4.5), "r is 4.5"),
    "r as text": (config(r="4"), "r is '4'"),
    "a trillion ranks": (config(r=10**12), "r is 1000000000000"),
    "alpha not a number": (config(lora_alpha=float("nan")), "is not JSON: NaN, which is not a number"),
    "infinite alpha": (config(lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha of 1e300": (config(lora_alpha=1e300), r"lora_alpha is 1e\+300"),
    "alpha below zero": (config(lora_alpha=-8), "lora_alpha is -8"),
    "infinite alpha of some": (config(alpha_pattern={"up_proj": float("inf")}), "alpha_pattern gives 'up_proj' the value inf"),
    "rank of some as text": (config(rank_pattern={"up_proj": "x"}), "rank_pattern gives 'up_proj' the value 'x'"),
    "patterns in a list": (config(rank_pattern=[1]), r"rank_pattern is \[1\]"),
    "a pattern that is none": (config(alpha_pattern={"(((": 3}), "alpha_pattern: missing"),
    "a pattern that never ends": (config(alpha_pattern={"(.*.*.*.*.*.*.*)*x": 3}), "takes more than 0.1 seconds"),
    "targets that never end": (config(target_modules="(.*.*.*.*.*.*.*)*x"), "takes more than 0.1 seconds"),
    "targets that are numbers": (config(target_modules=[1, 2]), r"target_modules \[1, 2\] is neither"),
    "another kind": (config(peft_type="LOHA"), "peft_type 'LOHA' is not ADALORA, .* or PROMPT_TUNING"),
    "no kind": (config(peft_type=["LORA"]), r"peft_type \['LORA'\] is not"),
    "a field of a later version": (config(evil_field=True), "uses evil_field, which is not supported"),
    "a start that changed the base": (config(init_lora_weights="pissa"), "'pissa' changed the base weights"),
    "DoRA without magnitudes": (config(use_dora=True), "not its partner lora_magnitude_vector"),
    "AdaLoRA without E": (config(peft_type="ADALORA", init_r=4, target_r=4, total_step=2), "partner lora_E|uses"),
    "rows of tokens that are missing": (config(trainable_token_indices=[1, 2]), "their rows are missing"),
}  # fmt: skip


# the three readers: of a run, of a folder, and beside an adapter that is there; the other verbs where one of them differs
READERS = ["chat", "export of the folder", "load"]
EVERYWHERE = ["weights a pointer", "NaN", "one layer gone", "another shape", "a pattern that is none", "infinite alpha"]
CASES = [(how, verb) for how in BROKEN for verb in (VERBS if how in EVERYWHERE else READERS)]


# each fault by one reader in turn, and one of them by every verb
IN_CI = [(how, READERS[at % 3]) for at, how in enumerate(BROKEN)] + [(EVERYWHERE[0], verb) for verb in VERBS]


@pytest.mark.parametrize(("how", "verb"), some_slow(CASES, but=IN_CI), ids=[f"{how}, {verb}" for how, verb in CASES])
def test_a_broken_adapter_is_refused(broken, trained, routed, tiny_model, tmp_path, monkeypatch, how, verb):
    monkeypatch.setattr(bounded, "SECONDS", 0.1)
    change, expected = BROKEN[how]
    run, model = broken(change), tiny_model("llama")
    with refused(f"(?s){expected}", [run, trained, model], [tmp_path / "out"], tmp_path / "canary"):
        VERBS[verb](run=run, out=tmp_path / "out", trained=trained, model=model, routed=routed)


@pytest.mark.parametrize("how", ["no weights", "weights cut", "weights a pointer", "a pickle only", "config cut"])
def test_a_broken_adapter_is_listed_as_damaged(broken, how):
    change, expected = BROKEN[how]
    (found,) = adapters(broken(change))
    assert found["state"].startswith("damaged: ")
    assert expected.partition(" .*")[0].partition(".*")[0] in found["state"]


CHANGED = {
    "weights": (tensors(lambda found: {key: value * 2 for key, value in found.items()}), WEIGHTS),
    "alpha": (config(lora_alpha=64), CONFIG),
    "template": (writing("chat_template.jinja", "{{ messages[0].content }}"), "chat_template.jinja"),
    "tokenizer gone": (removing("tokenizer.json"), "tokenizer.json"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", CHANGED)
def test_an_adapter_that_was_changed_after_its_training_is_refused(
    broken, trained, routed, tiny_model, tmp_path, how, verb
):
    change, name = CHANGED[how]
    run = broken(change, sealed=True)
    with refused(
        f"adapter {run}/adapter: {name} changed since the training; .*remove .*manifest.json",
        [run],
        [tmp_path / "out"],
        tmp_path / "canary",
    ):
        VERBS[verb](run=run, out=tmp_path / "out", trained=trained, model=tiny_model("llama"), routed=routed)


def test_a_change_on_purpose_is_taken_once_the_seal_is_removed(broken, trained, tmp_path):
    run = broken(CHANGED["weights"][0])
    changed, as_trained = (export(one, tmp_path / f"{name}") for name, one in (("a", run), ("b", trained)))
    assert changed["verified"]
    assert as_trained["verified"]
    norms = [[module["delta_norm"] for module in report["modules"]] for report in (changed, as_trained)]
    assert norms[0] == pytest.approx([4 * norm for norm in norms[1]], rel=1e-2)  # twice A times twice B


SOUND = {
    "fields that say nothing": config(peft_version="9.9", task_type=None, evil_field=None),
    "code named in the config": config(auto_mapping={"base_model_class": "evil", "parent_library": "evil"}),
    "a base of another name": config(base_model_name_or_path="/nowhere/evil"),
    "a pickle beside the weights": writing("adapter_model.bin", b"cos\nsystem\n"),
    "leaf names": config(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]),
}


@pytest.mark.parametrize("how", SOUND)
def test_an_adapter_that_is_only_unusual_is_the_same_model(broken, trained, tiny_model, how):
    run = broken(SOUND[how])
    before = digests(run)
    assert chat(run, "What is 1 plus 2?", max_new_tokens=4) == chat(trained, "What is 1 plus 2?", max_new_tokens=4)
    found, as_ever = (open_trained([one / "adapter"], tiny_model("llama")).adapter.updates for one in (run, trained))
    assert found.keys() == as_ever.keys()
    assert all(torch.equal(found[name].B_OR, as_ever[name].B_OR) for name in found)
    assert digests(run) == before


def test_layers_left_out_of_the_training_are_not_missed(tiny_model, rows, tmp_path):
    recipe = recipe_of(tiny_model("llama"), rows, tmp_path / "run")
    lora = {"exclude_modules": ["up_proj"], "layers_to_transform": [1]}
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update=lora)})
    run = train(recipe)
    assert len(methods.read(run.adapter).updates) == 6
    assert export(run.path, tmp_path / "out")["verified"]


# ---- arguments in each other's place ---------------------------------------------------------------------------------


def swapped(trained, model, out):
    data = trained / "data_report.json"
    return {
        "export MODEL": (lambda: export(model, out), "is not a run folder|no recipe.yaml"),
        "export MODEL --model ADAPTER": (lambda: export(model, out, model=trained / "adapter"), "is not a run folder"),
        "export ADAPTER": (lambda: export(trained / "adapter", out), rf"is an adapter; name the model.*--model .*{model.name}"),
        "export ADAPTER --model ADAPTER": (
            lambda: export(trained / "adapter", out, model=trained / "adapter"), r"is an adapter, not a model.*give the model"
        ),
        "export ADAPTER --model RUN": (lambda: export(trained / "adapter", out, model=trained), "no config.json"),
        "export RUN --model MODEL": (lambda: export(trained, out, model=model), "is a run, which records its base"),
        "export RUN --out MODEL": (lambda: export(trained, model), "is not empty; export never overwrites"),
        "export FILE": (lambda: export(data, out), "is not a run folder"),
        "chat ADAPTER": (lambda: chat(trained / "adapter", "x"), "is an adapter, not a model"),
        "eval ADAPTER": (lambda: evaluate(trained / "adapter", data), "is an adapter, not a model"),
        "eval MODEL": (lambda: evaluate(model), "no held-out rows"),
        "adapters FILE": (lambda: adapters(data), "no folder"),
    }  # fmt: skip


@pytest.mark.parametrize("which", swapped(*[Path("x")] * 3))
def test_swapped_arguments_are_refused(trained, tiny_model, tmp_path, which):
    model = tiny_model("llama")
    call, expected = swapped(trained, model, tmp_path / "out")[which]
    with refused(f"(?s){expected}", [trained, model], [tmp_path / "out"], tmp_path / "canary"):
        call()


def test_an_adapter_of_another_base_is_refused(trained, tiny_model, rows, routed, tmp_path):
    other = tiny_model("qwen3")
    differs = r"not the base that .* was trained on \(config.json, model.safetensors differ\)"
    remedy = r".* with --model, or, if it was changed on purpose, remove .*manifest.json"
    with refused(differs + remedy, [trained, other], [tmp_path / "out"], tmp_path / "canary"):
        export(trained / "adapter", tmp_path / "out", model=other)
    with pytest.raises(InputError, match=differs):
        chat(trained, "x", overrides=[f"model.name_or_path={other}"])
    run = train(recipe_of(other, rows, tmp_path / "run"))
    with pytest.raises(InputError, match="trained on another base than"):
        routed.load("other", run.path)


def test_an_adapter_of_another_tool_for_a_base_of_other_shapes_is_refused(broken, tiny_model, tmp_path):
    run, other = broken(lambda folder: None), tiny_model("gpt2")
    with refused("made for another base; it has 14 problems", [run, other], [tmp_path / "out"], tmp_path / "canary"):
        export(run / "adapter", tmp_path / "out", model=other)


def test_the_seal_lists_every_file_of_the_adapter(trained):
    sealed = json.loads((trained / "adapter" / "manifest.json").read_text())
    assert sealed["files"].keys() == {path.name for path in (trained / "adapter").iterdir()} - {"manifest.json"}
    assert sealed["base"] == json.loads((trained / "environment.json").read_text())["base_model"]["sha256"]
