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
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from .. import base_model, kernels
from ..data import IGNORE_INDEX
from ..kernels import causal, checkpointing, loss, tiles, token_rows
from ..system import memory
from . import images, rows

# B batch (1), H heads, T tokens, D head dim, N scored positions, V vocabulary, C positions in a chunk of the head

_ATTENTION = "qlora_plan"
VOCAB_CHUNK_SIZE = 32768  # of trl 1.16, whose trainer/utils.py is slow to import; tests/planner compares them
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
    if not padded and (device_kind == "cpu" or not loss.is_left_to_trl(peft_model, found.loss, device_kind)):
        weight = token_rows.parts(model.get_output_embeddings())[0]
        head = len(weight), weight.element_size(), device_kind
    step = Step(tuple(names[kind] for kind in kinds), ways[0]["embedding"], plain, checkpointed, head, padded)
    return step, found.joined


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
        with _attention(peft_model.get_base_model(), attention, joined), _one_piece(tile, at_once), live:
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
    task, attention = base_model.task_of(peft_model), _way_of_attention(device_kind, installed.joined, packed, document)
    if not task.HAS_TOKENS:
        return images.loss, attention
    if task.HAS_CLASSES:
        return rows.loss, rows.way_of_attention(device_kind, document, _Flash.apply)
    if device_kind == "cuda" and loss.is_left_to_trl(peft_model, installed.loss, device_kind):
        return functools.partial(_trls_loss, chunk=chunk), attention
    joined = packed or installed.joined
    return functools.partial(_loss_of_trained_positions, lean=installed.loss, joined=joined), attention


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


# ---- the loss --------------------------------------------------------------------------------------------------------


def _inputs(num_tokens):
    """Return input_ids, attention_mask and labels of one row."""
    return [torch.zeros(1, num_tokens, dtype=torch.int64, device="meta") for _ in range(3)]


def _positions(count):
    return torch.zeros(count, dtype=torch.int64, device="meta")


def _loss_of_trained_positions(peft_model, num_tokens, num_scored, lean, joined):
    """What supervised.loss_of_trained_positions computes. lean: by kernels.loss."""
    ids, mask, labels = _inputs(num_tokens)
    columns, head = _positions(num_scored), peft_model.get_base_model().get_output_embeddings()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if lean:
        found = loss.hidden_states(peft_model, head, columns, **inputs).flatten(0, 1)
    else:
        found = peft_model(**inputs, use_cache=False, logits_to_keep=columns).logits.flatten(0, 1)
    found = found if joined else found.index_select(0, _positions(num_scored))
    targets = labels.flatten().index_select(0, _positions(num_scored))
    if lean:
        return loss.cross_entropy(found, head, targets) / num_scored
    return F.cross_entropy(found.float(), targets, reduction="sum") / num_scored


def _trls_loss(peft_model, num_tokens, num_scored, chunk):
    """What trl 1.16 computes on a GPU: trainer/utils.py add_fused_lm_head, then SFTTrainer.compute_loss."""
    ids, mask, labels = _inputs(num_tokens)
    model = peft_model.get_base_model()
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    is_trained, at = labels != IGNORE_INDEX, (_positions(num_scored), _positions(num_scored))
    head = model.get_output_embeddings()
    found = _ChunkedHead.apply(hidden[at], head.weight, head.bias, labels[at], chunk)
    log_probs, _, _ = (x.new_zeros(is_trained.shape).masked_scatter(is_trained, x) for x in found)
    return -log_probs.sum() / num_scored


class _ChunkedHead(torch.autograd.Function):
    """Tensors as trl 1.16 makes them on a GPU: log-probability, entropy and top-1 of N positions, from (N, D) and (V, D).

    Source: trl/kernels/chunked_logprob.py, ChunkedLogProbFunction: one buffer of `chunk` x 32,768 logits that its kernels
    work on in place, statistics of each position, gradients summed in float32. (It does not run on the meta device.)
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias, targets_N, chunk):
        statistics = [hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(7)]
        buffer = hidden_ND.new_empty(chunk, VOCAB_CHUNK_SIZE)
        log_z, log_probs, entropy = (torch.empty_like(statistics[0]) for _ in range(3))
        is_top1 = torch.empty_like(log_z, dtype=torch.bool)
        ctx.save_for_backward(hidden_ND, weight_VD, bias, targets_N, log_z, entropy)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        del buffer
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx, *gradients):
        *sources, _, _, _ = ctx.saved_tensors
        sums = [
            torch.zeros_like(x, dtype=torch.float32) if needed else None
            for x, needed in zip(sources, ctx.needs_input_grad, strict=False)
        ]
        buffer = sources[0].new_empty(ctx.chunk, VOCAB_CHUNK_SIZE)
        rounded = [x if x is None else x.to(y.dtype) for x, y in zip(sums, sources, strict=True)]
        del buffer
        return *rounded, None, None


# ---- the model for the time of a trace -------------------------------------------------------------------------------


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


@contextlib.contextmanager
def _attention(model, function, joined):
    """Count attention as the kernels do it that will be chosen; on the meta device sdpa builds S x S scores."""

    def mask(batch_size, q_length, kv_length, device, **kwargs):
        if q_length == kv_length:
            return None
        return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)

    before = model.config._attn_implementation
    if before == "eager" and not joined:
        yield
        return
    AttentionInterface.register(_ATTENTION, function)
    AttentionMaskInterface.register(_ATTENTION, mask)
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.config._attn_implementation = before  # a package that it needs may be missing where it is planned


@contextlib.contextmanager
def _one_piece(tile, at_once):
    """Let what the kernels compute piece by piece be one piece, whatever the sequence has: a tile of so many
    tokens, and so many positions of the loss."""
    before = tiles.of, loss.pieces, loss.at_once
    tiles.of, loss.pieces = lambda _: [slice(0, tile)], lambda _, size: [slice(0, size)]
    loss.at_once = lambda *_: at_once
    try:
        yield
    finally:
        tiles.of, loss.pieces, loss.at_once = before


def _way_of_attention(device_kind, joined, packed, document):
    """Return an attention function. joined: kernels.attention is what computes it."""
    on_cuda = device_kind == "cuda"

    def attend(module, query, key, value, attention_mask, **kwargs):
        if attention_mask is not None:  # transformers repeats keys and values then, and torch has the mask as numbers
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
            numbers = torch.zeros_like(attention_mask, dtype=query.dtype)
            return _Masked.apply(query, key, value, numbers).transpose(1, 2).contiguous(), None
        if joined and not on_cuda:
            return _InBlocks.apply(query, key, value, document).transpose(1, 2).contiguous(), None
        if packed and not on_cuda:  # document by document: kernels.attention.one_by_one
            half = query.shape[2] // 2
            parts = [[x[:, :, part] for x in (query, key, value)] for part in (slice(half), slice(half, None))]
            return torch.cat([_Flash.apply(*part, False).transpose(1, 2) for part in parts], dim=1), None
        if on_cuda and query.dtype != torch.bfloat16:  # kernels.attention.sdpa, where there is no flash attention
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
        return _Flash.apply(query, key, value, on_cuda).transpose(1, 2).contiguous(), None

    return attend


class _InBlocks(torch.autograd.Function):
    """Tensors as kernels.causal makes them for the last block of the longest document."""

    @staticmethod
    def forward(ctx, query, key, value, document):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value)
        ctx.document = document
        in_float32 = key[:, :, :document].to(torch.float32, copy=key.dtype != torch.float32)
        scores, probabilities = (_block(query, document, torch.float32) for _ in range(2))
        del in_float32, scores, probabilities
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value = ctx.saved_tensors
        sums = [torch.empty_like(x[:, :, : ctx.document], dtype=torch.float32) for x in (key, value)]
        in_float32 = torch.empty_like(sums[0])
        grad_query = torch.empty_like(query)
        scores = [_block(query, ctx.document, torch.float32) for _ in range(3)]
        del scores, in_float32
        return grad_query, *(torch.empty_like(x) for x in (key, value)), None


def _block(query, document, dtype):
    """Return the scores of a block of queries and all keys of a document."""
    return query.new_empty(query.shape[1], min(causal.BLOCK, document), document, dtype=dtype)


class _Masked(torch.autograd.Function):
    """Tensors as attention with a mask (B, 1, T, S) makes them, which it keeps for the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output = torch.empty_like(query[..., : value.shape[-1]])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, output, lse)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _, _ = ctx.saved_tensors
        return *(torch.empty_like(x) for x in (query, key, value)), None


class _Flash(torch.autograd.Function):
    """Tensors as flash attention makes them: (B, H, T, D) from three, keys and values with fewer heads as they are.

    scratch: whether the backward pass allocates what FlashAttention-2 does: float32 sums of the gradient of the query, and
    with grouped queries gradients of key and value a query head. Source: torch, aten/src/ATen/native/transformers/cuda/
    flash_attn/flash_api.cpp, mha_bwd.
    """

    @staticmethod
    def forward(ctx, query, key, value, scratch, mask=None):
        output = torch.empty_like(query[..., : value.shape[-1]])  # its numbers in the query's order, as the kernels do
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse, *([] if mask is None else [mask]))
        ctx.scratch = scratch
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, lse, *_ = ctx.saved_tensors
        scratch = []
        if ctx.scratch:
            scratch = [torch.empty_like(lse), torch.empty_like(query, dtype=torch.float32)]
            if key.shape[1] != query.shape[1]:
                scratch += [torch.empty_like(query), torch.empty_like(query)]
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        del scratch
        return *gradients, None, None
