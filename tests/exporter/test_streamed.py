"""Streamed from the files or held whole in memory: one model, to float32 rounding; and never more than its bound."""

import dataclasses
import gc
import json
import shutil
import sys
import threading

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora import base_model, methods
from qlora.data import Example
from qlora.evaluation import metrics
from qlora.exporter import merge, proof, streamed
from qlora.recipe import Lora, Model, Quantization
from qlora.system.errors import ProofFailed
from tests import forked
from tests.conftest import CONVERSATIONS, FAMILIES, encode, messages

CPU = torch.device("cpu")


def rows_of(tokenizer, count=6):
    return [encode(tokenizer, messages(turns)) for turns in CONVERSATIONS[:count]]


def source_of(checkpoint, section):
    return merge.plan(checkpoint, base_model.load_config(checkpoint, section), torch.float16).source


@pytest.fixture
def live_models(tiny_model, load_model, tmp_path):
    """Return make(family, quantization) -> (whole, streamed): the same base with the same strong random adapter."""

    def make(family, quantization=Quantization()):  # noqa: B008 (frozen)
        section = Model(name_or_path=str(tiny_model(family)))
        checkpoint = base_model.find(section)
        model = methods.attach(load_model(family, quantization), Lora(r=4, lora_alpha=8))
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        methods.save(model, tmp_path / "adapter", "x", None)
        bare = streamed.live(checkpoint, section, quantization, CPU, source_of(checkpoint, section))
        return model.eval(), methods.load(bare, tmp_path / "adapter")

    return make


def assert_same(whole, other):
    """Both are proof.Live on the same rows."""
    for one, two in zip(whole.log_probabilities, other.log_probabilities, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)  # float32 sums in another order, of values up to 10
    assert other.base_scores.loss == pytest.approx(whole.base_scores.loss, abs=1e-5)
    assert other.base_scores.kl == pytest.approx(whole.base_scores.kl, rel=1e-4)
    assert whole.base_scores.kl > 1e-3


@pytest.mark.parametrize(("family", "tokens_at_once"), [("llama", 0), ("llama", 80), *((f, 10**6) for f in FAMILIES)])
def test_the_live_model_is_the_same_streamed(live_models, tokenizer, family, tokens_at_once):
    whole, other = live_models(family)
    rows = rows_of(tokenizer)
    live = proof.Live(other, rows, tokens_at_once)
    assert len(live.batches) == {0: 6, 80: 3, 10**6: 1}[tokens_at_once]
    assert_same(proof.Live(whole, rows), live)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_same_streamed(tiny_model, family):
    whole = proof.reload(tiny_model(family), CPU)
    other = streamed.exported(tiny_model(family), CPU)
    ids = torch.arange(3, 200)[None] * 7 % 512
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, other(ids).logits, atol=2e-5, rtol=1e-5)


def test_rows_padded_together_are_answered_as_each_alone(load_model, tokenizer):
    # longer than the window of gemma2 in conftest (256), beside short ones
    rows = rows_of(tokenizer)
    rows += [Example(rows[0].input_ids * 12, rows[0].labels * 12), Example(rows[1].input_ids[:2], rows[1].labels[:2])]
    assert max(len(row.input_ids) for row in rows) > 256
    columns = [range(len(row.input_ids) - 1) for row in rows]
    for family in ("llama", "gemma2", "gpt2"):
        model = load_model(family, None).float()
        alone = [metrics.log_probabilities(model, [row], [kept])[0] for row, kept in zip(rows, columns, strict=True)]
        together = metrics.log_probabilities(model, rows, columns)
        for row, one, two in zip(rows, alone, together, strict=True):
            with torch.no_grad():  # the reference: the model's own logits
                logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
            torch.testing.assert_close(one, logits.log_softmax(-1), atol=1e-5, rtol=0)
            torch.testing.assert_close(two, one, atol=2e-5, rtol=0)


def test_of_a_row_that_does_not_fit_the_last_positions_up_to_the_last_trained_one_are_compared():
    long = Example(list(range(2000)), [-100] * 1500 + [7] * 400 + [-100] * 100)
    short = Example(list(range(20)), [-100] * 10 + [7] * 10)
    assert proof.columns([short, long], 500_000) == [range(19), range(1765, 1899)]  # 256 MiB hold 134 positions
    assert proof.columns([short, long], 500) == [range(19), range(1999)]


def test_a_layer_is_in_memory_while_it_is_called_and_at_no_other_time(live_models):
    _, model = live_models("llama")
    layers, seen = base_model.decoder_layers(model), []

    def look(module, args, output):
        weights = [layer.mlp.up_proj.base_layer.weight.quant_state.absmax for layer in layers]
        seen.append([bool(absmax.any()) for absmax in weights])

    for layer in layers:
        layer.mlp.register_forward_hook(look)
    with torch.no_grad():
        model(torch.arange(5)[None])
    assert seen == [[True, False], [False, True]]
    look(None, None, None)
    assert seen[-1] == [False, False]


ROPES = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_buffers_that_no_file_holds_are_those_of_the_whole_model(tmp_path, rope):
    config = FAMILIES["llama"]()
    config.rope_parameters = ROPES[rope]
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole, other = proof.reload(tmp_path, CPU), streamed.exported(tmp_path, CPU)
    buffers = dict(whole.named_buffers())
    assert buffers
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, buffers.pop(name))
    assert not buffers


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_rows_of_new_tokens_are_in_the_streamed_model(tiny_model, tokenizer, tmp_path, family):
    section = Model(name_or_path=str(tiny_model(family)), new_tokens=["<call>", "<|im_start|>"])
    checkpoint = base_model.find(section)
    ids = list(checkpoint.new_tokens.values())
    model = methods.attach(base_model.load(checkpoint, section, Quantization()), Lora(r=4, lora_alpha=8), 0, ids)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    methods.save(model, tmp_path / "adapter", "x", None)
    bare = streamed.live(checkpoint, section, Quantization(), CPU, source_of(checkpoint, section))
    other = methods.load(bare, tmp_path / "adapter", checkpoint.new_tokens.values())
    rows = [Example([*row.input_ids, *ids], [*row.labels, *ids]) for row in rows_of(tokenizer)]
    assert_same(proof.Live(model.eval(), rows), proof.Live(other, rows, 10**6))


def test_files_without_the_models_prefix_are_read(tiny_model, tmp_path):
    # as openai-community/gpt2 has them
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model("gpt2"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    section = Model(name_or_path=str(tmp_path))
    checkpoint = base_model.find(section)
    whole = base_model.to_float32(base_model.load(checkpoint, section, Quantization()))
    other = streamed.live(checkpoint, section, Quantization(), CPU, source_of(checkpoint, section))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, base_model.to_float32(other)(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")  # true: the biases stay
@pytest.mark.parametrize("quantization", [Quantization(), Quantization(use_double_quant=False), None])
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head", "input_layernorm"]}]
)
def test_other_adapters_of_peft_work_on_it(tiny_model, tokenizer, tmp_path, quantization, settings):
    import peft

    section = Model(name_or_path=str(tiny_model("qwen2" if "bias" in settings else "llama")))
    checkpoint = base_model.find(section)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    whole = peft.get_peft_model(base_model.load(checkpoint, section, quantization), config)
    torch.manual_seed(3)
    state = {
        name: torch.randn_like(tensor, dtype=torch.float32) * 0.1 + 0.5 * ("magnitude" in name)
        for name, tensor in peft.get_peft_model_state_dict(whole).items()
    }
    other = streamed.live(checkpoint, section, quantization, CPU, source_of(checkpoint, section))
    other = peft.get_peft_model(other, config)
    for model in (whole, other):
        assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
    rows = rows_of(tokenizer)
    assert_same(proof.Live(whole.eval(), rows), proof.Live(other.eval(), rows, 10**6))


@pytest.fixture
def proven(live_models, tokenizer, load_model, tmp_path):
    """Return (live, judge): judge(change) -> what is wrong with the faithful merge after `change` on it, streamed."""
    whole, other = live_models("llama")
    live = proof.Live(other, rows_of(tokenizer), 10**6)
    plain = load_model("llama", None).float()
    with torch.no_grad():
        for name in base_model.linear_names(plain):
            layer = whole.get_submodule(f"base_model.model.{name}")
            weight = layer.base_layer.weight
            weight.quant_state.dtype = torch.float32
            delta = layer.float().get_delta_weight("default")
            plain.get_submodule(name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state) + delta)

    def judge(change=lambda model: None):
        with torch.no_grad():
            change(plain)
        plain.save_pretrained(tmp_path / "out")
        merged = live.compare(streamed.exported(tmp_path / "out", CPU))
        return proof.failures(live.scores, merged, live.base_scores, "float32", live.num_trained)

    return judge


def test_the_faithful_merge_passes(proven):
    assert proven() == []


def _one_layer_wrong(model):
    model.model.layers[1].mlp.down_proj.weight.mul_(1.05)


def _embedding_rounded(model):
    weight = model.model.embed_tokens.weight
    weight.copy_(dequantize_4bit(*quantize_4bit(weight.data, blocksize=64, quant_type="nf4")))


def _head_wrong(model):
    model.lm_head.weight[100:].mul_(1.05)


@pytest.mark.parametrize(
    ("change", "where"),
    [(_one_layer_wrong, "decoder layer 1"), (_embedding_rounded, "the embedding"), (_head_wrong, "")],
)
def test_a_wrong_merge_fails_and_the_place_is_named(proven, change, where):
    failures = proven(change)
    assert any("KL(trained, exported)" in failure for failure in failures)
    assert any(f"differ most in {where}" in failure for failure in failures)


def test_a_merge_that_lost_the_adapter_fails(live_models, tokenizer, tiny_model):
    live = proof.Live(live_models("llama")[1], rows_of(tokenizer), 10**6)
    merged = live.compare(streamed.exported(tiny_model("llama"), CPU))
    assert len(proof.failures(live.scores, merged, live.base_scores, "bfloat16", live.num_trained)) > 1


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_folder_whose_tensors_are_not_the_models_fails(tiny_model, tmp_path, change):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model("llama"), tmp_path, dirs_exist_ok=True)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = torch.zeros(2, 2)
    else:
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for opened in (streamed.exported, proof.reload):
        with pytest.raises(ProofFailed, match=name):
            opened(tmp_path, CPU)


class Peak:
    """Most bytes of anonymous memory (what no file stands behind) while in the block, above those at its start."""

    def __enter__(self):
        gc.collect()
        self.before = self.most = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    def _watch(self):
        while not self._done.wait(0.0005):
            self.most = max(self.most, self._now())

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()
        self.num_bytes = self.most - self.before


def measure(folder, rows):
    """Print, as JSON, the peak of a proof of the model in `folder` (as its own export), whole and streamed, and the Need."""
    section, quantization = Model(name_or_path=str(folder)), Quantization()
    checkpoint, rows = base_model.find(section), proof.from_json({"rows": rows, "from": ""})[0]
    attached = methods.attach(base_model.load(checkpoint, section, quantization), Lora(r=8, lora_alpha=8))
    methods.save(attached, folder / "adapter", "x", None)
    quantized = [name.removesuffix(".base_layer") for name in base_model.quantized_modules(attached.get_base_model())]
    config = base_model.load_config(checkpoint, section)
    need = streamed.need(config, rows, quantized, methods.read(folder / "adapter"))
    source = source_of(checkpoint, section)
    del attached
    with Peak() as layers:
        bare = streamed.live(checkpoint, section, quantization, CPU, source)
        live = proof.Live(methods.load(bare, folder / "adapter"), rows, need.tokens_at_once)
        scores = [live.scores.loss, live.base_scores.loss, live.compare(streamed.exported(folder, CPU)).loss]
    del bare, live
    with Peak() as whole:
        live = proof.Live(methods.load(base_model.load(checkpoint, section, quantization), folder / "adapter"), rows)
        expected = [live.scores.loss, live.base_scores.loss, live.compare(proof.reload(folder, CPU)).loss]
    result = {"need": dataclasses.asdict(need), "streamed": layers.num_bytes, "whole": whole.num_bytes}
    print(json.dumps({**result, "scores": scores, "expected": expected}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_memory_stays_under_the_bound_that_is_said_in_advance(tokenizer, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=8_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=6, bos_token_id=3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    rows = proof.to_json(rows_of(tokenizer), "")["rows"]
    # Tensors of a 7B model are over 32 MiB, which glibc gives back as soon as they are freed; so it does with these.
    call = "import ctypes; M_MMAP_THRESHOLD = -3; ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 262144); "
    call += "import json, sys, pathlib; from tests.exporter.test_streamed import measure; "
    call += "measure(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))"
    done = forked.run("-c", call, tmp_path, json.dumps(rows))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["scores"] == pytest.approx(found["expected"], abs=1e-4)
    # the whole model, loaded: 257 to 310 MB, since what loading frees goes back at once
    assert found["streamed"] < found["need"]["streamed"] < 0.75 * found["whole"]
    assert found["whole"] < found["need"]["whole"]


def test_a_stand_in_takes_no_memory_in_either_dtype():
    module = torch.nn.Linear(1, 1)
    module.weight = torch.nn.Parameter(base_model.stand_in((10**9, 10**9), torch.bfloat16, CPU), requires_grad=False)
    base_model.to_float32(module)
    assert module.weight.shape == (10**9, 10**9)
    assert module.weight.dtype == torch.float32
    assert base_model.is_stand_in(module.weight)
    assert not base_model.is_stand_in(torch.ones(1, 1))
    assert base_model.is_stand_in(base_model.stand_in((1, 1), torch.float32, CPU))
