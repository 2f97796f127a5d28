"""How often a training step waits for the GPU, counted on a pretended one: once. tests/test_pretended.py runs it."""

import collections
import itertools
import sys

import pytest
import safetensors

from qlora.commands.train import train
from qlora.training.objectives.supervised import Trainer

pretended = sys.modules.get("pretended_cuda")  # the plugin tests.pretended has imported it
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(pretended is None, reason="counts on a pretended device alone")]

# each is one read of the device; what is not here must not come
OF_A_STEP = {"tolist() at training/reliable_trainer.py": 1}  # losses and norm together: is the step to be skipped?
OF_A_LOG = {
    "item() at transformers/trainer.py": 1
}  # the mean loss since the last log, which transformers sums on the device
# and of two micro-batches: warn_if_padding_and_no_attention_mask, which GPT-2 and a few older families call
OF_GPT2 = {"item() at transformers/modeling_utils.py": 2}


@pytest.fixture
def steps(make_recipe, monkeypatch):
    """Return steps(family, **sections) -> (run, [(waits {what and where: how often}, copies)] of each step but the first)."""

    def trained(family="llama", **sections):
        seen, original = [], Trainer.end_step

        def end_step(self, control):
            original(self, control)
            seen.append((collections.Counter(pretended.COUNTS.waits), pretended.COUNTS.copies))

        monkeypatch.setattr(Trainer, "end_step", end_step)
        sections["training"] = {"max_steps": 3, "logging_steps": 100} | sections.get("training", {})
        sections["data"] = {"eval_fraction": 0.0} | sections.get("data", {})
        run = train(make_recipe(family, **sections))
        found = []
        for (before, _), (after, _) in itertools.pairwise(seen):
            waits = collections.Counter()
            for where, count in (after - before).items():
                waits[where.rsplit(":", 1)[0]] += count  # without the line
            found.append(dict(waits))
        return run, found

    return trained


def rows_of(size, micro_batches, **more):
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches} | more


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("llama", {"training": rows_of(1, 4, tokens_per_micro_batch=None)}),
        ("llama", {"training": rows_of(2, 3)}),  # the rows of a step joined
        ("llama", {"training": rows_of(1, 2, tokens_per_micro_batch=None), "data": {"packing": True}}),
        ("llama", {"training": rows_of(1, 3, tokens_per_micro_batch=None), "memory": {"gradient_checkpointing": True}}),
    ],
    ids=["rows", "joined", "packed", "checkpointed"],
)
def test_a_step_waits_for_the_gpu_once_however_many_micro_batches(steps, family, sections):
    _, found = steps(family, **sections)
    assert found == [OF_A_STEP] * 2


def test_a_logged_step_waits_once_more(steps):
    _, found = steps(training=rows_of(1, 2, tokens_per_micro_batch=None, logging_steps=1))
    assert found == [OF_A_STEP | OF_A_LOG] * 2


def test_gpt2_asks_in_each_micro_batch_whether_there_is_padding(steps):
    _, found = steps("gpt2", training=rows_of(2, 2, tokens_per_micro_batch=None))
    assert found == [OF_A_STEP | OF_GPT2] * 2


def test_new_tokens_are_trained_on_a_gpu(steps):
    run, found = steps(model={"new_tokens": ["<one>", "<two>"]})
    assert found == [OF_A_STEP] * 2
    with safetensors.safe_open(run.adapter / "adapter_model.safetensors", "pt") as adapter:
        assert [name for name in adapter.keys() if "lm_head" in name]  # noqa: SIM118
