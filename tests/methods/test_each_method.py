"""What holds for each method through PEFT but LoRA: it computes what PEFT does, loads, and merges into one layer."""

import pytest
import torch
import transformers
from peft import HiraConfig, IA3Config, OFTConfig, PeftModel, get_peft_model

from qlora import base_model, methods
from qlora.evaluation.generate import answers
from qlora.recipe import Bottleneck, Hira, Ia3, Oft, PrefixTuning, PromptTuning
from qlora.system.errors import InputError
from tests.conftest import some_slow

IDS = torch.arange(4, 60)[None]
# section -> PEFT's own config of the same; how far a random number is from where it starts
PEFT = {
    Ia3(): IA3Config(task_type="CAUSAL_LM"),
    Oft(): OFTConfig(task_type="CAUSAL_LM", target_modules="all-linear", oft_block_size=32, r=0),
    Oft(use_cayley_neumann=False): OFTConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", oft_block_size=32, r=0, use_cayley_neumann=False
    ),
    Hira(r=4): HiraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4),
}
each_section = pytest.mark.parametrize("section", PEFT, ids=lambda section: section.key)
CASES = [(family, section) for family in ("llama", "gpt2", "qwen2") for section in PEFT]
each_case = pytest.mark.parametrize(
    ("family", "section"),
    some_slow(CASES, [case for case in CASES if case[0] != "llama" and case[1] != Ia3()]),
    ids=lambda one: one if isinstance(one, str) else one.key,
)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def shake(model):
    """Put random numbers near their start into all that is trained."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float(".ia3_l." in name), std=0.1)
    return model


@pytest.fixture
def trained(load_model, tmp_path):
    """Return trained(family, section, quantized=True) -> (model with random numbers in the method, its folder)."""

    def make(family, section, quantized=True):
        model = load_model(family) if quantized else load_model(family, None)
        model = shake(methods.attach(model, section))
        methods.save(model, tmp_path / section.key, "base", None)
        return model.eval(), tmp_path / section.key

    return make


@each_section
def test_it_computes_in_float32_what_peft_computes(load_model, section):
    ours = shake(methods.attach(base_model.to_float32(load_model("llama")), section))
    theirs = get_peft_model(base_model.to_float32(load_model("llama")), PEFT[section])
    numbers = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(numbers[name])
    found = []
    for model in (ours, theirs):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss, *(p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad)])
    assert len(found[0]) > 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@each_section
def test_plain_peft_opens_the_folder(trained, load_model, section):
    model, folder = trained("llama", section)
    theirs = PeftModel.from_pretrained(base_model.to_float32(load_model("llama")), folder)
    torch.testing.assert_close(logits(theirs), logits(base_model.to_float32(model)), atol=1e-4, rtol=1e-4)


@each_case
def test_loaded_again_it_computes_the_same_and_switched_off_the_base(trained, load_model, family, section):
    model, folder = trained(family, section)
    loaded = methods.load(load_model(family), folder)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(load_model(family)), atol=1e-2)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load_model(family)))


@each_case
def test_the_merged_layer_is_the_layer_with_its_bias(trained, family, section):
    model, folder = trained(family, section)
    base_model.to_float32(model)
    updates = methods.read(folder).updates
    assert updates
    for name, update in updates.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
        base = layer.base_layer
        bias = None if base.bias is None else update.merged_bias(base.bias.detach())
        with torch.no_grad():
            eye = torch.eye(layer.in_features)
            W_OI = (base(eye) - (0 if base.bias is None else base.bias)).T
            merged = torch.cat([update.merged(W_OI[rows], rows) for rows in (slice(0, 7), slice(7, None))])
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, merged, bias), atol=1e-4, rtol=1e-3)
        assert not update.is_zero()


@each_section
def test_untrained_it_is_zero_and_the_base(load_model, tmp_path, section):
    model = methods.attach(load_model("llama"), section)
    torch.testing.assert_close(logits(model), logits(load_model("llama")), atol=2e-2, rtol=2e-2)
    methods.save(model, tmp_path / "adapter", "base", None)
    with pytest.raises(InputError, match="its update is zero in all"):
        methods.read(tmp_path / "adapter").refuse_untrained()


@each_section
def test_rows_of_new_tokens_are_refused(load_model, section):
    with pytest.raises(InputError, match=r"model.new_tokens: PEFT's .* trains no rows of an embedding"):
        methods.attach(load_model("llama"), section, token_ids=[500])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (Oft(oft_block_size=48), "oft.oft_block_size: 48 does not divide the inputs of 14 layers"),
        (Hira(r=65), "hira.r: 65 is above the smaller side of"),
        (Hira(target_modules=["nowhere"]), "hira.target_modules: 'nowhere' matches no linear layer"),
    ],
)
def test_what_no_layer_can_have_is_refused(load_model, section, said):
    with pytest.raises(InputError, match=said):
        methods.attach(load_model("llama"), section)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "section",
    [PrefixTuning(num_virtual_tokens=4), PromptTuning(num_virtual_tokens=4), Bottleneck(size=8), Hira(r=4)],
    ids=lambda section: section.key,
)
def test_answers_of_many_at_once_are_those_of_each_by_itself(trained, tokenizer, family, section):
    # padded on the left, a trained prompt must stand before the words, not before the padding (huggingface/peft#1093)
    model, _ = trained(family, section, quantized=False)
    base_model.to_float32(model)
    prompts = [list(range(4, 4 + length)) for length in (5, 40, 17, 1)]
    together = answers(model, tokenizer, prompts, set(), 8)
    assert together == [answers(model, tokenizer, [prompt], set(), 8)[0] for prompt in prompts]
    with torch.no_grad():  # and the first word is the one that training's own forward pass finds the likeliest
        for prompt, text in zip(prompts, together, strict=True):
            first = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()
            assert text.startswith(tokenizer.decode([first], skip_special_tokens=True))


def test_a_bottleneck_adapter_adds_to_what_the_block_gives_the_residual():
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
    )
    torch.manual_seed(0)
    model = shake(
        methods.attach(transformers.BertForSequenceClassification(config), Bottleneck(where="houlsby"))
    ).eval()
    layer, hidden = model.bert.encoder.layer[0], torch.randn(1, 5, 8)

    def added(block, output):
        output = block.dense(output)
        return output + block.bottleneck_dropout.adapters["default"](output)

    attended = layer.attention.self(hidden)[0]
    attended = layer.attention.output.LayerNorm(hidden + added(layer.attention.output, attended))
    expected = layer.output.LayerNorm(attended + added(layer.output, layer.intermediate(attended)))
    found = layer(hidden)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


@pytest.mark.parametrize(
    ("kind", "config", "places"),
    [
        ("DistilBertForSequenceClassification", {"n_layers": 1}, ["attention", "ffn"]),
        ("ModernBertForSequenceClassification", {}, ["attn", "mlp"]),
        ("Qwen2ForSequenceClassification", {"pad_token_id": 0}, ["self_attn", "mlp"]),
        ("ViTForImageClassification", {}, ["attention", "mlp"]),
        ("DeiTForImageClassification", {}, ["attention", "mlp"]),
    ],
)
def test_bottleneck_adapters_find_the_blocks_of_a_classifier_and_train_its_head(kind, config, places):
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**{"num_hidden_layers": 1, **config}))
        methods.attach(model, Bottleneck(where="houlsby"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    behind = {name.rpartition("bottleneck_")[2].split(".")[0] for name in trained if "bottleneck_" in name}
    assert sorted(behind) == sorted(places)
    assert trained & {"classifier.weight", "score.weight"}


def test_a_bottleneck_adapter_is_refused_where_a_layer_has_no_such_blocks():
    with torch.device("meta"):
        model = transformers.SwinForImageClassification(transformers.SwinConfig())
    with pytest.raises(
        InputError, match=r"bottleneck\.where pfeiffer: SwinStage has no block of its own for its mlp; take lora"
    ):
        methods.attach(model, Bottleneck())
