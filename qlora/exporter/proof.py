"""The proof: the written folder, reloaded by plain transformers, against the live NF4 + adapter model.

Two-sided. The folder must be the model that was trained, and it must not be the base. Both models compute in float32,
with the exact NF4 values, so that what is compared is the weights and not the rounding of two bfloat16 computations.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch

from .. import base_model
from ..data import IGNORE_INDEX, Example
from ..evaluation import metrics
from ..system.errors import InputError, ProofFailed

# KL(live || merged) in nats a position. Measured on SmolLM2-135M: float16 1e-6 (10 to 40 steps), bfloat16 2.5e-4 to 1e-3;
# any wrong merge (other base, adapter lost, embedding rounded) 0.06 to 0.23. The limits stand a decade above the right
# ones and far below the wrong ones.
KL_LIMIT = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-2}
TOP1_LIMIT = {"float32": 0.99, "float16": 0.97, "bfloat16": 0.90}  # wrong merges: 0.79 to 0.89; near-ties flip
_LOSS_LIMIT = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-2}  # nats a trained token, of many
# The merged model must be this many times nearer to the live one than the base is.
BASE_FACTOR = 4

# B rows of a batch, T positions of a row, V vocab, L the embedding and the decoder layers, H hidden

MOST_ROWS = 64
_STORED_BYTES = 256 * 2**20  # of the live model's log probabilities, kept while the merged model loads


def loss_limit(dtype, num_trained):
    """Return how far the losses may be apart, means over so many trained tokens.

    Where rounding moves log probabilities by a KL of k, it moves that of a token by about sqrt(2 k) either way (KL is half their
    variance), and the mean of n by sqrt(2 k / n). Four times that, at the limit of the KL, is more than the limit for many tokens
    where there are less than 128 (float32: 320): with 14 an export of SmolLM2-135M in float16
    missed this limit alone, at 6.3e-3.
    """
    return max(_LOSS_LIMIT[dtype], 4 * math.sqrt(2 * KL_LIMIT[dtype] / max(1, num_trained)))


@dataclass(frozen=True)
class Scores:
    """Of one model on the proof rows. The others are against the live model, and None for the live model itself.

    hidden: how far, relatively, the hidden states are from the live model's after the embedding and after each decoder
    layer, at the last compared position of every row.
    """

    loss: float
    kl: float | None = None
    top1: float | None = None
    hidden: tuple | None = None


def proof_rows(examples, vocab_size):
    """Return those of the first MOST_ROWS rows whose positions fit the memory set aside, or the shortest if none does."""
    budget, rows = _STORED_BYTES // (4 * vocab_size), []
    for example in examples[:MOST_ROWS]:
        if len(example.input_ids) - 1 <= budget:
            budget -= len(example.input_ids) - 1
            rows.append(example)
    return rows or [min(examples[:MOST_ROWS], key=lambda example: len(example.input_ids))]


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
    """The trained model's answers on `rows`: log probabilities after every position that `columns` keeps.

    tokens_at_once: rows go through the model together up to that many tokens, padding counted; always one. A model that
    reads its weights from disk at each pass (streamed.py) needs few passes, another may as well take row by row.
    """

    def __init__(self, peft_model, rows, tokens_at_once=0):
        base_model.to_float32(peft_model)
        self.rows = rows
        self.columns = columns(rows, peft_model.config.get_text_config().vocab_size)
        self.batches = batches(rows, tokens_at_once)
        self.hidden, found = [], {}
        for batch in self.batches:
            answers, hidden_LBH = self._answers(peft_model, batch)
            found |= dict(zip(batch, answers, strict=True))
            self.hidden.append(hidden_LBH)
        self.log_probabilities = [found[number] for number in range(len(rows))]
        losses = [self._picked(number, log_p) for number, log_p in enumerate(self.log_probabilities)]
        self.scores = Scores(torch.cat(losses).mean().item())
        with peft_model.disable_adapter():
            self.base_scores = self.compare(peft_model)

    @property
    def num_positions(self):
        return sum(map(len, self.columns))

    @property
    def num_trained(self):
        """How many tokens the losses are means over."""
        labels = [row.labels[kept.start + 1 : kept.stop + 1] for row, kept in zip(self.rows, self.columns, strict=True)]
        return sum(label != IGNORE_INDEX for row in labels for label in row)

    def compare(self, model):
        """Return the Scores of `model` against the live one."""
        losses, kl, same = [], 0.0, 0
        apart_L = size_L = torch.zeros(())
        for batch, live_LBH in zip(self.batches, self.hidden, strict=True):
            answers, hidden_LBH = self._answers(model, batch)
            for number, other_TV in zip(batch, answers, strict=True):
                live_TV = self.log_probabilities[number]
                kl += metrics.kl_divergence(live_TV, other_TV)
                same += (live_TV.argmax(-1) == other_TV.argmax(-1)).sum().item()
                losses.append(self._picked(number, other_TV))
            del answers, other_TV  # or they stay in memory while the next rows are computed
            apart_L = apart_L + (hidden_LBH - live_LBH).square().sum((1, 2))
            size_L = size_L + live_LBH.square().sum((1, 2))
        hidden = tuple((apart_L / size_L).sqrt().tolist())
        return Scores(torch.cat(losses).mean().item(), kl / self.num_positions, same / self.num_positions, hidden)

    def _answers(self, model, batch):
        """Return (log probabilities (T, V) of each row in `batch`, their hidden states (L, B, H)), in one pass."""
        columns = [self.columns[number] for number in batch]
        with _hidden_states(model, [positions.stop - 1 for positions in columns]) as hidden:
            answers = metrics.log_probabilities(model, [self.rows[number] for number in batch], columns)
        return answers, torch.stack(hidden)

    def _picked(self, number, log_probabilities_TV):
        """Return -log p of the trained tokens of a row."""
        kept = self.columns[number]
        labels = torch.tensor(self.rows[number].labels[kept.start + 1 : kept.stop + 1])
        trained = labels != IGNORE_INDEX
        return -log_probabilities_TV[trained].gather(-1, labels[trained, None])[:, 0]


@contextlib.contextmanager
def _hidden_states(model, positions):
    """Yield a list that gets (B, H) from the embedding and each decoder layer called: at one of `positions` in each row."""
    found = []

    def keep(module, args, output):
        hidden_BTH = output[0] if isinstance(output, tuple) else output
        found.append(hidden_BTH[torch.arange(len(positions)), positions].float().cpu())

    watched = [model.get_input_embeddings(), *base_model.decoder_layers(model)]
    hooks = [module.register_forward_hook(keep) for module in watched]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def columns(rows, vocab_size):
    """Return the range of positions of each row that are compared: all, but of a row that alone does not fit the memory
    set aside as many as do, up to its last trained token."""
    most, result = max(1, _STORED_BYTES // (4 * vocab_size)), []
    for row in rows:
        stop = len(row.input_ids) - 1
        if stop > most:
            stop = max(number for number, label in enumerate(row.labels) if label != IGNORE_INDEX)
        result.append(range(max(0, stop - most), stop))
    return result


def batches(rows, tokens_at_once):
    """Return the numbers of `rows` in lists that go through a model together, longest rows first (see Live)."""
    result, width = [], 0
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number].input_ids)):
        if not result or (len(result[-1]) + 1) * width > tokens_at_once:
            result.append([])
            width = len(rows[number].input_ids)
        result[-1].append(number)
    return result


def device_for(num_bytes, device):
    """Return `device`, or the CPU if that many bytes and a tenth more are not free on it."""
    if device.type == "cuda" and 1.1 * num_bytes > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def reload(folder, device, trust_remote_code=False):
    """Return the model in `folder` as any user would load it.

    In float32 on `device` where that fits, else as stored on `device`, else in float32 on the CPU.
    """
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    in_float32 = device_for(2 * num_bytes, device) == device
    device = device_for(num_bytes, device)
    return open_folder(folder, device, "float32" if in_float32 or device.type == "cpu" else "auto", trust_remote_code)


def open_folder(folder, device, dtype="float32", trust_remote_code=False):
    """Return the model that plain transformers makes of `folder`, of a multimodal checkpoint the whole one.

    Raises:
        ProofFailed: it does not take every tensor.
    """
    task = base_model.task_of_folder(folder)
    auto = task.auto_class(multimodal=base_model.whole_config(folder) is not None)
    model, info = auto.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # reported like the rest
        output_loading_info=True,
    )
    lost = [*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        raise ProofFailed(
            f"tensors of the exported folder are missing, unused or of another shape: {', '.join(sorted(lost)[:5])}"
        )
    return task.accept_arguments(model).eval()


def failures(live, merged, base, dtype, num_trained):
    """Return what is wrong, as sentences; none means proven. num_trained: tokens that the losses are means over."""
    found = []
    if not (math.isfinite(merged.loss) and math.isfinite(merged.kl)):
        return [f"its logits are not finite in {dtype}; export with --dtype bfloat16 or float32"]
    if merged.kl > KL_LIMIT[dtype]:
        found.append(
            f"KL(trained, exported) is {merged.kl:.2e} nats a token, the limit for {dtype} is {KL_LIMIT[dtype]:.0e}"
        )
    if merged.top1 < TOP1_LIMIT[dtype]:
        found.append(f"top-1 agreement is {merged.top1:.2%}, the limit for {dtype} is {TOP1_LIMIT[dtype]:.0%}")
    limit = loss_limit(dtype, num_trained)
    if abs(merged.loss - live.loss) > limit:
        found.append(
            f"the loss is {merged.loss:.4f}, the trained model's {live.loss:.4f}, of {num_trained:,} tokens: at most "
            f"{limit:.1e} apart in {dtype}"
        )
    if not base.kl > BASE_FACTOR * merged.kl:
        found.append(
            f"the export is no closer to the trained model (KL {merged.kl:.2e}) than the untrained base is ({base.kl:.2e}): "
            f"the training is lost in {dtype}"
        )
    if found:
        steps = [after - before for before, after in zip((0.0, *merged.hidden), merged.hidden, strict=False)]
        worst = max(range(len(steps)), key=steps.__getitem__)
        found.append(
            f"the hidden states differ most in {f'decoder layer {worst - 1}' if worst else 'the embedding'}: "
            f"by {merged.hidden[worst]:.1e} after it, {merged.hidden[-1]:.1e} after the last layer"
        )
    return found


def refuse_unproven(report, out):
    """Raise ProofFailed, with all that was found, unless the export to `out` that `report` is of was verified."""
    if not report["verified"]:
        what = "the adapter on the original base" if report["base"] == "original" else "the trained model"
        raise ProofFailed(
            "\n  ".join([f"the export differs from {what}; nothing was left at {out}:", *report["failures"]])
        )
