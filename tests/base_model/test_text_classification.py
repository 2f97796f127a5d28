"""A base model under a head for classes: what is new in it, what is quantized, and which files are taken for it."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qlora import base_model, methods
from qlora.base_model import Task
from qlora.recipe import Lora, Model, Quantization
from qlora.system.errors import InputError

HEADS = {
    "bert": ["bert.pooler", "classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "modernbert": ["head", "classifier"],
    "llama": ["score"],
}
TASK = Task("text-classification", ("a", "b", "c"), 7)


def opened(folder, task=TASK, quantization=Quantization()):  # noqa: B008 (frozen)
    section = Model(name_or_path=str(folder))
    return base_model.load(base_model.find(section, task=task), section, quantization)


@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_new_in_16_bit_trained_whole_and_all_else_is_the_bases(tiny_base, family):
    model = opened(tiny_base(family))
    assert base_model.task_of(model).head_names(model) == HEADS[family]
    in_head = lambda name: name.startswith(tuple(f"{one}." for one in HEADS[family]))  # noqa: E731
    assert not any(map(in_head, base_model.linear_names(model)))
    assert set(base_model.quantized_modules(model)) == set(base_model.linear_names(model))
    section = Model(name_or_path=str(tiny_base(family)))
    checkpoint = base_model.find(section, task=TASK)
    config = base_model.load_config(checkpoint, section)
    assert base_model.names_to_quantize(config, section) == list(base_model.quantized_modules(model))
    files = load_file(tiny_base(family) / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in files and parameter.is_floating_point():
            assert torch.equal(parameter, files[name]), name
        elif parameter.is_floating_point():
            assert in_head(name), name
    attached = methods.attach(model, Lora(r=4))
    trained = {name for name, parameter in attached.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if ".modules_to_save." in name}
    assert {name.removeprefix("base_model.model.").split(".modules_to_save")[0] for name in whole} == set(HEADS[family])
    assert trained - whole == {name for name in trained if ".lora_" in name}
    assert sorted(attached.peft_config["default"].modules_to_save) == sorted(HEADS[family])


def test_a_new_head_is_drawn_by_the_seed(tiny_base):
    one, same, other = (
        opened(tiny_base("llama"), Task("text-classification", ("a", "b"), seed)).score.weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.float().std() == pytest.approx(0.02, rel=0.3)


def test_the_head_of_a_classifier_is_kept_for_its_classes_and_new_for_others(tiny_base, tmp_path):
    config = transformers.AutoConfig.from_pretrained(tiny_base("bert"))
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    transformers.BertForSequenceClassification(config).bfloat16().save_pretrained(tmp_path)
    shutil.copy(tiny_base("bert") / "tokenizer.json", tmp_path)
    shutil.copy(tiny_base("bert") / "tokenizer_config.json", tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    for labels, kept in ((("no", "yes"), True), (("yes", "no"), False), (("a", "b", "c"), False), ((), True)):
        model = opened(tmp_path, Task("text-classification", labels), None)
        assert torch.equal(model.bert.pooler.dense.weight, files["bert.pooler.dense.weight"])
        found = model.classifier.weight
        assert (
            found.shape == files["classifier.weight"].shape and torch.equal(found, files["classifier.weight"])
        ) == kept
        assert list(model.config.id2label.values()) == list(labels or ("no", "yes"))
    with pytest.raises(InputError, match=r"a model for text-classification .* set task: text-classification"):
        opened(tmp_path, Task())
    for problem in ("regression", "multi_label_classification"):
        settings = json.loads((tmp_path / "config.json").read_text()) | {"problem_type": problem}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match=f"problem_type is {problem}; only single_label"):
            opened(tmp_path)


def test_a_missing_layer_is_no_new_head(tiny_base, tmp_path):
    shutil.copytree(tiny_base("bert"), tmp_path / "cut")
    files = load_file(tmp_path / "cut" / "model.safetensors")
    del files["bert.encoder.layer.1.output.dense.weight"]
    save_file(
        files | {"bert.encoder.extra.weight": torch.zeros(2)}, tmp_path / "cut" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "cut", quantization=None)
    assert "missing: bert.encoder.layer.1.output.dense.weight" in str(caught.value)
    assert "not used by this architecture: bert.encoder.extra.weight" in str(caught.value)


def test_a_decoder_in_4_bit_has_no_room_for_a_head_in_16(tiny_base, tmp_path):
    # unslothai/unsloth#5027: transformers makes the new head 4-bit too, and fails in the middle of its random numbers
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                               llm_int8_skip_modules=["lm_head"])  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base("llama"), quantization_config=four_bit)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base("llama") / name, tmp_path)
    with pytest.raises(InputError, match=r"the head \(score\) is in 4 bit.*give the 16-bit model"):
        opened(tmp_path)


def test_an_architecture_without_a_classifier_is_refused(tiny_model):
    with pytest.raises(InputError, match="transformers has no ForSequenceClassification for 'mamba'"):
        opened(tiny_model("mamba"))
