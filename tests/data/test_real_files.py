"""Public data sets as they are published, where a copy lies beside the checkout."""

import itertools
import json
from pathlib import Path

import pytest

from qlora import base_model, data
from qlora.data import chat, formats, sources
from qlora.recipe import Data, Model, Source
from qlora.system.errors import InputError
from tests.classifiers import make_tokenizer
from tests.test_smollm2 import FOLDER, needs_model

FILES = Path(__file__).parents[3] / "shared" / "data"

TOOLS = {"chat_template": "chatml"}
MMLU = {
    "prompt": "{{ question }}\n{% for choice in choices %}{{ 'ABCD'[loop.index0] }}. {{ choice }}\n{% endfor %}Answer:",
    "completion": "{{ 'ABCD'[answer] }}",
}
SST2 = {"columns": {"prompt": "sentence", "completion": "label"}}

pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason=f"no copies of public data sets in {FILES}")


@needs_model
@pytest.mark.parametrize(
    ("name", "rows", "shape", "settings"),
    [
        pytest.param("alpaca_en_6k.json", 6000, "alpaca", {}, marks=pytest.mark.slow),
        pytest.param("alpaca_zh_1k.json", 1000, "alpaca", {}, marks=pytest.mark.slow),
        pytest.param("c4_raw.jsonl", 200, "text", {}, marks=pytest.mark.slow),
        pytest.param(
            "e2e_cleaned.csv",
            4299,
            "completion",
            {"columns": {"prompt": "mr", "completion": "ref"}},
            marks=pytest.mark.slow,
        ),
        ("glaive_toolcall_en_sharegpt.json", 200, "sharegpt", TOOLS),
        pytest.param(
            "gsm8k_train_2k.jsonl",
            2000,
            "completion",
            {"columns": {"prompt": "question", "completion": "answer"}},
            marks=pytest.mark.slow,
        ),
        pytest.param("mmlu_dev_fewshot.jsonl", 285, "completion", {"columns": MMLU}, marks=pytest.mark.slow),
        pytest.param(
            "mmlu_val.jsonl",
            1531,
            "completion",
            {"columns": {"prompt": "input", "completion": "output"}},
            marks=pytest.mark.slow,
        ),
        pytest.param("oasst1_messages.jsonl", 723, "messages", {}, marks=pytest.mark.slow),
        pytest.param("oasst_zh_history.json", 519, "alpaca", {}, marks=pytest.mark.slow),
        pytest.param("sgd_tool_dialogues.jsonl", 300, "messages", TOOLS, marks=pytest.mark.slow),
        pytest.param("snips_json_dev.jsonl", 700, "messages", {}, marks=pytest.mark.slow),
        pytest.param("snips_json_train.jsonl", 12806, "messages", {}, marks=pytest.mark.slow),  # as the rows of dev
        ("sst2_dev.csv", 872, "completion", SST2),
        pytest.param("sst2_train.csv", 6917, "completion", SST2, marks=pytest.mark.slow),  # likewise
        pytest.param("tiny_shakespeare.txt", 1, "text", {}, marks=pytest.mark.slow),
    ],
)
def test_every_row_is_read_and_every_answer_is_trained_to_its_end(name, rows, shape, settings):
    path, settings = str(FILES / name), dict(settings)
    tokenizer = base_model.load_tokenizer(FOLDER, Model(name_or_path=str(FOLDER)))
    chat.set_template(tokenizer, settings.pop("chat_template", None))
    section = Data(train=path, max_length=2**30, **settings)
    loaded = data.Rows(data.load(section.train, tokenizer, section, seed=0))
    summary = loaded.parts[0].summary
    assert (summary["rows_read"], summary["rows_kept"], summary["format"]) == (rows, rows, shape)
    assert len(loaded) == rows
    sample = loaded[:100]
    for conversation, example in zip(data.conversations(sample), sample, strict=True):
        trained = tokenizer.decode([label for label in example.labels if label != data.IGNORE_INDEX])
        if conversation.text is not None:
            assert trained == tokenizer.decode(tokenizer(conversation.text + "<|im_end|>").input_ids[1:])
            continue
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        pieces = trained.split("<|im_end|>")
        assert len(pieces) == len(answers) + 1
        for answer, piece in zip(answers, pieces, strict=False):
            assert piece.startswith(answer["content"])
            calls = [json.loads(text.partition("</tool_call>")[0]) for text in piece.split("<tool_call>")[1:]]
            assert calls == [call["function"] for call in answer.get("tool_calls", [])]


@needs_model
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8k_train_2k.jsonl", "keys question, answer match no known format"),
        ("glaive_toolcall_en_sharegpt.json", "the chat template leaves the row's tools out ('search_recipes')"),
        ("e2e_cleaned.csv", "e2e_cleaned.csv: columns mr, ref match no known format"),
    ],
)
def test_what_the_model_would_not_see_is_refused_row_by_row(name, expected):
    tokenizer = base_model.load_tokenizer(FOLDER, Model(name_or_path=str(FOLDER)))
    section = Data(train=str(FILES / name), max_length=2**30)
    with pytest.raises(InputError) as caught:
        data.load(section.train, tokenizer, section, seed=0)
    assert expected in str(caught.value)
    assert ("problems" in str(caught.value)) == (not name.endswith(".csv"))


def test_history_of_a_published_file_reaches_the_conversation():
    rows = json.loads((FILES / "oasst_zh_history.json").read_text(encoding="utf-8"))
    for row in rows:
        _, conversation = formats.read(row)
        assert len(conversation.messages) == 2 * len(row["history"]) + 2 + bool(row.get("system"))


def rows_of(name):
    path = str(FILES / name)
    return [row.value for row in sources.File(path, Source(path=path)).rows()]


@pytest.mark.parametrize(("name", "objective"), [("lf_kto_en_demo.json", "KTO"), ("lf_dpo_en_demo.json", "DPO")])
def test_each_row_of_a_file_for_another_objective_is_refused_by_its_name(name, objective):
    for row in rows_of(name):
        with pytest.raises(ValueError, match=f"for {objective}; supervised training does not take it"):
            formats.read(row)


def test_words_and_calls_in_two_messages_of_published_files_are_one_turn():
    said = [formats.read(row)[1] for row in rows_of("ms_tooluse_valid.jsonl")]
    assert sum(one.merged for one in said) == 20
    for one in [*said, *(formats.read(row)[1] for row in rows_of("glaive_toolcall_en_sharegpt.json"))]:
        roles = [message["role"] for message in one.messages]
        assert ("assistant", "assistant") not in set(itertools.pairwise(roles))


def test_parts_with_values_and_loss_weights_of_published_files_are_read():
    for row in rows_of("lf_v1_sft_demo.jsonl"):
        _, conversation = formats.read(row)
        assert conversation.flags == ((1, True),)
        assert [message["content"] for message in conversation.messages] == [
            message["content"][0]["value"] for message in row["messages"]
        ]
    for row in rows_of("lf_reason_tool_use_demo_50.jsonl"):
        _, conversation = formats.read(row)
        said = json.dumps(conversation.messages)
        for part in (part for message in row["messages"] for part in message["content"]):
            assert part["type"] == "tool_call" or json.dumps(part["value"])[1:-1] in said


def test_sst2_has_two_classes_whatever_they_are_called():
    columns = {"text": "sentence"}
    for labels, expected in ((None, ["0", "1"]), (["negative", "positive"], ["negative", "positive"])):
        section = Data(train=str(FILES / "sst2_dev.csv"), columns=columns, labels=labels, overlong="truncate")
        names = labels or data.labels.found(section.train, section)
        section = section.model_copy(update={"labels": names})
        rows = data.Rows(data.load(section.train, make_tokenizer(), section, seed=0, encoder=data.LabelledText))
        balance = data.labels.balance(rows, rows[:0], names)
        assert [one["label"] for one in balance["classes"]] == expected
        assert [one["rows"] for one in balance["classes"]] == [428, 444]  # as the GLUE benchmark has them
        assert balance["contradictory"] == 0
