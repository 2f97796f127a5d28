"""Greedy answers from a model: many at once, or one that streams."""

from __future__ import annotations

import torch


def answers(model, tokenizer, prompts, stops, max_new_tokens, batch_size=25, on_batch=None):
    """Return the answer text to each prompt (lists of token ids), decoded greedily, in the order given.

    Prompts of like length share a batch (padded on the left), whatever their order. on_batch(number of prompts) is
    called after each. stops: ids that end an answer; not part of the text.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in batch)
        pads = [longest - len(prompts[index]) for index in batch]
        rows = [[tokenizer.pad_token_id] * pad + list(prompts[index]) for pad, index in zip(pads, batch, strict=True)]
        ids = torch.tensor(rows, device=model.device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=model.device)
        output = _generate(model, tokenizer, ids, mask, stops, max_new_tokens)
        for index, row in zip(batch, output[:, longest:].tolist(), strict=True):
            texts[index] = tokenizer.decode(_until_stop(row, stops), skip_special_tokens=True)
        if on_batch is not None:
            on_batch(len(batch))
    return texts


def stream(model, tokenizer, prompt, stops, max_new_tokens, on_text):
    """Return the answer text to one prompt (token ids); on_text(piece) is called as words are finished."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            if text:
                on_text(text)

    ids = torch.tensor([list(prompt)], device=model.device)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = _generate(model, tokenizer, ids, torch.ones_like(ids), stops, max_new_tokens, streamer)
    return tokenizer.decode(_until_stop(output[0, len(prompt) :].tolist(), stops), skip_special_tokens=True)


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
