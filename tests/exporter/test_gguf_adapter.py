"""The adapter alone as a GGUF file: what llama.cpp adds to its base is what a merge adds."""

import importlib.util
import shutil

import pytest
import torch

from qlora.commands.export import export
from qlora.commands.train import train
from qlora.exporter.gguf import adapter as gguf_adapter
from qlora.exporter.gguf import converter
from qlora.exporter.gguf import tensors as gguf_tensors
from qlora.system.errors import InputError, ProofFailed
from tests.conftest import some_slow

gguf = pytest.importorskip("gguf", reason="no gguf; pip install '.[gguf]'")
pytestmark = pytest.mark.usefixtures("unplanned")


@pytest.fixture(autouse=True)
def no_llama_cpp_of_the_user(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)


def read(file):
    """Return ({key: value}, {name: float32 tensor}) of a GGUF file."""
    reader = gguf.GGUFReader(file)
    found = {
        one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy()) for one in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, found


def added(fields, tensors):
    """Return {name: what llama.cpp adds to that weight}, as llama-adapter.cpp has it: alpha / rank of each lora_b."""
    alpha = fields["adapter.lora.alpha"]
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert {f"{name}.lora_{part}" for name in names for part in "ab"} == set(tensors)
    return {
        name: alpha / tensors[f"{name}.lora_b"].shape[1] * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        for name in names
    }


CASES = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "phi3": {},
    "llama rslora": {"use_rslora": True, "r": 8},
    "llama patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "llama-tied all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", some_slow(CASES, but=["gpt2", "phi3", "llama patterns"]))
def test_base_and_adapter_are_the_merged_file(case, make_recipe, tmp_path):
    family = case.partition(" ")[0]
    run = train(make_recipe(family, lora=CASES[case], quantization=None))
    out = tmp_path / "mine.gguf"
    found = export(run.path, out, gguf="adapter")
    fields, tensors = read(out)
    assert (fields["general.type"], fields["adapter.type"], fields["general.name"]) == ("adapter", "lora", "mine")
    assert found["modules"] == len(tensors) // 2 > 4

    merged = export(run.path, tmp_path / "merged", "float32", gguf="f16")["gguf"]["file"]
    base = tmp_path / "base.gguf"
    converter.write(run.recipe().model.name_or_path, base, "f16")
    (of_base, before), (_, after) = read(base), read(tmp_path / "merged" / merged)
    assert fields["general.architecture"] == of_base["general.architecture"]
    deltas = added(fields, tensors)
    assert deltas.keys() <= before.keys()
    for name, weight in before.items():
        if name in deltas:
            assert torch.allclose(weight + deltas[name], after[name], rtol=2e-3, atol=2e-4), name  # f16 of both
            assert (after[name] - weight).norm() > 10 * (weight + deltas[name] - after[name]).norm(), name
        else:
            assert torch.equal(weight, after[name]), name


def test_the_rows_of_queries_and_keys_are_in_the_order_of_llama_cpp(trained_once, tmp_path):
    """Two-sided: the order of transformers would be another update."""
    run = trained_once("llama")
    export(run.path, tmp_path / "mine.gguf", gguf="adapter")
    _, tensors = read(tmp_path / "mine.gguf")
    from safetensors.torch import load_file

    stored = load_file(run.adapter / "adapter_model.safetensors")
    B_OR = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].float()
    found = tensors["blk.0.attn_q.weight.lora_b"]
    assert not torch.equal(found, B_OR)
    assert torch.equal(found, gguf_tensors.permuted(B_OR, 4))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"lora": {"use_dora": True}}, "is DoRA, and llama.cpp's --lora takes only LoRA; merge it: qlora export"),
        ({"hira": {}}, "is HiRA, and llama.cpp's --lora takes only LoRA; merge it"),
        ({"bottleneck": {}}, "is Bottleneck, .* takes only LoRA; adapters have a nonlinearity"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "has weights trained whole .* takes only LoRA; merge it"),
        ({"model": {"new_tokens": ["<a>"]}}, "has new tokens, .* merge it"),
    ],
)
def test_what_llama_cpp_does_not_take_is_refused_with_what_to_do(sections, expected, make_recipe, tmp_path):
    if "model" in sections:
        sections = {"model": {"name_or_path": str(make_recipe().model.name_or_path), **sections["model"]}}
    run = train(make_recipe(**sections))
    with pytest.raises(InputError, match=expected):
        export(run.path, tmp_path / "mine.gguf", gguf="adapter")
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_wrong_file_is_never_left_and_what_means_nothing_is_refused(trained_once, tmp_path, monkeypatch):
    run, out = trained_once("llama"), tmp_path / "mine.gguf"
    for options, expected in [
        ({"dtype": "float16"}, "leave --dtype out"),
        ({"overrides": ["export.int8=true"]}, "leave --int8 out"),
    ]:
        with pytest.raises(InputError, match=expected):
            export(run.path, out, gguf="adapter", **options)
    with pytest.raises(InputError, match=r"give its name, which ends in \.gguf"):
        export(run.path, tmp_path / "folder", gguf="adapter")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_adapter, "_alpha_of", lambda update: 2 * update.scaling * len(update.A_RI))
        with pytest.raises(ProofFailed, match="is not the one that was trained"):
            export(run.path, out, gguf="adapter")
    assert not list(tmp_path.glob("*.gguf*"))
    export(run.path, out, gguf="adapter")
    with pytest.raises(InputError, match="already exists and is not overwritten"):
        export(run.path, out, gguf="adapter")


def test_an_adapter_of_another_tool_on_its_base(trained_once, tmp_path):
    run = trained_once("llama")
    folder = shutil.copytree(run.adapter, tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    export(folder, tmp_path / "theirs.gguf", gguf="adapter", model=run.recipe().model.name_or_path)
    export(run.path, tmp_path / "ours.gguf", gguf="adapter")
    (_, theirs), (_, ours) = read(tmp_path / "theirs.gguf"), read(tmp_path / "ours.gguf")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python; pip install '.[gguf]'")
def test_llama_cpp_answers_with_it_as_with_the_merge(trained_once, tmp_path):
    import llama_cpp

    run = trained_once("llama")
    export(run.path, tmp_path / "mine.gguf", gguf="adapter")
    merged = export(run.path, tmp_path / "merged", gguf="f16", overrides=["export.base=original"])["gguf"]["file"]
    converter.write(run.recipe().model.name_or_path, tmp_path / "base.gguf", "f16")

    def logits(model, **more):
        llama = llama_cpp.Llama(str(model), logits_all=True, verbose=False, **more)
        llama.eval([1, 5, 9, 20])
        return torch.tensor(llama.scores[:4].copy())

    both = logits(tmp_path / "base.gguf", lora_path=str(tmp_path / "mine.gguf"))
    assert torch.allclose(both, logits(tmp_path / "merged" / merged), atol=0.1)
    assert not torch.allclose(both, logits(tmp_path / "base.gguf"), atol=0.1)
