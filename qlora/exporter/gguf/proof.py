"""What llama.cpp reads in a GGUF file, against what transformers reads in the exported folder."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import base_model
from ...data import IGNORE_INDEX
from ...recipe import Model
from ...system.errors import ProofFailed
from ...system.extras import how_to_install
from .. import proof

# llama.cpp's CPU code rounds activations to float16 before each product and reads GELU from a float16 table. Measured at
# f16 against float32 transformers: SmolLM2-135M 1.2e-6 nats a token; llama.cpp's own f16 against bf16 of Llama-3-8B: 2.5e-5.
# q8_0 and q4_k_m: SmolLM2-135M 0.004 and 0.041, Llama-3-8B 0.0014 and 0.031 (llama.cpp, tools/perplexity/README.md).
# The limits have room for other models and are far below what a mistake costs (tests/exporter/test_gguf.py).
KL_LIMIT = {"f16": 1e-4, "q8_0": 0.02, "q4_k_m": 0.3}
# f16: a greedy token may differ only where the transformers model's first two tokens are nearer than this, in nats.
NEAR_TIE = 0.05


@dataclass(frozen=True)
class Proof:
    """What was compared. proven: False with why_not where llama-cpp-python is not installed, and nothing was.

    num_tokens: greedy tokens of the transformers model; same_top1: the share that llama.cpp would say too, after the
    same words; kl: KL(transformers, llama.cpp) in nats a token; widest_miss: the greatest lead in nats that a token had
    in transformers which llama.cpp did not choose.
    """

    proven: bool
    why_not: str | None = None
    num_prompts: int = 0
    num_tokens: int = 0
    same_top1: float = 0.0
    kl: float = 0.0
    widest_miss: float = 0.0


_PROMPTS = 8


def prompts_of(tokenizer, rows):
    """Return up to 8 prompts, as strings, of Examples: what stands before the first trained token, shortest first;
    of a row that is trained whole, its first half."""
    starts = []
    for row in rows:
        first = next(at for at, label in enumerate(row.labels) if label != IGNORE_INDEX)
        starts.append(row.input_ids[: first if first > 1 else max(1, len(row.input_ids) // 2)])
    shortest = sorted(starts, key=len)[:_PROMPTS]
    return [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in shortest]


def prove(folder, gguf_file, kind, prompts, max_new_tokens=32):
    """Return the Proof that llama.cpp reads in `gguf_file` what transformers reads in `folder`.

    prompts: strings as the chat template renders them. llama.cpp has to make the same tokens of each, with the start
    token put before by itself if the file says so. Then transformers answers greedily (in float32 where that fits, see
    `proof.reload`), and llama.cpp is shown prompt and answer: after every token of it, the two distributions are compared.
    KL at most KL_LIMIT; f16 also: equal greedy tokens, but for near ties. Memory, beside the two models: 4 bytes for each
    token of the longest prompt and each of the vocabulary.

    Raises:
        ProofFailed: other tokens, or other probabilities; says which.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return Proof(
            False, f"not proven: llama-cpp-python is not installed; export again after:  {how_to_install('gguf')}"
        )
    section = Model(name_or_path=str(folder))
    tokenizer = base_model.load_tokenizer(Path(folder), section)
    rows = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    longest = max(map(len, rows)) + max_new_tokens
    model = proof.reload(Path(folder), base_model.default_device())
    with opened(gguf_file, longest) as served:
        for prompt, row in zip(prompts, rows, strict=True):
            _refuse_other_tokens(tokenizer, served, prompt, row)
        found = [_compare(model, served, row, max_new_tokens) for row in rows]
    kl, lead, same = (torch.cat(parts) for parts in zip(*found, strict=True))
    missed = lead[~same]
    result = Proof(
        True,
        num_prompts=len(rows),
        num_tokens=len(kl),
        same_top1=same.float().mean().item(),
        kl=kl.mean().item(),
        widest_miss=missed.max().item() if len(missed) else 0.0,
    )
    problems = []
    if not result.kl <= KL_LIMIT[kind]:
        problems.append(
            f"KL to the exported folder is {result.kl:.2e} nats per token; the limit for {kind} is {KL_LIMIT[kind]}"
        )
    if kind == "f16" and result.widest_miss > NEAR_TIE:
        problems.append(
            f"it predicts another token where the exported folder leads by {result.widest_miss:.2f} nats; the limit is {NEAR_TIE}"
        )
    if problems:
        raise ProofFailed("\n  ".join([f"{gguf_file} is not the exported model:", *problems]))
    return result


def opened(gguf_file, num_tokens):
    """Return, for a `with` block, llama.cpp's model of `gguf_file`, which keeps the logits after each of up to so many tokens."""
    from llama_cpp import Llama

    # float32 keys and values: llama.cpp's default is float16, which would be compared too
    return contextlib.closing(
        Llama(str(gguf_file), n_ctx=num_tokens, n_batch=num_tokens, n_ubatch=num_tokens, logits_all=True, type_k=0,
              type_v=0, yarn_attn_factor=-1.0, verbose=False, n_threads=torch.get_num_threads())
    )  # fmt: skip


def _refuse_other_tokens(tokenizer, served, prompt, row):
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(served.model)
    adds = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
    text = prompt.removeprefix(tokenizer.bos_token) if adds else prompt
    found = served.tokenize(text.encode(), add_bos=True, special=True)
    if found != row:
        at = next(
            (i for i, pair in enumerate(zip(found, row, strict=False)) if pair[0] != pair[1]), min(len(found), len(row))
        )
        raise ProofFailed(
            f"llama.cpp tokenizes a prompt differently: from token {at} on {found[at : at + 5]} instead of {row[at : at + 5]} "
            f"({tokenizer.decode(row[at : at + 5])!r}) in {prompt[:80]!r}"
        )


@torch.no_grad()
def _compare(model, served, row, max_new_tokens):
    """Return (KL in nats, lead of the first token over the second in nats, same first token?) for each greedy token."""
    ids, rows, cache = list(row), [], None
    while len(rows) < max_new_tokens:
        new = torch.tensor([ids if cache is None else ids[-1:]], device=model.device)
        output = model(new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].float().cpu())
        ids.append(rows[-1].argmax().item())
    served.reset()
    served.eval(ids[:-1])
    expected = torch.stack(rows).log_softmax(-1)
    found = torch.from_numpy(served.scores[len(row) - 1 : len(ids) - 1].copy()).log_softmax(-1)
    top = expected.topk(2).values
    kl = (expected.exp() * (expected - found)).sum(-1)
    return kl, top[:, 0] - top[:, 1], expected.argmax(-1) == found.argmax(-1)
