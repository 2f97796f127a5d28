"""Multimodal checkpoints: the text half is trained and exported, the rest of the folder stays what it was."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora import base_model, methods
from qlora.base_model import multimodal
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.plan import plan
from qlora.commands.push import push
from qlora.commands.train import train
from qlora.recipe import Model
from qlora.system.errors import InputError
from tests.conftest import CHATML, SHAPE, VOCAB_SIZE, make_tokenizer, some_slow
from tests.exporter.test_configs import older, read  # noqa: F401 (a fixture)

_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip
_QWEN_TOWER = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
_QWEN3_5 = {
    **SHAPE,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": _ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
}

FAMILIES = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**SHAPE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 256},
        vision_config=_TOWER,
        mm_tokens_per_image=4,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config={**SHAPE, "model_type": "mistral", "head_dim": 16},
        vision_config={**_TOWER, "model_type": "pixtral", "head_dim": 16},
        tie_word_embeddings=False,
    ),
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config={**SHAPE, "rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        tie_word_embeddings=True,
    ),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**SHAPE, "rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        vision_config={**_QWEN_TOWER, "fullatt_block_indexes": [0]},
        tie_word_embeddings=False,
    ),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(
        text_config={**SHAPE, "head_dim": 16, "rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
        vision_config={**_QWEN_TOWER, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
    ),
    "qwen3_5": lambda: transformers.Qwen3_5Config(text_config=_QWEN3_5, vision_config=_QWEN_TOWER),
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeConfig(
        text_config={**SHAPE, **_EXPERTS, "head_dim": 16, "rope_parameters": _ROPE | {"mrope_section": [3, 3, 2]}},
        vision_config={**_QWEN_TOWER, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=False,
    ),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeConfig(
        text_config={**_QWEN3_5, **_EXPERTS, "shared_expert_intermediate_size": 64}, vision_config=_QWEN_TOWER
    ),
    "gemma4": lambda: transformers.Gemma4Config(
        text_config={
            **SHAPE,
            "head_dim": 16,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 64,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=_TOWER,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config={**SHAPE, "model_type": "llama"},
        vision_config={**_TOWER, "model_type": "clip_vision_model"},
        tie_word_embeddings=False,
    ),
    "internvl": lambda: transformers.InternVLConfig(
        text_config={**SHAPE, "model_type": "qwen2"},
        vision_config={**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_json):
    """Return make(family) -> a folder that transformers' own multimodal class wrote; made once, do not write to it."""
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForImageTextToText.from_config(FAMILIES[family](), dtype=torch.bfloat16)
            with torch.no_grad():  # as in conftest: it should say something
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(5)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            make_tokenizer(tokenizer_json).save_pretrained(made[family])
            (made[family] / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessor"}')
        return made[family]

    return make


def is_text(name):
    return not any(part in name for part in ("vision", "visual", "multi_modal_projector", "mlp1"))


def whole_logits(folder, ids):
    """Return what transformers' own multimodal class makes of text."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


IDS = torch.arange(5, 45)[None]


def test_every_family_that_is_let_through_is_tested_here():
    assert set(multimodal.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_half_computes_what_the_whole_model_does(checkpoint, family):
    section = Model(name_or_path=str(checkpoint(family)))
    model = base_model.load(base_model.find(section), section, None, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, whole_logits(checkpoint(family), IDS), rtol=0, atol=1e-5
        )


EXPORTED = [
    "gemma3",
    "gemma4",
    "mistral3",
    "qwen2_5_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
]  # the others are alike


@pytest.mark.parametrize("family", some_slow(EXPORTED, but=["gemma3"]))
@pytest.mark.usefixtures("unplanned")
def test_the_text_half_is_trained_and_all_else_kept(checkpoint, family, make_recipe, tmp_path, capsys):
    folder, out = checkpoint(family), tmp_path / "out"
    excluded = ["shared_expert_gate"] if family == "qwen3_5_moe" else None  # has one row: too few for the rank
    recipe = make_recipe(model={"name_or_path": str(folder)}, lora={"exclude_modules": excluded})
    run = train(recipe)
    tensors = load_file(folder / "model.safetensors")
    others = sum(not is_text(name) for name in tensors)
    assert f"multimodal checkpoint: training the text half; {others} other tensors" in said(capsys)
    result = evaluate(run.path)
    assert result["before"]["loss"] != result["loss"]

    report = export(run.path, out, dtype="bfloat16")
    assert report["verified"]
    assert f"{others} that are not text copied unchanged" in said(capsys)
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    different = {name for name in tensors if not torch.equal(written[name], tensors[name])}
    assert different
    assert all(map(is_text, different))
    assert (out / "preprocessor_config.json").read_bytes() == (folder / "preprocessor_config.json").read_bytes()
    before, after = (json.loads((one / "config.json").read_text()) for one in (folder, out))
    added = after["text_config"].keys() - before["text_config"].keys()  # spellings of transformers 4
    assert added <= {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "num_experts",
                     "tie_word_embeddings"}  # fmt: skip
    for name in added:
        del after["text_config"][name]
    assert after == before

    checkpoint_ = base_model.find(recipe.model)
    live = methods.load(base_model.load(checkpoint_, recipe.model, recipe.quantization), run.adapter)
    base_model.to_float32(live)
    with torch.no_grad():
        exported, trained = whole_logits(out, IDS), live(input_ids=IDS).logits
        with live.disable_adapter():
            base = live(input_ids=IDS).logits
    assert (exported - trained).abs().max() < 0.2 * (base - trained).abs().max()


def as_on_the_hub(folder, out):
    """Write Qwen2.5-VL as the hub has it: settings of the text at the top, in version 4's spelling, other tensor names."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    text.pop("dtype", None)
    config |= {**text, "model_type": "qwen2_5_vl", "torch_dtype": config.pop("dtype")}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(folder / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.usefixtures("unplanned")
def test_names_and_config_of_the_hub_are_kept(checkpoint, make_recipe, tmp_path):
    folder = as_on_the_hub(checkpoint("qwen2_5_vl"), tmp_path / "hub")
    assert torch.equal(whole_logits(folder, IDS), whole_logits(checkpoint("qwen2_5_vl"), IDS))
    run = train(
        make_recipe(model={"name_or_path": str(folder)}, lora={"init_lora_weights": "loftq"})
    )  # reads the files
    assert export(run.path, tmp_path / "out", dtype="bfloat16")["verified"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    written, tensors = (load_file(one / "model.safetensors") for one in (tmp_path / "out", folder))
    assert written.keys() == tensors.keys()
    assert "visual.merger.ln_q.weight" in written
    assert "model.layers.0.mlp.up_proj.weight" in written


@pytest.mark.usefixtures("unplanned")
def test_older_names_of_the_other_half_are_known_and_kept(checkpoint, make_recipe, tmp_path):
    def as_on_the_hub(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensors.pop(name)

    section = damaged(checkpoint("gemma3"), tmp_path / "hub", as_on_the_hub)
    run = train(make_recipe(model=section.model_dump()))
    report = export(run.path, tmp_path / "out", overrides=["export.base=original"], compare_bases=True)
    assert report["verified"]
    assert [one["model"].split(",")[0] for one in report["comparison"]] == ["dequantized base", "original base"] * 2
    written, tensors = (load_file(one / "model.safetensors") for one in (tmp_path / "out", tmp_path / "hub"))
    assert written.keys() == tensors.keys()


@pytest.mark.usefixtures("unplanned")
def test_the_template_of_the_processor_is_the_one_that_is_trained(checkpoint, make_recipe, tmp_path, capsys):
    section = damaged(checkpoint("gemma3"), tmp_path / "base", lambda tensors: None)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    (tmp_path / "base" / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    run = train(make_recipe(model=section.model_dump()))
    assert "template the model's own" in said(capsys)
    export(run.path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "chat_template.json").read_text()) == {"chat_template": CHATML}
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.usefixtures("unplanned")
def test_new_tokens_grow_the_text_half_alone(checkpoint, make_recipe, tmp_path):
    folder, out = checkpoint("gemma3"), tmp_path / "out"
    new_tokens = [f"<{number}>" for number in range(VOCAB_SIZE)]  # more than the embedding has spare rows
    run = train(make_recipe(model={"name_or_path": str(folder), "new_tokens": new_tokens}))
    assert export(run.path, out)["verified"]
    config = json.loads((out / "config.json").read_text())
    num_rows = config["text_config"]["vocab_size"]
    assert num_rows > VOCAB_SIZE
    assert "vocab_size" not in config
    written = load_file(out / "model.safetensors")
    assert len(written["language_model.model.embed_tokens.weight"]) == num_rows
    assert written["vision_tower.embeddings.patch_embedding.weight"].dtype == torch.bfloat16
    assert whole_logits(out, IDS).shape[-1] == num_rows


@pytest.mark.parametrize("family", some_slow(["gemma3", "qwen3_vl"], ["qwen3_vl"]))
@pytest.mark.usefixtures("unplanned")
def test_it_is_proven_layer_by_layer_too(checkpoint, make_recipe, tmp_path, family):
    run = train(make_recipe(model={"name_or_path": str(checkpoint(family))}))
    whole = export(run.path, tmp_path / "whole", overrides=["export.verify=full"])
    layers = export(run.path, tmp_path / "layers", overrides=["export.verify=layers"])
    assert layers["verify"] == "layers"
    assert layers["merged"]["loss"] == pytest.approx(whole["merged"]["loss"], abs=1e-4)
    assert layers["merged"]["kl"] == pytest.approx(whole["merged"]["kl"], abs=1e-6)


@pytest.mark.usefixtures("unplanned")
def test_a_trained_head_is_written_where_the_whole_model_finds_it(checkpoint, make_recipe, tmp_path):
    folder, out = checkpoint("gemma3"), tmp_path / "out"  # whose head is tied
    run = train(make_recipe(model={"name_or_path": str(folder)}, lora={"modules_to_save": ["lm_head"]}))
    assert export(run.path, out)["verified"]
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_run_is_planned_and_resumed_like_any_other(checkpoint, make_recipe):
    section = {"name_or_path": str(checkpoint("mistral3"))}
    recipe = make_recipe(model=section, training={"save_steps": 1})
    assert plan(recipe)["fits"]
    train(recipe)
    longer = make_recipe(model=section, training={"save_steps": 1, "max_steps": 3})
    run = train(longer, resume=True, allow_change=["training.max_steps"])
    assert (run.checkpoints / "step-3").is_dir()


def damaged(folder, out, change):
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return Model(name_or_path=str(out))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop("language_model.model.layers.1.mlp.up_proj.weight"),
            "missing: model.layers.1.mlp.up_proj.weight",
        ),
        (lambda t: t.pop("vision_tower.post_layernorm.weight"), "vision_tower.post_layernorm.weight"),
        (
            lambda t: t.update({"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(4, 4)}),
            "not used by this architecture: model.layers.7.mlp.up_proj.weight",
        ),
        (lambda t: t.update({"robot.arm": torch.zeros(4)}), "not used by this architecture: robot.arm"),
    ],
)
def test_what_is_missing_or_left_over_is_named(checkpoint, tmp_path, change, said):
    section = damaged(checkpoint("gemma3"), tmp_path / "damaged", change)
    with pytest.raises(InputError) as error:
        base_model.load(base_model.find(section), section, None)
    assert said in str(error.value)
    assert str(error.value).count("\n") <= 2  # that tensor alone


def test_an_infinite_number_in_the_text_is_refused_and_one_elsewhere_kept(checkpoint, tmp_path):
    section = damaged(
        checkpoint("gemma3"), tmp_path / "one", lambda t: t["vision_tower.post_layernorm.bias"].fill_(torch.inf)
    )
    base_model.load(base_model.find(section), section, None)
    section = damaged(
        checkpoint("gemma3"), tmp_path / "two", lambda t: t["language_model.model.norm.weight"].fill_(torch.inf)
    )
    with pytest.raises(InputError, match=r"norm\.weight: contains non-finite values"):
        base_model.load(base_model.find(section), section, None)


def test_a_family_whose_text_half_cannot_be_had_is_called_multimodal(tmp_path):
    config = transformers.MllamaConfig(
        text_config={**SHAPE, "cross_attention_layers": [1]}, vision_config={"hidden_size": 32, "num_hidden_layers": 1}
    )
    config.save_pretrained(tmp_path)
    section = Model(name_or_path=str(tmp_path))
    with pytest.raises(InputError, match=r"multimodal checkpoint \(mllama, with vision_config"):
        base_model.load_config(base_model.find(section, weights=False), section)


def test_one_that_is_quantized_already_is_called_multimodal(checkpoint, tmp_path):
    section = damaged(checkpoint("gemma3"), tmp_path / "base", lambda tensors: None)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"a multimodal checkpoint .* that is quantized already"):
        base_model.load_config(base_model.find(section), section)


@pytest.mark.usefixtures("unplanned")
def test_gguf_of_a_multimodal_checkpoint_is_refused_before_anything_is_written(checkpoint, make_recipe, tmp_path):
    run = train(make_recipe(model={"name_or_path": str(checkpoint("gemma3"))}))
    with pytest.raises(InputError, match="multimodal"):
        export(run.path, tmp_path / "out", gguf="f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unplanned")
def test_cards_say_how_it_is_opened(checkpoint, make_recipe, tmp_path, capsys):
    run = train(make_recipe(model={"name_or_path": str(checkpoint("gemma3"))}))
    export(run.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "    from transformers import AutoModelForImageTextToText, AutoTokenizer\n" in card
    push(tmp_path / "out", "someone/gemma", dry_run=True)
    assert "preprocessor_config.json" in capsys.readouterr().out
    push(run.path, "someone/adapter", base="someone/gemma-base", dry_run=True)
    shown = capsys.readouterr().out
    assert "qlora export THIS_FOLDER --model someone/gemma-base --out MERGED" in shown
    assert "PeftModel" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl"])  # others it does not know, or names otherwise
@pytest.mark.usefixtures("unplanned")
def test_transformers_4_reads_a_whole_export_as_5_does(older, checkpoint, family, make_recipe, tmp_path):  # noqa: F811
    run = train(make_recipe(model={"name_or_path": str(checkpoint(family))}))
    export(run.path, tmp_path / "out", dtype="float32")
    assert read(tmp_path / "out", "--save", tmp_path / "read.json")[0] == 0
    code, said = read(tmp_path / "out", "--compare", tmp_path / "read.json", older=older)
    assert code == 0, said
