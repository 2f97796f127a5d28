"""Answers from a model: many at once, greedily, or one that streams."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass

import torch

from .. import base_model, methods
from ..system.errors import InputError, Interrupted
from ..system.events import note, progress
from .asked import BATCH_SIZE
from .batches import in_batches, room_for
from .sampling import Sampling


@dataclass(frozen=True)
class Pace:
    """How long an answer took. cut_off: it ended at max_new_tokens."""

    num_tokens: int
    seconds: float
    cut_off: bool

    @property
    def tokens_per_second(self):
        return self.num_tokens / max(self.seconds, 1e-9)


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
            output = _generate(model, tokenizer, ids, mask, stops, Sampling(limits[some[0]]))
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


def stream(model, tokenizer, prompt, stops, sampling, on_text, on_limit=None, on_done=None):
    """Return the answer text to one prompt (token ids); on_text(piece) is called as words are finished.

    sampling: a Sampling. on_limit(positions): called where the answer was cut short because the model has no more positions.
    on_done(Pace): called at the end, of what there is where it was interrupted too.

    Raises:
        InputError: the prompt fills all positions of the model.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        num_tokens = -len(prompt)  # it is given those first

        def put(self, value):
            is_end = self.num_tokens >= 0 and value.item() in stops  # which the tokenizer may not call special
            self.num_tokens += value.numel()
            if not is_end:
                super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            if text:
                on_text(text)

    limit = limit_of(model, prompt, sampling.max_new_tokens)
    ids = torch.tensor([list(prompt)], device=model.device)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start, is_full = time.monotonic(), False
    try:
        with sampling.drawing(ids.device):
            output = _generate(
                model, tokenizer, ids, torch.ones_like(ids), stops, sampling.changed(max_new_tokens=limit), streamer
            )
        kept = _until_stop(output[0, len(prompt) :].tolist(), stops)
        is_full = len(kept) == limit
    except (KeyboardInterrupt, Interrupted):
        streamer.end()  # what it holds back until a word is finished
        raise
    finally:
        if on_done is not None:
            cut_off = is_full and limit == sampling.max_new_tokens
            on_done(Pace(max(0, streamer.num_tokens), time.monotonic() - start, cut_off))
    if on_limit is not None and limit < sampling.max_new_tokens and is_full:
        on_limit(methods.num_positions(model) + len(prompt) + limit)
    return tokenizer.decode(kept, skip_special_tokens=True)


@torch.no_grad()
def _generate(model, tokenizer, ids, mask, stops, sampling, streamer=None):
    from transformers import GenerationConfig

    config = GenerationConfig(**sampling.settings(), eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id)
    # weights in shares are gathered by all processes at each token, so those that have ended go on until all have
    together = base_model.is_gathered(model)
    with nothing_filled_in(model):
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer, synced_gpus=together
        )


@contextlib.contextmanager
def nothing_filled_in(model):
    """Let `model` generate by what it is given alone.

    transformers fills in what the model's generation_config.json says beside it: a repetition penalty, beams, a time, tokens
    that are never said. The likeliest token is none of these.
    """
    from transformers import GenerationConfig

    its_own = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    for module, _ in its_own:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in its_own:
            module.generation_config = config


def _until_stop(ids, stops):
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
