"""How long an answer takes: to its first token, and for each further one."""

from __future__ import annotations

import statistics
import time

import torch

from .generate import nothing_filled_in

NUM_TOKENS, REPEATS = 16, 3


def seconds_of(model, tokenizer, prompt) -> dict[str, float]:
    """Return {"first_token", "token"}: seconds of one greedy answer to `prompt` (token ids), by itself.

    Answers of one token and of NUM_TOKENS more are timed in turn; medians of REPEATS, after one of each that does not
    count. No token ends the answer, so that all take the same number of steps.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    first: list = []
    whole: list = []
    for _ in range(1 + REPEATS):
        first.append(seconds_of_answer(model, ids, 1, tokenizer.pad_token_id))
        whole.append(seconds_of_answer(model, ids, 1 + NUM_TOKENS, tokenizer.pad_token_id))
    return medians(first, whole)


def medians(first, whole):
    """Return {"first_token", "token"} of seconds to the first token, and to NUM_TOKENS more; the first times do not count."""
    to_first, in_all = statistics.median(first[1:]), statistics.median(whole[1:])
    return {"first_token": to_first, "token": max(0.0, in_all - to_first) / NUM_TOKENS}


@torch.no_grad()
def seconds_of_answer(model, ids, num_tokens, pad_token_id):
    """Return the seconds of `num_tokens` greedy tokens after `ids`, (1, T); no token ends them."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=pad_token_id
    )
    _wait(ids.device)
    begun = time.perf_counter()
    with nothing_filled_in(model):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    _wait(ids.device)
    return time.perf_counter() - begun


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
