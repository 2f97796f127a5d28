"""What only a GPU can show: pytest -m gpu. Small tensors and tiny models; a minute on any card."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Params4bit
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora import base_model, methods
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.kernels import attention, liger, nf4, norm
from qlora.kernels.checkpointing import Host, checkpointed
from qlora.recipe import Lora
from qlora.system.errors import DoesNotFit
from qlora.training.objectives.supervised import Trainer
from tests.conftest import messages, write_jsonl

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_nf4_codes_and_constants_are_the_same_on_cpu_and_cuda():
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    cpu, cuda = (Params4bit(W.clone(), compress_statistics=True, quant_type="nf4").to(d) for d in ("cpu", "cuda"))
    assert torch.equal(cpu.data.flatten(), cuda.data.cpu().flatten())
    assert torch.equal(cpu.quant_state.absmax, cuda.quant_state.absmax.cpu())
    a, b = nf4.quantize(W).rows(0, len(W)), nf4.quantize(W.cuda()).rows(0, len(W)).cpu()
    torch.testing.assert_close(a, b, atol=0, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_on_the_gpu_exports_proven(make_recipe, tmp_path, family):
    run = train(make_recipe(family))
    assert "cpu" not in run.environment()["device"]
    for verify in ("full", "layers"):
        report = export(run.path, tmp_path / verify, overrides=[f"export.verify={verify}"])
        assert report["verified"]
        assert report["merged"]["kl"] < 1e-4
        assert report["quantized"]["same_codes_as_training"] == report["quantized"]["modules"]


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


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="varlen_attn needs 8.0"
)
@pytest.mark.parametrize("num_kv_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_documents_in_one_call_are_the_documents_one_by_one(num_kv_heads, window, head_dim):
    module, segments = SimpleNamespace(num_key_value_groups=8 // num_kv_heads), [37, 1, 130, 64, 280]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    inputs = [draw(1, heads, sum(segments), head_dim) for heads in (8, num_kv_heads, num_kv_heads)]
    grad_output = draw(1, sum(segments), 8, head_dim)
    assert attention.takes_one_call(module, inputs[0], inputs[2], attention._capability(inputs[0].device))

    found = []
    for path in (attention.in_one_call, attention.one_by_one):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = path(module, *leaves, segments, window, scaling=0.1)
        found.append([output, *torch.autograd.grad(output, leaves, grad_output)])
    for one, other in zip(*found, strict=True):
        # bf16 rounding is up to 0.5 % of the norm on these inputs (on a CPU, against float32); one key more over 10 %
        assert (one.float() - other.float()).norm() < 2e-2 * other.float().norm()


def test_a_packed_run_on_the_gpu_has_the_losses_of_the_documents_one_by_one(make_recipe, tmp_path, monkeypatch):
    losses = {}
    for one in (True, False):
        if not one:
            monkeypatch.setattr(attention, "takes_one_call", lambda *args, **kwargs: False)
        run = train(
            make_recipe(
                output_dir=str(tmp_path / str(one)),
                data={"packing": True},
                training={"max_steps": 3, "learning_rate": 1e-3},
            )
        )
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        losses[one] = [record["loss"] for record in records if "loss" in record]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


def step_of(model, ids):
    """Return (loss, {name: gradient}, bytes allocated between forward and backward pass), dropout from a fixed seed."""
    torch.manual_seed(0)
    before = torch.cuda.memory_allocated()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.item(), gradients, held


@pytest.mark.real_gpu
@pytest.mark.parametrize("slow", [None, "copies", "layers"])
def test_what_waits_on_the_host_comes_back_as_it_was(load_model, monkeypatch, slow):
    if slow == "copies":  # 10 ms each, on their stream
        original = Host.copy

        def late(host, targets, sources, device):
            with torch.cuda.stream(host._stream):
                torch.cuda._sleep(20_000_000)
            return original(host, targets, sources, device)

        monkeypatch.setattr(Host, "copy", late)
    model = methods.attach(load_model(), Lora(r=4, lora_dropout=0.2)).train()
    layers = base_model.decoder_layers(model)
    if slow == "layers":
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(20_000_000))
    ids = torch.randint(0, 512, (8, 512), device="cuda")
    step_of(model, ids)
    loss, gradients, held = step_of(model, ids)
    with checkpointed(layers, len(layers)):
        _, _, kept = step_of(model, ids)
    with checkpointed(layers, len(layers), offload=True) as host:
        for _ in range(3):
            found = step_of(model, ids)
            assert found[0] == loss
            for name, gradient in gradients.items():
                assert (found[1][name].float() - gradient.float()).norm() <= 1e-3 * gradient.float().norm(), name
        assert all(buffer.is_pinned() for buffer in host.free)
        assert [len(buffer) for buffer in host.free] == [Host.PIECE] * len(layers)  # half a MiB each: one piece
        torch.cuda.synchronize()
    assert found[2] <= kept < held  # two layers, and two may be in flight: equal at the most


@pytest.mark.real_gpu
def test_a_run_that_the_card_refuses_memory_says_what_was_asked_and_free(make_recipe, tmp_path, monkeypatch):
    turns = messages([("user", "What is 1 plus 2? " * 30), ("assistant", "1 plus 2 is 3. " * 20)])
    rows = write_jsonl(tmp_path / "long.jsonl", [{"messages": turns}] * 64)
    recipe = make_recipe(
        data={"train": str(rows), "max_length": 512, "overlong": "truncate", "eval_fraction": 0.0},
        training={"per_device_train_batch_size": 64},
    )
    rehearse = Trainer.rehearse

    def limited(*args):
        torch.cuda.empty_cache()
        share = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
        return rehearse(*args)

    monkeypatch.setattr(Trainer, "rehearse", limited)
    try:
        with pytest.raises(
            DoesNotFit, match=r"in the rehearsal, .*: [\d.]+ \wiB requested, [\d.]+ \wiB free\n  training rows"
        ):
            train(recipe)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_run_on_the_gpu_is_stopped_and_resumed_with_its_states_paged(make_recipe, tmp_path, monkeypatch):
    made = []
    original = Trainer.create_optimizer
    monkeypatch.setattr(Trainer, "create_optimizer", lambda self, model=None: made.append(original(self)) or made[-1])
    lora = {"r": 64, "lora_alpha": 64, "lora_dropout": 0.1, "target_modules": ["down_proj"]}
    settings = {"lora": lora, "training": {"max_steps": 6, "save_steps": 1, "save_total_limit": None}}
    whole = train(make_recipe("wide", **settings, output_dir=str(tmp_path / "whole")))
    # as a kill -9 after step 3 leaves it
    other = tmp_path / "other"
    shutil.copytree(whole.path, other)
    shutil.rmtree(other / "adapter")
    for step in (4, 5, 6):
        shutil.rmtree(other / "checkpoints" / f"step-{step}")
    resumed = train(make_recipe("wide", **settings, output_dir=str(other)), resume=True)
    states = [[state["state1"] for state in optimizer.state.values()] for optimizer in made]
    paged = [[getattr(state, "is_paged", False) for state in each] for each in states]
    assert paged[0] == paged[1]
    assert any(paged[1])
    assert {state.dtype for state in states[0] if getattr(state, "is_paged", False)} == {torch.uint8}
    losses = [
        [record["loss"] for record in map(json.loads, run.metrics_file.read_text().splitlines()) if "loss" in record]
        for run in (whole, resumed)
    ]
    assert losses[1] == pytest.approx(
        losses[0], rel=1e-3
    )  # kernels that add in another order each time: not to the bit


def test_liger_computes_what_our_norm_does():
    pytest.importorskip("liger_kernel")
    module = LlamaRMSNorm(4096).to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 5000, 4096, device="cuda", dtype=torch.bfloat16)
    results = []
    for source in (norm, liger):
        leaf = x.clone().requires_grad_()
        y = source.forward_of(module)(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, torch.ones_like(y))))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).norm() <= 1e-2 * one.float().norm()
