"""The contract of a method: each file has all of it, and a third one, written here, trains, saves, loads and refuses a merge."""

import inspect
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from qlora import base_model, methods, training
from qlora.exporter import merge
from qlora.methods import contract
from qlora.recipe import (
    Adalora,
    Bottleneck,
    Full,
    Hira,
    Ia3,
    Lora,
    Model,
    Oft,
    PrefixTuning,
    PromptTuning,
    Quantization,
    Training,
)
from qlora.recipe.methods import Method
from qlora.runs import record
from qlora.runs.checkpoints import Checkpoints
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError, TrainingFailed
from tests.conftest import CONVERSATIONS, encode, messages

FUNCTIONS = [name for name, _ in inspect.getmembers(contract.Method, inspect.isfunction) if not name.startswith("_")]


@pytest.mark.parametrize("name", methods.names())
def test_a_method_has_every_function_of_the_contract(name):
    module = methods.of(type("Section", (Method,), {"key": name}))
    for function in FUNCTIONS:
        assert inspect.signature(getattr(module, function)) == inspect.signature(getattr(contract.Method, function))


def test_each_section_of_the_recipe_that_is_a_method_has_its_file():
    assert {
        section.key for section in (Lora, Adalora, Ia3, Oft, Hira, Full, Bottleneck, PrefixTuning, PromptTuning)
    } == set(methods.names())


# ---- a third method: the gains of all norms, in two groups of parameters, and a count of steps ------------------------

GAINS = """
import json

import torch
from safetensors.torch import load_file, save_file

from qlora.methods.adapter import Adapter
from qlora.methods.contract import Description, Group, Schedule, Trainable


class Count(Schedule):
    changes = True

    def __init__(self):
        self.steps = self.total = 0

    def begin(self, total_steps):
        self.total = total_steps

    def penalty(self, named_parameters):
        return 0 * sum(parameter.sum() for _, parameter in named_parameters)

    def after_step(self, step):
        self.steps += 1

    def state(self):
        return {"steps": torch.tensor(float(self.steps))}, {"total": self.total}

    def restore(self, tensors, values):
        self.steps, self.total = int(tensors["steps"]), values["total"]

    def measured(self):
        return {"count": self.steps}


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def trainable(model, section):
    gains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow = tuple(name for name in gains if "layers.0." in name)
    fast = Group(tuple(name for name in gains if name not in slow), learning_rate=section.ratio, weight_decay=0.0)
    return Trainable("gains of norms", gains, (Group(slow), fast), {"model.norm.weight": (slice(0, 8),)}, Count())


def save(model, folder, base_name, revision):
    folder.mkdir()
    save_file({n: p.detach() for n, p in model.named_parameters() if "norm" in n}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "GAINS"}))


def load(model, adapter, token_ids=()):
    with torch.no_grad():
        for name, tensor in adapter.replaced.items():
            model.get_parameter(name).copy_(tensor)
    return model.requires_grad_(False).eval()


def fill(model, adapter, ends=()):
    load(model, adapter)


def read(folder, config):
    tensors = load_file(folder / "adapter_model.safetensors")
    return Adapter(folder, config, "Gains", {}, tensors, unmergeable="stay beside their base; serve both")


def describe(config):
    return Description("Gains", "all")
"""


class Gains(Method):
    key: ClassVar[str] = "gains"
    ratio: float = 2.0


@pytest.fixture
def gains(tmp_path, monkeypatch):
    """Put the file of another method beside the others; return its section."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "gains.py").write_text(GAINS)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "new")])
    yield Gains()
    sys.modules.pop("qlora.methods.gains", None)


@pytest.fixture
def fit(load_model, tokenizer, tmp_path):
    """Return fit(section, folder, resume=None, **training) -> (model, its run) after real training, saved at each second step."""

    def fit(section, folder, resume=None, **settings):
        run = RunDir(tmp_path / folder)
        run.path.mkdir(exist_ok=True)
        model = methods.attach(base_model.to_float32(load_model("llama", None)), section)
        examples = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS]
        defaults = {"max_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0, "gradient_accumulation_steps": 2,
                    "save_steps": 2, "save_total_limit": None, "weight_decay": 0.0}  # fmt: skip
        saving = training.Saving(to=Checkpoints(run.checkpoints, "run"), every=2, resume=resume)
        chosen = training.Settings(Training(**{**defaults, **settings}))
        training.train(model, tokenizer, training.Rows(examples), chosen, run, saving)
        return model, run

    return fit


def test_a_new_file_is_a_new_method(gains, load_model):
    assert methods.names() == [
        "adalora",
        "bottleneck",
        "full",
        "gains",
        "hira",
        "ia3",
        "lora",
        "oft",
        "prefix_tuning",
        "prompt_tuning",
    ]
    model = methods.attach(load_model("llama", None), gains)
    assert methods.trainable(model).summary == "gains of norms"
    assert methods.describe({"peft_type": "GAINS"}).kind == "Gains"


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_each_group_of_parameters_learns_at_its_own_rate(gains, fit, load_model, optim):
    model, _ = fit(gains, "run", max_steps=1, lr_scheduler_type="constant", optim=optim)
    before = dict(base_model.to_float32(load_model("llama", None)).named_parameters())
    moved = {name: (p.detach() - before[name].detach()).abs() for name, p in model.named_parameters()}
    # Adam's first step is the learning rate times the sign of the gradient
    assert moved["model.layers.0.input_layernorm.weight"].median().item() == pytest.approx(1e-2, rel=1e-3)
    assert moved["model.layers.1.input_layernorm.weight"].median().item() == pytest.approx(2e-2, rel=1e-3)
    assert moved["model.norm.weight"][8:].median().item() == pytest.approx(2e-2, rel=1e-3)
    assert not moved["model.norm.weight"][:8].any()  # held
    assert not moved["model.layers.0.mlp.up_proj.weight"].any()


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch"])
def test_several_groups_and_a_schedule_resume_to_the_bit(gains, fit, optim):
    whole, run = fit(gains, "whole", optim=optim)
    resumed, again = fit(gains, "resumed", resume=run.checkpoints / "step-2", optim=optim)
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    counts = [[line.metrics["count"] for line in record.read(one)] for one in (run, again)]
    assert counts[0][-1] == counts[1][-1] == 4


@pytest.mark.parametrize(
    "section",
    [
        Lora(r=4, lora_dropout=0.1, loraplus_lr_ratio=16),
        pytest.param(Adalora(init_r=6, target_r=3, tinit=1, tfinal=1), marks=pytest.mark.slow),
        Ia3(),
        pytest.param(Oft(module_dropout=0.5), marks=pytest.mark.slow),
        pytest.param(Hira(hira_dropout=0.1), marks=pytest.mark.slow),
        Full(modules=["mlp", "lm_head"]),
        Bottleneck(dropout=0.1),
        PrefixTuning(prefix_projection=True),
        pytest.param(PromptTuning(), marks=pytest.mark.slow),
    ],
    ids=lambda section: section.key,
)
def test_each_method_resumes_to_the_bit_and_leaves_the_base_alone(fit, load_model, section):
    whole, run = fit(section, "whole")
    resumed, _ = fit(section, "resumed", resume=run.checkpoints / "step-2")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    base = base_model.to_float32(load_model("llama", None)).state_dict()
    left = {name.replace(".base_layer", ""): parameter
            for name, parameter in whole.get_base_model().named_parameters() if not parameter.requires_grad}  # fmt: skip
    assert base.keys() & left.keys()
    assert all(torch.equal(left[name], base[name]) for name in base.keys() & left.keys())
    assert section.key == "full" or left.keys() >= base.keys()


def test_what_is_saved_loads_into_the_base_and_refuses_to_be_merged(gains, fit, load_model, tiny_model, tmp_path):
    model, _ = fit(gains, "run")
    methods.save(model, tmp_path / "adapter", "base", None)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        expected, loaded = model.eval()(input_ids=ids).logits, base_model.to_float32(load_model("llama", None))
        before = loaded(input_ids=ids).logits
        found = methods.load(loaded, tmp_path / "adapter")(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, atol=1e-2)
    section = Model(name_or_path=str(tiny_model("llama")))
    checkpoint = base_model.find(section)
    config = base_model.load_config(checkpoint, section)
    with pytest.raises(InputError, match="Gains stay beside their base; serve both"):
        merge.plan(checkpoint, config, torch.float16, adapter=methods.read(tmp_path / "adapter"))
    with pytest.raises(InputError, match="has Gains, trained biases or modules, so it cannot be added"):
        methods.read(tmp_path / "adapter").refuse_more_than_low_rank("cannot be added")


def test_a_method_whose_parameters_do_not_move_stops_the_run(gains, load_model):
    model = methods.attach(load_model("llama", None), gains)
    before = {name: p.detach().clone() for name, p in methods.trainable(model).first_to_move.items()}
    with pytest.raises(TrainingFailed, match=f"{len(before)} of {len(before)} adapters did not move"):
        methods.refuse_unmoved(methods.trainable(model).first_to_move, before)


def test_no_other_file_knows_a_method_by_its_name():
    package = Path(methods.__file__).parents[1]
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in {"methods", "recipe"}:
            assert "adalora" not in path.read_text(encoding="utf-8").lower(), path


@pytest.mark.parametrize(
    ("section", "quantization"),
    [
        (Lora(r=4, init_lora_weights="loftq"), Quantization()),
        (Lora(r=4, init_lora_weights="pissa", rank_pattern={"q_proj": 2}), None),
        (Lora(r=4, init_lora_weights="eva", modules_to_save=["lm_head"]), Quantization()),
        (Adalora(init_r=6, target_r=3), Quantization()),
        (Ia3(), Quantization()),
        (Oft(), Quantization()),
        (Full(), None),
        (Bottleneck(where="houlsby"), Quantization()),
        (PrefixTuning(prefix_projection=True, encoder_hidden_size=32), Quantization()),
        (PromptTuning(), Quantization()),
        (Hira(), Quantization()),
    ],
)
def test_a_model_without_numbers_gets_the_shapes_of_one_with(load_model, tiny_model, tokenizer, section, quantization):
    model_section = Model(name_or_path=str(tiny_model("llama")))
    checkpoint = base_model.find(model_section)
    examples = [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS * 4]
    real = methods.attach(load_model("llama", quantization), section, checkpoint=checkpoint, examples=examples)
    config = base_model.load_config(checkpoint, model_section)
    empty = methods.attach(base_model.load_on_meta(config, model_section, quantization), section)
    found, expected = (
        {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} for model in (empty, real)
    )
    assert found.keys() == expected.keys()
    if isinstance(section, Lora) and section.init_lora_weights == "eva":  # shares the same ranks out among the layers
        found, expected = (sum(s[0] for n, s in shapes.items() if "lora_A" in n) for shapes in (found, expected))
    assert found == expected
