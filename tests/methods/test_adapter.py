"""An adapter folder is read whole or refused with the reason, and never put on a base that it was not made for."""

import shutil

import pytest
import torch

from qlora import methods
from qlora.system.errors import InputError
from tests.conftest import some_slow
from tests.methods.folders import IDS, KEY, ROWS, edit_config, edit_tensors
from tests.methods.test_methods import logits


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / methods.WEIGHTS).unlink(), "adapter_model.safetensors"),
        (lambda f: (f / methods.CONFIG).unlink(), "adapter_config.json"),
        (lambda f: (f / methods.WEIGHTS).write_bytes((f / methods.WEIGHTS).read_bytes()[:-9]), "adapter"),
        (lambda f: edit_tensors(f, lambda t: t.pop(KEY)), "up_proj: has lora_B but not its partner"),
        (lambda f: edit_tensors(f, lambda t: t.update(other=torch.ones(1))), "other: not a tensor of an adapter"),
        (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("inf"))), "non-finite"),
        (lambda f: edit_tensors(f, lambda t: t.clear()), "no LoRA tensors"),
        (
            lambda f: edit_config(f, peft_type="LOHA"),
            "'LOHA' is not ADALORA, BOTTLENECK, FULL, HIRA, IA3, LORA, OFT, PREFIX_TUNING or PROMPT_TUNING",
        ),
        (lambda f: edit_config(f, use_dora=True), "not its partner lora_magnitude_vector"),
        (lambda f: edit_config(f, layer_replication=[[0, 2]]), "uses layer_replication"),
        (lambda f: edit_config(f, init_lora_weights="pissa"), "changed the base weights"),
        (lambda f: edit_config(f, r=8), "rank differs"),
    ],
)
def test_a_broken_adapter_is_an_input_error(saved, break_it, expected):
    _, folder = saved("llama")
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        methods.read(folder)


def test_an_adapter_of_another_base_is_refused_not_ignored(saved, load_model):
    _, folder = saved("llama")
    with pytest.raises(InputError, match="made for another base"):
        methods.load(load_model("gpt2"), folder)
    edit_tensors(folder, lambda t: t.update({KEY: torch.ones(4, 128, dtype=torch.bfloat16)}))
    with pytest.raises(InputError, match=r"up_proj.lora_A.weight: \(4, 128\), the base needs \(4, 64\)"):
        methods.load(load_model("llama"), folder)


def test_a_copied_folder_reads_the_same(saved, tmp_path):
    _, folder = saved("llama")
    copy = methods.read(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.updates.keys() == methods.read(folder).updates.keys()


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: edit_tensors(f, lambda t: t.pop(ROWS)), "lm_head: adapter_config.json names tokens, and their rows"),
        (
            lambda f: edit_tensors(f, lambda t: t[ROWS].fill_(float("nan"))),
            "lm_head.token_adapter.trainable_tokens_delta: contains non-finite values",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({ROWS: torch.ones(2, 64)})),
            r"lm_head: rows \(2, 64\) do not fit",
        ),
        (lambda f: edit_tensors(f, lambda t: t.update({ROWS: torch.ones(3)})), r"lm_head: rows \(3,\) do not fit"),
        (
            lambda f: edit_config(f, trainable_token_indices=None),
            "rows of tokens that adapter_config.json does not name",
        ),
        (
            lambda f: edit_config(f, trainable_token_indices=1),
            "trainable_token_indices in adapter_config.json is not",
        ),
        (lambda f: edit_config(f, trainable_token_indices={"lm_head": [1, 1, 2]}), "trainable_token_indices"),
        (lambda f: edit_config(f, trainable_token_indices={"lm_head": [1, 2, -1]}), "trainable_token_indices"),
        (lambda f: edit_config(f, trainable_token_indices={"lm_head": "abc"}), "trainable_token_indices"),
    ],
)
def test_broken_rows_are_an_input_error(saved, break_it, expected):
    _, folder = saved("llama", token_ids=IDS)
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        methods.read(folder)


def test_rows_for_another_head_or_of_another_width_are_refused(saved, load_model):
    _, untied = saved("llama", token_ids=IDS)
    with pytest.raises(
        InputError, match=r"\[7, 300, 511\] in lm_head.* need \[7, 300, 511\] in model.embed_tokens; restore"
    ):
        methods.load(load_model("llama-tied"), untied, IDS)
    edit_tensors(untied, lambda t: t.update({ROWS: torch.ones(3, 32, dtype=torch.bfloat16)}))
    with pytest.raises(
        InputError, match=r"lm_head.token_adapter.trainable_tokens_delta: \(3, 32\), the base needs \(3, 64\)"
    ):
        methods.load(load_model("llama"), untied, IDS)
    read = methods.read(untied)
    shapes = {module: update.shape for module, update in read.updates.items()}
    with pytest.raises(InputError, match="lm_head: rows of 32 numbers, the base has 64"):
        read.refuse_mismatch(shapes, {}, {"model.embed_tokens": (512, 64), "lm_head": (512, 64)}, IDS)


@pytest.mark.parametrize("family", some_slow(["llama", "llama-tied"], ["llama-tied"]))
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "layers_to_transform": [1]},
        {"target_modules": r".*\.1\..*_proj", "use_dora": True},
    ],
)
def test_an_adapter_that_peft_alone_made_loads(foreign, load_model, settings, family):
    from peft import LoraConfig

    made, folder = foreign(LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings), family)
    loaded = methods.load(load_model(family), folder)
    expected, base = logits(made), logits(load_model(family))
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(base, expected, atol=0.1)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: edit_config(f, use_qalora=True), "uses use_qalora, which is not supported"),
        (lambda f: edit_config(f, something_new={"a": 1}), "uses something_new, which is not supported"),
        (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "changed the base weights"),
        (lambda f: edit_config(f, init_lora_weights="loftq"), "changed the base weights"),
        (lambda f: edit_config(f, use_dora=False), "lora_magnitude_vector does not belong to this kind"),
        (
            lambda f: edit_tensors(f, lambda t: t.pop(KEY[:-13] + "lora_magnitude_vector")),
            "not its partner lora_magnitude_vector",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop("base_model.model.lm_head.weight")), "lm_head"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(9, 64)})),
            r"lm_head.weight: \(9, 64\), the base needs \(512, 64\)",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)})),
            "model.norm.weight: not in the base",
        ),
    ],
)
def test_a_folder_that_does_not_fit_in_every_tensor_is_refused(foreign, load_model, break_it, expected):
    from peft import LoraConfig

    _, folder = foreign(LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["lm_head"], use_dora=True))
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        methods.load(load_model("llama"), folder)
