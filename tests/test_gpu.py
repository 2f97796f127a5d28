"""What only a GPU can show: pytest -m gpu. Small tensors and tiny models; a minute on any card."""

import json

import pytest
import torch
from bitsandbytes.nn import Params4bit

from qlora import base_model, sft
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.export import merge
from qlora.recipe import Quantization

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_nf4_codes_and_constants_are_the_same_on_cpu_and_cuda():
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    cpu, cuda = (Params4bit(W.clone(), compress_statistics=True, quant_type="nf4").to(d) for d in ("cpu", "cuda"))
    assert torch.equal(cpu.data.flatten(), cuda.data.cpu().flatten())
    assert torch.equal(cpu.quant_state.absmax, cuda.quant_state.absmax.cpu())
    a, b = merge.dequantized(W, Quantization()), merge.dequantized(W.cuda(), Quantization()).cpu()
    torch.testing.assert_close(a, b, atol=0, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_on_the_gpu_exports_proven(make_recipe, tmp_path, family):
    run = train(make_recipe(family))
    assert "cpu" not in run.environment()["device"]
    report = export(run.path, tmp_path / "out")
    assert report["verified"]
    assert report["merged"]["kl"] < 1e-4


def test_losses_on_the_gpu_are_those_of_the_cpu(make_recipe, tmp_path, monkeypatch):
    losses = {}
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setattr(base_model, "default_device", lambda: torch.device("cpu"))
        run = train(make_recipe(output_dir=str(tmp_path / device), training={"max_steps": 5, "learning_rate": 1e-3}))
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        losses[device] = [record["loss"] for record in records if "loss" in record]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)


def test_optimizer_states_of_large_adapters_are_paged(make_recipe, monkeypatch):
    made = []
    original = sft.Trainer.create_optimizer
    monkeypatch.setattr(
        sft.Trainer, "create_optimizer", lambda self, model=None: made.append(original(self)) or made[-1]
    )
    # 1,024 x 128: over the 100,000 numbers from which bitsandbytes pages
    train(make_recipe(lora={"r": 1024, "lora_alpha": 1024, "target_modules": ["down_proj"]}))
    paged = [state["state1"] for state in made[0].state.values() if getattr(state["state1"], "is_paged", False)]
    assert paged
    assert {tensor.dtype for tensor in paged} == {torch.uint8}
