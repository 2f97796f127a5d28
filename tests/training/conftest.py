"""Real trainings of tiny models, without a recipe or a run folder of a verb."""

import json

import pytest
import torch

from qlora import base_model, kernels, methods, training
from qlora.recipe import Lora, Quantization, Training
from qlora.runs.folder import RunDir
from qlora.training import Rows, Settings
from tests.conftest import CONVERSATIONS, encode, messages

# rows of very different lengths, so that a mean over rows or over micro-batches is another number than one over tokens
UNEVEN = [
    [("user", "Count."), ("assistant", "1 " * n + "ab cd ef gh" * (n < 5))]
    for n in (1, 30, 2, 25, 3, 20, 40, 4, 1, 33, 9, 5, 17, 2, 28, 6)
]


RANK_4 = Lora(r=4)


@pytest.fixture
def fit(load_model, tokenizer, tmp_path):
    """Return fit(turns, family="llama", **training) -> (PeftModel, Result, RunDir) after real training."""
    runs = iter(range(100))

    def fit(
        turns=CONVERSATIONS,
        family="llama",
        checkpointed_layers=0,
        offload=False,
        rehearse=True,
        lora=RANK_4,
        held_out=(),
        float32=False,
        batches=None,
        token_ids=(),
        quantization=Quantization(),  # noqa: B008 (frozen)
        kernels_setting="off",
        tokens=None,
        limit_bytes=None,
        predicted_bytes=None,
        **settings,
    ):
        run = RunDir(tmp_path / f"run{next(runs)}")
        run.path.mkdir()
        model = load_model(family, quantization)
        torch.manual_seed(0)
        if float32:
            base_model.to_float32(model)
        model = methods.attach(model, lora, token_ids=token_ids)
        defaults = {"max_steps": 1, "learning_rate": 1e-2, "warmup_ratio": 0.0, "gradient_accumulation_steps": 1,
                    "lr_scheduler_type": "constant"}  # fmt: skip
        examples, eval_examples = ([encode(tokenizer, messages(t)) for t in rows] for rows in (turns, held_out))
        with kernels.installed(model, kernels_setting) as installed:
            chosen = Settings(
                Training(**{**defaults, **settings}),
                checkpointed_layers,
                offload,
                limit_bytes=limit_bytes,
                predicted_bytes=predicted_bytes,
                tokens_per_micro_batch=tokens,
                rehearse=rehearse,
                installed=installed,
            )
            result = training.train(model, tokenizer, Rows(batches or examples, eval_examples), chosen, run)
        return model, result, run

    return fit


def trained(model):
    return {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}


def losses(run):
    """Return everything in metrics.jsonl that says what was computed."""
    measured = ("time", "tokens_per_second", "memory_bytes")
    return [{key: value for key, value in record.items() if key not in measured} for record in records(run)]


def records(run):
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
