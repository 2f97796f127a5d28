"""Scores of classes against closed forms and numbers that were counted by hand."""

import pytest
import torch
from torch.nn import functional as F

from qlora.evaluation import classes
from qlora.system.events import heard_by
from qlora.terminal.classes import show_classes

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
RIGHT = [0, 1, 2, 2]


def test_accuracy_f1_and_confusion_are_what_one_counts():
    names = ["a", "b", "c"]
    score = classes.score(LOGITS, RIGHT, names)
    found = score.to_json() | classes.details(score, names)
    assert found["confusion"] == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert found["metrics"]["accuracy"]["value"] == 0.75
    # F1 of a: 2/3, b: 1, c: 2/3
    assert found["metrics"]["macro_f1"]["value"] == pytest.approx(7 / 9)
    assert found["per_class"][2] == {
        "label": "c",
        "rows": 2,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
    }
    assert found["loss"] == pytest.approx(F.cross_entropy(LOGITS, torch.tensor(RIGHT)).item())
    twice = classes.score(LOGITS.repeat(2, 1), RIGHT * 2, names).to_json()["metrics"]["macro_f1"]
    assert twice["value"] == pytest.approx(7 / 9)
    assert twice["low"] <= twice["value"] <= twice["high"] <= 1


def test_classes_without_rows_and_answers_are_no_part_of_macro_f1():
    score = classes.score(LOGITS[:2], [0, 1], names := ["a", "b", "never"])
    found = score.to_json() | classes.details(score, names)
    assert found["metrics"]["macro_f1"]["value"] == 1.0
    assert found["per_class"][2] == {"label": "never", "rows": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_rows_come_back_in_their_order_whatever_shares_a_batch():
    class Row:
        def __init__(self, length):
            self.input_ids = [1] * int(length)

    def model(lengths):
        return type("Output", (), {"logits": torch.stack([lengths, -lengths], 1)})

    model.device = torch.device("cpu")
    lengths = [float(37 * n % 101) for n in range(100)]  # several batches
    found = classes.logits_of(model, lambda rows: {"lengths": torch.tensor([float(len(r.input_ids)) for r in rows])},
                              [Row(n) for n in lengths])  # fmt: skip
    assert found[:, 0].tolist() == lengths


def test_of_many_classes_the_most_frequent_mistakes_are_listed():
    names, right = [f"c{n}" for n in range(20)], list(range(20))
    logits = torch.eye(20)
    logits[7] = logits[3]
    score = classes.score(logits, right, names)
    result = {"rows": 20, "labels": names, **score.to_json(), **classes.details(score, names)}
    said = []
    with heard_by(said.append):
        show_classes(result)
    assert said[-1].rows == [["c7, c3", "1"]]
