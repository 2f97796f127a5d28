"""The loss of classes, by its formula; a batch in halves is the batch."""

import types

import pytest
import torch

from qlora.data import Labelled, Pad
from qlora.training.objectives.classification import Classification
from tests.classifiers import make_tokenizer

EXAMPLES = [Labelled([2, *[7 + n] * (1 + n % 3), 3], [0] * (3 + n % 3), n % 3) for n in range(5)]
MATRIX = torch.linspace(-1, 1, 400 * 3).view(400, 3)


def model(input_ids, attention_mask):
    """Return logits that depend on all tokens but the padding."""
    summed = (MATRIX[input_ids] * attention_mask[..., None]).sum(1)
    return types.SimpleNamespace(logits=summed.bfloat16())


@pytest.mark.parametrize("weights", [None, (1.0, 5.0, 0.5)])
def test_the_loss_is_the_weighted_mean_and_halves_add_up_to_it(weights):
    objective = Classification(Pad(make_tokenizer(), takes_types=False), weights)
    batch = objective.collate(list(enumerate(EXAMPLES)))
    assert batch.pop("rows") == [0, 1, 2, 3, 4]
    assert objective.lengths(batch) == [len(example.input_ids) for example in EXAMPLES]
    assert int(objective.num_tokens(batch)) == sum(objective.lengths(batch))
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.float().log_softmax(-1)
    each = torch.tensor([1.0 if weights is None else weights[example.label] for example in EXAMPLES])
    picked = -logits[torch.arange(5), batch["labels"]]
    expected = (each * picked).sum() / each.sum()
    items = objective.num_items(batch)
    assert items == pytest.approx(each.sum().item())
    torch.testing.assert_close(objective.loss(model, batch, None), expected)
    halves = objective.halves(batch)
    assert [len(half["labels"]) for half in halves] == [2, 3]
    torch.testing.assert_close(sum(objective.loss(model, half, items) for half in halves), expected)
    assert objective.halves(halves[0] | {name: value[:1] for name, value in halves[0].items()}) == ()
