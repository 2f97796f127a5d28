"""Rows of like length share a batch."""

from qlora.training.objectives import supervised
from tests.conftest import encode, messages
from tests.training.conftest import UNEVEN


def test_rows_of_like_length_share_a_batch_where_the_recipe_says_so(fit, monkeypatch, tokenizer):
    tokens = 4 * sum(len(encode(tokenizer, messages(turns)).input_ids) for turns in UNEVEN)
    widths = {}
    loss = supervised.loss_of_trained_positions

    def noted(model, inputs, count, lean):
        widths.setdefault(grouped, []).append(inputs["input_ids"].shape)
        return loss(model, inputs, count, lean)

    monkeypatch.setattr(supervised, "loss_of_trained_positions", noted)
    for grouped in (False, True):
        fit(UNEVEN * 4, max_steps=8, per_device_train_batch_size=8, group_by_length=grouped, rehearse=False)
    assert len(widths[True]) == len(widths[False])
    padded = {grouped: sum(rows * width for rows, width in shapes) for grouped, shapes in widths.items()}
    assert padded[True] - tokens < 0.5 * (padded[False] - tokens)
