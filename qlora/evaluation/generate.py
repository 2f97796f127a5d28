"""Greedy answers from a model: many at once, or one that streams."""

from __future__ import annotations

import itertools

import torch

from .. import base_model, methods
from ..system.errors import InputError, Interrupted
from ..system.events import note, progress
from .asked import BATCH_SIZE
from .batches import in_batches, room_for


def answers(model, tokenizer, prompts, stops, max_new_tokens, batch_size=BATCH_SIZE, what="answering"):
    """Return the answer text to each prompt (lists of token ids), decoded greedily, in the order given.

    Prompts of like length share a batch (padded on the left), whatever their order; where memory runs out, fewer do. what: the
    progress is of. stops: ids that end an answer; not part of the text. Answers end at the model's last position.

    Raises:
        InputError: a prompt fills all positions of the model.
        DoesNotFit: there is no memory for one answer by itself.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    limits = [limit_of(model, prompt, max_new_tokens) for prompt in prompts]
    texts = [""] * len(prompts)
    batch_size = _fitting(model, max(map(len, prompts), default=1) + max_new_tokens, batch_size)
    with progress(what, len(prompts), "rows") as advance:

        def answer(some):
            longest = max(len(prompts[index]) for index in some)
            pads = [longest - len(prompts[index]) for index in some]
            rows = [
                [tokenizer.pad_token_id] * pad + list(prompts[index]) for pad, index in zip(pads, some, strict=True)
            ]
            ids = torch.tensor(rows, device=model.device)
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=model.device)
            output = _generate(model, tokenizer, ids, mask, stops, limits[some[0]])
            for index, row in zip(some, output[:, longest:].tolist(), strict=True):
                texts[index] = tokenizer.decode(_until_stop(row, stops), skip_special_tokens=True)
            advance(len(some))

        for _, alike in itertools.groupby(
            order, key=limits.__getitem__
        ):  # near the last position each length has its own
            batch_size = in_batches(answer, list(alike), batch_size)
    return texts


def _fitting(model, num_tokens, batch_size):
    room = room_for(model, num_tokens)
    if room is None or room >= batch_size:
        return batch_size
    note(
        f"{room} answers at a time, as with --batch-size {room}: there is no memory for {batch_size} of {num_tokens:,} tokens"
    )
    return room


def limit_of(model, prompt, max_new_tokens):
    """Return how many tokens an answer to `prompt` (token ids) can have: max_new_tokens, or up to the last position.

    Raises:
        InputError: the prompt leaves no position for an answer.
    """
    positions = base_model.num_positions(model.config)
    if positions is None:
        return max_new_tokens
    taken = methods.num_positions(model)
    if taken + len(prompt) >= positions:
        raise InputError(
            f"the prompt is too long: {len(prompt):,} tokens, and {base_model.said_of_positions(positions, taken)} for prompt "
            "and answer; shorten it"
        )
    return min(max_new_tokens, positions - taken - len(prompt))


def stream(model, tokenizer, prompt, stops, max_new_tokens, on_text, on_limit=None):
    """Return the answer text to one prompt (token ids); on_text(piece) is called as words are finished.

    on_limit(positions): called where the answer was cut short because the model has no more positions.

    Raises:
        InputError: the prompt fills all positions of the model.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            if text:
                on_text(text)

    limit = limit_of(model, prompt, max_new_tokens)
    ids = torch.tensor([list(prompt)], device=model.device)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        output = _generate(model, tokenizer, ids, torch.ones_like(ids), stops, limit, streamer)
    except (KeyboardInterrupt, Interrupted):
        streamer.end()  # what it holds back until a word is finished
        raise
    found = output[0, len(prompt) :].tolist()
    kept = _until_stop(found, stops)
    if on_limit is not None and limit < max_new_tokens and len(kept) == limit:
        on_limit(methods.num_positions(model) + len(prompt) + limit)
    return tokenizer.decode(kept, skip_special_tokens=True)


@torch.no_grad()
def _generate(model, tokenizer, ids, mask, stops, max_new_tokens, streamer=None):
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id
    )
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)


def _until_stop(ids, stops):
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
