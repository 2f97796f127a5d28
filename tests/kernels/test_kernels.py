"""Each kernel against the modules that it takes the place of: losses, gradients, and what is kept."""

import contextlib
import sys
import types

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP

from qlora import base_model, kernels, methods
from qlora.kernels import attention, checkpointing, liger, linear, loss, norm, swiglu, tiles
from qlora.kernels.causal import causal_attention
from qlora.recipe import Adalora, Lora, Quantization
from qlora.system import memory
from qlora.terminal import shown
from qlora.terminal.training import say_kernels
from tests.conftest import some_slow

# kinds installed in each family; "all" is what a training installs
EXPECTED = {
    "llama": {"lora": 8, "rmsnorm": 5, "swiglu": 2},
    "qwen2": {"lora": 8, "rmsnorm": 5, "swiglu": 2},
    "gemma": {"lora": 8, "rmsnorm": 5, "swiglu": 2},
    "qwen3": {"lora": 8, "rmsnorm": 9, "swiglu": 2},
    "phi3": {"lora": 8, "rmsnorm": 5},
    "phi": {"lora": 12},
    "gpt2": {"lora": 8},  # in 4 bit its Conv1D layers are linear ones
}


@pytest.fixture
def load(load_model):
    def load(family, dtype="bfloat16", **lora):
        section = Lora(**{"r": 4, "lora_alpha": 8, **lora})
        model = methods.attach(load_model(family, Quantization(compute_dtype=dtype)), section)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ".lora_B." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.train()

    return load


def batch(seed=0, rows=3, length=40):
    ids = torch.randint(5, 500, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :10] = -100
    return {"input_ids": ids, "labels": labels}


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model, setting="off", kinds=None, monkeypatch=None):
    """Return (loss, one flat gradient, Installed) of a batch."""
    if kinds is not None:
        monkeypatch.setattr(kernels, "_KINDS", kinds)
    with kernels.installed(model, setting) as found:
        value = model(**batch(), use_cache=False).loss
        found_gradients = torch.autograd.grad(value, trained(model))
    return value.item(), torch.cat([gradient.flatten().float() for gradient in found_gradients]), found


ALL = [(family, "all") for family in ("llama", "qwen2", "gemma", "gpt2", "qwen3", "phi3", "phi")]
EACH = [(family, kind) for kind in ("lora", "rmsnorm", "swiglu") for family, _ in ALL]


@pytest.mark.parametrize(
    ("family", "kind"), some_slow(ALL + EACH, but=[("llama", "all"), ("gemma", "all"), ("gpt2", "all")])
)
def test_gradients_are_those_of_the_plain_modules(load, monkeypatch, family, kind):
    kinds = {name: source for name, source in kernels._KINDS.items() if kind in (name, "all")}
    for dtype in ("float32", "bfloat16", "float16"):
        model = load(family, dtype)
        plain_loss, plain, _ = gradients(model)
        fast_loss, fast, found = gradients(model, "auto", kinds, monkeypatch)
        assert not found.refused
        if kind == "all":
            assert found.modules == EXPECTED[family]
        if dtype == "float32":
            assert fast_loss == pytest.approx(plain_loss, rel=1e-5)
            assert (fast - plain).norm() <= 1e-5 * plain.norm()
        else:
            assert fast_loss == pytest.approx(plain_loss, rel=1e-2)
            assert F.cosine_similarity(fast, plain, dim=0) > 0.999


@pytest.mark.parametrize("family", some_slow(["llama", "qwen2", "gemma", "gpt2"], but=["llama"]))
def test_ten_steps_have_the_losses_of_the_plain_modules(load, family):
    losses = {}
    for setting in ("off", "auto"):
        model = load(family)
        masters = [parameter.detach().float().requires_grad_() for parameter in trained(model)]
        optimizer = torch.optim.AdamW(masters, lr=5e-3)
        with kernels.installed(model, setting):
            losses[setting] = []
            for step in range(10):
                value = model(**batch(seed=step % 2), use_cache=False).loss
                for master, gradient in zip(masters, torch.autograd.grad(value, trained(model)), strict=True):
                    master.grad = gradient.float()
                optimizer.step()
                with torch.no_grad():
                    for master, parameter in zip(masters, trained(model), strict=True):
                        parameter.copy_(master)
                losses[setting].append(value.item())
    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-2)
    assert losses["off"][-1] < losses["off"][0] - 0.1  # there was something to learn


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 7}}])
def test_adapters_with_dropout_scaling_and_ranks_of_their_own(load, monkeypatch, settings):
    model = load("qwen2", "float32", **settings)
    torch.manual_seed(3)
    plain_loss, plain, _ = gradients(model)
    torch.manual_seed(3)
    fast_loss, fast, found = gradients(model, "auto")
    assert found.modules["lora"] == (14 if "lora_dropout" in settings else 8)
    assert ("swiglu" in found.modules) == ("lora_dropout" not in settings)
    assert fast_loss == pytest.approx(plain_loss, rel=1e-5)
    assert (fast - plain).norm() <= 1e-5 * plain.norm()


def test_adapters_on_a_16_bit_base(load_model):
    model = methods.attach(load_model("llama", None), Lora(r=4, init_lora_weights="gaussian")).train()
    _, plain, _ = gradients(model)
    _, fast, found = gradients(model, "auto")
    assert found.modules == EXPECTED["llama"]
    assert F.cosine_similarity(fast, plain, dim=0) > 0.999


@pytest.mark.parametrize(
    "settings",
    [
        Lora(r=4, use_dora=True),
        Adalora(),
        Lora(r=4, bias="lora_only", target_modules=["q_proj"]),
    ],
)
def test_what_the_kernel_does_not_compute_is_left_to_peft(load_model, settings):
    with kernels.installed(methods.attach(load_model("qwen2"), settings).train()) as found:
        assert "lora" not in found.modules
        assert "swiglu" not in found.modules
        assert found.modules["rmsnorm"] == 5


def test_a_trained_norm_is_left_alone(load):
    model = load("llama", modules_to_save=["norm"])
    with kernels.installed(model):
        norms = {m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"}
        assert {m for m in norms if "forward" in vars(m)} == {m for m in norms if not m.weight.requires_grad}
    assert any(m.weight.requires_grad for m in norms)


@pytest.fixture
def with_liger(monkeypatch):
    """A function: let liger-kernel be installed, whose RMSNorm computes `norm_of(x, weight, eps)`, as it would on a GPU."""

    def with_liger(norm_of):
        class Function:
            @staticmethod
            def apply(x, weight, eps, offset, casting_mode, in_place):
                assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
                return norm_of(x, weight, eps)

        module = types.SimpleNamespace(LigerRMSNormFunction=Function)
        monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", module)
        monkeypatch.setattr(liger, "runs_on", lambda weight: True)

    return with_liger


def test_liger_is_used_where_it_computes_the_same(load, with_liger):
    model = load("gemma", "float32")  # whose norms have 1 + weight
    _, plain, _ = gradients(model)
    with_liger(lambda x, weight, eps: F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype))
    _, fast, found = gradients(model, "auto")
    assert found.modules == {"swiglu": 2, "liger": 5, "lora": 8}
    assert (fast - plain).norm() <= 1e-5 * plain.norm()


def test_liger_with_another_result_or_without_a_compiler_is_named_and_our_norm_is_used(load, with_liger, capsys):
    model = load("llama")
    expected = gradients(model, "auto")[1]

    def broken(x, weight, eps):
        raise RuntimeError("Failed to find C compiler.\nPlease install one")

    for norm_of, said in (
        (
            lambda x, weight, eps: x * weight.to(x.dtype),
            "RMSNorms by Liger: not used for LlamaRMSNorm, because the results",
        ),
        (
            broken,
            "RMSNorms by Liger: installed, but does not run here; LlamaRMSNorm: RuntimeError: Failed to find C compiler.",
        ),
    ):
        with_liger(norm_of)
        _, got, found = gradients(model, "auto")
        assert found.modules == EXPECTED["llama"]
        assert torch.equal(got, expected)
        with shown():
            say_kernels(found, torch.device("cpu"))
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 300, 576), (2, 37, 9, 64), (5, 129)]
)  # hidden states; heads, as Qwen3's norms; 2-D
def test_a_norm_in_tiles_is_the_same_to_the_bit(monkeypatch, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator).mul_(30).to(dtype) for _ in range(2))
    weight, results = torch.randn(shape[-1], generator=generator), []
    for tile in (4096, 7):
        monkeypatch.setattr(tiles, "TILE", tile)
        leaf = x.clone().requires_grad_()
        y = norm.RmsNorm.apply(leaf, weight, 1e-6)
        results.append((y, *torch.autograd.grad(y, leaf, g)))
    assert len(tiles.of(shape[0] * shape[1])) > 10 or len(shape) == 2
    assert all(one.dtype == dtype and torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_norm_holds_no_float32_copy_of_more_than_a_tile(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 16)
    x = torch.randn(1, 640, 256, dtype=torch.bfloat16, requires_grad=True)
    with memory.LiveTensors(x) as live:
        y = norm.RmsNorm.apply(x, torch.ones(256), 1e-6)
        y.backward(torch.ones_like(y))
    everything = 640 * 256 * 2
    # x, y, the gradients of both; the sum of a tile's float32 tensors is a tenth of one of them
    assert live.peak < 4.5 * everything


def test_a_kernel_that_computes_something_else_is_not_used(load, monkeypatch):
    model = load("llama")
    expected = gradients(model)[1]
    right = norm.forward_of

    def wrong(module):
        forward = right(module)
        return forward and (lambda x: forward(x) * 1.1)

    monkeypatch.setattr(norm, "forward_of", wrong)
    with kernels.installed(model) as found:
        assert found.refused == {"rmsnorm": ["LlamaRMSNorm"]}
        assert "rmsnorm" not in found.modules
        got = torch.autograd.grad(model(**batch(), use_cache=False).loss, trained(model))
    assert F.cosine_similarity(torch.cat([g.flatten().float() for g in got]), expected, dim=0) > 0.999


class Dropping(LlamaMLP):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class Clamping(LlamaMLP):
    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-30, 30))


@pytest.mark.parametrize("kind", [Dropping, Clamping])
def test_a_module_that_does_more_than_its_parts_say_is_left_alone(load, kind):
    model = load("llama")
    for layer in base_model.decoder_layers(model):
        layer.mlp.__class__ = kind
    with kernels.installed(model) as found:
        assert found.refused == {"swiglu": [kind.__name__]}
        assert found.modules["lora"] == 14


def test_rows_are_joined_only_where_that_gives_the_logits_of_each(load, monkeypatch):
    model = load("llama")
    with kernels.installed(model) as found:
        assert found.joined
    original = attention.in_blocks

    def with_a_sink(*args, **kwargs):
        return 0.8 * original(*args, **kwargs)

    monkeypatch.setattr(attention, "in_blocks", with_a_sink)
    with kernels.installed(model) as found:
        assert not found.joined
    monkeypatch.setattr(attention, "in_blocks", original)
    model.get_base_model().set_attn_implementation("eager")  # as the recipe may ask for
    with kernels.installed(model) as found:
        assert not found.joined


def test_afterwards_the_model_is_as_before(load):
    model = load("llama")
    before = [module.forward.__func__ for module in model.modules()]
    with contextlib.suppress(RuntimeError), kernels.installed(model):
        assert [module.forward for module in model.modules() if "forward" in vars(module)]
        raise RuntimeError
    assert [module.forward.__func__ for module in model.modules()] == before
    with kernels.installed(model, "off") as found:
        assert not found.modules
        assert [module.forward.__func__ for module in model.modules()] == before


def kept_bytes(run):
    """Return the bytes of the tensors that autograd keeps in `run`, parameters apart, each storage once."""
    storages = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def test_less_is_kept(load):
    model = load("llama")
    layer = model.get_base_model().model.layers[0]
    x = torch.randn(1, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    tokens, hidden, inner, rank = 64, 64, 128, 4
    plain = kept_bytes(lambda: layer.mlp(x))
    with kernels.installed(model):
        fast = kept_bytes(lambda: layer.mlp(x))
        normed = kept_bytes(lambda: layer.input_layernorm(x))
    # x, gate, up; A x of the three adapters; and nothing else
    assert fast == tokens * 2 * (hidden + 2 * inner + 3 * rank)
    assert plain > 1.5 * fast
    assert normed == tokens * (2 * hidden + 4) + 4 * hidden  # x, one number a token; the weight in float32


@pytest.fixture
def products(monkeypatch):
    """The base products that are made: a list of the layers, in turn."""
    made = []
    original = linear.Base.weight
    monkeypatch.setattr(linear.Base, "weight", lambda self: made.append(self) or original(self))
    return made


@pytest.mark.parametrize("tile", [4096, 7])
def test_a_checkpointed_layer_keeps_one_tensor_and_multiplies_no_more_than_it_must(load, monkeypatch, products, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    model = load("llama", "float32")
    layers = base_model.decoder_layers(model)
    mlp, num_tiles = layers[0].mlp, -(-20 // tile)
    x = torch.randn(1, 20, 64, requires_grad=True)

    def run():
        return (x + mlp(x)).sin().sum()

    with kernels.installed(model):
        plain = torch.autograd.grad(run(), [x, *trained(mlp)])
        with checkpointing.checkpointed(layers, 1):
            products.clear()
            assert kept_bytes(lambda: mlp(x)) == 20 * 64 * 4
            assert len(products) == 3 * num_tiles
            products.clear()
            output = checkpoint(lambda x: (x + mlp(x)).sin(), x, use_reentrant=False)
            assert len(products) == 3 * num_tiles
            products.clear()
            checkpointed = torch.autograd.grad(output.sum(), [x, *trained(mlp)])
            # sin asks for the output again; then gate and up, and each for its gradient
            assert len(products) == (3 + 5) * num_tiles
            output = checkpoint(lambda x: x + mlp(x), x, use_reentrant=False)
            products.clear()
            torch.autograd.grad(output.sum(), [x, *trained(mlp)])
            assert len(products) == 5 * num_tiles  # nothing but x was asked for
        assert not hasattr(mlp, "computed_again")
    for one, other in zip(checkpointed, plain, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("num_tokens", [1, 4096, 4097, 100_001])
def test_tiles_are_even_and_cover_all_tokens(num_tokens):
    found = tiles.of(num_tokens)
    assert [index for part in found for index in range(part.start, part.stop)] == list(range(num_tokens))
    sizes = [part.stop - part.start for part in found]
    assert max(sizes) <= tiles.TILE
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("family", some_slow(["llama", "qwen2", "gemma", "gpt2"], but=["llama"]))
def test_however_many_layers_are_checkpointed_the_numbers_are_the_same_to_the_bit(load, family):
    results = []
    for number in (0, 1, 2):
        model = load(family)
        with kernels.installed(model), checkpointing.checkpointed(base_model.decoder_layers(model), number):
            value = model(**batch(), use_cache=False).loss
            results.append([value, *torch.autograd.grad(value, trained(model))])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_each_activation_has_its_derivative(act):
    from transformers.activations import ACT2FN

    module = ACT2FN[act]
    x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    got = swiglu._BACKWARD[type(module).__name__](torch.ones_like(x), x.detach())
    torch.testing.assert_close(got, expected)


# ---- attention on a CPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 50, 128, 300])
@pytest.mark.parametrize("length", [1, 37, 128, 129, 300])
def test_causal_attention_is_torchs_own(length, window):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(heads, length, 16, generator=generator) for heads in (6, 2, 2)]
    grad = torch.randn(6, length, 16, generator=generator)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    ways = (
        lambda q, k, v: F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True, scale=0.3
        )[0],
        lambda q, k, v: causal_attention(q, k, v, 0.3, window),
    )
    found = []
    for way in ways:
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = way(*leaves)
        found.append([output, *torch.autograd.grad(output, leaves, grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_causal_attention_in_bfloat16_is_no_further_off_than_torchs_own():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(heads, 256, 64, generator=generator).bfloat16() for heads in (6, 2, 2)]
    grad = torch.randn(6, 256, 64, generator=generator).bfloat16()

    def own(q, k, v):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]

    def results(way, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = way(*leaves)
        return [x.float() for x in (output, *torch.autograd.grad(output, leaves, grad.to(dtype)))]

    exact = results(own, torch.float32)
    ours = results(lambda q, k, v: causal_attention(q, k, v, 64**-0.5), torch.bfloat16)
    torchs = results(own, torch.bfloat16)
    errors = [[((x - y).norm() / y.norm()).item() for x, y in zip(way, exact, strict=True)] for way in (ours, torchs)]
    assert all(mine < 1.5 * theirs for mine, theirs in zip(*errors, strict=True)), errors


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_cross_entropy_is_that_of_the_logits(count):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 301, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(count, 16, generator=generator), torch.randint(301, (count,), generator=generator)
    found = []
    for way in (
        lambda h: F.cross_entropy(head(h), targets, reduction="sum"),
        lambda h: loss.cross_entropy(h, head, targets),
    ):
        leaf = hidden.clone().requires_grad_()
        value = way(leaf) / 7
        found.append([value, *torch.autograd.grad(value, leaf)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_large_logits_do_not_overflow():
    head = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    value = loss.cross_entropy(torch.tensor([[1e4, -1e4]]), head, torch.tensor([0]))
    assert value == pytest.approx(0.0, abs=1e-6)


def test_hidden_states_are_what_the_head_gets(load):
    model = load("llama")
    columns = torch.tensor([3, 7])
    ids = batch()["input_ids"]
    with torch.no_grad():
        hidden = loss.hidden_states(model, model.get_output_embeddings(), columns, input_ids=ids)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


def test_the_loss_kernel_leaves_what_is_between_hidden_states_and_loss(load_model):
    assert loss.takes(load_model("llama"))
    assert loss.takes(load_model("gpt2"))
    assert not loss.takes(load_model("gemma2"))  # caps its logits
    assert not loss.takes(load_model("phi"))  # the head has a bias
    trained_head = load_model("llama")
    trained_head.get_output_embeddings().weight.requires_grad_(True)
    assert not loss.takes(trained_head)


def test_packed_rows_go_through_the_plain_attention_with_kernels_off(load, monkeypatch):
    called = []
    monkeypatch.setattr(attention, "causal_attention", lambda *args: called.append(args) or causal_attention(*args))
    model = load("llama")
    inputs = {
        "input_ids": batch(rows=1)["input_ids"],
        "segments": [15, 25],
        "position_ids": torch.cat([torch.arange(15), torch.arange(25)])[None],
    }
    results = {}
    for plain in (True, False):
        with attention.within_documents(model, plain):
            results[plain] = model(**inputs, use_cache=False).logits
        assert bool(called) is not plain
    assert F.cosine_similarity(results[True].flatten().float(), results[False].flatten().float(), dim=0) > 0.999
