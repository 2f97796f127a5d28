"""Checkpointed layers change what is kept, never what is computed; and the host holds exactly what the device does not."""

import copy
import gc
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora import base_model, methods
from qlora.kernels.checkpointing import Host, checkpointed
from qlora.recipe import Lora
from qlora.system.errors import InputError
from tests.conftest import FAMILIES, VOCAB_SIZE, some_slow

WIDTH, NUM_LAYERS = 64, 2  # of the tiny families
DROPOUT = Lora(r=4, lora_dropout=0.2)


@pytest.fixture
def prepared(load_model):
    """Return prepare(family) -> a PeftModel in training mode whose adapters are random."""

    def prepare(family="llama", lora=DROPOUT):
        torch.manual_seed(1)
        model = methods.attach(load_model(family), lora)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    return prepare


def forward(model, length=24, rows=2, seed=3):
    ids = torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model, **shape):
    """Return (loss, {name: gradient}) of one forward and backward pass, dropout drawn from a fixed seed."""
    torch.manual_seed(2)
    loss = forward(model, **shape)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.item(), gradients


def same(one, other):
    return one[0] == other[0] and all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


class Calls:
    """How often each layer was computed."""

    def __init__(self, layers):
        self.counts = [0] * len(layers)
        for at, layer in enumerate(layers):
            mlp = next(child for name, child in layer.named_children() if "mlp" in name)
            mlp.register_forward_pre_hook(lambda *_, at=at: self.add(at))

    def add(self, at):
        self.counts[at] += 1


WAYS = [(family, way) for family in FAMILIES for way in ("kept", "offloaded")]


@pytest.mark.parametrize(
    ("family", "way"), some_slow(WAYS, but=[("llama", "kept"), ("llama", "offloaded"), ("gpt2", "offloaded")])
)
def test_the_first_layers_are_computed_again_and_the_bits_stay(prepared, family, way):
    model, offload = prepared(family), way == "offloaded"
    layers = base_model.decoder_layers(model)
    plain = step(model)
    calls = Calls(layers)
    for number in range(NUM_LAYERS + 1):
        calls.counts[:] = [0] * NUM_LAYERS
        with checkpointed(layers, number, offload):
            assert same(step(model), plain)
        assert calls.counts == [2] * number + [1] * (NUM_LAYERS - number)
    calls.counts[:] = [0] * NUM_LAYERS
    assert same(step(model), plain)
    assert calls.counts == [1] * NUM_LAYERS  # nothing is left of it
    assert not same(step(model, seed=4), plain)


class Live(TorchDispatchMode):
    """Bytes of the storages made within the block that are alive, and the most there were; those of `but` left out."""

    def __init__(self, but):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in but}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key, num_bytes):
        self.seen.discard(key)
        self.bytes -= num_bytes


def held(model, number, offload, shape):
    """Return the bytes that are alive between forward and backward pass, without those of the host's buffers."""
    with checkpointed(base_model.decoder_layers(model), number, offload) as host:
        step(model, **shape)  # buffers there are from now on
        buffers = [*host.free] if host else []
        gc.collect()
        with Live(buffers) as live:
            loss = forward(model, **shape)
            between = live.bytes
            loss.backward()
        model.zero_grad()
        return between, live.peak, sum(buffer.numel() for buffer in buffers)


def test_the_device_holds_less_by_what_the_host_holds(prepared):
    model, shape = prepared(), {"length": 200, "rows": 3}
    hidden = 3 * 200 * WIDTH * 2  # bf16
    found = {key: held(model, *key, shape) for key in [(0, False), (1, False), (2, False), (1, True), (2, True)]}
    assert found[0, False][0] > found[1, False][0] > found[2, False][0]
    for number in (1, 2):
        (between, peak, none), (offloaded, offloaded_peak, buffers) = found[number, False], found[number, True]
        assert between - offloaded == number * hidden == buffers
        assert none == 0
        assert peak - offloaded_peak == number * hidden  # the peak is at the loss, before anything comes back


def test_buffers_are_made_once_and_used_again_also_for_shorter_rows(prepared):
    model = prepared()
    with checkpointed(base_model.decoder_layers(model), 2, offload=True) as host:
        step(model, length=48)
        first = sorted(buffer.data_ptr() for buffer in host.free)
        assert len(first) == 2
        for length in (48, 7, 33, 48):
            step(model, length=length)
            assert sorted(buffer.data_ptr() for buffer in host.free) == first
        step(model, length=96)
        assert [len(buffer) for buffer in host.free] == [2 * 96 * WIDTH * 2] * 2
    assert host.free == []


def test_two_steps_at_once_and_steps_broken_off_do_not_share_what_they_hold(prepared):
    model = prepared()
    plain = {seed: step(model, seed=seed) for seed in (3, 4)}
    with checkpointed(base_model.decoder_layers(model), 2, offload=True) as host:
        losses = []
        for seed in (3, 4):
            torch.manual_seed(2)
            losses.append(forward(model, seed=seed))
        assert host.free == []
        for seed, loss in zip((3, 4), losses, strict=True):
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            model.zero_grad()
            assert same((loss.item(), gradients), plain[seed])
        del losses, loss
        assert len(host.free) == 4

        def stop(*_):
            raise KeyboardInterrupt

        for hook in ("register_forward_pre_hook", "register_full_backward_hook"):
            handle = getattr(base_model.decoder_layers(model)[1], hook)(stop)
            with pytest.raises(KeyboardInterrupt):
                step(model)
            handle.remove()
            model.zero_grad()
            gc.collect()
            assert len(host.free) == 4, hook
            assert same(step(model), plain[3])


@pytest.mark.slow
def test_pieces_of_one_size_hold_hidden_states_of_any_length(prepared, monkeypatch):
    # pinned memory comes in powers of two: nothing else is asked for
    monkeypatch.setattr(Host, "piece", 4096)
    model = prepared()
    shapes = [{"length": length} for length in (24, 7, 96, 33)]
    plain = [step(model, **shape) for shape in shapes]
    with checkpointed(base_model.decoder_layers(model), 2, offload=True) as host:
        for shape, expected in zip(shapes, plain, strict=True):
            assert same(step(model, **shape), expected)
        assert {len(buffer) for buffer in host.free} == {4096}
        assert len(host.free) == 2 * 2 * 96 * WIDTH * 2 / 4096  # of the longest, without waste here


class Late:
    """A copy stream at its slowest: nothing is copied before the main stream waits for it.

    It holds no memory: what is copied must still be there then.
    """

    def __init__(self):
        self.waiting, self.num_begun, self.num_done, self.most = [], 0, 0, 0

    def copy(self, host, targets, sources, device):
        self.waiting.append([(self._weak(t), self._weak(s)) for t, s in zip(targets, sources, strict=True)])
        self.num_begun += 1
        self.most = max(self.most, len(self.waiting))
        return self.num_begun

    def wait_event(self, event):
        while self.num_done < event:
            for target, source in self.waiting.pop(0):
                self._strong(target).copy_(self._strong(source))
            self.num_done += 1

    @staticmethod
    def _weak(x):
        return weakref.ref(x.untyped_storage()), x.dtype, x.storage_offset(), x.shape, x.stride()

    @staticmethod
    def _strong(weak):
        storage, dtype, *place = weak
        assert storage() is not None, "freed before it was copied"
        return torch.empty(0, dtype=dtype).set_(storage(), *place)


@pytest.mark.slow
def test_copies_may_be_as_late_as_the_events_allow(load_model, monkeypatch):
    late = Late()
    model = methods.attach(load_model(), DROPOUT).train()
    layers = base_model.decoder_layers(model)
    layers.extend(copy.deepcopy(layer) for layer in list(layers) * 2)  # six
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    plain = step(model)
    monkeypatch.setattr(Host, "copy", lambda host, *args: late.copy(host, *args))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: late)
    coming = []
    handle = layers[2].register_full_backward_hook(lambda *_: coming.append(late.num_begun - late.num_done))
    with checkpointed(layers, 5, offload=True) as host:
        for _ in range(3):
            assert same(step(model), plain)
        assert coming == [1] * 3  # that of layer 1 was on its way while layer 2 ran backward
        handle.remove()
        assert len(host.free) == 5
        assert late.num_done == late.num_begun == 3 * 2 * 5
        assert late.most == Host.IN_FLIGHT
        handle = layers[3].register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # broken off when one is on its way back
            step(model)
        handle.remove()
        gc.collect()
        model.zero_grad()
        assert late.num_done == late.num_begun
        assert same(step(model), plain)
        forward(model)
        assert late.num_begun - late.num_done == Host.IN_FLIGHT
    assert late.num_done == late.num_begun


def test_evaluation_in_between_is_neither_checkpointed_nor_stored(prepared):
    model = prepared()
    plain = step(model)
    with checkpointed(base_model.decoder_layers(model), 2, offload=True) as host:
        step(model)
        held_back, host.free = host.free, []
        with torch.no_grad():
            model.eval()
            forward(model)
            model.train()
            forward(model)
        assert host.free == []  # asked for none: nothing came back either
        host.free = held_back
        assert same(step(model), plain)


def test_accumulated_gradients_of_rows_of_any_length_are_the_same(prepared):
    model, lengths = prepared(), [31, 5, 64, 17]
    random.Random(0).shuffle(lengths)

    def accumulate():
        torch.manual_seed(2)
        for length in lengths:
            forward(model, length=length).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        return 0.0, gradients

    plain = accumulate()
    with checkpointed(base_model.decoder_layers(model), 2, offload=True):
        assert same(accumulate(), plain)


def test_more_layers_than_there_are_and_layers_of_another_kind_are_refused(prepared):
    model = prepared()
    layers = base_model.decoder_layers(model)
    with (
        pytest.raises(InputError, match=r"memory.gradient_checkpointing is 3, but the model has 2 layers"),
        checkpointed(layers, 3),
    ):
        pass
    plain = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    with checkpointed(plain, 0):
        pass
    with pytest.raises(InputError, match="TransformerEncoderLayer cannot be checkpointed"), checkpointed(plain, 1):
        pass
    with pytest.raises(InputError, match=r"set memory.offload=false"):
        Host().checkpoint(True, lambda: None)
