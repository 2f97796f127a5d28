"""Attention within documents: a packed row holds several, and none sees another.

The lengths of the documents travel with the batch as `segments`, and each is attended to by itself: on a card that can,
all in one call of varlen_attn, else one by one. No S x S mask is built, and attention costs the sum of the squares of the
lengths instead of the square of the sum. With kernels off each document goes through torch's own attention.
"""

from __future__ import annotations

import contextlib
import functools
import types

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..system import devices
from ..system.errors import InputError
from .causal import causal_attention, within_window

NAME, PLAIN = "qlora_segments", "qlora_segments_plain"

# B batch (1), H heads, T tokens of the packed row, D head dim


def segment_attention(
    module, query_BHTD, key_BHTD, value_BHTD, attention_mask, segments, sliding_window=None, **kwargs
):
    """Return ((B, T, H, D), None): causal attention of each of `segments` (lengths that sum to T) within itself.

    sliding_window: the last tokens that a token sees, itself among them; None: all. kwargs: what transformers passes to
    sdpa_attention_forward (dropout, scaling, ...). Key and value may have fewer heads (grouped-query attention).
    """
    _refuse_more(attention_mask, **kwargs)
    if takes_one_call(module, query_BHTD, value_BHTD, _capability(query_BHTD.device), **kwargs):
        return in_one_call(module, query_BHTD, key_BHTD, value_BHTD, segments, sliding_window, **kwargs), None
    if query_BHTD.device.type == "cpu" and _is_plain(module, query_BHTD, value_BHTD, **kwargs):
        return in_blocks(module, query_BHTD, key_BHTD, value_BHTD, segments, sliding_window, **kwargs), None
    return one_by_one(module, query_BHTD, key_BHTD, value_BHTD, segments, sliding_window, **kwargs), None


def plain_segment_attention(module, query, key, value, attention_mask, segments, sliding_window=None, **kwargs):
    """What segment_attention returns, by torch's own attention a document."""
    _refuse_more(attention_mask, **kwargs)
    return one_by_one(module, query, key, value, segments, sliding_window, **kwargs), None


def _refuse_more(attention_mask, s_aux=None, **kwargs):
    """Raise ValueError for what would be left out: a mask that the model makes by itself, attention sinks."""
    if attention_mask is not None or s_aux is not None:
        raise ValueError("attention with a mask of its own, or with attention sinks")


def takes_one_call(module, query, value, capability, **kwargs):
    """Return whether varlen_attn computes this attention, from shapes and settings alone.

    capability: (major, minor) of the card; None where varlen_attn does not run at all.
    """
    head_dim = query.shape[-1]
    return (
        capability is not None
        and capability >= (8, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        # what the kernel takes; between 192 and 256 its backward needs an A100 or H100
        and head_dim % 8 == 0
        and (head_dim <= 192 or head_dim == 256)
        and _is_plain(module, query, value, **kwargs)
    )


def _is_plain(module, query, value, dropout=0.0, is_causal=None, softcap=None, position_bias=None, **kwargs):
    """Return whether nothing is asked for but causal attention: sdpa heeds the rest, or says that it cannot."""
    return (
        value.shape[-1] == query.shape[-1]
        and not dropout
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and softcap is None
        and position_bias is None
    )


def in_one_call(module, query_BHTD, key_BHTD, value_BHTD, segments, sliding_window=None, scaling=None, **kwargs):
    """Return (B, T, H, D): what `one_by_one` returns, by one call of varlen_attn; `takes_one_call` says where."""
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query_BHTD, key_BHTD, value_BHTD))
    offsets, longest = _offsets(tuple(segments), query_BHTD.device), max(segments)
    output_THD = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),  # tokens before and after; -1: no limit
        enable_gqa=query_THD.shape[1] != key_THD.shape[1],
    )
    return output_THD.contiguous()[None]


def in_blocks(module, query_BHTD, key_BHTD, value_BHTD, segments, sliding_window=None, scaling=None, **kwargs):
    """Return (B, T, H, D): what `one_by_one` returns, by causal_attention; on a CPU."""
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    parts = zip(*(x[0].split(list(segments), dim=1) for x in (query_BHTD, key_BHTD, value_BHTD)), strict=True)
    outputs = [causal_attention(q, k, v, scale, sliding_window).transpose(0, 1) for q, k, v in parts]
    return torch.cat(outputs)[None]


def one_by_one(module, query_BHTD, key_BHTD, value_BHTD, segments, sliding_window=None, **kwargs):
    """Return (B, T, H, D), one sdpa call a document: any device and dtype."""
    outputs, start = [], 0
    for length in segments:
        part = slice(start, start + length)
        mask = None
        if sliding_window and length > sliding_window:
            mask = within_window(length, 0, sliding_window, query_BHTD.device)[None, None]
        output, _ = sdpa(module, query_BHTD[:, :, part], key_BHTD[:, :, part], value_BHTD[:, :, part], mask, **kwargs)
        outputs.append(output)
        start += length
    return torch.cat(outputs, dim=1)


def sdpa(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, **kwargs):
    """Return ((B, T, H, D), None): what transformers' sdpa_attention_forward does, without all scores in memory on old cards.

    Where there is no flash attention, torch's memory-efficient kernel is left, which takes no grouped queries: asked for them,
    torch computes all T x T scores instead (huggingface/transformers#48633, on a T4). So each query head gets a copy of its
    keys and values.
    """
    group = query_BHTD.shape[1] // key_BKTD.shape[1]
    if group > 1 and kwargs.get("cache") is None and _lacks_flash(query_BHTD):
        key_BKTD, value_BKTD = (x.repeat_interleave(group, dim=1) for x in (key_BKTD, value_BKTD))
        module = types.SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # without its num_key_value_groups
    return sdpa_attention_forward(module, query_BHTD, key_BKTD, value_BKTD, attention_mask, **kwargs)


def _lacks_flash(query):
    """Return whether torch's flash attention cannot compute this: on an NVIDIA card below capability 8.0, or in float32."""
    if query.device.type != "cuda" or torch.version.cuda is None:
        return False
    return query.dtype == torch.float32 or torch.cuda.get_device_capability(query.device) < (8, 0)


@functools.cache
def _capability(device):
    """Return (major, minor) of an NVIDIA card, or None: another device, or a build of torch without flash attention."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device) if torch.backends.cuda.is_flash_attention_available() else None


@functools.lru_cache(maxsize=1)  # every layer asks for the same batch; a copy to the device in each would make it wait
def _offsets(segments, device):
    """Return where each document starts, and the end: int32, (len(segments) + 1,)."""
    return devices.sent(np.cumsum([0, *segments], dtype=np.int32), device)


AttentionInterface.register("sdpa", sdpa)  # rows that are not joined too
for _name, _function in ((NAME, segment_attention), (PLAIN, plain_segment_attention)):
    # no mask is registered for it, and transformers makes none: for other ones it asks the device in each micro-batch whether the
    # positions are those of several documents, and waits for the answer
    AttentionInterface.register(_name, _function)


def why_not(config, longest=None):
    """Return why the documents of a row cannot be kept apart in the architecture of `config`, in words; None if they can.

    longest: the tokens of the longest row that there may be; None: not to be asked.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"its {', '.join(sorted(kinds))} layers would carry state from one document to the next"
    if getattr(config, "attn_logit_softcapping", None):
        return "this architecture uses attention logit softcapping"
    if config.model_type in ("qwen2_moe", "phimoe") and getattr(config, "sliding_window", None):
        return "this architecture does not pass its sliding window to the attention function"  # transformers 5.23
    short = _longrope_positions(config)
    if short is not None and longest is not None and longest > short:
        return (
            f"this model has other rotary factors for rows over {short:,} tokens (longrope), and one such row would change those "
            f"of the rows beside it; data.max_length is {longest:,}"
        )
    return None


def _longrope_positions(config):
    """Return the longest row with the short factors of longrope, in tokens; None of other models.

    transformers 5.23 takes short or long factors for a whole batch, by its greatest position (longrope_frequency_update).
    """
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(one for one in found.values() if isinstance(one, dict))]
    lengths = [one.get("original_max_position_embeddings") for one in kinds if one.get("rope_type") == "longrope"]
    return min(filter(None, lengths), default=None)


def joins(model):
    """Return whether this model gives rows that are joined into one the logits of each alone; tried on two short rows.

    Architectures with sinks, masks, biases or positions of their own do not, whatever they call them. On the meta device,
    where there are no numbers, only whether it lets its attention be replaced.
    """
    if why_not(model.config):
        return False
    weight = next(model.get_input_embeddings().parameters())  # with rows of new tokens .weight is a copy of the table
    # from all over the vocabulary: its first tokens are often special ones, whose logits in 16 bit are rounding (SmolLM2-135M)
    ids = (torch.arange(16, device=weight.device) * 2741 + 311)[None] % len(weight)
    rows = ids.split([6, 10], dim=1)
    positions = torch.cat([torch.arange(row.shape[1], device=ids.device) for row in rows])[None]
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            with within_documents(model):
                if weight.device.type == "meta":
                    return True
                together = model(
                    input_ids=ids, position_ids=positions, segments=[row.shape[1] for row in rows], use_cache=False
                ).logits
            alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
    except (InputError, ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        return False  # it is a question; what it cannot do is an answer
    finally:
        model.train(was)
    return bool((together.float() - alone.float()).norm() <= 0.05 * alone.float().norm())


def refuse_unsupported(config, longest=None):
    """Raise InputError where documents of a packed row cannot be kept apart in this architecture; longest: see `why_not`."""
    reason = why_not(config, longest)
    if reason:
        raise InputError(f"data.packing: {reason}; set data.packing=false")


@contextlib.contextmanager
def within_documents(model, plain=False):
    """Attend within documents while the block runs; batches must carry `segments`. plain: by torch's own attention."""
    before, name = model.config._attn_implementation, PLAIN if plain else NAME
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise InputError(
            f"data.packing: {type(model).__name__} has an attention that cannot be replaced; set data.packing=false"
        )
    try:
        yield
    finally:
        model.config._attn_implementation = before  # which was checked when the model was loaded


def as_now(model):
    """Return a function that opens a block in which `model` attends as it does now, also within `within_documents`."""
    own = model.config._attn_implementation

    @contextlib.contextmanager
    def attending():
        then, model.config._attn_implementation = model.config._attn_implementation, own
        try:
            yield
        finally:
            model.config._attn_implementation = then

    return attending
