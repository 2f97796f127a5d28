"""A plan for images against real steps: the peak of living tensors, and what a card makes of them."""

import contextlib

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW

from qlora import base_model, kernels, methods, planner
from qlora.kernels import checkpointing
from qlora.planner import images
from qlora.recipe import Full, Lora, Model, Quantization, Training
from qlora.system import cards, memory
from qlora.training.master_weights import MasterWeights
from qlora.training.objectives.classification import Classification

_SHARED = {"image_size": 64, "num_channels": 3, "num_labels": 3}
CONFIGS = {
    "vit": lambda: transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, patch_size=8, **_SHARED
    ),
    "swin": lambda: transformers.SwinConfig(
        embed_dim=64, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4, **_SHARED
    ),
}
CLASSES = {"vit": "ViTForImageClassification", "swin": "SwinForImageClassification"}


def outline_of(name, section, quantization):
    config = CONFIGS[name]()
    config.architectures = [CLASSES[name]]
    return planner.outline(config, Model(name_or_path="x"), quantization, section, 0, "cpu", False)


def peaks(folder, section, quantization, steps):
    """Return the most bytes alive in a step for each (images, checkpointed layers) of `steps`."""
    checkpoint = base_model.find(Model(name_or_path=str(folder)), task=base_model.Task("image-classification"))
    model = base_model.load(checkpoint, Model(name_or_path=str(folder)), quantization)
    model = methods.attach(model, section)
    model.train()
    masters = MasterWeights([p for p in model.parameters() if p.requires_grad])
    optimizer = AdamW(masters.masters, lr=1e-4, optim_bits=8)
    live = memory.LiveTensors(*base_model.tensors(model), *masters.masters)
    objective = Classification(pad=None)

    def step(many, checkpointed):
        with contextlib.ExitStack() as stack:
            stack.enter_context(kernels.installed(model))
            stack.enter_context(checkpointing.checkpointed(base_model.decoder_layers(model), checkpointed))
            stack.enter_context(live)
            live.peak = 0
            for count in (1, many):  # the first for the gradients that it leaves
                inputs = {"pixel_values": torch.zeros(count, 3, 64, 64, dtype=torch.bfloat16)}
                inputs["labels"] = torch.zeros(count, dtype=torch.int64)
                objective.loss(model, inputs, torch.tensor(float(count))).backward()
                masters.take_gradients()
                del inputs
            optimizer.step()
            masters.give_weights()
            masters.clear_gradients()
        return live.peak

    step(1, 0)  # the states of the optimizer
    return [step(*one) for one in steps]


@pytest.mark.parametrize(
    ("name", "section", "quantization"),
    [
        ("vit", Lora(), Quantization()),
        pytest.param("swin", Lora(), Quantization(), marks=pytest.mark.slow),
        pytest.param("vit", Full(), None, marks=pytest.mark.slow),
    ],
    ids=["vit", "swin", "vit-full"],
)
def test_the_peak_is_that_of_real_steps(tmp_path, name, section, quantization):
    torch.manual_seed(0)
    getattr(transformers, CLASSES[name])(CONFIGS[name]()).save_pretrained(tmp_path)
    outline = outline_of(name, section, quantization)
    assert outline.counts == "images"
    steps = [(1, 0), (7, 0), (32, 0), (7, outline.num_layers)]
    for (many, checkpointed), real in zip(steps, peaks(tmp_path, section, quantization, steps), strict=True):
        load = planner.Load(many, 1, many)
        found = planner.usage(outline, load, Training(gradient_accumulation_steps=2), checkpointed, False)
        assert found.allocated_bytes == pytest.approx(real, rel=0.05)


def test_the_work_of_an_image_is_that_of_its_positions():
    config = CONFIGS["vit"]()
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(config)
    assert images.positions(model) == 65
    work = outline_of("vit", Lora(), Quantization()).work
    assert work.positions == 65
    card = cards.card_of("3060")
    once, twice = (planner.speed.seconds(work, card, rows, 1, rows, 0.0) for rows in (5_000, 10_000))
    assert twice == pytest.approx(2 * once, rel=0.01)
