"""Prefix tuning: N keys and values before each text are trained in every layer; the model stays as it is.

Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, 2021 (arXiv:2101.00190).

PEFT 0.21 passes them as a cache that each forward pass fills up, so that a layer that is computed again would find the text in
it twice, and transformers takes the cache away from such layers. Here they are a cache that is only read.
"""

from __future__ import annotations

import math

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from .. import base_model
from ..system.errors import InputError
from . import peft_model, targets, virtual_tokens
from .contract import Description, Trainable, one_group

# B rows, T tokens, N virtual tokens, L layers, K heads of keys and values, D head dim

save = peft_model.save

_SILENT = ("prefix_projection", "encoder_hidden_size", "init_weights")  # they made the numbers that are saved


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method; nothing is read from checkpoint and examples."""
    targets.refuse_token_rows(token_ids, "prefix tuning")
    torch.manual_seed(seed)
    attached = _made(
        model,
        section.num_virtual_tokens,
        prefix_projection=section.prefix_projection,
        encoder_hidden_size=section.encoder_hidden_size or model.config.get_text_config().hidden_size,
        init_weights=section.init_weights,
    )
    _refuse_unread(attached)
    return attached


def _made(model, number, **how):
    attached = virtual_tokens.attached(model, _config(number, **how), _forward, _generate)
    for layer in base_model.decoder_layers(model):
        layer._can_checkpoint_with_cache = True  # transformers: of layers that only read it
    return attached


class _Prefix(CacheLayerMixin):
    """The trained keys and values (1, K, N, D) of one layer: read, never added to. seen: whether the layer has asked."""

    is_sliding = False

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values, self.is_initialized, self.seen = keys, values, True, False

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.seen = True
        pairs = ((self.keys, key_states), (self.values, value_states))
        return tuple(torch.cat([own.expand(len(new), -1, -1, -1), new], dim=2) for own, new in pairs)

    def get_mask_sizes(self, query_length):
        return self.keys.shape[2] + query_length, 0

    def get_seq_length(self):
        return self.keys.shape[2]

    def get_max_length(self):
        return -1


def _keys_and_values(model):
    """Return [(keys, values)] of all layers, each (1, K, N, D)."""
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    numbers = torch.arange(config.num_virtual_tokens, device=encoder.embedding.weight.device)
    shape = config.num_virtual_tokens, config.num_layers, 2, config.num_attention_heads, -1
    prefix_L2KND = encoder(numbers).view(shape).permute(1, 2, 3, 0, 4)
    return [(keys[None], values[None]) for keys, values in prefix_L2KND.to(peft_model.dtype_of(model.get_base_model()))]


def _forward(model, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
    """The base's forward with the trained keys and values before those of each row."""
    config = model.get_base_model().config.get_text_config()
    cache = Cache(layers=[_Prefix(*pair) for pair in _keys_and_values(model)])
    number = cache.get_seq_length()
    if attention_mask is not None:
        attention_mask = virtual_tokens.with_mask(attention_mask, number)
    if position_ids is not None:
        position_ids = position_ids + number
    kwargs["use_cache"] = False
    if hasattr(config, "output_router_logits"):
        kwargs["output_router_logits"] = False  # their balance is counted with the mask, which is longer than the row
    return model.get_base_model()(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, **kwargs
    )


def _generate(model, input_ids, attention_mask, generation_config, **kwargs):
    """The base's generate with a cache that begins with the trained keys and values.

    Where attention has a window, padding between them and a row's tokens would let the window end too early: each row alone.
    """
    lengths, window = attention_mask.sum(1).tolist(), _window(model.get_base_model().config)
    longest = model.num_virtual_tokens + input_ids.shape[1] + generation_config.max_new_tokens
    if window is None or longest <= window or min(lengths) == input_ids.shape[1]:
        return _generate_together(model, input_ids, attention_mask, generation_config=generation_config, **kwargs)
    rows = [row[-length:] for row, length in zip(input_ids, lengths, strict=True)]
    ones = [torch.ones_like(row)[None] for row in rows]
    found = [
        _generate_together(model, row[None], mask, generation_config=generation_config, **kwargs)[0, len(row) :]
        for row, mask in zip(rows, ones, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return torch.cat([input_ids, pad(found, batch_first=True, padding_value=generation_config.pad_token_id)], dim=1)


def _generate_together(model, input_ids, attention_mask, **kwargs):
    base = model.get_base_model()
    cache, rows = DynamicCache(config=base.config), len(input_ids)
    for index, pair in enumerate(_keys_and_values(model)):
        cache.update(*(one.expand(rows, -1, -1, -1) for one in pair), index)
    number = model.num_virtual_tokens
    found = base.generate(
        # transformers takes what is in a cache for the first of these tokens: so many of any kind
        input_ids=torch.cat([input_ids[:, :1].expand(-1, number), input_ids], dim=1),
        attention_mask=virtual_tokens.with_mask(attention_mask, number),
        past_key_values=cache,
        **kwargs,
    )
    return found[:, number:]


def _window(config):
    """Return how many tokens the layer that sees least sees; None: all layers see all."""
    windows = [layer.sliding_window for layer in DynamicCache(config=config).layers if layer.is_sliding]
    return min(windows, default=None)


@torch.no_grad()
def _refuse_unread(model):
    """Raise InputError unless each layer takes its keys and values; tried on two tokens."""
    base, name = model.get_base_model(), type(model.get_base_model()).__name__
    pairs = _keys_and_values(model)
    layers, was = [_Prefix(*pair) for pair in pairs], base.training
    ids = torch.zeros(1, 2, dtype=torch.long, device=pairs[0][0].device)
    try:
        base.eval()(input_ids=ids, past_key_values=Cache(layers=layers), use_cache=False)
        why = "has layers without attention, or whose attention takes none"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        # of any architecture's own code; what it cannot do is an answer
        why = str(error).partition("\n")[0] or type(error).__name__
    finally:
        base.train(was)
    if not all(layer.seen for layer in layers):
        raise InputError(
            f"prefix_tuning: {name} has layers that cannot take keys and values before a text: {why}; take lora"
        )


def trainable(model, section):
    prefix = peft_model.named(model, "prompt_encoder.")
    how = f", projected by {section.encoder_hidden_size or 'hidden'} numbers" if section.prefix_projection else ""
    return Trainable(
        f"prefix tuning, {section.num_virtual_tokens} keys and values a layer{how}",
        first_to_move={name: p for name, p in prefix.items() if "transform" in name} or prefix,
        groups=one_group(model),
    )


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def read(folder, config):
    sizes = [config.get("token_dim"), config.get("num_layers")]
    width = 2 * math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    why = (
        "puts keys and values before the text, which no weight of the base can take up. Serve it beside the base: "
        "`qlora chat RUN`, or any server that loads PEFT's prefix tuning"
    )
    return virtual_tokens.read(folder, config, describe(config).kind, width, _SILENT, why)


def load(model, adapter, token_ids=()):
    attached = _made(model, adapter.config["num_virtual_tokens"])
    _refuse_another(attached, adapter)
    virtual_tokens.fill(attached, adapter)
    return attached.requires_grad_(False).eval()


def fill(model, adapter, ends=()):
    _refuse_another(model, adapter)
    if adapter.config.get("prefix_projection"):
        raise InputError(
            f"adapter {adapter.folder}: what prefix_projection made is saved, not the network that made it, so it cannot be "
            "trained further; set prefix_projection: false, or take the checkpoints: qlora train RECIPE --resume"
        )
    virtual_tokens.fill(model, adapter)


def _config(number, **how):
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=number, **how)


def _refuse_another(model, adapter):
    names, made = ("num_layers", "num_attention_heads", "token_dim"), model.active_peft_config
    differing = [f"{n} is {adapter.config.get(n)}, the base's {getattr(made, n)}" for n in names
                 if adapter.config.get(n) != getattr(made, n)]  # fmt: skip
    if differing:
        raise InputError(f"adapter {adapter.folder}: made for another base; its {', its '.join(differing)}")


def describe(config):
    number = config.get("num_virtual_tokens")
    return Description("prefix tuning", f"{number} virtual tokens", "{W}, and keys and values before the text")
