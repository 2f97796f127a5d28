"""The plan of a classifier against real training steps of real NF4 models."""

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW

from qlora import base_model, data, kernels, methods, planner
from qlora.commands.plan import plan
from qlora.kernels import checkpointing
from qlora.recipe import Bottleneck, Full, Lora, Model, Quantization, Training
from qlora.system import memory
from qlora.system.events import heard_by
from qlora.training.master_weights import MasterWeights
from qlora.training.objectives.classification import Classification
from tests.classifiers import make_tokenizer
from tests.conftest import slow_where_emulated

_SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
          "pad_token_id": 0}  # fmt: skip
SHAPES = {
    "bert": (transformers.AutoModelForMaskedLM, lambda: transformers.BertConfig(**_SHAPE, max_position_embeddings=512)),
    "modernbert": (
        transformers.AutoModelForMaskedLM,
        lambda: transformers.ModernBertConfig(
            **_SHAPE, max_position_embeddings=2048, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
        ),
    ),
    "llama": (
        transformers.AutoModelForCausalLM,
        lambda: transformers.LlamaConfig(**_SHAPE, num_key_value_heads=2, max_position_embeddings=2048),
    ),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("modernbert", Lora(r=16)),
        pytest.param("bert", Lora(r=16), marks=pytest.mark.slow),
        pytest.param("llama", Lora(r=16), marks=pytest.mark.slow),
        pytest.param("bert", Bottleneck(where="houlsby"), marks=pytest.mark.slow),
        pytest.param("bert", Full(), marks=pytest.mark.slow),
    ],
    ids=lambda one: one if isinstance(one, str) else one.key,
)
@slow_where_emulated
def test_the_peak_is_that_of_real_training_steps(tmp_path, name, method):
    quantization = None if method.key == "full" else Quantization()
    auto, config = SHAPES[name]
    torch.manual_seed(0)
    auto.from_config(config(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    section, task = Model(name_or_path=str(tmp_path)), base_model.Task("text-classification", ("a", "b", "c"))
    checkpoint = base_model.find(section, task=task)
    found = base_model.load_config(checkpoint, section)
    outline = planner.outline(found, section, quantization, method, 0, "cpu", False, "auto")
    assert not outline.joins
    model = methods.attach(base_model.load(checkpoint, section, quantization), method).train()
    masters = MasterWeights([p for p in model.parameters() if p.requires_grad])
    assert outline.trained.sum() == sum(master.numel() for master in masters.masters)  # the head among them
    optimizer = AdamW(masters.masters, lr=1e-4, optim_bits=8)
    live = memory.LiveTensors(*base_model.tensors(model), *masters.masters)
    objective = Classification(data.Pad(make_tokenizer(), name == "bert"))

    def step(rows, length, checkpointed):
        """Return the most bytes alive in a step of two micro-batches."""
        layers = base_model.decoder_layers(model)
        with kernels.installed(model, "auto"), checkpointing.checkpointed(layers, checkpointed), live:
            live.peak = 0
            for count, longest in ((1, 8), (rows, length)):
                lengths = [longest - (count > 1), *[longest] * (count - 1)]  # one is shorter, so that there is padding
                examples = [data.Labelled([7] * number, [0] * number, 1) for number in lengths]
                batch = objective.collate(list(enumerate(examples)))
                del batch["rows"]
                objective.loss(model, batch, torch.tensor(float(rows))).backward()
                masters.take_gradients()
                del batch, examples
            optimizer.step()
            masters.give_weights()
            masters.clear_gradients()
        return live.peak

    step(1, 64, 0)  # the states of the optimizer
    for rows, length, checkpointed in ((2, 512, 0), (8, 128, 0), (8, 128, 2), (4, 512, 4)):
        load = planner.Load(rows, length, rows, joined=False)
        expected = planner.usage(
            outline, load, Training(gradient_accumulation_steps=2), checkpointed, False
        ).allocated_bytes
        assert expected == pytest.approx(step(rows, length, checkpointed), rel=0.02), (rows, length, checkpointed)


def test_the_plan_of_a_recipe_counts_rows_that_are_padded_and_offers_no_packing(classify_recipe):
    recipe, said = classify_recipe("bert"), []
    with heard_by(said.append):
        found = plan(recipe, "24GiB")
    [line] = [one.text for one in said if str(getattr(one, "text", "")).startswith("plan ")]
    assert line.endswith("largest micro-batch is 16 rows of 8 tokens")
    assert found["fits"]
    assert found["components"]["adapter"] > 0
    assert not [change for change in found["suggestions"] if "packing" in change["set"]]
    twice = plan(classify_recipe("bert", training={"per_device_train_batch_size": 32}), "24GiB")
    assert twice["peak_bytes"] > found["peak_bytes"]
