"""model.adapter_name_or_path: an adapter is trained further as what it is, on the base that it was trained on."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from qlora import evaluate, methods
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.system.errors import InputError
from tests.conftest import recipe_in, some_slow

CASES = {
    "lora": {"lora": {"r": 4, "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.1}},
    "dora": {"lora": {"r": 4, "use_dora": True, "modules_to_save": ["lm_head"]}},
    "loftq": {"lora": {"r": 4, "init_lora_weights": "loftq"}},
    "pissa": {"lora": {"r": 4, "init_lora_weights": "pissa"}, "quantization": None},
    "ia3": {"ia3": {}},
    "oft": {"oft": {}},
    "hira": {"hira": {"r": 4}},
    "prompt tuning": {"prompt_tuning": {"num_virtual_tokens": 4}},
    "prefix tuning": {"prefix_tuning": {"num_virtual_tokens": 4}},
    "bottleneck": {"bottleneck": {"size": 8}},
}


@pytest.fixture(scope="module")
def started(tiny_model, tmp_path_factory):
    """Return started(sections) -> a run of two steps; each made once, do not write to it."""
    made = {}

    def make(**sections):
        key = repr(sections)
        if key not in made:
            made[key] = train(recipe_in(tmp_path_factory.mktemp("first"), tiny_model(), sections))
        return made[key]

    return make


@pytest.fixture
def further(make_recipe, tmp_path, unplanned):
    """Return further(start, **sections) -> a run of a recipe without a method that begins with the adapter `start`."""

    def make(start, family="llama", name="second", training=None, **sections):
        recipe = make_recipe(family, ia3={}, **({} if "quantization" not in sections else {"quantization": None}),
                             training=training or {}, output_dir=str(tmp_path / name))  # fmt: skip
        values = recipe.model_dump(exclude_unset=True)
        values |= {"lora": sections["lora"]} if "lora" in sections else {}
        values["model"]["adapter_name_or_path"] = str(start)
        del values["ia3"]
        return train(type(recipe).from_dict(values))

    return make


@pytest.mark.parametrize("case", some_slow(CASES, but=("lora", "prompt tuning")))
def test_each_method_goes_on_where_it_was(started, further, tmp_path, case):
    run = started(**CASES[case])
    quantized = {} if "quantization" not in CASES[case] else {"quantization": None}
    # at a learning rate that hardly moves anything what was there is still there
    same = further(run.path, training={"learning_rate": 1e-6, "max_steps": 1}, name="same", **quantized)
    before, after = (load_file(one.adapter / methods.WEIGHTS) for one in (run, same))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=1e-3)


def test_it_learns_on_and_is_evaluated_and_exported_as_ever(started, further, tmp_path):
    run = started(**CASES["lora"])
    more = further(run.path, training={"max_steps": 4})
    section = more.recipe().lora
    assert (section.r, section.rank_pattern) == (4, {"q_proj": 2})
    assert evaluate(more.path)["loss"] < evaluate(run.path)["loss"]
    assert export(more.path, tmp_path / "out")["verified"]


def test_the_fit_of_loftq_to_its_base_is_not_forgotten(started, further):
    run = started(**CASES["loftq"])
    assert further(run.path, training={"max_steps": 1}).recipe().method.corrects_quantization


def test_an_adapter_folder_of_peft_goes_on(started, further, tmp_path):
    run = started(lora={"r": 4, "use_rslora": True})
    shutil.copytree(run.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "manifest.json").unlink()
    assert further(tmp_path / "adapter").recipe().lora.use_rslora


def test_what_it_was_trained_with_may_be_said_again_and_how_may_change(started, further):
    run = started(lora={"r": 4})
    assert (
        further(run.path, lora={"r": 4, "lora_dropout": 0.2, "loraplus_lr_ratio": 8}).recipe().lora.lora_dropout == 0.2
    )


def test_another_rank_base_or_quantization_is_refused_by_name(started, further, make_recipe, tmp_path):
    run = started(lora={"r": 4})
    with pytest.raises(InputError, match=r"lora.r: 8, but .* has 4"):
        further(run.path, lora={"r": 8})
    with pytest.raises(InputError, match=r"not the base that .*run was trained on"):
        further(run.path, family="qwen2")
    with pytest.raises(InputError, match=r"quantization: null, but .*run was trained on a base with quant_type nf4"):
        further(run.path, quantization=None)
    with pytest.raises(InputError, match="neither a finished run nor an adapter folder"):
        further(tmp_path / "nowhere")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adalora": {"init_r": 6, "target_r": 3, "tinit": 0, "tfinal": 0}}, "its ranks have shrunk"),
        ({"full": {}, "quantization": None}, "is a model, not an adapter; train it further with model.name_or_path="),
    ],
)
def test_what_cannot_go_on_says_why(started, further, sections, said):
    run = started(**sections)
    with pytest.raises(InputError, match=said):
        further(run.path, **({"quantization": None} if "quantization" in sections else {}))


def test_it_resumes_unless_the_adapter_was_changed(started, further, tmp_path):
    first = shutil.copytree(started(lora={"r": 4}).path, tmp_path / "first")
    more = further(first, training={"max_steps": 1})
    recipe = more.recipe()
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 2})})
    train(longer, resume=True)
    weights = load_file(first / "adapter" / methods.WEIGHTS)
    shutil.rmtree(first / "adapter")
    shutil.copytree(more.adapter, first / "adapter")  # another one with the same tensors
    assert load_file(first / "adapter" / methods.WEIGHTS).keys() == weights.keys()
    longest = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": 3})})
    with pytest.raises(InputError, match="adapter: was"):
        train(longest, resume=True)
