"""The proof: the written folder, reloaded by plain transformers, against the live NF4 + adapter model.

Two-sided. The folder must be the model that was trained, and it must not be the base. Both models compute in float32,
with the exact NF4 values, so that what is compared is the weights and not the rounding of two bfloat16 computations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import base_model, metrics
from ..data import IGNORE_INDEX, Example
from ..errors import InputError, ProofFailed

# KL(live || merged) in nats a position. Measured on SmolLM2-135M: float16 1e-6 (10 to 40 steps), bfloat16 2.5e-4 to 1e-3;
# any wrong merge (other base, adapter lost, embedding rounded) 0.06 to 0.23. The limits stand a decade above the right
# ones and far below the wrong ones.
KL_LIMIT = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-2}
TOP1_LIMIT = {"float32": 0.99, "float16": 0.97, "bfloat16": 0.90}  # wrong merges: 0.79 to 0.89; near-ties flip
LOSS_LIMIT = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-2}  # nats a trained token
# The merged model must be this many times nearer to the live one than the base is.
BASE_FACTOR = 4

_STORED_BYTES = 256 * 2**20  # of the live model's log probabilities, kept while the merged model loads


@dataclass(frozen=True)
class Scores:
    """Of one model on the proof rows. kl and top1 are against the live model; None for the live model itself."""

    loss: float
    kl: float | None = None
    top1: float | None = None


def proof_rows(examples, vocab_size):
    """Return the first rows whose positions fit the memory set aside: always one, at most 64."""
    budget, rows = _STORED_BYTES // (4 * vocab_size), []
    for example in examples[:64]:
        budget -= len(example.input_ids) - 1
        if rows and budget < 0:
            break
        rows.append(example)
    return rows


# For an adapter that comes without rows: text of several kinds, so that many layers and tokens have something to say.
_SENTENCES = (
    "A proof is a chain of small steps, each of which anybody can check.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2))",
    '{"name": "Ada", "born": 1815, "wrote": ["notes", "letters"]}',
    "Question: What weighs more, a pound of feathers or a pound of lead?\nAnswer: They weigh the same.",
    "Der Zug nach Basel f\u00e4hrt um 7 Uhr 42 von Gleis 11 ab. Le train pour Lyon est en retard.",
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427\u3002",
    "1 2 4 8 16 32 64 128; a b c d e f g; Monday Tuesday Wednesday Thursday",
    "Dear Sir or Madam, thank you for your letter of 3 May. We shall answer it within ten working days.",
)


def text_rows(tokenizer):
    """Return rows of plain text, every token of them scored."""
    rows = [tokenizer(text).input_ids for text in _SENTENCES]
    return [Example(ids, ids) for ids in rows]


def to_json(rows, which):
    """Return what proof_rows.json holds: the rows, and where they come from in words."""
    return {"from": which, "rows": [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]}


def from_json(content):
    """Return (rows, where they come from) of proof_rows.json; raises InputError if it is something else."""
    try:
        return [Example(row["input_ids"], row["labels"]) for row in content["rows"]], content["from"]
    except (KeyError, TypeError):
        raise InputError("proof_rows.json of the run holds no rows; the run folder is damaged") from None


class Live:
    """The trained model's answers on `rows`: log probabilities after every position."""

    def __init__(self, peft_model, rows):
        base_model.to_float32(peft_model)
        self.rows = rows
        self.log_probabilities = [_log_probabilities(peft_model, row) for row in rows]
        self.scores = Scores(_loss(self.log_probabilities, rows))
        with peft_model.disable_adapter():
            self.base_scores = self.compare(peft_model)

    @property
    def num_positions(self):
        return sum(len(one) for one in self.log_probabilities)

    def compare(self, model):
        """Return the Scores of `model` against the live one."""
        losses, kl, same = [], 0.0, 0
        for row, live_TV in zip(self.rows, self.log_probabilities, strict=True):
            other_TV = _log_probabilities(model, row)
            kl += metrics.kl_divergence(live_TV, other_TV)
            same += (live_TV.argmax(-1) == other_TV.argmax(-1)).sum().item()
            losses.append(_picked(other_TV, row))
        return Scores(torch.cat(losses).mean().item(), kl / self.num_positions, same / self.num_positions)


def _log_probabilities(model, row):
    return metrics.log_probabilities(model, row, torch.arange(len(row.input_ids) - 1))


def _picked(log_probabilities_TV, row):
    """Return -log p of the trained tokens of `row`."""
    labels = torch.tensor(row.labels[1:])
    trained = labels != IGNORE_INDEX
    return -log_probabilities_TV[trained].gather(-1, labels[trained, None])[:, 0]


def _loss(log_probabilities, rows):
    return torch.cat([_picked(one, row) for one, row in zip(log_probabilities, rows, strict=True)]).mean().item()


def device_for(num_bytes, device):
    """Return `device`, or the CPU if that many bytes and a tenth more are not free on it."""
    if device.type == "cuda" and 1.1 * num_bytes > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def reload(folder, device, trust_remote_code=False):
    """Return the model in `folder` as any user would load it.

    In float32 on `device` where that fits, else as stored on `device`, else in float32 on the CPU.
    """
    from transformers import AutoModelForCausalLM

    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    in_float32 = device_for(2 * num_bytes, device) == device
    device = device_for(num_bytes, device)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32 if in_float32 or device.type == "cpu" else "auto",
        device_map={"": device},
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    lost = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if lost:
        raise ProofFailed(f"the written folder does not load whole: {', '.join(sorted(lost)[:5])}")
    return model.eval()


def failures(live, merged, base, dtype):
    """Return what is wrong, as sentences; none means proven."""
    found = []
    if not (math.isfinite(merged.loss) and math.isfinite(merged.kl)):
        return [f"its answers are not finite numbers in {dtype}; export with --dtype bfloat16 or float32"]
    if merged.kl > KL_LIMIT[dtype]:
        found.append(
            f"KL(trained, exported) is {merged.kl:.2e} nats a token, the limit for {dtype} is {KL_LIMIT[dtype]:.0e}"
        )
    if merged.top1 < TOP1_LIMIT[dtype]:
        found.append(f"top-1 agreement is {merged.top1:.2%}, the limit for {dtype} is {TOP1_LIMIT[dtype]:.0%}")
    if abs(merged.loss - live.loss) > LOSS_LIMIT[dtype]:
        found.append(f"the loss is {merged.loss:.4f}, the trained model's {live.loss:.4f}")
    if not base.kl > BASE_FACTOR * merged.kl:
        found.append(
            f"the export is no nearer to the trained model (KL {merged.kl:.2e}) than the untrained base is ({base.kl:.2e}): "
            f"what was trained is lost in {dtype}"
        )
    return found
