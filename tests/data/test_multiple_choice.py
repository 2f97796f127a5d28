"""Questions with choices, in the files that people have them in."""

import dataclasses
import json

import pytest

from qlora.data import multiple_choice
from qlora.data.multiple_choice import Question
from qlora.system.errors import InputError
from tests.conftest import write_jsonl

ROW = {"question": "Two?", "choices": ["1", "2", "3"], "answer": 1}


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return multiple_choice.read(tmp_path / name)


def test_the_same_question_is_read_from_every_kind_of_file(tmp_path):
    expected = Question(1, "Two?", ("1", "2", "3"), 1)
    assert multiple_choice.read(write_jsonl(tmp_path / "a.jsonl", [ROW])) == [expected]
    assert written(tmp_path, "b.json", json.dumps([ROW | {"answer": "b", "id": 7}])) == [expected]
    [of_table] = written(tmp_path, "c.csv", "question,A,B,C,answer\nTwo?,1,2,3,B\n")
    assert of_table == dataclasses.replace(expected, line=2)


def test_mmlus_own_files_have_no_header(tmp_path):
    text = '"Two, or ""2""?",2,2,3,4,B\nThree?,1,2,3,4,C\n'
    first, second = written(tmp_path, "anatomy_test.csv", text)
    assert first == Question(1, 'Two, or "2"?', ("2", "2", "3", "4"), 1)
    assert second == Question(2, "Three?", ("1", "2", "3", "4"), 2)
    assert written(tmp_path, "b.tsv", text.replace(",", "\t").replace("\t or", ", or"))[1] == second


def test_what_is_wrong_in_an_array_on_one_line_is_said_with_the_row(tmp_path):
    first, second = written(tmp_path, "a.json", json.dumps([ROW, ROW]))
    assert (str(first.place), str(second.place)) == ("1 (row 1)", "1 (row 2)")
    with pytest.raises(InputError, match=r"line 1 \(row 2\): no answer"):
        written(tmp_path, "b.json", json.dumps([ROW, {"question": "Two?"}]))


def test_a_subject_is_kept(tmp_path):
    [found] = multiple_choice.read(write_jsonl(tmp_path / "a.jsonl", [ROW | {"subject": "number_theory"}]))
    assert found.subject == "number_theory"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answer": 3}, "answer: 3; write a letter from A to C, or in JSON a number from 0 to 2"),
        ({"answer": "D"}, "answer: 'D'; write a letter from A to C"),
        ({"answer": "1"}, "answer: '1'; write a letter"),
        ({"answer": True}, "answer: True; write a letter"),
        ({"choices": ["one"]}, "choices: a list; write a list of two texts or more"),
        ({"choices": "1 2 3"}, "choices: a string; write a list"),
        ({"choices": ["1", 2, "3"]}, r"choices\[1\]: 2; write a text"),
        ({"choices": ["1", " ", "3"]}, r"choices\[1\]: empty"),
        ({"question": None}, "question: null; write a text"),
        ({"choices": [f"{n}" for n in range(27)]}, "choices: 27 of them; there are letters for 26"),
        ({"subject": 3}, "subject: 3; write a text"),
    ],
)
def test_a_wrong_row_is_named_with_its_line_and_what_is_allowed(tmp_path, changed, said):
    file = write_jsonl(tmp_path / "a.jsonl", [ROW, ROW | changed])
    with pytest.raises(InputError, match=rf"a\.jsonl has 1 problem\n  line 2: {said}"):
        multiple_choice.read(file)


def test_all_wrong_rows_are_named_together(tmp_path):
    with pytest.raises(InputError) as refused:
        written(tmp_path, "a.csv", "question,A,B,answer\nOne?,1,2,E\nTwo?,1,2\n")
    assert str(refused.value).splitlines()[:3] == [
        f"{tmp_path}/a.csv has 2 problems",
        "  line 2: answer: 'E'; write a letter from A to B, or in JSON a number from 0 to 1",
        "  line 3: 3 fields, the header has 4",
    ]
    with pytest.raises(InputError, match="no answer; it has question, choices"):
        multiple_choice.read(write_jsonl(tmp_path / "b.jsonl", [{"question": "a", "choices": ["1", "2"]}]))
    with pytest.raises(InputError, match="no choices, and no A, B, C; it has question, answer"):
        multiple_choice.read(write_jsonl(tmp_path / "b.jsonl", [{"question": "a", "answer": "A"}]))
    with pytest.raises(InputError, match="no data file at"):
        multiple_choice.read(tmp_path / "none.csv")
