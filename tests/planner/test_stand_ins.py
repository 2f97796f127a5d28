"""What stands for kernels on the meta device allocates what they allocate."""

import pytest
import torch
import transformers
from trl.trainer.utils import add_fused_lm_head

from qlora import base_model, kernels, methods, planner
from qlora.recipe import Lora, Model, Quantization, Training
from qlora.system import memory
from tests.conftest import SHAPE

# tables of more than 32,768 tokens, a part of which trl has in memory at a time
MIXTURE = SHAPE | {"vocab_size": 40_000, "num_local_experts": 4, "output_router_logits": True}


@pytest.mark.slow
def test_the_loss_of_experts_on_a_cpu_is_trls_in_the_plan_too(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**MIXTURE, tie_word_embeddings=False)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    section, lora = Model(name_or_path=str(tmp_path)), Lora(r=4, target_modules=["q_proj", "v_proj"])
    outline = planner.outline(config, section, Quantization(), lora, 0, "cpu", False)
    assert outline.step.head is None
    base = base_model.load(base_model.find(section), section, Quantization(), device="cpu")
    add_fused_lm_head(base, outputs=("entropy", "is_top1"))
    model = methods.attach(base, lora).train()
    for length, scored in ((64, 48), (192, 128)):
        ids = torch.full((1, length), 7)
        labels = torch.full((1, length), -100)
        labels[0, -scored:] = 7
        with kernels.installed(model, "auto"), memory.LiveTensors(*base_model.tensors(model)) as live:
            model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum().backward()
        model.zero_grad(set_to_none=True)
        found = planner.usage(
            outline, planner.Load(1, length, scored), Training(gradient_accumulation_steps=1), 0, False
        )
        assert found.where == "loss head"
        trained = 4 * outline.trained.sum()  # masters, and states of the optimizer, which this step has not
        held = found.allocated_bytes - trained - found.components["optimizer"] + outline.mapped
        assert held == pytest.approx(live.peak, rel=0.05)
