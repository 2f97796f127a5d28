"""Gradient checkpointing: decoder layers that keep only their input, and recompute their activations in the backward pass.

As few layers as necessary, because a checkpointed layer is computed twice. The inputs, hidden states of 2 bytes * width
per token and layer, can be offloaded to CPU memory; copies run on a stream of their own, beside the layers' work.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..system.errors import InputError

# B rows, T tokens, D hidden width

PIECE = 4 * 2**20  # a copy of it takes 0.2 ms at 25 GB/s, so that starting the copies costs little beside them

_plain = functools.partial(checkpoint, use_reentrant=False)


def is_possible(layer):
    """True if a decoder layer can be checkpointed: transformers' class for that calls it, with whatever arguments."""
    return isinstance(layer, GradientCheckpointingLayer)


@contextlib.contextmanager
def checkpointed(layers, number, offload=False):
    """Checkpoint the first `number` of decoder `layers` while the block runs; yields the Host, or None. See Checkpointing."""
    with Checkpointing(layers, number, offload) as chosen:
        yield chosen.host


class Checkpointing:
    """Checkpoints the first `number` of decoder `layers` while a `with` block runs, wherever these train.

    Random numbers (dropout) are restored. offload: the inputs of these layers are offloaded to CPU memory; host: the Host
    that holds them, or None. Between two micro-batches `change` may take others: no number changes.

    Entering raises:
        InputError: there are fewer layers, or they cannot be checkpointed one by one.
    """

    def __init__(self, layers, number, offload=False):
        self.layers, self.number, self.offload = list(layers), number, offload
        self.host = None

    def __enter__(self):
        if self.number > len(self.layers):
            raise InputError(
                f"memory.gradient_checkpointing is {self.number}, but the model has {len(self.layers)} layers"
            )
        for layer in self.layers[: self.number]:
            if not is_possible(layer):
                raise InputError(
                    f"{type(layer).__name__} cannot be checkpointed; set memory.gradient_checkpointing=false and, for less "
                    "memory, a smaller micro-batch"
                )
        self._begin()
        return self

    def __exit__(self, *exception):
        self._end()

    def next(self, on_gpu, small=False):
        """Return (number, offload) of the next step to less memory, None where there is none.

        Twice as many layers, but at least a quarter of them, or a small step of a sixteenth more; all; on a GPU, their inputs
        to the host.
        """
        total = len(self.layers)
        if self.number < total and all(isinstance(layer, GradientCheckpointingLayer) for layer in self.layers):
            more = self.number + -(-total // 16) if small else max(2 * self.number, -(-total // 4))
            return min(total, more), self.offload
        return (self.number, True) if on_gpu and self.number and not self.offload else None

    def change(self, number, offload):
        """Checkpoint the first `number` layers from now on."""
        self._end()
        self.number, self.offload = number, offload
        self._begin()

    def _begin(self):
        chosen = self.layers[: self.number]
        self.host = Host() if self.offload and chosen else None
        for index, layer in enumerate(chosen):
            again = _plain if self.host is None else functools.partial(self.host.checkpoint, index == 0)
            layer._gradient_checkpointing_func = again
            layer.gradient_checkpointing = True
            for module in layer.modules():
                module.computed_again = True  # kernels.swiglu keeps less then

    def _end(self):
        for layer in self.layers[: self.number]:
            layer.gradient_checkpointing = False
            for module in layer.modules():
                vars(module).pop("computed_again", None)
        if self.host:
            self.host.close()
        self.host = None


def _nothing():
    return None


class Host:
    """Hidden states in CPU memory, from a layer's forward pass to its backward pass.

    On a GPU the main stream never waits for a copy that is not two layers late: a hidden state leaves while the next
    layers run, and comes back while the layer after it runs backward, so at most IN_FLIGHT of them are on the device
    beside the layer at work. Buffers are pinned, and used again in every step. On a CPU the copies are plain ones.

    PIECE: bytes of a pinned buffer; a hidden state takes as many as it needs. torch's allocator of pinned memory rounds each up
    to a power of two (pytorch #150517: 35 GiB became 64), which this is: less than a piece a layer is lost. piece: None for
    buffers as large as what they hold.
    """

    IN_FLIGHT, PIECE = 2, PIECE
    piece: int | None = None

    def __init__(self):
        self.free = []  # buffers that hold nothing
        self._leaving = deque()  # (hidden state, the event after its copy)
        self._newest = _nothing  # the _Stored of the layer before, if that is still needed
        self._stream = None

    def checkpoint(self, first, function, *args):
        """Return function(*args), checkpointed; args[0], the hidden states (B, T, D), goes to the host.

        first: this is the first layer of the model.
        """
        if not args:
            raise InputError("cannot find the hidden states of this architecture; set memory.offload=false")
        if first:
            self._release(0)  # of a step that was broken off
            self._newest = _nothing
        # the address: these hooks live as long as what they store, and must not hold the hidden states themselves
        store = functools.partial(self._store, args[0].data_ptr())
        # what a checkpoint saves of its own, its inputs, goes through the hooks around it; what is within it does not
        with torch.autograd.graph.saved_tensors_hooks(store, self._fetch):
            return _plain(function, *args)

    def close(self):
        """Free all buffers."""
        self._release(0)
        self.free.clear()

    def _store(self, address, x):
        if x.data_ptr() != address:
            return x
        stored = _Stored(self, x, self._newest())
        self._newest = weakref.ref(stored)
        return stored

    def _fetch(self, stored):
        if not isinstance(stored, _Stored):
            return stored
        self._release(0)
        x = stored.take()
        if stored.before is not None:
            stored.before.bring()
        return x

    def buffer(self, num_bytes):
        """Return a free buffer (uint8) of at least `num_bytes`; a new one takes the place of one that is too small."""
        self.free.sort(key=len)
        for at, buffer in enumerate(self.free):
            if len(buffer) >= num_bytes:
                return self.free.pop(at)
        if self.free:
            self.free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def copy(self, targets, sources, device):
        """Start target.copy_(source) of each pair after what the main stream has to do so far; return the event after them, or
        None.

        On a CPU it is done at once.
        """
        if self._stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def leave(self, x):
        """Copy `x` to buffers; return these. `x` is held until the copy is done."""
        if self._stream is None and x.device.type == "cuda":
            self._stream, self.piece = torch.cuda.Stream(x.device), self.PIECE
        self._release(self.IN_FLIGHT - 1)
        x = x.detach().contiguous()
        parts = self.parts(x)
        buffers = [self.buffer(self.piece or len(part)) for part in parts]
        event = self.copy([buffer[: len(part)] for buffer, part in zip(buffers, parts, strict=True)], parts, x.device)
        if event is not None:
            self._leaving.append((x, event))
        return buffers

    def parts(self, x):
        """Return the bytes of a contiguous tensor, in as many parts as it takes buffers: views, uint8."""
        flat = x.view(-1).view(torch.uint8)
        return [flat] if self.piece is None else flat.split(self.piece)

    def _release(self, keep):
        while len(self._leaving) > keep:
            x, event = self._leaving.popleft()
            # from here on the main stream may write where x was
            torch.cuda.current_stream(x.device).wait_event(event)


class _Stored:
    """A hidden state in CPU memory. before: that of the layer before, which is needed next."""

    def __init__(self, host, x, before):
        self.host, self.before = host, before
        self.empty = functools.partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)
        self.buffers = host.leave(x)
        self.coming: Any = None  # (hidden state, the event after its copy)

    def bring(self):
        """Start the copy back to the device."""
        if self.coming is None:
            x = self.empty()
            parts = self.host.parts(x)
            stored = [buffer[: len(part)] for buffer, part in zip(self.buffers, parts, strict=True)]
            self.coming = x, self.host.copy(parts, stored, x.device)

    def take(self):
        """Return the hidden state on its device; the main stream waits until it is there."""
        self.bring()
        (x, event), self.coming = self.coming, None
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)
        return x

    def __del__(self):
        if getattr(self, "coming", None) is not None:  # never asked for: the step was broken off
            self.take()
        if hasattr(self, "buffers"):
            self.host.free.extend(self.buffers)
