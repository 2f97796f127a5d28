"""The recipe is a frozen value; a wrong one is refused with every problem, its line and the remedy."""

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from qlora.recipe import (
    Adalora,
    Bottleneck,
    Data,
    Dpo,
    Full,
    Hira,
    Ia3,
    Kto,
    Oft,
    Orpo,
    PrefixTuning,
    PromptTuning,
    Recipe,
    documentation,
    parse_size,
)
from qlora.system.errors import InputError

MINIMAL = "model: {name_or_path: m}\ndata: {train: d.jsonl}\noutput_dir: o\n"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def load(tmp_path, text, *overrides):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path, overrides)


def refusal(tmp_path, text, *overrides):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_on_disk_loads_and_says_what_it_costs(path):
    recipe = Recipe.load(path)
    header = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    if path.parent.name != "gpt2":  # the tutorial's
        assert recipe.quantization.quant_type == "nf4"
        assert recipe.lora.target_modules == "all-linear"
    assert "qlora train" in header
    assert "measured" in header.lower()


def test_there_are_recipes_for_the_models_people_have():
    assert {path.parent.name for path in RECIPES} >= {
        *(
            "qwen3-0.6b",
            "qwen3-4b",
            "qwen3-8b",
            "qwen3-14b",
            "llama-3.2-1b",
            "llama-3.2-3b",
            "llama-3.1-8b",
            "gemma-3-4b",
        ),
        *("mistral-7b", "phi-4-mini", "smollm3-3b", "qwen2.5-7b", "llama-2-7b", "gpt2"),
    }


def test_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load(tmp_path, MINIMAL, "training.learning_rate=3e-5", "lora.target_modules=[q_proj, v_proj]")
    assert load(tmp_path, recipe.to_yaml()) == recipe
    assert recipe.training.learning_rate == 3e-5


def test_a_recipe_cannot_be_changed(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 8


@pytest.mark.parametrize("written", ["2e-4", "2.0e-4", "0.0002", "2E-4"])
def test_numbers_are_numbers_however_they_are_written(tmp_path, written):
    # YAML 1.1 reads 2e-4 as a string
    assert load(tmp_path, f"{MINIMAL}training: {{learning_rate: {written}}}\n").training.learning_rate == 2e-4


def test_all_problems_are_reported_together_with_their_lines(tmp_path):
    text = "model: {name_or_path: m}\nlora:\n  rnak: 4\n  lora_dropout: 2\ntraining:\n  optim: adamw\noutput_dir: o\n"
    message = refusal(tmp_path, text)
    assert "has 4 problems" in message
    assert "line 3  lora.rnak: unknown field; did you mean lora.r?" in message
    assert "line 4  lora.lora_dropout: should be less than 1, found 2" in message
    assert "line 6  training.optim: 'adamw' is not one of 'paged_adamw_8bit'" in message
    assert "data: required" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lr: 1", "unknown field; did you mean training.learning_rate?"),
        ("learning_rate: 1", "did you mean training.learning_rate?"),
        ("lora: {rank: 4}", "did you mean lora.r?"),
        ("lora: {r: sixteen}", "lora.r: should be a valid integer, found 'sixteen'"),
        ("lora: {r: 1.5}", "lora.r: should be a valid integer"),
        ("lora: {r: true}", "lora.r: should be a valid integer"),
        ("lora: {r: 0}", "greater than or equal to 1"),
        ("lora: 5", "lora: should be"),
        ("training: {learning_rate: .nan}", "finite"),
        ("training: {learning_rate: -1}", "greater than 0"),
        ("training: {max_steps: 0}", "greater than or equal to 1"),
        ("training: {neftune_noise_alpha: 0}", "greater than 0"),
        ("quantization: {quant_type: nf5}", "'nf5' is not one of 'nf4', 'fp4'"),
        ("export: {base: bnb}", "'bnb' is not"),
        ("memory: {gradient_checkpointing: maybe}", "has 1 problem\n"),
        ("memory: {gradient_checkpointing: -1}", "should be auto, true, false or a number of layers, found -1"),
        ("memory: {gradient_checkpointing: 1.5}", "should be auto, true, false or a number of layers, found 1.5"),
        ("memory: {offload: 1}", "memory.offload: should be 'auto' or true or false, found 1"),
    ],
)
def test_wrong_values_are_refused_by_field(tmp_path, line, expected):
    message = refusal(tmp_path, MINIMAL + line + "\n")
    assert expected in message
    assert "line 4" in message


@pytest.mark.parametrize(
    "text",
    ["", "- a\n", "model: [\n", "a: 1\na: 2\n", "a: 1\n---\nb: 2\n", "a: !!python/object:os.system x\n", "[" * 5000],
    ids=["empty", "list", "cut off", "duplicate key", "two documents", "tag", "deep"],
)
def test_what_is_not_one_mapping_is_refused(tmp_path, text):
    assert "r.yaml" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("[<a>, <b>, <a>]", "model.new_tokens: '<a>' is listed more than once"),
        ("[<a>, '']", "model.new_tokens: '' cannot be a token; leave it out"),
        ('[<a>, " \\n"]', "model.new_tokens: ' \\n' cannot be a token; leave it out"),
        ("[]", "model.new_tokens: List should have at least 1 item"),
        ("<a>", "model.new_tokens: should be a valid list"),
        ("[1]", "model.new_tokens.0: should be a valid string"),
    ],
)
def test_new_tokens_are_texts_that_stand_once(tmp_path, tokens, expected):
    assert expected in refusal(tmp_path, MINIMAL, f"model.new_tokens={tokens}")
    assert load(tmp_path, MINIMAL, "model.new_tokens=[<a>, <b>]").model.new_tokens == ["<a>", "<b>"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.peft_type=ADALORA"], "AdaLoRA is a section of its own: adalora"),
        (["lora.init_r=8"], "lora.init_r"),
        (["adalora.r=8"], "adalora.r"),
        (["adalora={}", "lora.r=8"], "lora and adalora exclude each other; keep one"),
        (["lora=null"], "lora: null leaves nothing to train"),
        (["adalora.use_dora=true"], "adalora.use_dora"),
        (["adalora.rank_pattern={q_proj: 2}"], "adalora.rank_pattern"),
        (["adalora.init_lora_weights=eva"], "adalora.init_lora_weights"),
        (["adalora.target_r=12"], "target_r 12 must be less than init_r 12"),
        (
            ["adalora.tinit=20", "training.max_steps=20"],
            "adalora.tinit and adalora.tfinal leave no steps",
        ),
        (["adalora.tfinal=0.95"], "adalora.tinit and adalora.tfinal leave no steps"),
        (["lora.modules_to_save=[]"], "lora.modules_to_save: List should have at least 1 item"),
        (["lora.rank_pattern={q_proj: 0}"], "lora.rank_pattern.q_proj: should be greater than or equal to 1"),
        (["lora.alpha_pattern={q_proj: -1}"], "lora.alpha_pattern.q_proj: should be greater than 0"),
        (["lora.layers_to_transform=[1]", "lora.target_modules=.*_proj"], "layers_to_transform is for a list"),
        (["lora.bias=lora"], "lora.bias: 'lora' is not one of 'none', 'all', 'lora_only'"),
        (["lora.use_dora=true", "lora.lora_bias=true"], "use_dora and lora_bias exclude each other"),
        (["lora.use_dora=true", "lora.init_lora_weights=loftq"], "use_dora and init_lora_weights loftq exclude each"),
        (["lora.init_lora_weights=orthogonal", "lora.r=5"], "init_lora_weights orthogonal needs even ranks"),
        (["lora.init_lora_weights=orthogonal", "lora.rank_pattern={q_proj: 3}"], "needs even ranks"),
        (["lora.init_lora_weights=mica"], "lora.init_lora_weights: 'mica' is not one of True, 'gaussian'"),
        (["lora.init_lora_weights=false"], "lora.init_lora_weights: False is not one of True"),
        (["lora.init_lora_weights=pissa"], "lora.init_lora_weights pissa needs a 16-bit base"),
        (
            ["lora.init_lora_weights=loftq", "quantization=null"],
            "lora.init_lora_weights loftq corrects a quantized base",
        ),
        (["lora.ensure_weight_tying=true"], "ensure_weight_tying is for modules_to_save"),
        (["lora.target_parameters=[x]"], "lora.target_parameters: unknown field"),
    ],
)
def test_adapter_settings_that_do_not_go_together_are_refused(tmp_path, overrides, expected):
    assert expected in refusal(tmp_path, MINIMAL, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adalora.init_r=8", "adalora.target_r=4", "adalora.tinit=10", "adalora.tfinal=0.2"],
        ["lora.use_dora=true", "lora.rank_pattern={q_proj: 8}", "lora.alpha_pattern={q_proj: 16}", "lora.bias=all"],
        ["lora.init_lora_weights=pissa", "quantization=null"],
        ["lora.init_lora_weights=loftq", "lora.modules_to_save=[lm_head]", "lora.layers_to_transform=[0, 1]"],
    ],
)
def test_a_recipe_of_any_kind_reads_back_equal(tmp_path, overrides):
    recipe = load(tmp_path, MINIMAL, *overrides)
    assert load(tmp_path, recipe.to_yaml()) == recipe


def test_eval_and_eval_fraction_exclude_each_other(tmp_path):
    assert "exclude each other" in refusal(tmp_path, MINIMAL, "data.eval=e.jsonl", "data.eval_fraction=0.1")


def test_an_override_that_is_wrong_says_so(tmp_path):
    assert "override  lora.r" in refusal(tmp_path, MINIMAL, "lora.r=x")
    assert "is not of the form" in refusal(tmp_path, MINIMAL, "lora.r")
    assert "lora.rr: unknown field" in refusal(tmp_path, MINIMAL, "lora.rr=1")


def test_an_override_reaches_a_section_that_the_file_leaves_out(tmp_path):
    recipe = load(tmp_path, MINIMAL, "lora.r=8", "quantization=null")
    assert recipe.lora.r == 8
    assert recipe.quantization is None


@pytest.mark.parametrize(
    ("path", "expected"), [("", "should not be blank"), ("~/x", "a full path"), ("a\0b", "U+0000")]
)
def test_a_file_of_rows_given_as_an_option_is_refused_by_its_name(path, expected):
    with pytest.raises(InputError, match="--data ") as caught:
        Data.of_file(path, {"max_length": 64})
    assert expected in str(caught.value)
    assert Data.of_file("a.jsonl", {"max_length": 64}) == Data(train="a.jsonl", max_length=64)


def test_a_missing_file_is_one_clear_message(tmp_path):
    with pytest.raises(InputError, match=r"no recipe at .*; give the path of a YAML file$"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(InputError, match=r"no recipe at .*; did you mean .*mine\.yaml\?$"):
        Recipe.load(tmp_path / "mine.yml")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_an_input_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError):
        Recipe.load(path)


def test_the_page_of_the_recipe_is_made_from_the_fields():
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert documentation.table() in page, "write it with: python -m qlora.recipe.documentation docs/recipe.md"


def test_every_field_is_documented_with_its_default():
    rows = re.findall(r"^\| `([\w.]+)` \|([^|]*)\|(.*)\|$", documentation.table(), flags=re.MULTILINE)
    documented = {name: default for name, default, _ in rows}
    assert all(words.strip() for *_, words in rows)
    recipe = Recipe.from_dict({"model": {"name_or_path": "m"}, "data": {"train": "d"}, "output_dir": "o"}).model_dump()
    fields = {name: value for name, value in recipe.items() if not isinstance(value, dict)}
    others = [Adalora, Ia3, Oft, Hira, Full, Bottleneck, PrefixTuning, PromptTuning, Dpo, Kto, Orpo]
    recipe |= {section.key: section().model_dump() for section in others}
    fields = {name: value for name, value in fields.items() if name not in {section.key for section in others}}
    fields |= {f"{name}.{field}": value for name, section in recipe.items() if isinstance(section, dict)
               for field, value in section.items()}  # fmt: skip
    assert documented.keys() == fields.keys()
    for field, value in fields.items():
        if field not in {"model.name_or_path", "data.train", "output_dir"}:
            assert yaml_value(documented[field]) == value, field


def choices_of(annotation):
    if get_origin(annotation) is Literal:
        return {choice for choice in get_args(annotation) if isinstance(choice, str)}
    return set() if get_origin(annotation) is dict else set().union(*map(choices_of, get_args(annotation)))


def fields_of(section, prefix=""):
    for name, field in section.model_fields.items():
        inner = documentation._section_of(field.annotation)
        yield from fields_of(inner, f"{name}.") if inner is not None else [(f"{prefix}{name}", field)]


def test_every_choice_of_a_field_is_named_in_its_words():
    fields = dict(fields_of(Recipe))
    assert choices_of(fields["training.optim"].annotation) > {"adamw_8bit", "paged_lion_8bit"}
    for name, field in fields.items():
        if name != "model.dtype":  # its words name the field whose choices it has
            said = f"{field.description} {field.default}"
            assert not [choice for choice in choices_of(field.annotation) if choice not in said], name


def yaml_value(text):
    return YAML(typ="safe", pure=True).load(text.strip())


def test_sizes_are_read_as_people_write_them():
    assert [parse_size(text) for text in ("5GB", "500MiB", "1.5 kb")] == [5 * 10**9, 500 * 2**20, 1500]
    for wrong in ("5", "GB", "-1GB", "5 bananas", ""):
        with pytest.raises(ValueError, match="give a size such as 5GB"):
            parse_size(wrong)
