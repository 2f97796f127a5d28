"""What is computed on the meta device in place of kernels that do not run there, or that a device chooses: the loss, attention.

They allocate what the kernels allocate, and compute nothing.
"""

from __future__ import annotations

import contextlib

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from ..data import IGNORE_INDEX
from ..kernels import causal, loss, tiles

# B batch (1), H heads, T tokens, D head dim, N scored positions, V vocabulary, C positions in a chunk of the head

_ATTENTION = "qlora_plan"
VOCAB_CHUNK_SIZE = 32768  # of trl 1.16, whose trainer/utils.py is slow to import; tests/planner compares them


# ---- the loss --------------------------------------------------------------------------------------------------------


def _inputs(num_tokens):
    """Return input_ids, attention_mask and labels of one row."""
    return [torch.zeros(1, num_tokens, dtype=torch.int64, device="meta") for _ in range(3)]


def _positions(count):
    return torch.zeros(count, dtype=torch.int64, device="meta")


def loss_of_trained_positions(peft_model, num_tokens, num_scored, lean, joined):
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


def trls_loss(peft_model, num_tokens, num_scored, chunk):
    """What trl 1.16 computes: trainer/utils.py add_fused_lm_head, then SFTTrainer.compute_loss.

    chunk: positions in the buffer of its kernels on a GPU. None: on a CPU, where it computes the same in torch's operations, of
    all positions, trained or not, up to 4,096 at a time; of more it is counted as if they were one piece.
    """
    ids, mask, labels = _inputs(num_tokens)
    model = peft_model.get_base_model()
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    is_trained, at = labels != IGNORE_INDEX, (_positions(num_scored), _positions(num_scored))
    head = model.get_output_embeddings()
    if chunk is None:
        scored, targets = hidden.reshape(-1, hidden.shape[-1]), labels.clamp(min=0).reshape(-1)
        found = _ChunkedHead.apply(scored, head.weight, head.bias, targets, None)
        log_probs, _, _ = (x.view(is_trained.shape).masked_fill(~is_trained, 0) for x in found)
    else:
        found = _ChunkedHead.apply(hidden[at], head.weight, head.bias, labels[at], chunk)
        log_probs, _, _ = (x.new_zeros(is_trained.shape).masked_scatter(is_trained, x) for x in found)
    return -log_probs.sum() / num_scored


class _ChunkedHead(torch.autograd.Function):
    """Tensors as trl 1.16 makes them: log-probability, entropy and top-1 of N positions, from (N, D) and (V, D).

    Source: trl/kernels/chunked_logprob.py, ChunkedLogProbFunction (which does not run on the meta device): one buffer of logits
    of a part of the vocabulary, statistics of each position, gradients summed in float32. On a GPU the buffer has `chunk` x
    32,768, and its kernels work in place. chunk None: on a CPU, where _forward_tile and _backward_tile have three and seven
    float32 copies of it at a time, and a mask.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias, targets_N, chunk):
        statistics = [hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(7)]
        work = _logits(hidden_ND, weight_VD, chunk, 3)
        log_z, log_probs, entropy = (torch.empty_like(statistics[0]) for _ in range(3))
        is_top1 = torch.empty_like(log_z, dtype=torch.bool)
        ctx.save_for_backward(hidden_ND, weight_VD, bias, targets_N, log_z, entropy)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        del work
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx, *gradients):
        *sources, _, _, _ = ctx.saved_tensors
        sums = [
            torch.zeros_like(x, dtype=torch.float32) if needed else None
            for x, needed in zip(sources, ctx.needs_input_grad, strict=False)
        ]
        work = _logits(sources[0], sources[1], ctx.chunk, 7)
        rounded = [x if x is None else x.to(y.dtype) for x, y in zip(sums, sources, strict=True)]
        del work
        return *rounded, None, None


def _logits(hidden_ND, weight_VD, chunk, copies):
    """Return the buffer of logits, and on a CPU (chunk None) the copies of it."""
    if chunk is not None:
        return [hidden_ND.new_empty(chunk, VOCAB_CHUNK_SIZE)]
    shape = len(hidden_ND), min(len(weight_VD), VOCAB_CHUNK_SIZE)
    made = [hidden_ND.new_empty(shape), hidden_ND.new_empty(shape, dtype=torch.bool)]
    return made + [hidden_ND.new_empty(shape, dtype=torch.float32) for _ in range(copies)]


# ---- attention, and pieces --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention(model, function, joined):
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
def one_piece(tile, at_once):
    """Let what the kernels compute piece by piece be one piece, whatever the sequence has: a tile of so many
    tokens, and so many positions of the loss."""
    before = tiles.of, loss.pieces, loss.at_once
    tiles.of, loss.pieces = lambda _: [slice(0, tile)], lambda _, size: [slice(0, size)]
    loss.at_once = lambda *_: at_once
    try:
        yield
    finally:
        tiles.of, loss.pieces, loss.at_once = before


def way_of_attention(device_kind, joined, packed, document):
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
            return torch.cat([Flash.apply(*part, False).transpose(1, 2) for part in parts], dim=1), None
        if on_cuda and query.dtype != torch.bfloat16:  # kernels.attention.sdpa, where there is no flash attention
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
        return Flash.apply(query, key, value, on_cuda).transpose(1, 2).contiguous(), None

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


class Flash(torch.autograd.Function):
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
