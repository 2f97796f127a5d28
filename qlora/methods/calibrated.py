"""What training rows say of each layer before any training: what goes into it, and where their loss would move its weight.

Matrices of several layers are summed up in one pass over the rows, of as many as have room. The weight may be in 4 bit: its
gradient is that of what it computes.
"""

from __future__ import annotations

import contextlib
import itertools

import torch

from ..data import IGNORE_INDEX
from ..system.errors import InputError

# O out_features, I in_features, R rank, T tokens

_TOKENS, _LONGEST = 8192, 512  # of the first rows, and of one of them, from its end: there is the answer
_BYTES = 2**30  # of the matrices that are summed up in one pass over the rows


def moments(peft_model, layers, rows):
    """Yield (layer, C (I, I)) of each of `layers`, LoRA layers of a new PeftModel: the mean of x x' over its inputs x."""
    for group in _groups(layers, lambda layer: layer.in_features**2):
        yield from _moments(peft_model, group, rows).items()


def gradients(peft_model, layers, rows):
    """Yield (layer, G (O, I)) of each of `layers`, as `moments` has it: the gradient of the summed loss in its weight."""
    for group in _groups(layers, lambda layer: layer.in_features * layer.out_features):
        yield from _gradients(peft_model, group, rows).items()


def rows_of(kind, examples, device):
    """Return [(input_ids, labels)], each (1, T), of the first rows with trained tokens.

    Raises:
        InputError: there is none. kind: the start that needs them.
    """
    found, count = [], 0
    for example in examples:
        ids, labels = example.input_ids[-_LONGEST:], example.labels[-_LONGEST:]
        if any(label != IGNORE_INDEX for label in labels[1:]):
            found.append(tuple(torch.tensor(part, device=device)[None] for part in (ids, labels)))
            count += len(ids)
        if count >= _TOKENS:
            break
    if not found:
        raise InputError(f"lora.init_lora_weights {kind}: no row has a trained token to read; use other rows, or eva")
    return found


def _groups(layers, numbers):
    """Yield lists of layers whose matrices, numbers(layer) in float32 each, take no more than _BYTES; at least one layer."""
    rest = list(layers)
    while rest:
        sizes = itertools.accumulate(4 * numbers(layer) for layer in rest)
        many = max(1, sum(size <= _BYTES for size in sizes))
        yield rest[:many]
        rest = rest[many:]


@contextlib.contextmanager
def _watched(layers, hook):
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _moments(peft_model, layers, rows):
    """Return {layer: C (I, I)}, the mean of x x' over the inputs x of a layer."""
    found = {layer: torch.zeros((), device=peft_model.device) for layer in layers}

    def add(layer, arguments, output):
        x_TI = arguments[0].flatten(0, -2).float()
        found[layer] = found[layer] + x_TI.T @ x_TI

    with _watched(layers, add):
        for ids, _ in rows:
            peft_model(input_ids=ids, logits_to_keep=1, use_cache=False)
    count = sum(ids.shape[1] for ids, _ in rows)
    return {layer: moment / count for layer, moment in found.items() if moment.dim()}


@torch.enable_grad()
def _gradients(peft_model, layers, rows):
    """Return {layer: G (O, I)}, the gradient of the summed loss of `rows` in a layer's weight."""
    found = {layer: torch.zeros((), device=peft_model.device) for layer in layers}

    def watch(layer, arguments, output):
        x_TI = arguments[0].detach().flatten(0, -2)

        def add(gradient):
            found[layer] = found[layer] + gradient.flatten(0, -2).float().T @ x_TI.float()

        output.register_hook(add)

    with _watched(layers, watch):
        for ids, labels in rows:
            logits = peft_model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(
                logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum"
            ).backward()
            peft_model.zero_grad(set_to_none=True)
    return {layer: gradient for layer, gradient in found.items() if gradient.dim()}
