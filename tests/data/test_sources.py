"""The reader keeps true line numbers, alters no good row, and names every bad line."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data.sources import expand, read_rows
from qlora.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_rows(path)
    return str(caught.value)


def write(tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(st.lists(VALUES, min_size=1, max_size=5), st.sampled_from(["lines", "array", "indented"]), st.booleans())
def test_rows_come_back_exactly(tmp_path_factory, values, layout, ascii_only):
    if layout == "lines":
        values = [{"row": value} for value in values]  # a file that opens with [ is an array
        text = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in values)
    else:
        text = json.dumps(values, ensure_ascii=ascii_only, indent=2 if layout == "indented" else None)
    path = tmp_path_factory.mktemp("d") / "d.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert [row.value for row in read_rows(path)] == values


def test_line_numbers_count_blank_lines_crlf_and_bom(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\r\n\n{"a": "\xe2\x80\xa8"}\r\n')
    assert [(row.line, row.value) for row in read_rows(path)] == [(1, {"a": 1}), (4, {"a": "\u2028"})]


def test_line_numbers_in_an_array_are_where_rows_begin(tmp_path):
    path = write(tmp_path, '[\n {"a": 1},\n\n {"a":\n 2},\n {"a": 3}\n]\n')
    assert [row.line for row in read_rows(path)] == [2, 4, 6]


def test_all_bad_lines_are_reported_the_first_twenty_in_full(tmp_path):
    message = refusal(write(tmp_path, '{"a": 1}\n' + "nope\n" * 25))
    assert "has 25 problems" in message
    assert "line 2 " in message
    assert "line 21 " in message
    assert "line 22 " not in message
    assert "and 5 more" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b"[]", "has no rows"),
        (b'{"a": 1}\n{"a": \xff}\n', "line 2: not UTF-8 (byte 0xff)"),
        (b'{"a": NaN}\n', "line 1  not valid JSON: NaN is not JSON"),
        (b'{"a": 1, "a": 2}\n', "'a' stands twice"),
        (b'{"a": 1} {"a": 2}\n', "line 1  not valid JSON: Extra data"),
        (b'[{"a": 1},\n{"a": 2}', "line 2: not valid JSON"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2: not valid JSON"),
        (b'[{"a": 1}]\nmore', "after the end"),
        (b'{"a":' + b"[" * 100_000 + b"\n", "line 1  not valid JSON: nested too deeply"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, content, expected):
    assert expected in refusal(write(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no data file at" in refusal(tmp_path / "none.jsonl")
    assert "cannot read" in refusal(tmp_path)


def test_a_line_of_five_megabytes_is_read(tmp_path):
    text = "x" * 5_000_000
    assert read_rows(write(tmp_path, json.dumps({"a": text})))[0].value == {"a": text}


# ---- tables, and what a path may name --------------------------------------------------------------------------------


def write_as(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_csv_row_knows_the_line_it_begins_on(tmp_path):
    path = write_as(tmp_path, "d.csv", '\ufeffprompt,completion\r\n"a, ""b""\r\nsecond line",1\r\n\r\nc,2\r\n')
    rows = read_rows(path)
    assert [(row.line, row.value) for row in rows] == [
        (2, {"prompt": 'a, "b"\r\nsecond line', "completion": "1"}),
        (5, {"prompt": "c", "completion": "2"}),
    ]


FIELD = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5), st.sampled_from(["csv", "tsv"]))
def test_tables_come_back_exactly(tmp_path_factory, rows, kind):
    rows = [row for row in rows if any(field.strip() for field in row)] or [("x", "y")]
    path = tmp_path_factory.mktemp("d") / f"d.{kind}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *rows])
    assert [tuple(row.value.values()) for row in read_rows(path)] == rows


def test_rows_with_too_few_or_too_many_fields_are_named_together(tmp_path):
    message = refusal(write_as(tmp_path, "d.csv", "a,b\n1,2\n1\n1,2,3\n"))
    assert "line 3  1 fields, the header has 2" in message
    assert "line 4  3 fields, the header has 2" in message


def test_a_quote_that_never_ends_is_refused(tmp_path):
    assert "d.csv has 1 problem" in refusal(write_as(tmp_path, "d.csv", 'a,b\n"1,2\n3,4\n'))


def test_parquet_rows_come_back_with_their_numbers(tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = [{"messages": [{"role": "user", "content": "日本"}], "n": n} for n in range(5)]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    rows = read_rows(path)
    assert [row.value for row in rows] == values
    assert rows[4].where == f"{path} row 5"
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a whole Parquet file" in refusal(path)


def test_a_glob_and_a_folder_name_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv", "notes.md"):
        (tmp_path / name).write_text("x")
    assert [path.rpartition("/")[2] for path in expand(tmp_path)] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert [path.rpartition("/")[2] for path in expand(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "d[1].json").write_text("x")
    assert expand(f"{tmp_path}/d[1].json") == [f"{tmp_path}/d[1].json"]  # a name, not a glob
    with pytest.raises(InputError, match="no data file matches"):
        expand(f"{tmp_path}/*.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no"):
        expand(tmp_path / "empty")
