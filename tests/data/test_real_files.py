"""Public data sets as they are published, where a copy lies beside the checkout."""

import collections
import json
from pathlib import Path

import pytest

from qlora import base_model, data
from qlora.errors import InputError
from qlora.recipe import Data, Model
from tests.test_smollm2 import FOLDER, needs_model

FILES = Path(__file__).parents[3] / "shared" / "data"

COLUMNS = {
    "gsm8k_train_2k.jsonl": {"prompt": "question", "completion": "answer"},
    "e2e_cleaned.csv": {"prompt": "mr", "completion": "ref"},
    "sst2_dev.csv": {"prompt": "sentence", "completion": "label"},
}

pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason=f"no copies of public data sets in {FILES}")


@needs_model
@pytest.mark.parametrize(
    ("name", "rows", "shape"),
    [
        ("alpaca_en_6k.json", 6000, "alpaca"),
        ("alpaca_zh_1k.json", 1000, "alpaca"),
        ("oasst1_messages.jsonl", 723, "messages"),
        ("snips_json_dev.jsonl", 700, "messages"),
        ("oasst_zh_history.json", 519, "alpaca"),
        ("gsm8k_train_2k.jsonl", 2000, "completion"),
        ("e2e_cleaned.csv", 4299, "completion"),
        ("sst2_dev.csv", 872, "completion"),
    ],
)
def test_every_row_is_read_and_every_answer_is_trained_to_its_end(name, rows, shape):
    path = str(FILES / name)
    tokenizer = base_model.load_tokenizer(FOLDER, Model(name_or_path=str(FOLDER)))
    sources = data.read([path], COLUMNS.get(name))
    assert (sources[0].num_read, sources[0].format) == (rows, shape)
    dropped = collections.defaultdict(collections.Counter)
    conversations = sources[0].conversations[:200]
    section = Data(train=[path], max_length=100_000)
    for conversation, example in zip(
        conversations, data.encode(conversations, tokenizer, section, dropped)[1], strict=True
    ):
        answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
        trained = tokenizer.decode([label for label in example.labels if label != data.IGNORE_INDEX])
        assert trained == "".join(f"{answer}<|im_end|>" for answer in answers)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8k_train_2k.jsonl", "keys question, answer fit no known shape"),
        ("glaive_toolcall_en_sharegpt.json", "tools: not supported yet"),
        ("c4_raw.jsonl", "keys text fit no known shape"),
        ("e2e_cleaned.csv", "line 2  keys mr, ref fit no known shape"),
    ],
)
def test_a_shape_that_is_not_known_yet_is_refused_row_by_row(name, expected):
    with pytest.raises(InputError) as caught:
        data.read([str(FILES / name)])
    assert expected in str(caught.value)
    assert "problems" in str(caught.value)


def test_history_of_a_published_file_reaches_the_conversation():
    rows = json.loads((FILES / "oasst_zh_history.json").read_text(encoding="utf-8"))
    (source,) = data.read([str(FILES / "oasst_zh_history.json")])
    for row, conversation in zip(rows, source.conversations, strict=True):
        assert len(conversation.messages) == 2 * len(row["history"]) + 2 + bool(row.get("system"))
