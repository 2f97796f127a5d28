"""NEFTune: the noise has the size that the paper gives it, document by document, and is there in training only."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from qlora import training
from qlora.commands.train import train
from qlora.training.neftune import noisy_embeddings
from tests.conftest import some_slow

ALPHA, WIDTH = 5.0, 256


class Embedder(torch.nn.Module):
    """A model that returns its embeddings."""

    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(10, WIDTH)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask=None, segments=None):
        return self.embeddings(input_ids)


@pytest.fixture
def model():
    model = Embedder()
    torch.manual_seed(0)
    torch.nn.init.zeros_(model.embeddings.weight)  # what comes out is the noise
    return model.train()


def noise_in(model, input_ids, **batch):
    """Return the noise (B, T, D) that a batch gets, all embeddings being 0."""
    with noisy_embeddings(model, ALPHA):
        return model(input_ids, **batch).detach().float()


def assert_uniform(noise, length):
    """By the closed form: within +-bound, and with the moments of a uniform distribution, at 5 standard errors."""
    bound, count = ALPHA / math.sqrt(length * WIDTH), noise.numel()
    assert noise.abs().max() <= bound * (1 + 1e-6)
    assert noise.abs().max() > bound * (1 - 10 / count)  # the chance that all are smaller is e**-10
    assert abs(noise.mean()) < 5 * bound / math.sqrt(3 * count)
    # the variance of u**2 is 4/45 where u is uniform(-1, 1)
    assert abs((noise / bound).square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / count)


def test_a_packed_document_gets_the_noise_of_its_own_length(model):
    segments = [3, 50, 1, 10]
    noise = noise_in(model, torch.zeros(1, sum(segments), dtype=torch.long), segments=segments)
    for part in noise[0].split(segments):
        assert_uniform(part, len(part))


def test_a_padded_row_gets_the_noise_of_its_tokens_and_padding_none(model):
    mask = torch.tensor([[1] * 20, [1] * 4 + [0] * 16, [0] * 13 + [1] * 7])
    noise = noise_in(model, torch.zeros_like(mask), attention_mask=mask)
    for row, kept in zip(noise, mask.bool(), strict=True):
        assert_uniform(row[kept], int(kept.sum()))
        assert not row[~kept].any()


def test_a_batch_without_a_mask_has_no_padding(model):
    noise = noise_in(model, torch.zeros(2, 30, dtype=torch.long))
    assert_uniform(noise, 30)


def test_the_noise_of_a_document_does_not_depend_on_its_company(model):
    ids = torch.zeros(1, 8, dtype=torch.long)
    found = []
    for batch in ({"segments": [8]}, {"segments": [8, 90]}, {"attention_mask": torch.tensor([[1] * 8 + [0] * 90])}):
        torch.manual_seed(3)
        length = sum(batch.get("segments", [98]))
        found.append(noise_in(model, ids.new_zeros(1, length), **batch)[:, :8])
    assert all(torch.equal(noise, found[0]) for noise in found)


def test_noise_follows_the_seed_and_is_rounded_to_the_model(model):
    ids = torch.zeros(1, 8, dtype=torch.long)
    noises = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        noises.append(noise_in(model, ids))
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])
    torch.manual_seed(1)
    assert torch.equal(noise_in(model.bfloat16(), ids), noises[0].bfloat16().float())


def test_there_is_no_noise_in_evaluation_nor_after_the_block(model):
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert not noise_in(model.eval(), ids).any()
    assert noise_in(model.train(), ids).any()
    assert not model(ids).any()
    with pytest.raises(KeyError), noisy_embeddings(model, ALPHA):
        raise KeyError
    assert not model(ids).any()
    assert not model._forward_pre_hooks
    assert not model.embeddings._forward_hooks


@pytest.mark.parametrize("packing", some_slow([True, False], [True]))
@pytest.mark.usefixtures("unplanned")
def test_training_with_noise_is_another_training_with_the_same_evaluation(make_recipe, tmp_path, monkeypatch, packing):
    models, original = [], training.train
    monkeypatch.setattr(training, "train", lambda model, *a, **kw: models.append(model) or original(model, *a, **kw))
    runs = {}
    for name, alpha, learning_rate in [("none", None, 1e-2), ("five", 5.0, 1e-2), ("again", 5.0, 1e-2),
                                       ("still", None, 1e-9), ("still-five", 5.0, 1e-9)]:  # fmt: skip
        settings = {"neftune_noise_alpha": alpha, "learning_rate": learning_rate}
        recipe = make_recipe(data={"packing": packing}, training=settings, output_dir=str(tmp_path / name))
        run = train(recipe)
        records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
        assert len(records) == 3
        runs[name] = load_file(run.adapter / "adapter_model.safetensors"), records[0]["loss"], records[-1]["eval_loss"]
        assert not models[-1]._forward_pre_hooks
        assert not models[-1].get_input_embeddings()._forward_hooks
    for name, tensor in runs["none"][0].items():
        assert not torch.equal(tensor, runs["five"][0][name]), name
        assert torch.equal(runs["five"][0][name], runs["again"][0][name]), name
    # weights that stand still: another loss in training, the same in evaluation
    assert runs["still"][1] != runs["still-five"][1]
    assert runs["still"][2] == pytest.approx(runs["still-five"][2], rel=1e-6)


@pytest.mark.usefixtures("unplanned")
def test_checkpointing_does_not_draw_the_noise_again(make_recipe, tmp_path):
    found = []
    for checkpointing in (False, True):
        run = train(
            make_recipe(
                memory={"gradient_checkpointing": checkpointing},
                training={"neftune_noise_alpha": 5.0},
                output_dir=str(tmp_path / str(checkpointing)),
            )
        )
        found.append(load_file(run.adapter / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
