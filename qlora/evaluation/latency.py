"""How long an answer takes: to its first token, and for each further one."""

from __future__ import annotations

import statistics
import time

import torch

NUM_TOKENS, REPEATS = 16, 3


@torch.no_grad()
def seconds_of(model, tokenizer, prompt, num_tokens=NUM_TOKENS, repeats=REPEATS) -> dict[str, float]:
    """Return {"first_token", "token"}: seconds of one greedy answer to `prompt` (token ids), by itself.

    Answers of one token and of `num_tokens` more are timed in turn; medians of `repeats`, after one of each that does not
    count. No token ends the answer, so that all take the same number of steps.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    lengths = (1, 1 + num_tokens)
    taken = {length: [_timed(model, tokenizer, ids, length)][:0] for length in lengths}
    for _ in range(repeats):
        for length in lengths:
            taken[length].append(_timed(model, tokenizer, ids, length))
    first, whole = (statistics.median(taken[length]) for length in lengths)
    return {"first_token": first, "token": max(0.0, whole - first) / num_tokens}


def _timed(model, tokenizer, ids, length):
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    _wait(ids.device)
    begun = time.perf_counter()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    _wait(ids.device)
    return time.perf_counter() - begun


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
