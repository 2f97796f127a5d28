"""A pretended CUDA device: the CPU computes, and says that it is cuda:0. For tests and counts where there is no GPU.

    HF_DEACTIVATE_ASYNC_LOAD=1 python -m pytest -p tests.pretended -m "gpu and not real_gpu"

Storages that are meant to be on the device are marked, and all that is computed from them is marked too. An operation on marked
and unmarked tensors raises, as it would on a GPU. Counted in COUNTS is what costs time there: waits of the host for the
device, and operations that would be launched. What it cannot show: memory, streams, pinned memory, time.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import traceback
import types
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import bitsandbytes.functional  # before CUDA is pretended: it looks for its libraries when it is imported
import bitsandbytes.optim
import torch
import torch.utils.checkpoint
import transformers.modeling_utils
import trl.kernels.chunked_logprob
import trl.trainer.sft_trainer  # and all that it imports by and by, before CUDA is pretended
import trl.trainer.utils
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
CAPABILITY = (8, 9)
TOTAL_BYTES = 24 * 2**30
_PACKAGES = ("qlora", "trl", "transformers", "accelerate", "peft", "bitsandbytes")

# operations that wait for the device by themselves: the shape of what they return depends on numbers there
_WAIT = ("aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_consecutive",
         "aten::repeat_interleave.Tensor")  # fmt: skip
# operations that may have tensors of both kinds: a copy, indices, an optimizer's paged states
_MIX = ("aten::copy_", "aten::index", "aten::_index_put", "aten::index_put", "bitsandbytes::optimizer", "aten::set_",
        "aten::detach", "aten::lift")  # fmt: skip
# operations that make another view or nothing at all
_NO_LAUNCH = ("view", "aten::t.", "transpose", "detach", "slice", "select.", "alias", "expand", "split", "squeeze",
              "as_strided", "permute", "empty", "_local_scalar", "aten::t", "unbind", "aten::set_", "aten::lift")  # fmt: skip


@dataclass
class Counts:
    """waits: of the host for the device, {what and where: how often}; copies: to the device, without a wait; launches:
    {operation: how often}."""

    waits: collections.Counter = field(default_factory=collections.Counter)
    copies: int = 0
    launches: collections.Counter = field(default_factory=collections.Counter)

    def clear(self):
        self.waits.clear()
        self.launches.clear()
        self.copies = 0

    def snapshot(self):
        """Return (waits, copies, launches, dequantizations of a weight) so far."""
        names = ("bitsandbytes::dequantize_4bit", "bitsandbytes::gemm_4bit")  # the latter dequantizes too
        dequantized = sum(count for name, count in self.launches.items() if name.startswith(names))
        return self.waits.total(), self.copies, self.launches.total(), dequantized


COUNTS = Counts()
_marked: dict = {}  # address of a storage -> weak reference, which its end takes out
_forced: list = [None]  # whether what is made now is on the device; None: if it is computed from what is
_active = [False]
_device_of = torch.Tensor.device.__get__  # type: ignore[attr-defined]


# ---- marks -----------------------------------------------------------------------------------------------------------


def is_marked(tensor):
    try:
        return tensor.untyped_storage()._cdata in _marked
    except (NotImplementedError, RuntimeError):  # no storage
        return False


def _mark(tensors):
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and _device_of(tensor).type == "cpu" and not is_marked(tensor):
            storage = tensor.untyped_storage()
            address = storage._cdata
            _marked[address] = weakref.ref(storage, lambda _, address=address: _marked.pop(address, None))


@contextlib.contextmanager
def _making(on_device):
    before, _forced[0] = _forced[0], on_device
    try:
        yield
    finally:
        _forced[0] = before


def _is_cuda(device):
    if isinstance(device, int):
        return True
    return torch.device(device).type == "cuda"


def _wait(what):
    COUNTS.waits[f"{what} at {_where()}"] += 1


def _where():
    """Return the innermost line of a package that counts."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        parts = Path(frame.filename).parts
        if parts[-1] != Path(__file__).name and any(package in parts for package in _PACKAGES):
            return f"{'/'.join(parts[-2:])}:{frame.lineno}"
    return "?"


# ---- operations ------------------------------------------------------------------------------------------------------


class _Operations(TorchDispatchMode):
    """Marks what is computed from marked tensors, counts, and refuses to mix."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on = [x for x in given if is_marked(x)]
        name = func.name()
        if on:
            off = [x for x in given if x.dim() and _device_of(x).type == "cpu" and not is_marked(x)]
            if off and not name.startswith(_MIX):
                raise RuntimeError(f"pretended CUDA: {name} of tensors on cuda:0 and on the CPU, at {_where()}")
            self._count(name, args, kwargs, off)
        before = _forced[0]
        made = func(*args, **kwargs)
        if before or (before is None and on and "_local_scalar" not in name):
            _mark(tree_leaves(made))
        return made

    def _count(self, name, args, kwargs, off):
        if name.startswith("aten::copy_") and off:
            if kwargs.get("non_blocking") or (len(args) > 2 and args[2]):
                COUNTS.copies += 1
            else:
                _wait("copy_ between host and device")
        elif name == "aten::_local_scalar_dense":
            _wait("item()")
        elif name in _WAIT:
            _wait(name)
        elif name.startswith(("aten::index.", "aten::index_put")) and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        ):
            _wait("index by a mask")
        if not any(part in name for part in _NO_LAUNCH):
            COUNTS.launches[name] += 1


class _Functions(TorchFunctionMode):
    """Answers for the device of a tensor, and moves tensors by copying them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        asked = _ANSWERS.get(getattr(func, "__self__", None))
        if asked is not None:
            return asked(args[0])
        if func is torch.Tensor.get_device:
            return 0 if is_marked(args[0]) else -1
        if func is torch.Tensor.numpy and is_marked(args[0]):
            raise TypeError("pretended CUDA: a tensor on cuda:0 cannot become an array; copy it to the CPU first")
        if func is torch.Tensor.tolist and is_marked(args[0]):
            _wait("tolist()")
        if func in (torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.to) and _device_of(args[0]).type == "cpu":
            to, dtype = _destination(func, args, kwargs)
            if to is not None:
                return _moved(args[0], to, dtype, kwargs.get("non_blocking", False))
        if func is torch.Tensor.pin_memory:  # torch 2.12's DataLoader asks whether there is CUDA, and pins
            return args[0]
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type not in ("cuda", "cpu"):
            return func(*args, **kwargs)
        to = _is_cuda(kwargs["device"])
        kwargs["device"] = torch.device("cpu")
        if to and func in (torch.tensor, torch.as_tensor):
            _wait("tensor(..., device='cuda')")
        with _making(to):
            made = func(*args, **kwargs)
        if to:
            _mark(tree_leaves(made))
        return made


def _destination(func, args, kwargs):
    """Return (whether to the device: True or False, None if nowhere else; dtype or None) of a `to`."""
    if func is not torch.Tensor.to:
        return func is torch.Tensor.cuda, None
    other = next((x for x in (*args[1:], kwargs.get("other")) if isinstance(x, torch.Tensor)), None)
    if other is not None:
        return is_marked(other), other.dtype
    device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != "copy"})
    if device is None or device.type not in ("cuda", "cpu"):
        return None, dtype
    return device.type == "cuda", dtype


def _moved(tensor, to, dtype, non_blocking):
    source = tensor if torch.is_grad_enabled() and tensor.requires_grad else tensor.detach()
    with _making(to):
        if to == is_marked(tensor):
            return tensor if dtype in (None, tensor.dtype) else torch.Tensor.to(tensor, dtype)
        if non_blocking:
            COUNTS.copies += 1
        else:
            _wait("copy to the device" if to else "copy to the host")
        return source.clone() if dtype is None else torch.Tensor.to(source, dtype, copy=True)


_ANSWERS = {
    torch.Tensor.device: lambda x: CUDA if is_marked(x) else _device_of(x),
    torch.Tensor.is_cuda: is_marked,
    torch.Tensor.is_cpu: lambda x: not is_marked(x) and _device_of(x).type == "cpu",
}


# ---- torch.cuda ------------------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, *args, **kwargs): ...

    def record(self, *args): ...

    def wait(self, *args): ...

    def query(self):
        return True

    def synchronize(self):
        _wait("event.synchronize()")

    def elapsed_time(self, other):
        return 1.0


class _Stream:
    device, cuda_stream = CUDA, 0

    def __init__(self, *args, **kwargs): ...

    def wait_stream(self, stream): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return _Event()

    def query(self):
        return True

    def synchronize(self):
        _wait("stream.synchronize()")


class _AnyGenerator(type):
    def __instancecheck__(cls, instance):
        return isinstance(instance, _generator)


class _Generator(metaclass=_AnyGenerator):
    def __new__(cls, device="cpu"):
        return _generator("cpu")


_generator = torch.Generator


def _cuda():
    """Return {name: value} of what replaces that in torch.cuda."""
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="NVIDIA GeForce RTX 4090",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=TOTAL_BYTES,
        multi_processor_count=128,
        gcnArchName="",
    )
    constant = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": properties.name,
        "get_device_capability": CAPABILITY, "get_device_properties": properties, "memory_allocated": 0, "memory_reserved": 0,
        "max_memory_allocated": 1, "max_memory_reserved": 1, "mem_get_info": (TOTAL_BYTES - 2**30, TOTAL_BYTES),
        "current_stream": stream, "default_stream": stream, "is_bf16_supported": True, "_is_in_bad_fork": False,
        "memory_stats": {},
    }  # fmt: skip
    nothing = (
        "init _lazy_init set_device reset_peak_memory_stats reset_max_memory_allocated empty_cache manual_seed manual_seed_all "
        "set_rng_state set_rng_state_all _sleep set_per_process_memory_fraction ipc_collect"
    )
    return {
        **{name: lambda *args, value=value, **kwargs: value for name, value in constant.items()},
        **{name: lambda *args, **kwargs: None for name in nothing.split()},
        **{name: lambda *args: contextlib.nullcontext() for name in ("stream", "device", "device_of")},
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "synchronize": lambda *args: _wait("torch.cuda.synchronize()"),
        "Stream": _Stream,
        "Event": _Event,
    }


# ---- what others compute on a GPU alone ------------------------------------------------------------------------------


def _get_paged(*shape, dtype=torch.float32, device=None):
    """bitsandbytes: memory of the host that the device can reach."""
    with _making(False):
        paged = torch.zeros(*shape, dtype=dtype)
    paged.is_paged, paged.page_deviceid = True, 0
    return paged


def _code_on(original):
    def get_4bit_type(typename, device=None, blocksize=64):
        code = original(typename, device="cpu", blocksize=blocksize)
        if device is None or _is_cuda(device):
            code = code.clone()
            _mark([code])
        return code

    return get_4bit_type


def _varlen(query, key, value, offsets, offsets_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """torch's varlen_attn, document by document."""
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert offsets.dtype == torch.int32
    assert is_marked(offsets)
    with torch._C.DisableTorchFunction():
        ends = offsets.detach().numpy().tolist()
    outputs = []
    for start, end in itertools.pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        at = torch.arange(end - start, device=query.device)
        before = at[:, None] - at
        seen = (before >= 0) & (before <= window_size[0]) if window_size[0] >= 0 else before >= 0
        part = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(part[0].transpose(0, 1))
    return torch.cat(outputs)


def _in_mode(function):
    """Return `function` that autograd calls in a thread state without our mode, in it."""

    def call(*args, **kwargs):
        if not _active[0]:
            return function(*args, **kwargs)
        with _Functions():
            return function(*args, **kwargs)

    return call


def install():
    """Pretend from now on that there is one GPU; tensors are put on it only within `active`."""
    for name, value in _cuda().items():
        setattr(torch.cuda, name, value)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.version.cuda = "13.0"
    torch.Generator = _Generator
    functional = bitsandbytes.functional
    functional.get_paged, functional.fill = _get_paged, lambda tensor, value, **kwargs: None
    functional.prefetch_tensor = lambda tensor, to_cpu=False: None
    functional.get_4bit_type = _code_on(functional.get_4bit_type)
    transformers.modeling_utils.caching_allocator_warmup = lambda *args, **kwargs: None
    trl.trainer.utils._use_triton = lambda device: torch.device(device).type == "cuda"
    trl.kernels.chunked_logprob._addmm_fp32 = lambda total, a, b: total.addmm_(a.float(), b.float())
    run = _in_mode(torch.autograd._engine_run_backward)
    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = run
    hooks = torch.autograd.graph.saved_tensors_hooks
    original = hooks.__init__
    hooks.__init__ = lambda self, pack, unpack: original(self, _in_mode(pack), _in_mode(unpack))


@contextlib.contextmanager
def active():
    """Let the CPU be cuda:0 while the block runs; yields COUNTS."""
    from qlora.kernels import attention

    attention._capability.cache_clear()
    _active[0] = True
    try:
        with mock.patch.object(attention, "varlen_attn", _varlen), _Functions(), _Operations():
            yield COUNTS
    finally:
        _active[0] = False
