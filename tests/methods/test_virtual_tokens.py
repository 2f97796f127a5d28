"""Prompt and prefix tuning: what PEFT computes, with checkpointed layers and padding too, opened by PEFT, switched, refused."""

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from qlora import base_model, methods
from qlora.evaluation.generate import answers
from qlora.kernels.checkpointing import checkpointed
from qlora.recipe import PrefixTuning, PromptTuning, Recipe
from qlora.system.errors import InputError
from tests.conftest import SHAPE

IDS = torch.arange(4, 34)[None]
PREFIX, PROMPT = PrefixTuning(num_virtual_tokens=5), PromptTuning(num_virtual_tokens=5)
each_section = pytest.mark.parametrize("section", [PREFIX, PROMPT], ids=lambda section: section.key)
# layers that see no more than eight tokens, all of them or each second one
WINDOWED = {
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8,
                                            layer_types=["sliding_attention", "full_attention"]),
}  # fmt: skip
FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "bloom", "mistral", "gemma3"]


@pytest.fixture
def load(load_model):
    """Return load(family) -> a float32 model with weights large enough for what stands before a text to count."""

    def load(family):
        torch.manual_seed(0)
        if family in WINDOWED:
            return transformers.AutoModelForCausalLM.from_config(WINDOWED[family]).eval()
        return base_model.to_float32(load_model(family, None)).eval()

    return load


def attached(model, section, seed=0):
    """Return a model with random virtual tokens."""
    model = methods.attach(model, section, seed)
    torch.manual_seed(seed + 3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model.eval()


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tuning_starts_as_and_computes_what_peft_does(load, family):
    ours = methods.attach(load(family), PREFIX)
    torch.manual_seed(0)
    theirs = get_peft_model(load(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    one, other = (model.prompt_encoder["default"].embedding.weight for model in (ours, theirs))
    with torch.no_grad():
        other.copy_(one)
    found = []
    for model, weight in ((ours, one), (theirs, other)):
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        found.append((output.logits, weight.grad))
    for mine, peft in zip(*found, strict=True):
        torch.testing.assert_close(mine, peft, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("projected", [False, True])
def test_it_starts_from_the_numbers_that_peft_starts_from(load_model, projected):
    section = PrefixTuning(prefix_projection=projected, encoder_hidden_size=32 if projected else None)
    ours = methods.attach(load_model("llama"), section, seed=7)
    torch.manual_seed(7)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=projected, encoder_hidden_size=32
    )
    theirs = get_peft_model(load_model("llama"), config)
    numbers = dict(theirs.prompt_encoder.named_parameters())
    for name, parameter in ours.prompt_encoder.named_parameters():
        assert torch.equal(parameter, numbers[name].bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "section", [PREFIX, PROMPT, PrefixTuning(prefix_projection=True)], ids=["prefix", "prompt", "projected"]
)
def test_layers_that_are_computed_again_give_the_same_gradients(load, family, section):
    # PEFT refuses (huggingface/peft#869, #2191): there the text would be in the cache twice
    model = attached(load(family), section).train()
    found = []
    for number, offload in ((0, False), (2, False), (2, True)):
        model.zero_grad()
        with checkpointed(base_model.decoder_layers(model), number, offload):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.prompt_encoder.parameters()])
    for plain, again, offloaded in zip(*found, strict=True):
        assert plain.any()
        assert torch.equal(plain, again)
        assert torch.equal(plain, offloaded)


@each_section
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_computes_alone_what_it_does_beside_a_longer_one(load, family, section):
    model = attached(load(family), section)
    ids = torch.cat([IDS, torch.nn.functional.pad(IDS[:, :9], (0, 21))])
    together = logits(model, ids, attention_mask=(ids != 0).long())
    torch.testing.assert_close(together[:1], logits(model), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:, :9], logits(model, IDS[:, :9]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_prefix_leaves_the_window_with_the_tokens_not_with_the_padding(load, tokenizer, family):
    model = attached(load(family), PREFIX)
    prompts = [list(range(4, 4 + length)) for length in (1, 9, 4)]
    together = answers(model, tokenizer, prompts, set(), 6)
    assert together == [answers(model, tokenizer, [prompt], set(), 6)[0] for prompt in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        grown = list(prompt)
        for _ in range(6):  # by the forward pass of training, token by token
            grown.append(logits(model, torch.tensor([grown]))[0, -1].argmax().item())
        assert text == tokenizer.decode(grown[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "section",
    [PREFIX, PrefixTuning(num_virtual_tokens=3, prefix_projection=True), PROMPT],
    ids=["prefix", "projected", "prompt"],
)
def test_the_folder_loads_here_and_in_plain_peft(load_model, tmp_path, family, section):
    model = attached(load_model(family), section)
    methods.save(model, tmp_path / "saved", "base", None)
    loaded = methods.load(load_model(family), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(load_model(family)))
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(load_model(family)), atol=1e-2)
    theirs = PeftModel.from_pretrained(base_model.to_float32(load_model(family)), tmp_path / "saved").eval()
    mask = torch.ones_like(IDS)
    peft = logits(theirs, attention_mask=mask)[:, -IDS.shape[1] :]  # of a prompt PEFT returns logits too
    torch.testing.assert_close(peft, logits(base_model.to_float32(loaded)), atol=1e-4, rtol=1e-4)


@each_section
def test_a_folder_that_peft_wrote_loads(load_model, tmp_path, section):
    kind = {"prefix_tuning": PrefixTuningConfig, "prompt_tuning": PromptTuningConfig}[section.key]
    theirs = get_peft_model(load_model("qwen2"), kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path / "peft")
    model = methods.load(load_model("qwen2"), tmp_path / "peft")
    torch.testing.assert_close(logits(model), logits(theirs.eval())[:, -IDS.shape[1] :], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("family", ["lfm2", "mamba"])
def test_a_model_with_layers_that_take_no_keys_is_refused(load_model, family):
    with pytest.raises(InputError, match=r"prefix_tuning: .*\n?.*take lora"):
        methods.attach(load_model(family, None), PREFIX)


def test_a_network_whose_output_alone_is_saved_is_not_trained_further(load_model, tmp_path):
    section = PrefixTuning(num_virtual_tokens=4, prefix_projection=True)
    methods.save(methods.attach(load_model("llama"), section), tmp_path / "saved", "base", None)
    with pytest.raises(InputError, match="what prefix_projection made is saved, not the network"):
        methods.attach(load_model("llama"), section, start=tmp_path / "saved")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"prefix_tuning": {"encoder_hidden_size": 8}}, "encoder_hidden_size is for prefix_projection: true"),
        ({"prefix_tuning": {}, "data": {"packing": True}}, "joins rows, and prefix_tuning puts something before each"),
        ({"prefix_tuning": {"num_virtual_tokens": 0}}, "prefix_tuning.num_virtual_tokens"),
        ({"prefix_tuning": {}, "prompt_tuning": {}}, "prefix_tuning and prompt_tuning exclude each other"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(method, said):
    data = {"train": "x.jsonl"} | method.pop("data", {})
    with pytest.raises(InputError, match=said):
        Recipe.from_dict({"model": {"name_or_path": "x"}, "data": data, "output_dir": "y"} | method)
