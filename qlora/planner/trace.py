"""One training step traced on the meta device: live bytes after each allocation and release, as a formula.

The model is real code on the meta device: the layers of transformers, PEFT and bitsandbytes run forward and backward and
allocate what they allocate, whatever the architecture. Decoder layers that are alike are run once and counted as often as
they stand there. A level is a sum over what grows with what: a few runs give it for all numbers of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from .. import base_model, kernels
from ..kernels import causal, checkpointing, loss, tiles, token_rows
from ..system import memory
from . import images, rows, stand_ins

# B batch (1), H heads, T tokens, D head dim, N scored positions, V vocabulary, C positions in a chunk of the head

# (T, N, C, longest document, tokens of a tile) to run at: as many as there are terms in `growth`, point and term in one order
_POINTS = (
    (256, 128, 64, 256, 192),
    (512, 128, 64, 256, 192),
    (768, 128, 64, 256, 192),
    (256, 96, 64, 256, 192),
    (256, 128, 96, 256, 192),
    (256, 128, 64, 128, 192),
    (256, 128, 64, 256, 256),
)
# the point and term that nothing grows with there: the head's buffer, blocks of a document
_UNREAD = {"cpu": 4, "cuda": 5}


@dataclass(frozen=True)
class Segment:
    """Part of a step. levels: (events, 7), bytes above the start after each event, by what they grow with: `growth`."""

    levels: np.ndarray

    def rise_and_change(self, growth):
        """Return (most bytes above the level at the start, level at the end above that at the start)."""
        levels = self.levels @ growth
        return max(0.0, levels.max(initial=0.0)), (levels[-1] if len(levels) else 0.0)

    def blend(self, other, share):
        """Return the segment that lies between this one (share 0) and `other` (share 1)."""
        return Segment(self.levels + share * (other.levels - self.levels))


def growth(num_tokens, num_scored, head, document, padded=False, squared=None):
    """Return what levels grow with: 1, T, T squared, N, rows of the head's buffer (Step.at_once), scores of a block of a
    document (padded: of all documents, whole), and tokens of a tile (kernels.tiles).

    squared: the sum of the squares of several rows, where they are apart; None: T is one row.
    """
    squared = num_tokens**2 if squared is None else squared
    block, tile = (
        (num_tokens if padded else min(document, causal.BLOCK)) * document,
        max(part.stop - part.start for part in tiles.of(num_tokens)),
    )
    return np.array([1.0, num_tokens, squared, num_scored, head, block, tile])


@dataclass(frozen=True)
class Step:
    """A step's segments. layers: the kind of each; plain, checkpointed: {kind of layer: (forward, backward)}, and under
    "head": (final norm and loss, these and back to the last layer). head: (V, bytes of a hidden number, device) as
    loss.at_once takes them; None: the loss is trl's. padded: rows are not joined, and `document` is as long as all of them.
    """

    layers: tuple
    embedding: Segment
    plain: dict
    checkpointed: dict
    head: tuple | None = None
    padded: bool = False

    @property
    def masked(self):
        """Whether attention has a mask of T x T numbers whatever the rows."""
        return bool(self.embedding.levels[:, 2].any())

    def at_once(self, num_scored):
        """Return of how many scored positions logits are in memory at a time."""
        return min(num_scored, TOKEN_CHUNK_SIZE) if self.head is None else loss.at_once(num_scored, *self.head)

    def blend(self, other, share):
        """Return the step of a rank between those of two steps of one model."""

        def pairs(one, two):
            return {k: tuple(a.blend(b, share) for a, b in zip(one[k], two[k], strict=True)) for k in one}

        return Step(
            self.layers,
            self.embedding.blend(other.embedding, share),
            pairs(self.plain, other.plain),
            pairs(self.checkpointed, other.checkpointed),
            self.head,
            self.padded,
        )


def trace(peft_model, device_kind, packed, setting="auto"):
    """Return (the Step of a PEFT model on the meta device, whether rows are joined); leaves the model as it was.

    device_kind: "cuda" or "cpu": which loss is computed, and what attention needs for itself. packed: whether a row holds
    several documents. setting: of the kernels.
    """
    model = peft_model.get_base_model()
    layers = base_model.decoder_layers(model)
    # the first has an input without gradient, and the last's output is not let go of when the next layer runs
    kinds = [(index == 0, index == len(layers) - 1, _kind(layer)) for index, layer in enumerate(layers)]
    names = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    chosen = [layers[kinds.index(kind)] for kind in names]
    shapes: dict = {}
    padded = base_model.task_of(model).HAS_CLASSES
    with _cut(model, layers, chosen), kernels.installed(peft_model, setting) as found, _training(peft_model):
        _warm_up_positions(model)
        ways = []
        for number in (0, len(chosen)):
            with checkpointing.checkpointed(chosen, number):
                run = functools.partial(_run, peft_model, chosen, device_kind, found, packed, shapes=shapes)
                if not base_model.task_of(model).HAS_TOKENS:
                    fitted = images.fitted({many: run((many,) * 5) for many in images.NUMBERS}, len(_POINTS))
                    ways.append({name: Segment(levels) for name, levels in fitted.items()})
                    continue
                points = [point for number, point in enumerate(_POINTS) if number != _UNREAD[device_kind]]
                points = rows.points(points) if padded else points
                ways.append(_fitted({point: run(point) for point in points}, _UNREAD[device_kind], padded))
    plain, checkpointed = (
        {number: (segments["forward", number], segments["backward", number]) for number in names.values()}
        | {"head": (segments["head forward"], segments["head"])}
        for segments in ways
    )
    head = None
    if not padded and not loss.is_left_to_trl(peft_model, found.loss, device_kind):
        weight = token_rows.parts(model.get_output_embeddings())[0]
        head = len(weight), weight.element_size(), device_kind
    step = Step(tuple(names[kind] for kind in kinds), ways[0]["embedding"], plain, checkpointed, head, padded)
    return step, found.joined


def _warm_up_positions(model):
    """Call what computes rotary positions of longrope (Phi) once: it keeps the frequencies of long texts from then on."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            module(torch.empty(1, 1, 1, device="meta"), torch.empty(1, 1, dtype=torch.long, device="meta"))


def _kind(layer):
    """Return what two layers have in common that allocate the same."""
    shapes = ((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return (type(layer), *shapes)


def _run(peft_model, layers, device_kind, installed, packed, point, shapes):
    """Return {segment: levels} of one forward and backward pass. point: one of _POINTS. shapes: of _LiveShapes."""
    num_tokens, num_scored, chunk, document, tile = point
    marks = []

    def mark(name):
        marks.append((len(live.levels), live.bytes, name))

    def begin(number):
        return lambda module, args, kwargs: mark(("forward", number))

    def end(number):
        def hook(module, args, kwargs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:  # not below the first layer that has an adapter
                hidden.register_hook(lambda gradient: mark(("backward", number)))
            if number == len(layers) - 1:
                mark("head")

        return hook

    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(begin(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(end(number), with_kwargs=True))
    live = _LiveShapes(shapes)
    joined = packed or installed.joined
    way, attention = _ways(peft_model, device_kind, installed, packed, chunk, document)
    at_once = chunk if device_kind == "cuda" else loss.POSITIONS
    try:
        with (
            stand_ins.attention(peft_model.get_base_model(), attention, joined),
            stand_ins.one_piece(tile, at_once),
            live,
        ):
            live.add(*base_model.tensors(peft_model))
            mark("embedding")
            total = way(peft_model, num_tokens, num_scored)
            mark("loss")
            total.backward()
            del total
            mark("end")
    finally:
        for handle in handles:
            handle.remove()
        for parameter in peft_model.parameters():
            parameter.grad = None
    found = {}
    for (start, level, name), (stop, *_) in itertools.pairwise(marks):
        found[name] = np.array(live.levels[start:stop], dtype=float) - level
    nothing = np.zeros(0)
    found |= {("backward", n): nothing for n in range(len(layers)) if ("backward", n) not in found}
    found["head forward"] = found["head"]
    found["head"] = np.concatenate(
        [found["head"], found.pop("loss") + (found["head"][-1] if len(found["head"]) else 0)]
    )
    return found


def _ways(peft_model, device_kind, installed, packed, chunk, document) -> Any:
    """Return ((model, number of tokens, number of scored ones) -> loss, attention function) of what is planned.

    chunk: positions in a chunk of the head. document: the longest.
    """
    task, attention = (
        base_model.task_of(peft_model),
        stand_ins.way_of_attention(device_kind, installed.joined, packed, document),
    )
    if not task.HAS_TOKENS:
        return images.loss, attention
    if task.HAS_CLASSES:
        return rows.loss, rows.way_of_attention(device_kind, document, stand_ins.Flash.apply)
    if loss.is_left_to_trl(peft_model, installed.loss, device_kind):
        return functools.partial(stand_ins.trls_loss, chunk=chunk if device_kind == "cuda" else None), attention
    joined = packed or installed.joined
    return functools.partial(stand_ins.loss_of_trained_positions, lean=installed.loss, joined=joined), attention


class _LiveShapes(memory.LiveTensors):
    """LiveTensors on the meta device, where an operation asks for the shape of its result once.

    known: {operation and what it is given: (shape, stride, dtype) of a new tensor, or _FIRST, the first argument changed in
    place}. torch finds shapes in Python, 50 to 200 us an operation; layers that are alike, and a layer that is computed
    again, ask for the same ones.
    """

    def __init__(self, known):
        super().__init__()
        self.known = known

    def compute(self, func, args, kwargs):
        key = (func, _described(args), _described(tuple(kwargs.items())))
        known = self.known.get(key)
        if known is _FIRST:
            return args[0]
        if known is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor) and made.is_meta:
            if args and made is args[0] and _described(args) == key[1]:
                self.known[key] = _FIRST
            elif _is_new(made, args, kwargs):
                self.known[key] = (made.shape, made.stride(), made.dtype)
        return made


_FIRST = object()


def _described(value):
    """Return all that the shape of a result depends on, hashable."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(_described(each) for each in value)
    return type(value), value


def _is_new(made, args, kwargs):
    """Return whether a result is a whole tensor of its own: no view, and no result of another operation."""
    address = made.untyped_storage()._cdata
    given = [x.untyped_storage()._cdata for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    alike = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
    return address not in given and alike.untyped_storage().nbytes() == made.untyped_storage().nbytes()


def _fitted(runs, unread, padded):
    """Return {segment: Segment} from {point: run}, the same events in each: levels are exact, so a point a term will do.

    unread: the term that has no point, and is 0. padded: see `growth`.
    """
    terms = np.array([growth(t, n, c, document, padded) for t, n, c, document, _ in runs])
    terms[:, 6] = [tile for *_, tile in runs]
    terms = np.delete(terms, unread, axis=1)
    segments = {}
    for name in next(iter(runs.values())):
        levels = [run[name] for run in runs.values()]
        assert len({len(run) for run in levels}) == 1, f"{name} allocates other tensors at other sizes"
        found = np.round(np.linalg.solve(terms, np.stack(levels)).T, 6)
        segments[name] = Segment(np.insert(found, unread, 0.0, axis=1))
    return segments


@contextlib.contextmanager
def _cut(model, layers, chosen):
    """Leave the model no layers but `chosen`."""
    parent, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is layers)
    setattr(parent, name, nn.ModuleList(chosen))
    try:
        yield
    finally:
        setattr(parent, name, layers)


@contextlib.contextmanager
def _training(peft_model):
    was = peft_model.training
    peft_model.train()
    try:
        yield
    finally:
        peft_model.train(was)
