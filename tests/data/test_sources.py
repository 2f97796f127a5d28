"""The reader keeps true line numbers, alters no good row, and names every bad line."""

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data.sources import File, not_read, open_source
from qlora.recipe import Source
from qlora.system.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read_rows(path, **settings):
    return list(File(str(path), Source(path=str(path), **settings)).rows())


def expand(path):
    return [file.path for file in open_source(Source(path=str(path)))]


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_rows(path)
    return str(caught.value)


def problems(path):
    return [(row.line, row.problem) for row in read_rows(path) if row.problem is not None]


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
    assert [row.place for row in read_rows(path)] == [(2, 0), (4, 0), (6, 0)]


def test_rows_of_an_array_that_share_a_line_have_their_number_in_the_file_too(tmp_path):
    def places(text):
        return [str(row.place) for row in read_rows(write(tmp_path, text))]

    assert places('[{"a": 1}, {"a": 2}]') == ["1 (row 1)", "1 (row 2)"]
    assert places('[{"a": 1}]') == ["1"]
    assert places('[{"a": 1}\n, {"a": 2}, {"a":\n3},\n{"a": 4}\n]') == ["1", "2 (row 2)", "2 (row 3)", "4"]
    assert places(json.dumps([{"a": 1}, {"a": 2}], indent=0)) == ["2", "5"]


def test_a_bad_line_is_a_row_with_a_problem_and_those_around_it_are_whole(tmp_path):
    rows = read_rows(write(tmp_path, b'{"a": 1}\nnope\n{"a": "\xff"}\n{"a": 2}\n'))
    assert [(row.line, row.value) for row in rows if row.problem is None] == [(1, {"a": 1}), (4, {"a": 2})]
    assert "not valid JSON: Expecting value at column 1" in rows[1].problem
    assert "not UTF-8 (byte 0xff)" in rows[2].problem


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        (b'{"a": 1}\n{"a": \xff}\n', 2, "not UTF-8 (byte 0xff)"),
        (b'{"a": NaN}\n', 1, "not valid JSON: NaN is not valid JSON"),
        (b'{"a": 1, "a": 2}\n', 1, "'a' occurs twice"),
        (b'{"a": 1} {"a": 2}\n', 1, "not valid JSON: Extra data"),
        (b'{"a":' + b"[" * 100_000 + b"\n", 1, "not valid JSON: nested too deeply"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path, content, line, expected):
    ((number, problem),) = problems(write(tmp_path, content))
    assert number == line
    assert expected in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b"[]", "has no rows"),
        (b'[{"a": 1},\n{"a": 2}', "line 2: not valid JSON"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2: not valid JSON"),
        (b'[{"a": 1}]\nmore', "after the end"),
        (b'[{"a": 1},\n{"a": "\xff"}]', "line 2: not UTF-8 (byte 0xff)"),
        (b'[{"a": 1},\n{"a": 1, "a": 2}]', "'a' occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{\n "data": [{"a": 1}]\n}', "line 1: a JSON object that spans several lines; write one array of objects"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path, content, expected):
    assert expected in refusal(write(tmp_path, content))


def test_a_compressed_file_is_named_as_one(tmp_path):
    assert "is compressed; unpack it" in refusal(write_as(tmp_path, "d.jsonl.gz", b"\x1f\x8b"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no data file at" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "rows_train.csv").touch()
    assert refusal(tmp_path / "rows_trian.csv").endswith(f"; did you mean {tmp_path / 'rows_train.csv'}?")
    assert "did you mean" not in refusal(tmp_path / "none.jsonl") + refusal(tmp_path / "none" / "rows_train.csv")
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


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_file_of_a_spreadsheet_may_have_another_separator(tmp_path, separator):
    text = '\ufeff"Frage, kurz"|"Antwort"\n"Was kostet 1,50; oder mehr?"|"a ""b"" c"\n'
    rows = read_rows(write_as(tmp_path, "d.csv", text.replace("|", separator)))
    assert [row.value for row in rows] == [{"Frage, kurz": "Was kostet 1,50; oder mehr?", "Antwort": 'a "b" c'}]


@pytest.mark.parametrize("declared", ["sep=;\r\n", '"sep=;"\n'])
def test_the_separator_that_excel_declares_in_the_first_line_is_no_row(tmp_path, declared):
    path = write_as(tmp_path, "d.csv", f"{declared}a;b\n1,5;2\n")
    assert [(row.line, row.value) for row in read_rows(path)] == [(3, {"a": "1,5", "b": "2"})]


@pytest.mark.parametrize("text", ["a,b;c\n1,2;3\n", "text\none; two\n", '"a;b"\n"1;2"\n'])
def test_a_semicolon_beside_commas_or_in_a_single_column_separates_nothing(tmp_path, text):
    assert not [
        row for row in read_rows(write_as(tmp_path, "d.csv", text)) if len(row.value) != 1 + text.count(",") // 2
    ]


def test_a_quote_that_is_not_doubled_is_refused_with_what_to_do(tmp_path):
    assert "is written twice" in refusal(write_as(tmp_path, "d.csv", 'a,b\n"say "hi"",2\n'))


def test_rows_with_too_few_or_too_many_fields_are_named(tmp_path):
    path = write_as(tmp_path, "d.csv", "a,b\n1,2\n1\n1,2,3\n")
    assert problems(path) == [(3, "1 fields, the header has 2"), (4, "3 fields, the header has 2")]


def test_a_quote_that_never_ends_is_refused_with_the_line_it_begins_on(tmp_path):
    # no bad row that may be skipped: all that follows would be skipped with it
    assert "line 2: unexpected end of data" in refusal(write_as(tmp_path, "d.csv", 'a,b\n"1,2\n3,4\n'))


def test_a_table_that_is_not_utf8_is_refused_with_the_line(tmp_path):
    assert "line 2: not UTF-8 (byte 0xe9)" in refusal(write_as(tmp_path, "d.csv", b"a,b\ncaf\xe9,1\n"))


# ---- plain text ------------------------------------------------------------------------------------------------------

POEM = "One\n two\n\n\nThree\r\n"


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("document", [(1, POEM)]),
        ("paragraph", [(1, "One\n two"), (5, "Three")]),
        ("line", [(1, "One"), (2, " two"), (5, "Three")]),
    ],
)
def test_a_text_file_is_one_row_or_its_paragraphs_or_its_lines(tmp_path, by, expected):
    path = write_as(tmp_path, "d.txt", "\ufeff" + POEM)
    assert [(row.line, row.value["text"]) for row in read_rows(path, sample_by=by)] == expected


def test_text_that_is_not_utf8_is_refused_with_the_line(tmp_path):
    assert "line 2: not UTF-8" in refusal(write_as(tmp_path, "d.txt", b"a\n\xff\n"))


# ---- arrays are read block by block ----------------------------------------------------------------------------------


def test_rows_longer_than_a_block_and_across_its_end_come_back(tmp_path, monkeypatch):
    from qlora.data.readers import json_file

    monkeypatch.setattr(json_file, "_BLOCK", 7)
    values = [{"a": 'é\\"' * n, "n": [n, 1.5e10, True, None]} for n in range(40)]
    path = write_as(tmp_path, "d.json", json.dumps(values, indent=1, ensure_ascii=False))
    assert [row.value for row in read_rows(path)] == values
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(lines[row.line - 1].strip() == "{" for row in read_rows(path))


def test_a_broken_array_is_not_read_to_its_end(tmp_path):
    path = write_as(tmp_path, "d.json", '[{"a": 1}, {"a": nope}, ' + '{"a": 1}, ' * 500_000)
    file = File(str(path), Source(path=str(path)))
    with pytest.raises(InputError, match="line 1: not valid JSON: Expecting value at column 18"):
        list(file.rows())
    assert file.done <= 2**20 + 4096 < path.stat().st_size


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stand in for the network only: the split is what `datasets` makes of a local file."""
    import datasets

    path = write_as(
        tmp_path, "hub.jsonl", "".join(json.dumps({"prompt": f"Q{n}", "completion": f"A{n}"}) + "\n" for n in range(9))
    )
    asked = []

    def load_dataset(name, subset=None, *, split, revision, real=datasets.load_dataset):
        asked.append((name, subset, split, revision))
        if name != "owner/name":
            raise FileNotFoundError(f"Couldn't find any data file at {name}.")
        return real("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_is_read_by_name_subset_split_and_revision(hub):
    source = Source(name="owner/name", subset="en", split="test", revision="abc")
    (split,) = open_source(source)
    rows = list(split.rows())
    assert hub == [("owner/name", "en", "test", "abc")]
    assert [(row.line, row.value) for row in rows[:1]] == [(1, {"prompt": "Q0", "completion": "A0"})]
    assert (split.path, split.unit, len(rows), split.size) == ("owner/name/en:test", "row", 9, 9)


def test_a_hub_data_set_that_cannot_be_had_is_one_clear_message(hub):
    (split,) = open_source(Source(name="owner/none"))
    with pytest.raises(InputError, match=r"data set owner/none:train: Couldn't find any data file.*or the network"):
        list(split.rows())
    assert len(hub) == 1


def test_parquet_rows_come_back_with_their_numbers(tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = [{"messages": [{"role": "user", "content": "日本"}], "n": n} for n in range(5)]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    rows = read_rows(path)
    assert [row.value for row in rows] == values
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    path.write_bytes(path.read_bytes()[:-10])
    assert "not a complete Parquet file" in refusal(path)


def test_a_glob_and_a_folder_name_their_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv", "notes.md"):
        (tmp_path / name).write_text("x")
    assert [path.rpartition("/")[2] for path in expand(tmp_path)] == ["a.jsonl", "b.jsonl", "c.csv"]
    assert [path.rpartition("/")[2] for path in expand(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "d[1].json").write_text("x")
    assert expand(f"{tmp_path}/d[1].json") == [f"{tmp_path}/d[1].json"]  # a name, not a glob
    with pytest.raises(InputError, match="no data file matches"):
        expand(f"{tmp_path}/*.tsv")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [path.rpartition("/")[2] for path in expand(tmp_path)] == ["a.jsonl", "b.jsonl", "c.csv", "d[1].json"]
    assert not_read(Source(path=str(tmp_path))) == [f"{tmp_path}/dataset_info.json"]


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ("test.jsonl train.jsonl valid.jsonl", "train.jsonl", "valid.jsonl"),
        ("test-00000-of-00001.parquet train-00000-of-00002.parquet train-00001-of-00002.parquet", "train*.parquet",
         "test-00000-of-00001.parquet"),
        ("sst2_dev.csv sst2_train.csv", "sst2_train.csv", "sst2_dev.csv"),
    ],
)  # fmt: skip
def test_a_folder_is_not_trained_on_with_its_held_out_files(tmp_path, names, train, held_out):
    for name in names.split():
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError) as caught:
        expand(tmp_path)
    assert f"data.train={tmp_path / train} data.eval={tmp_path / held_out};" in str(caught.value)
    assert len(expand(tmp_path / train)) == names.count("train")
    assert len(expand(f"{tmp_path}/*")) == len(names.split())


@pytest.mark.parametrize("names", ["a.jsonl test.jsonl", "train.jsonl more_train.jsonl", "latest.csv trainers.csv"])
def test_a_folder_of_one_split_is_read_whole(tmp_path, names):
    for name in names.split():
        (tmp_path / name).write_text("x")
    assert len(expand(tmp_path)) == 2


def test_a_pattern_that_looks_everywhere_does_not_find_what_a_run_has_written(tmp_path):
    for name in ("a.jsonl", "more/b.jsonl", "runs/x/metrics.jsonl", "runs/x/environment.json", "runs/x/recipe.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert expand(f"{tmp_path}/**/*.jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/more/b.jsonl"]
    assert not_read(Source(path=f"{tmp_path}/**/*.jsonl")) == [f"{tmp_path}/runs/x"]
    assert expand(f"{tmp_path}/runs/*/*.jsonl") == [f"{tmp_path}/runs/x/metrics.jsonl"]  # which asks for it
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no data file"):
        expand(tmp_path / "empty")


def test_a_disk_that_fails_while_rows_are_read_is_named_and_not_the_cache(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")  # a regular file whose first read is an I/O error
    [file] = open_source(Source(path=str(tmp_path / "rows.jsonl")))
    for read in (lambda: list(file.rows()), file.digest):
        with pytest.raises(InputError, match=r"rows\.jsonl: cannot be read: Input/output error") as caught:
            read()
        assert "QLORA_CACHE" not in str(caught.value)
