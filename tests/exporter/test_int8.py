"""A folder in dynamic int8 is opened by transformers alone and is the model that was trained; or there is none."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora import base_model
from qlora.commands.chat import chat
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.exporter import int8, merge, proof
from qlora.jobs.exporting import export_int8
from qlora.recipe import Model
from qlora.system.errors import InputError, ProofFailed
from tests.conftest import CONVERSATIONS, encode, messages

pytestmark = pytest.mark.usefixtures("unplanned")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="no torchao; pip install '.[int8]'"
)
AS_INT8 = ["export.int8=true"]


@pytest.fixture(scope="module")
def exported(trained_once, tmp_path_factory):
    """Return (folder, report) of the tiny Llama in int8, in several shards; made once, do not write to it."""
    out = tmp_path_factory.mktemp("int8") / "out"
    return out, export(trained_once("llama").path, out, overrides=[*AS_INT8, "export.max_shard_size=100KB"])


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@needs_torchao
def test_transformers_opens_it_and_computes_with_int8_weights_and_int8_activations(exported, tokenizer):
    out, report = exported
    assert report["verified"]
    assert report["int8"]["layers"] == 14
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    layer = model.model.layers[1].mlp.up_proj
    assert (type(layer.weight).__name__, layer.weight.qdata.dtype) == ("Int8Tensor", torch.int8)
    assert (type(model.lm_head.weight), model.dtype) == (torch.nn.Parameter, torch.bfloat16)
    x_TI = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    s_T1 = x_TI.float().abs().amax(1, keepdim=True) / 127.5  # the definition: a scale a token, a scale a row
    codes_TI = (x_TI.float() / s_T1).round().clamp(-128, 127)
    expected = codes_TI @ layer.weight.qdata.float().T * s_T1 * layer.weight.scale.flatten()
    torch.testing.assert_close(layer(x_TI).float(), expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)
    (row,) = [encode(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "3"}])]
    assert torch.isfinite(model(torch.tensor([row.input_ids])).logits).all()


@needs_torchao
def test_the_report_the_card_and_the_table_say_what_it_is(exported):
    out, report = exported
    assert json.loads((out / "export_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["merged"]["kl"] < 1e-4 < report["int8"]["kl"] < report["base_model"]["kl"]
    assert report["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    card = (out / "README.md").read_text()
    assert "in dynamic int8 for CPUs" in card
    assert "dynamic int8 of that" in card
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # the merge that it was made of is gone
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert "Int8Tensor" in str(file.metadata())  # no pickle: what belongs together is said in JSON


@needs_torchao
@pytest.mark.parametrize("what", ["a code", "a scale", "a norm", "one is missing"])
def test_a_weight_that_is_not_the_merged_one_is_found_when_it_is_read_back(trained_once, tmp_path, what):
    merged = tmp_path / "merged"
    export(trained_once("llama").path, merged, overrides=["export.verify=off"])
    assert int8.write(merged, tmp_path / "int8", "bfloat16", 10**9) == 14
    file = tmp_path / "int8" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        stored, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    name = "model.layers.0.self_attn.q_proj"
    if what == "a code":
        stored[f"{name}._weight_qdata"][3, 5] ^= 2
    elif what == "a scale":
        stored[f"{name}._weight_scale"][3] *= 1.02
    elif what == "a norm":
        stored["model.norm.weight"][0] += 0.1
    else:
        del stored[f"{name}._weight_qdata"]
    save_file(stored, file, metadata)
    with pytest.raises(ProofFailed, match="half a step" if what != "one is missing" else "its tensors are not those"):
        int8.refuse_other_weights(merged, tmp_path / "int8", "bfloat16")


@needs_torchao
def test_an_export_beyond_the_limit_fails_and_leaves_nothing(trained_once, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "KL_LIMIT", 1e-6)
    with pytest.raises(ProofFailed, match=r"int8: KL\(trained, exported\) is .* the limit is 1e-06") as error:
        export(trained_once("llama").path, tmp_path / "out", overrides=AS_INT8)
    assert error.value.exit_code == 4
    assert not list(tmp_path.iterdir())


def test_it_is_no_proof_where_the_untrained_base_is_as_near():
    live, near, far = proof.Scores(1.0), proof.Scores(1.0, 0.1, 0.9), proof.Scores(1.2, 0.2, 0.9)
    assert int8.failures(live, near, far) == []
    assert "no closer to the trained model" in int8.failures(live, far, near)[0]
    assert int8.failures(live, proof.Scores(float("nan"), float("nan")), far) == ["int8: its logits are not finite"]


@needs_torchao
def test_float16_beside_int8_would_overflow_which_is_why_it_is_never_taken():
    """Fails once torchao scales back before it rounds: then float16 may be offered."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(64, 8, bias=False, dtype=torch.float16)
    layer.weight.data.fill_(0.01)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    x = torch.full((1, 64), 20.0, dtype=torch.float16)
    assert torch.isinf(layer(x)).any()  # of 12.8
    assert {dtype: int8.dtype_beside(dtype) for dtype in ("float16", "bfloat16", "float32")} == {
        "float16": "bfloat16",
        "bfloat16": "bfloat16",
        "float32": "float32",
    }


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gguf": "q8_0"}, "--int8 writes no model in full precision, which --gguf needs"),
        ({"compare_bases": True}, "which --compare-bases needs"),
    ],
)
def test_what_needs_full_precision_does_not_go_with_it(trained_once, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        export(trained_once("llama").path, tmp_path / "out", overrides=AS_INT8, **options)
    assert not list(tmp_path.iterdir())


def test_without_torchao_it_is_refused_with_what_to_install(trained_once, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest)
    )
    with pytest.raises(InputError, match=r"needs the package torchao; install it:  pip install 'torchao"):
        export(trained_once("llama").path, tmp_path / "out", overrides=AS_INT8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "said"), [("gpt2", "8 of its layers are Conv1D"), ("qwen3-moe", "are experts or kernels")]
)
def test_layers_that_torchao_would_leave_as_they_are_are_refused(tiny_model, family, said):
    section = Model(name_or_path=str(tiny_model(family)))
    checkpoint = base_model.find(section)
    plan = merge.plan(checkpoint, base_model.load_config(checkpoint, section), torch.float16)
    with pytest.raises(InputError, match=said):
        export_int8.refuse(SimpleNamespace(checkpoint=checkpoint), plan, {})


def test_a_model_with_classes_is_refused():
    checkpoint = SimpleNamespace(task=base_model.Task("text-classification"))
    with pytest.raises(InputError, match="--int8 is for text-generation, and this is a model for text-classification"):
        export_int8.refuse(SimpleNamespace(checkpoint=checkpoint), None, {})


@needs_torchao
def test_eval_and_chat_open_it_and_a_damaged_one_is_refused(exported, trained_once, tmp_path):
    out, _ = exported
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages(turns)}) + "\n" for turns in CONVERSATIONS[:4]))
    live, stored = evaluate(trained_once("llama").path, rows), evaluate(out, rows)
    assert 0 < abs(stored["loss"] - live["loss"]) < 0.3
    assert isinstance(chat(out, "What is 1 plus 2?", max_new_tokens=4), str)
    broken = shutil.copytree(out, tmp_path / "broken")
    next(broken.glob("*.safetensors")).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="broken"):
        chat(broken, "Hi")


def test_without_torchao_chat_and_eval_say_what_to_install_and_nothing_of_training(tiny_model, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name, *rest)
    )
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "int8")
    config = json.loads((folder / "config.json").read_text())
    kind = {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {}, "_version": 2}}
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    for ask in (lambda: chat(folder, "Hi"), lambda: evaluate(folder, tmp_path / "rows.jsonl")):
        with pytest.raises(InputError, match=r"int8 needs the package torchao; install it:  pip install 'torchao"):
            ask()
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"quantized already \(gptq\); only bitsandbytes nf4 is read here, so give the 16-bit"
    ):
        chat(folder, "Hi")
