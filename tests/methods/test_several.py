"""Adapters of all kinds on one base: each computes what it computes alone, to the bit, and leaves nothing behind."""

import weakref

import pytest
import torch

from qlora import methods
from qlora.methods import peft_model
from qlora.methods.several import Several
from qlora.recipe import Adalora, Bottleneck, Full, Hira, Ia3, Lora, Oft, PrefixTuning, PromptTuning
from qlora.system.errors import InputError
from tests.methods.test_each_method import logits, shake

KINDS = {
    "lora": Lora(r=4),
    "rslora": Lora(r=6, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    "dora": Lora(r=4, use_dora=True),
    "head": Lora(r=4, modules_to_save=["lm_head", "norm"]),
    "adalora": Adalora(init_r=6, target_r=4),
    "ia3": Ia3(),
    "oft": Oft(oft_block_size=32),
    "hira": Hira(r=4),
    "bottleneck": Bottleneck(size=8, where="houlsby"),
    "bottleneck of one block": Bottleneck(size=4),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "prefix": PrefixTuning(num_virtual_tokens=4),
}
GPT2 = {"lora": Lora(r=4), "dora": Lora(r=4, use_dora=True), "ia3": Ia3(), "bottleneck": Bottleneck(size=8),
        "prompt": PromptTuning(num_virtual_tokens=4)}  # fmt: skip
BIASES = Lora(r=4, bias="all")


@pytest.fixture
def alone(load_model, tmp_path):
    """Return make(family, sections) -> {name: logits of its adapter, opened alone}; the folders are tmp_path / name."""

    def make(family, sections):
        found = {}
        for name, section in sections.items():
            model = shake(methods.attach(load_model(family), section))
            methods.save(model, tmp_path / name, "base", None)
            found[name] = logits(methods.load(load_model(family), tmp_path / name))
        return found

    return make


def parameters(several, name):
    """Weak references to those of an adapter: those of the base, whose objects DoRA replaces, are told by their memory."""
    base = {parameter.data_ptr() for parameter in several.choose(None).parameters()}
    return [weakref.ref(p) for p in several.choose(name).parameters() if p.data_ptr() not in base]


@pytest.mark.parametrize(
    ("family", "sections"), [("llama-tied", KINDS), pytest.param("gpt2", GPT2, marks=pytest.mark.slow)]
)
def test_each_computes_what_it_computes_alone_and_is_gone_when_it_is_unloaded(
    load_model, alone, tmp_path, family, sections
):
    expected = alone(family, sections)
    several = Several(load_model(family))
    expected[None] = logits(several.base)
    for name in sections:
        several.load(name, tmp_path / name)
        assert torch.equal(logits(several.base), expected[None]), name
    for name in [*expected, *reversed(expected)]:
        assert torch.equal(logits(several.choose(name)), expected[name]), name
    found = list(expected.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    before = {name: parameters(several, name) for name in sections}
    several.choose("lora")
    for name in sections:  # the first while it is in place, the others while it is not
        assert before[name]
        several.unload(name)
        assert not [one for one in before[name] if one() is not None], name  # huggingface/peft#738
    assert several.names == []
    assert torch.equal(logits(several.choose(None)), expected[None])
    several.load("again", tmp_path / "lora")
    assert torch.equal(logits(several.choose("again")), expected["lora"])


@pytest.mark.parametrize("kind", ["dora", "ia3", "bottleneck", "prompt"])
def test_a_load_that_is_interrupted_leaves_all_as_it_was(load_model, alone, tmp_path, monkeypatch, kind):
    expected = alone("llama", {"lora": KINDS["lora"], kind: KINDS[kind]})
    several = Several(load_model("llama"))
    base = logits(several.base)
    several.load("lora", tmp_path / "lora")
    several.choose("lora")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "_with_base", interrupted)  # the last thing that happens to a model that is loaded
    with pytest.raises(KeyboardInterrupt):
        several.load(kind, tmp_path / kind)
    monkeypatch.undo()
    assert several.names == ["lora"]
    assert torch.equal(logits(several.choose("lora")), expected["lora"])
    assert torch.equal(logits(several.choose(None)), base)
    several.load(kind, tmp_path / kind)
    assert torch.equal(logits(several.choose(kind)), expected[kind])


def test_a_switch_that_is_interrupted_is_made_good_by_the_next(load_model, alone, tmp_path):
    expected = alone("llama", {name: KINDS[name] for name in ("lora", "ia3")})
    several = Several(load_model("llama"))
    base = logits(several.base)
    for name in expected:
        several.load(name, tmp_path / name)
    several.choose("lora")
    changes = several._loaded["ia3"].changes
    container, *rest = changes[len(changes) // 2]

    class Interrupting(dict):
        def __setitem__(self, key, value):
            raise KeyboardInterrupt

        pop = __setitem__

    changes[len(changes) // 2] = (Interrupting(), *rest)
    with pytest.raises(KeyboardInterrupt):
        several.choose("ia3")
    changes[len(changes) // 2] = (container, *rest)
    assert torch.equal(logits(several.choose("lora")), expected["lora"])
    assert torch.equal(logits(several.choose("ia3")), expected["ia3"])
    assert torch.equal(logits(several.choose(None)), base)


@pytest.mark.parametrize("section", [BIASES, Full()], ids=["biases", "full"])
def test_what_trains_weights_of_the_base_is_alone_there(load_model, saved, tmp_path, section):
    trained, folder = saved("gpt2", section, quantized=False)
    methods.save(shake(methods.attach(load_model("gpt2", None), Lora(r=4))), tmp_path / "lora", "base", None)
    several = Several(load_model("gpt2", None))
    several.load("lora", tmp_path / "lora")
    with pytest.raises(InputError, match="has trained biases or weights, so it cannot be loaded beside another"):
        several.load("trained", folder)
    several.unload("lora")
    several.load("trained", folder)
    assert torch.equal(logits(several.choose("trained")), logits(trained))
    for refused in (lambda: several.load("lora", tmp_path / "lora"), lambda: several.choose(None),
                    lambda: several.unload("trained")):  # fmt: skip
        with pytest.raises(
            InputError, match=r"trained has trained the base's own weights, so .*; open the other by itself"
        ):
            refused()
    assert torch.equal(logits(several.choose("trained")), logits(trained))


def test_nothing_of_an_adapter_requires_a_gradient_after_any_switch(load_model, alone, tmp_path):
    # huggingface/peft#2765: set_adapter made what it activates trainable
    alone("llama", {name: KINDS[name] for name in ("head", "bottleneck")})
    several = Several(load_model("llama"))
    for name in ("head", "bottleneck"):
        several.load(name, tmp_path / name)
    for name in ("head", "bottleneck", None, "head"):
        model = several.choose(name)
        assert not [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in model.parameters()} <= {torch.uint8, peft_model.dtype_of(several.base)}


def test_every_method_is_tried_beside_the_others():
    assert {section.key for section in KINDS.values()} | {"full"} == {*methods.names()}
