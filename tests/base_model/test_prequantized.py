"""Folders whose weights are 4-bit codes already, made by transformers' own save_pretrained, as base of all verbs."""

import json
import shutil

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora import base_model
from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.train import train
from qlora.exporter.model_card import adapter_card
from qlora.jobs.exporting.run_facts import origin_of
from qlora.recipe import Model, Quantization
from qlora.runs import record
from qlora.system.errors import InputError
from tests.conftest import make_tokenizer, some_slow

SKIPPED = ["lm_head", "model.layers.1.mlp.up_proj"]


@pytest.fixture(scope="session")
def prequantized(tiny_model, tokenizer_json, tmp_path_factory):
    """Return make(family, nested=True, skipped=None) -> folder of a tiny model in 4 bit; made once, do not write to it."""
    made = {}

    def make(family="llama", nested=True, skipped=None):
        key = (family, nested, skipped and tuple(skipped))
        if key not in made:
            how = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=nested,
                bnb_4bit_compute_dtype=torch.float16,
                llm_int8_skip_modules=skipped,
            )
            model = AutoModelForCausalLM.from_pretrained(
                tiny_model(family), dtype=torch.float16, device_map={"": "cpu"}, quantization_config=how
            )
            folder = tmp_path_factory.mktemp(f"{family}-4bit")
            model.save_pretrained(folder)
            make_tokenizer(tokenizer_json).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def opened(folder):
    section = Model(name_or_path=str(folder))
    return base_model.load(base_model.find(section), section, Quantization())


def opened_by_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    for module in base_model.quantized_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # it would pack the codes anew on some hosts, and compute in bfloat16
    return model


def weights_of(folder):
    """Return {name: float32 weight} of a folder, codes dequantized here with bitsandbytes alone."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    found = {}
    for name, tensor in tensors.items():
        beside = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if beside:
            state = QuantState.from_dict({f"weight.{key}": value for key, value in beside.items()}, "cpu")
            state.dtype = torch.float32
            found[name] = dequantize_4bit(tensor, state)
        elif tensor.is_floating_point() and not any(
            f".weight.{end}" in name for end in ("absmax", "quant_map", "nested")
        ):
            found[name] = tensor.bfloat16().float()  # as training holds it
    return found


CASES = [("llama", True, None), ("llama", False, None), ("llama", True, SKIPPED), ("gpt2", True, None)]


@pytest.mark.parametrize(("family", "nested", "skipped"), CASES)
def test_it_is_loaded_with_its_own_codes(prequantized, family, nested, skipped):
    folder = prequantized(family, nested, skipped)
    theirs = opened_by_transformers(folder)
    ours = opened(folder)
    floats = [parameter for parameter in ours.parameters() if parameter.is_floating_point()]
    assert {parameter.dtype for parameter in floats} == {torch.bfloat16}  # float16 in the files
    layers = base_model.quantized_modules(ours)
    assert layers.keys() == base_model.quantized_modules(theirs).keys()
    for name, module in base_model.quantized_modules(theirs).items():
        assert torch.equal(module.weight.data, layers[name].weight.data)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = (base_model.to_float32(model)(ids).logits for model in (theirs, ours))
    assert torch.equal(found, expected)


VERBS = [("llama", True, SKIPPED, "full"), ("llama-tied", False, None, "layers"), ("gpt2", True, None, "layers")]


@pytest.mark.parametrize(("family", "nested", "skipped", "verify"), some_slow(VERBS, but=VERBS[:1]))
@pytest.mark.usefixtures("unplanned")
def test_a_run_on_it_is_exported_as_its_own_codes_plus_the_adapter(
    prequantized, make_recipe, tmp_path, family, nested, skipped, verify
):
    folder = prequantized(family, nested, skipped)
    run = train(make_recipe(model={"name_or_path": str(folder)}, training={"save_steps": 1, "max_steps": 1}))
    assert run.recipe().quantization.use_double_quant is nested
    longer = make_recipe(model={"name_or_path": str(folder)}, training={"save_steps": 1, "max_steps": 2})
    run = train(longer, resume=True)
    assert [line.step for line in record.read(run) if isinstance(line, record.Step)] == [1, 2]
    assert evaluate(run.path)["loss"] > 0
    assert isinstance(chat(run.path, "What is 1 plus 1?", max_new_tokens=3), str)

    report = export(run.path, tmp_path / "out", overrides=["export.dtype=float32", f"export.verify={verify}"])
    assert (report["verified"], report["live_model"], report["verify"]) == (True, "recorded", verify)
    names = set(run.environment()["base_model"]["quantized_modules"])
    assert report["quantized"] == {"modules": len(names), "same_codes_as_training": len(names)}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())

    expected, adapter = weights_of(folder), load_file(run.adapter / "adapter_model.safetensors")
    named = {"quant_type": "nf4", "use_double_quant": nested, "compute_dtype": "bfloat16"}
    card = adapter_card("mine", "base", {"peft_type": "LORA", "r": 4}, named, origin_of(run))
    assert "trained on its weights in 4 bit (NF4)" in card
    assert "BitsAndBytesConfig" not in card  # the base's config.json has it

    prefix, end = "base_model.model.", ".lora_A.weight"
    adapted = {name.removeprefix(prefix).removesuffix(end) for name in adapter if name.endswith(end)}
    assert adapted - names == ({SKIPPED[1]} if skipped else set())
    for name in adapted:
        A, B = (adapter[f"{prefix}{name}.lora_{letter}.weight"].float() for letter in "AB")
        expected[f"{name}.weight"] += 2 * B @ A  # lora_alpha / r
        if family == "gpt2":
            expected[f"{name}.weight"] = expected[f"{name}.weight"].T
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", some_slow(["mixtral", "phi3"], ["mixtral"]))
@pytest.mark.usefixtures("unplanned")
def test_layers_that_are_joined_in_memory_go_the_same_way(prequantized, make_recipe, tmp_path, family):
    """Experts stay in 16 bit, as transformers 5 writes them; query, key and value of phi3 are one matrix."""
    run = train(make_recipe(model={"name_or_path": str(prequantized(family))}))
    assert export(run.path, tmp_path / "out")["verified"]


def test_a_plain_folder_of_codes_answers_and_is_planned(prequantized, make_recipe):
    """A plan counts a layer that stays in 16 bit as such; eval and chat take the folder as it is."""
    few = plan(make_recipe(model={"name_or_path": str(prequantized("llama"))}))
    more = plan(make_recipe(model={"name_or_path": str(prequantized("llama", True, SKIPPED))}))
    numbers, tables = 64 * 128, 16 + 256 + 2
    saved = numbers * (2 - 1 / 2 - 1 / 64) - 4 * tables
    assert more["components"]["weights"] - few["components"]["weights"] == saved
    assert isinstance(chat(str(prequantized("llama")), "What is 1 plus 1?", max_new_tokens=3), str)


# ---- what is refused -------------------------------------------------------------------------------------------------

FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
UNSUPPORTED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"quantized already \(gptq\)"),
    "awq": ({"quant_method": "awq"}, r"quantized already \(awq\)"),
    "mxfp4": ({"quant_method": "mxfp4"}, r"quantized already \(mxfp4\)"),
    "8 bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"\(bitsandbytes 8-bit\)"),
    "fp4": (FOUR_BIT | {"bnb_4bit_quant_type": "fp4"}, r"\(bitsandbytes fp4\)"),
    "fp4 by default": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes fp4\)"),
    "no method": ({"bits": 4}, r"\(of an unknown kind\)"),
    "layers that are no names": (FOUR_BIT | {"llm_int8_skip_modules": ["("]}, "llm_int8_skip_modules .* is not a list"),
    "codes in bfloat16": (FOUR_BIT | {"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage is 'bfloat16'"),
}


def changed(folder, to, **config):
    copy = shutil.copytree(folder, to)
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_quantizations_are_refused_by_name(tiny_model, tmp_path, kind):
    quantization, expected = UNSUPPORTED[kind]
    folder = changed(tiny_model("llama"), tmp_path / "model", quantization_config=quantization)
    with pytest.raises(
        InputError, match=rf"config\.json: .*{expected}.*(give the 16-bit model it was made from|again)"
    ):
        opened(folder)


NULL = "quantization: null, but config.json says bnb_4bit_quant_type: nf4"
PLAIN = "quantization.use_double_quant: true, but config.json says bnb_4bit_use_double_quant: false"
NESTED = "quantization.use_double_quant: false, but config.json says bnb_4bit_use_double_quant: true"
CONTRADICTIONS = [
    (True, {"quantization": None}, NULL),
    (True, {"quantization": {"use_double_quant": False}}, NESTED),
    (False, {"quantization": {"use_double_quant": True}}, PLAIN),
    (True, {"quantization": {"quant_type": "fp4"}}, "quantization.quant_type: fp4, but config.json says"),
    (True, {"lora": {"init_lora_weights": "loftq"}}, "lora.init_lora_weights: loftq, which needs the original weights"),
    (True, {"export": {"base": "original"}}, "export.base: original, which needs the original weights"),
]


@pytest.mark.parametrize(("nested", "sections", "expected"), CONTRADICTIONS)
def test_a_recipe_that_contradicts_the_folder_is_refused_naming_both(
    prequantized, make_recipe, nested, sections, expected
):
    recipe = make_recipe(model={"name_or_path": str(prequantized("llama", nested))}, **sections)
    for verb in (train, plan):
        with pytest.raises(
            InputError, match=f"(?s)already; the recipe has 1 problem.*{expected}.*leave it out, or give"
        ):
            verb(recipe)


@pytest.mark.usefixtures("unplanned")
def test_ranks_shrink_on_codes_too(prequantized, make_recipe, tmp_path):
    adalora = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1}
    recipe = make_recipe(
        model={"name_or_path": str(prequantized("llama", True))}, adalora=adalora, training={"max_steps": 4}
    )
    assert export(train(recipe).path, tmp_path / "out")["verified"]


def broken(name, change):
    """Return edit(tensors), which replaces tensor `name` by what `change` makes of it, or removes it."""

    def edit(tensors):
        tensors[name] = change(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    return edit


def said_otherwise(**values):
    return lambda tensor: torch.tensor(
        list(json.dumps(json.loads(bytes(tensor.tolist())) | values).encode()), dtype=torch.uint8
    )


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
BROKEN = {
    "no absmax": (broken(f"{Q}.absmax", lambda _: None), f"{Q}: no 4-bit codes, but 4-bit by config.json"),
    "no table": (broken(f"{Q}.nested_quant_map", lambda _: None), f"{Q}: {Q}.nested_quant_map is missing"),
    "no state": (broken(STATE, lambda _: None), f"{STATE} is missing"),
    "state that is no JSON": (broken(STATE, lambda tensor: tensor[:9].clone()), "is not a JSON object"),
    "state that is a list": (
        broken(STATE, lambda _: torch.tensor([91, 93], dtype=torch.uint8)),
        "is not a JSON object",
    ),
    "blocks of 128": (broken(STATE, said_otherwise(blocksize=128)), f"{Q}: blocksize is 128, only 64 is supported"),
    "another shape": (broken(STATE, said_otherwise(shape=[32, 128])), r"shape is \[32, 128\], only \[64, 64\]"),
    "other values": (
        broken(f"{Q}.quant_map", lambda tensor: tensor * 2),
        "quant_map does not hold the 16 values of NF4",
    ),
    "half the codes": (broken(Q, lambda tensor: tensor[:999].clone()), "999 numbers of U8, not 2,048 of U8"),
    "no finite constant": (
        broken(f"{Q}.nested_absmax", lambda tensor: tensor * torch.nan),
        "nested_absmax: contains non-finite",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_codes_that_cannot_be_read_right_are_refused(prequantized, tmp_path, how):
    edit, expected = BROKEN[how]
    folder = shutil.copytree(prequantized("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"(?s){expected}"):
        opened(folder)


DISAGREE = {
    "a layer in 16 bit": ({"llm_int8_skip_modules": SKIPPED}, r"up_proj\.weight: 4-bit codes, but config\.json has no"),
    "the head": ({"llm_int8_skip_modules": ["up_proj"]}, r"the head \(lm_head\) is in 4 bit, which is not supported"),
    "double quantization": ({"bnb_4bit_use_double_quant": False}, "has double quantization, but config.json says"),
}


@pytest.mark.parametrize("how", DISAGREE)
def test_a_config_that_says_otherwise_than_the_files_is_refused_before_training(
    prequantized, make_recipe, tmp_path, how
):
    says, expected = DISAGREE[how]
    stored = json.loads((prequantized("llama") / "config.json").read_text())["quantization_config"]
    folder = changed(prequantized("llama"), tmp_path / "model", quantization_config=stored | says)
    with pytest.raises(InputError, match=f"(?s){expected}.*give the 16-bit model it was made from"):
        train(make_recipe(model={"name_or_path": str(folder)}))
    assert not (tmp_path / "run").exists()


# ---- adapters of other tools -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT's, of the name that is none
@pytest.mark.parametrize("named", some_slow([True, False], [False]))
def test_a_foreign_adapter_is_proven_against_the_model_that_it_was_trained_on(prequantized, tmp_path, capsys, named):
    """Trained by plain PEFT on a folder with a layer in 16 bit, as dynamic quantizations have it."""
    folder = prequantized("llama", True, SKIPPED)
    model = opened_by_transformers(folder)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(folder) if named else "someone/else"
    model.save_pretrained(tmp_path / "foreign")
    report = export(tmp_path / "foreign", tmp_path / "out", overrides=["export.dtype=float32"], model=folder)
    assert (report["verified"], report["live_model"]) == (True, "declared" if named else "assumed")
    assert ("assumed to be the 4-bit weights of" in capsys.readouterr().err) is not named

    base_model.to_float32(model)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(written(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out2").exists()
    for options, expected in (
        ({"overrides": ["export.base=original"]}, "export.base: original, which needs the original weights"),
        ({"compare_bases": True}, "has its weights in 4 bit only; leave --compare-bases out"),
        ({"overrides": ["quantization=null"]}, NULL),
    ):
        with pytest.raises(InputError, match=expected):
            export(tmp_path / "foreign", tmp_path / "out2", model=folder, **options)
