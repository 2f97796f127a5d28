"""Splits do not leak, nothing is cut or dropped in silence, and the report counts what happened."""

import csv
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora import data
from qlora.data import chat
from qlora.pages.data import altered
from qlora.recipe import Data
from qlora.system.errors import InputError
from tests.conftest import CONVERSATIONS, messages, write_jsonl

ROWS = [{"messages": messages(turns)} for turns in CONVERSATIONS]
LONG = {"messages": messages([("user", "x " * 200), ("assistant", "A")])}


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", ROWS * 3)


@pytest.fixture
def load(tokenizer):
    """Return load(train, **settings of the recipe's data) -> Rows."""

    def load(train, seed=0, **settings):
        section = Data(train=str(train) if not isinstance(train, (list, dict)) else train, **settings)
        return data.Rows(data.load(section.train, tokenizer, section, seed))

    return load


def texts(rows, tokenizer):
    return [tokenizer.decode(example.input_ids) for example in rows]


def report_of(rows, stops=(2,), batches=None, batches_per_step=10):
    return data.report(rows, rows.parts, stops, rows if batches is None else batches, batches_per_step)


def test_copies_of_a_row_are_never_on_both_sides(file, load, tokenizer):
    train, held_out = data.hold_out(load(file), 0.25, seed=1)
    assert set(texts(train, tokenizer)).isdisjoint(texts(held_out, tokenizer))
    assert (len(train), len(held_out)) == (54, 18)


def test_the_split_is_the_same_for_the_same_seed_only(file, load):
    rows = load(file)
    first, again, other = (data.hold_out(rows, 0.25, seed=seed)[1].lines.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_split_that_leaves_nothing_is_refused(tmp_path, load):
    file = write_jsonl(tmp_path / "d.jsonl", ROWS[:1] * 5)
    with pytest.raises(InputError, match="leaves no training rows"):
        data.hold_out(load(file), 0.5, seed=1)


# ---- bad rows --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [ROWS[0], {"words": "x"}, {"messages": []}, ROWS[1]])
    path.write_text(path.read_text() + "nope\n")
    return path


def test_bad_rows_are_reported_together_with_file_and_line(bad, load):
    with pytest.raises(InputError) as caught:
        load(bad)
    message = str(caught.value)
    assert f"{bad} has 3 problems" in message
    assert "line 2  keys words match no known format" in message
    assert "line 3  messages is an empty list" in message
    assert "line 5  not valid JSON" in message
    assert "data.on_bad_row=skip" in message


def test_bad_rows_are_skipped_and_counted_where_the_recipe_says_so(bad, load):
    rows = load(bad, on_bad_row="skip")
    summary = rows.parts[0].summary
    assert rows.lines.tolist() == [1, 4]
    assert (summary["rows_read"], summary["rows_kept"], summary["rows_dropped"]) == (5, 2, 3)
    assert sum(summary["reasons"].values()) == 3
    assert [row["row"] for row in summary["dropped_rows"]] == ["line 2", "line 3", "line 5"]
    assert "not valid JSON" in summary["dropped_rows"][2]["reason"]


def test_rows_with_the_same_problem_are_named_together(tmp_path, load, tokenizer):
    chat.set_template(tokenizer, "chatml")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + "nope\n" * 2500)
    with pytest.raises(InputError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert "has 2,500 problems" in lines[0]
    assert [line[:10] for line in lines[1:4]] == ["  line 2  ", "  line 3  ", "  line 4  "]
    assert lines[4:] == [
        "  lines 5, 6, 7, ...  likewise (2,497 rows)",
        "  fix these rows, or skip them with data.on_bad_row=skip",
    ]
    assert load(path, on_bad_row="skip").parts[0].summary["reasons"] == {
        "not valid JSON: Expecting value at column N; expected one JSON object per line": 2500
    }


def test_tools_of_any_name_that_a_template_leaves_out_are_one_kind_of_problem(tmp_path, load, tokenizer):
    rows = [{**ROWS[0], "tools": [{"name": f"tool_{chr(97 + i)}"}]} for i in range(9)]
    with pytest.raises(InputError) as caught:
        load(write_jsonl(tmp_path / "d.jsonl", rows))
    lines = str(caught.value).splitlines()
    assert "leaves the row's tools out ('tool_a')" in lines[1]
    assert lines[4] == "  lines 4, 5, 6, ...  likewise (6 rows)"


def test_twenty_lines_of_different_problems_are_shown_and_the_rest_counted(tmp_path, load, tokenizer):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({chr(97 + i) * 4: 1}) + "\n" for i in range(24)))
    with pytest.raises(InputError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 24 problems")
    assert lines[20].startswith("  line 20  keys tttt match no known format")
    assert lines[21] == "  ... and 4 more"


# ---- length ----------------------------------------------------------------------------------------------------------


def test_rows_over_max_length_are_an_error_with_their_lines_by_default(file, load):
    with pytest.raises(InputError, match=r"line 1  .*\d+ tokens, data.max_length is 8"):
        load(file, max_length=8)


def test_the_remedy_is_said_however_many_rows_are_wrong(file, load):
    with pytest.raises(
        InputError, match=r"likewise \(69 rows\)\n  raise data.max_length, or set data.overlong to drop"
    ):
        load(file, max_length=8)


@pytest.mark.parametrize(
    ("policy", "kept", "truncated", "split", "examples"),
    [("drop", 24, 0, 0, 24), ("truncate", 24, 0, 0, 24), ("truncate_prompt", 25, 1, 0, 25), ("split", 25, 0, 1, 25)],
)
def test_what_happens_to_long_rows_is_counted(tmp_path, load, policy, kept, truncated, split, examples):
    rows = load(write_jsonl(tmp_path / "d.jsonl", [*ROWS, LONG]), max_length=100, overlong=policy)
    summary = rows.parts[0].summary
    assert (summary["rows_read"], summary["rows_kept"], summary["rows_dropped"]) == (25, kept, 25 - kept)
    assert (summary["rows_truncated"], summary["rows_split"]) == (truncated, split)
    assert len(rows) == examples
    assert rows.lengths.max() <= 100
    if policy in ("drop", "truncate"):
        assert summary["reasons"] == {"prompt alone longer than max_length 100": 1}


def test_the_report_counts_tokens_and_stops(file, load):
    rows = load(file)
    report = report_of(rows)
    assert report["tokens"]["total"] == sum(len(example.input_ids) for example in rows)
    assert report["tokens"]["trained"] == sum(example.num_trained for example in rows)
    assert report["ends_with_stop_token"] == 1.0
    assert report["steps_per_epoch"] == 8  # 72 rows
    assert report["sources"][0]["format"] == "messages"
    assert report_of(rows, stops={5})["ends_with_stop_token"] == 0.0


def test_packing_is_in_the_report(file, load):
    rows = load(file)
    packs = data.pack(rows, 128)
    report = report_of(rows, batches=packs, batches_per_step=1)
    assert report["steps_per_epoch"] == len(packs)
    assert report["packing_efficiency"] == pytest.approx(report["tokens"]["total"] / (128 * len(packs)))
    assert sum(len(pack.input_ids) for pack in packs) == report["tokens"]["total"]


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    other = [{"prompt": f"Q{n}", "completion": f"A{n}"} for n in range(40)]
    return str(write_jsonl(tmp_path / "a.jsonl", ROWS)), str(write_jsonl(tmp_path / "b.jsonl", other))


def counts(rows):
    return np.bincount(rows.part_of, minlength=len(rows.parts)).tolist()


def test_a_weight_is_how_often_the_rows_of_a_source_are_seen_an_epoch(two, load):
    rows = load([{"path": two[0], "weight": 2.5}, {"path": two[1], "weight": 0.25}])
    mixed, again, other = (data.weighted(rows, seed) for seed in (1, 1, 2))
    assert counts(mixed) == [60, 10]
    seen = np.bincount(mixed.lines[mixed.part_of == 0])[1:]
    assert sorted(set(seen.tolist())) == [2, 3]
    assert mixed.lines.tolist() == again.lines.tolist() != other.lines.tolist()


def test_max_rows_is_a_draw_over_all_files_of_a_source(two, load):
    rows, again = (load([{"path": two[0]}, {"path": two[1], "max_rows": 7}], seed=3) for _ in range(2))
    assert counts(rows) == [24, 7]
    assert rows.lines.tolist() == again.lines.tolist()
    assert rows.lines[24:].tolist() != list(range(1, 8))
    assert rows.lines.tolist() != load([{"path": two[0]}, {"path": two[1], "max_rows": 7}], seed=4).lines.tolist()
    summary = rows.parts[1].summary
    assert (summary["rows_read"], summary["rows_kept"]) == (40, 7)
    assert summary["reasons"] == {"not in the sample of max_rows": 33}
    folder = two[0].rpartition("/")[0]
    assert len(load({"path": f"{folder}/*.jsonl", "max_rows": 20})) == 20
    assert len(load({"path": two[0], "max_rows": 500})) == 24


def test_what_does_not_fit_in_a_folder_is_said_to_be_read_with_it(tmp_path, load):
    """Such as the page of numbers that `qlora report` writes beside a page."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": "Once."}])
    assert len(load(tmp_path)) == 1
    (tmp_path / "b.json").write_text('{"kind": "qlora report", "runs": []}')
    with pytest.raises(InputError, match=r"b\.json(?s:.*)one of 2 data files of the folder .* which are all read"):
        load(tmp_path)
    with pytest.raises(InputError) as alone:
        load(tmp_path / "b.json")
    assert "folder" not in str(alone.value)
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.csv").write_text("when,how\n1,2\n")
    with pytest.raises(InputError, match=r"b\.csv(?s:.*)one of 2 data files of the folder"):
        load(tmp_path)


def test_each_source_may_have_columns_of_its_own(tmp_path, two, load, tokenizer):
    path = tmp_path / "c.csv"
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([("q", "a"), ("What?", "That.")])
    rows = load([two[0], {"path": str(path), "columns": {"prompt": "q", "completion": "a"}}])
    assert texts(rows, tokenizer)[-1] == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"
    assert rows.where(len(rows) - 1) == f"{path} line 2"


def test_text_is_trained_whole_and_ends_with_the_end_token(tmp_path, load, tokenizer):
    (tmp_path / "d.txt").write_text("Once upon a time.\n<|im_start|> is no token here.")
    (example,) = load(tmp_path / "d.txt")
    assert tokenizer.decode(example.input_ids) == "Once upon a time.\n<|im_start|> is no token here.<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in example.input_ids
    assert example.labels == [data.IGNORE_INDEX, *example.input_ids[1:]]


def test_the_conversations_of_rows_are_read_again_from_their_files(two, load):
    rows = load(list(two))[np.array([50, 3, 3, 60])]
    found = data.conversations(rows[:1]) + data.conversations(rows[1:])
    assert [c.messages[-1]["content"] for c in found] == ["A26", CONVERSATIONS[3][1][1], "A36"]


def test_rows_of_an_array_on_one_line_are_rows_of_their_own(tmp_path, load):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": f"Q{n}", "completion": f"A{n}"} for n in (0, 1, 2, 3, 1)]))
    rows = load(path)
    assert [c.messages[-1]["content"] for c in data.conversations(rows)] == ["A0", "A1", "A2", "A3", "A1"]
    assert len(rows.first_rows(2)) == 2
    assert data.copies(rows, rows[:0])["duplicates"] == 1
    assert rows.where(3) == f"{path} line 1 (row 4)"


def test_what_is_wrong_with_a_row_that_shares_its_line_names_the_row(tmp_path, load):
    path, good = tmp_path / "d.json", {"prompt": "Q", "completion": "A"}
    path.write_text(json.dumps([good, {**good, "completion": 7}, good]))
    with pytest.raises(InputError, match=r"line 1 \(row 2\)  .*completion"):
        load(path)
    path.write_text(json.dumps([good, {**good, "prompt": "Why? " * 99}]))
    with pytest.raises(InputError, match=r"line 1 \(row 2\)  .* tokens, data\.max_length is 64"):
        load(path, max_length=64)


def test_rows_of_several_examples_are_counted_as_one(tmp_path, load):
    rows = load(
        write_jsonl(tmp_path / "d.jsonl", [LONG, ROWS[0], LONG]), max_length=64, overlong="split", train_on="all"
    )
    assert len(rows) > 9
    assert rows.one_each().lines.tolist() == [1, 2, 3]
    assert set(rows.first_rows(2).lines.tolist()) == {1, 2}
    assert data.copies(rows, rows[:0]) == {"duplicates": 1, "eval_rows_in_training": 0}


# ---- nothing is lost in silence --------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["Hi", "What is 3 plus 4?", "x " * 40, "y " * 90, "日本 🙂", "", "  ", None, 5, "<|im_end|>", "\ud800"]
)
GOOD_OR_BAD = st.one_of(
    st.builds(lambda q, a: {"prompt": q, "completion": a}, WORDS, WORDS),
    st.builds(lambda q, a: {"instruction": q, "output": a}, WORDS, WORDS),
    st.builds(lambda text: {"text": text}, WORDS),
    st.builds(
        lambda turns: {"messages": [{"role": role, "content": words} for role, words in turns]},
        st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool", "gpt"]), WORDS), max_size=5),
    ),
    st.sampled_from([{}, {"words": 1}, [], None, 3]),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(GOOD_OR_BAD, min_size=1, max_size=12), st.sampled_from(["drop", "truncate_prompt", "truncate", "split"])
)
def test_rows_read_are_rows_kept_and_rows_dropped_with_a_reason(tmp_path, load, rows, policy):
    lines = [json.dumps({"pad": 1}), *map(json.dumps, rows), "nope"]  # the first is no array: the file is JSON Lines
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    loaded = load(tmp_path / "d.jsonl", max_length=64, overlong=policy, on_bad_row="skip")
    summary = loaded.parts[0].summary
    assert summary["rows_read"] == len(lines) == summary["rows_kept"] + summary["rows_dropped"]
    assert sum(summary["reasons"].values()) == summary["rows_dropped"] == len(summary["dropped_rows"])
    kept, dropped = set(loaded.lines.tolist()), {int(row["row"].split()[1]) for row in summary["dropped_rows"]}
    assert kept | dropped == set(range(1, len(lines) + 1))
    assert not kept & dropped
    assert len(kept) == summary["rows_kept"]
    assert loaded.lengths.max(initial=0) <= 64
    assert (loaded.num_trained > 0).all()
    assert summary["rows_truncated"] + summary["rows_split"] <= summary["rows_kept"]


# ---- what is said of keys, tables and files ---------------------------------------------------------------------------


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path


def test_unused_keys_and_merged_messages_and_removed_nulls_are_counted(tmp_path, load, tokenizer):
    chat.set_template(tokenizer, "chatml")
    look = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    calls = [*ROWS[0]["messages"], {"role": "assistant", "tool_calls": [look]}, {"role": "tool", "content": "2"}]
    rows = [{**ROWS[0], "id": 0}, {**ROWS[1], "id": 1, "note": "n"}, {"messages": [*calls, ROWS[0]["messages"][1]]}]
    part = load(write_jsonl(tmp_path / "d.jsonl", rows), on_bad_row="skip").parts[0]
    assert part.summary["unused"] == {"id": 2, "note": 1}
    assert report_of(load(tmp_path / "d.jsonl", on_bad_row="skip"))["sources"][0]["unused"] == {"id": 2, "note": 1}
    assert (part.summary["rows_merged"], part.summary["rows_with_nulls"]) == (1, 1), part.summary["reasons"]


def test_rows_that_are_in_the_template_already_are_counted_and_said(tmp_path, load):
    made = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    rows = [
        {"text": made},
        {"prompt": made[:-15], "completion": "A"},
        {"prompt": "Q", "completion": "A<|im_end|>"},
        *ROWS,
    ]
    [source] = report_of(load(write_jsonl(tmp_path / "d.jsonl", rows)))["sources"]
    assert source["rows_with_control"] == 3
    assert any("3 rows HOLD SPECIAL TOKENS" in line for line in altered(source))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_that_a_table_lacks_is_one_problem_of_the_file(tmp_path, load, suffix):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"d.{suffix}"
    if suffix == "csv":
        write_csv(path, [["q", "a"], *[["Q", "A"]] * 50])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"q": ["Q"] * 50, "a": ["A"] * 50}), path)
    for columns, expected in (
        ({"prompt": "question", "completion": "a"}, "has no column 'question', which data.columns names; it has q, a"),
        ({"prompt": "q", "completion": "a", "system": "s"}, "has no column 's', which data.columns names"),
        (None, "columns q, a match no known format"),
    ):
        with pytest.raises(InputError) as caught:
            load(path, columns=columns, on_bad_row="skip")
        assert expected in str(caught.value)
        assert "problems" not in str(caught.value)
    assert len(load(path, columns={"prompt": "q", "completion": "a"})) == 50


def test_an_optional_column_that_no_row_has_is_a_mistake_in_the_recipe(tmp_path, load):
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "Q", "a": "A"}, {"q": "Q", "a": "A", "s": "S"}])
    assert len(load(path, columns=columns)) == 2
    with pytest.raises(InputError, match=r"no row has 'sys', which data\.columns names"):
        load(path, columns={**columns, "system": "sys"})


def test_messages_in_a_cell_of_a_csv_file_are_the_messages(tmp_path, load):
    cells = [[json.dumps(row["messages"])] for row in ROWS]
    path = write_csv(tmp_path / "d.csv", [["messages"], *cells])
    plain = load(write_jsonl(tmp_path / "d.jsonl", ROWS))
    assert list(load(path)) == list(plain)


def test_one_datum_has_one_target_whatever_the_file_type(tmp_path, load, tokenizer):
    import datasets

    chat.set_template(tokenizer, "chatml")

    calls = [{"function": {"name": "f", "arguments": {key: "v"}}} for key in ("x", "y")]
    tools = [{"name": "f", "parameters": {"properties": {key: {"type": "string"}}}} for key in ("x", "y")]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "", "tool_calls": [one]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "A"},
            ],
            "tools": [tool],
        }
        for one, tool in zip(calls, tools, strict=True)
    ]
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    datasets.Dataset.from_list(rows).to_json(tmp_path / "filled.jsonl")
    assert "null" in (tmp_path / "filled.jsonl").read_text()  # else nothing is tested
    said = [data.conversations(load(tmp_path / name)) for name in (plain.name, "d.parquet", "filled.jsonl")]
    assert said[0] == said[1] == said[2]
    assert load(tmp_path / "filled.jsonl").parts[0].summary["rows_with_nulls"] == 2


def test_ignored_keys_make_rows_that_have_them_readable(tmp_path, load):
    rows = [{"messages": [{**ROWS[0]["messages"][0], "mood": "good"}, ROWS[0]["messages"][1]]}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match=r"data.ignore_keys: \[mood\]"):
        load(path)
    assert load(path, ignore_keys=["mood"]).parts[0].summary["unused"] == {"mood": 1}
