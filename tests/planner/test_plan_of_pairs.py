"""The plan of preference pairs against real training steps of a real NF4 model, and what a recipe of pairs is planned as."""

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW

from qlora import base_model, data, kernels, methods, planner
from qlora.commands.plan import plan
from qlora.data import Example
from qlora.jobs.planning import plan_job
from qlora.kernels import attention, checkpointing
from qlora.recipe import Dpo, Lora, Model, Quantization, Training
from qlora.system import memory
from qlora.system.events import heard_by
from qlora.training.master_weights import MasterWeights
from qlora.training.objectives.preference import Preference
from tests.conftest import slow_where_emulated, write_jsonl

SHAPE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0}  # fmt: skip


def pair(length, trained):
    labels = [-100] * (length - trained) + [7] * trained
    return data.Pair(Example([7] * length, labels), Example([8] * length, labels))


@slow_where_emulated
def test_the_peak_is_that_of_real_training_steps(tmp_path, tokenizer):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    section, method = Model(name_or_path=str(tmp_path)), Lora(r=16)
    checkpoint = base_model.find(section)
    config = base_model.load_config(checkpoint, section)
    outline = planner.outline(config, section, Quantization(), method, 0, "cpu", False, "auto")
    model = methods.attach(base_model.load(checkpoint, section, Quantization()), method).train()
    masters = MasterWeights([p for p in model.parameters() if p.requires_grad])
    optimizer = AdamW(masters.masters, lr=1e-4, optim_bits=8)
    live = memory.LiveTensors(*base_model.tensors(model), *masters.masters)
    base = model.get_base_model()  # embedding and head are mapped from their file, which is not counted on a CPU
    mapped = base_model.num_bytes([base.get_input_embeddings().weight, base.get_output_embeddings().weight])
    objective = Preference(Dpo(), 0, joined=True, lean=True)

    def step(many, length, checkpointed):
        """Return the most bytes alive in a step of two micro-batches, the larger one second."""
        layers = base_model.decoder_layers(model)
        with (
            kernels.installed(model, "auto") as installed,
            attention.within_documents(model, plain=not installed.joined),
            checkpointing.checkpointed(layers, checkpointed),
            live,
        ):
            assert installed.joined
            assert installed.loss
            live.peak = 0
            for count, longest in ((1, 8), (many, length)):
                rows = [(n, pair(longest, longest // 2), torch.zeros(2)) for n in range(count)]
                batch = objective.collate(rows)
                del batch["rows"]
                objective.loss(model, batch, torch.tensor(float(many))).backward()
                masters.take_gradients()
                del batch, rows
            optimizer.step()
            masters.give_weights()
            masters.clear_gradients()
        return live.peak - mapped

    step(1, 64, 0)  # the states of the optimizer
    for many, length, checkpointed in ((2, 128, 0), (1, 512, 0), (2, 256, 4)):
        tokens = 2 * many * length
        load = planner.Load(1, tokens, tokens // 2, joined=True, document=length, alone=False, pairs=True)
        training = Training(gradient_accumulation_steps=2)
        expected = planner.usage(outline, load, training, checkpointed, False).allocated_bytes
        assert expected == pytest.approx(step(many, length, checkpointed), rel=0.02), (many, length, checkpointed)


def test_a_recipe_of_pairs_is_planned_with_both_sequences(make_recipe, tmp_path, monkeypatch):
    rows = [{"prompt": f"Count to {n}", "chosen": "1 2 3 " * 9, "rejected": "no"} for n in range(12)]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = []
    with heard_by(said.append):
        found = plan(make_recipe(dpo={}, data={"train": str(file), "eval_fraction": 0.0}), "540MiB")
    assert found["fits"]
    assert not [change for change in found["suggestions"] if "packing" in change["set"]]
    assert found["limits"]["max_length"] == 512  # the model has no more positions
    monkeypatch.setattr(plan_job, "_positions", lambda recipe, config: None)
    limits = plan(make_recipe(dpo={}, data={"train": str(file), "eval_fraction": 0.0}), "540MiB")["limits"]
    assert limits["max_length"] == pytest.approx(limits["tokens_per_micro_batch"] / 2, rel=0.02)
    padded = plan(
        make_recipe(dpo={}, data={"train": str(file)}, training={"tokens_per_micro_batch": None}, kernels="off"),
        "24GiB",
    )
    assert padded["fits"]
