"""Rows and files that are wrong, hostile or odd, as `data` and `train` meet them: exit code 2, the file and the line named.

What each reader and each shape makes of a row is in tests/data; here is what must never hang, fill the memory, be altered in
silence, or end in a traceback.
"""

import datetime
import decimal
import gzip
import json
import os
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora import base_model
from qlora.commands.data import inspect_data
from qlora.commands.train import train
from qlora.data import tokenized
from qlora.data.encoder import Settings
from qlora.data.readers import lines
from qlora.data.readers.lines import Row
from qlora.data.sources import open_source
from qlora.data.supervised import Supervised
from qlora.recipe import Source
from qlora.system.errors import InputError
from tests.conftest import write_jsonl
from tests.data.test_properties import junk, rows

GOOD = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
LINE = json.dumps(GOOD).encode() + b"\n"


def row(**changes):
    """Return the line of a good row with a few keys changed."""
    return json.dumps(GOOD | changes).encode()


def said(*turns, **more):
    return row(messages=[*({"role": role, "content": content} for role, content in turns)], **more)


def call(arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    return row(messages=[GOOD["messages"][0], {"role": "assistant", "content": "", "tool_calls": calls}])


# what the third line of a file may be: name: (its bytes, what is said of it)
WRONG_ROWS = {
    "cut off": (LINE[:-5], "not valid JSON: Invalid control character"),
    "half a character": (LINE.replace(b"Hi", b"H\xc3"), "not UTF-8 (byte 0xc3)"),
    "Latin-1": (LINE.replace(b"Hi", b"caf\xe9"), "not UTF-8 (byte 0xe9)"),
    "half a surrogate": (LINE.replace(b"Hi", b"\\ud800"), "messages[1].content has half of a surrogate pair"),
    "half a surrogate as a name": (LINE.replace(b'"Hi"', b'"Hi", "name": "\\udfff"'), "messages[1].name has half of"),
    "NUL before it": (b"\0" + LINE, "not valid JSON: Expecting value at column 1"),
    "a line end in a text": (LINE.replace(b"Hi", b"\x0b"), "not valid JSON: Invalid control character"),
    "NaN": (b'{"text": NaN}', "NaN is not valid JSON"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "-Infinity is not valid JSON"),
    "a number past all floats": (b'{"text": "a", "score": 1e400}', "the number 1e400 is too large"),
    "a number of 5,000 digits": (b'{"text": "a", "score": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
    "a key twice": (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice in one object"),
    "a key twice inside": (LINE.replace(b'"Hi"', b'"Hi", "role": "user"'), "the key 'role' occurs twice"),
    "a key twice in arguments": (call('{"a": 1, "a": 2}'), "arguments is not valid JSON: the key 'a' occurs twice"),
    "NaN in arguments": (call('{"a": NaN}'), "arguments is not valid JSON: NaN is not valid JSON"),
    "100,000 brackets": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    "100,000 brackets in arguments": (call("[" * 100_000), "arguments is not valid JSON: nested too deeply"),
    "100,000 brackets as tools": (row(tools="[" * 100_000), "tools is a string, but not valid JSON: nested too deeply"),
    "two rows": (LINE.strip() + LINE, "not valid JSON: Extra data"),
    "a Python literal": (b"{'text': 'a'}", "not valid JSON: Expecting property name"),
    "a comma at the end": (b'{"text": "a",}', "not valid JSON"),
    "a comment": (b"// rows", "not valid JSON: Expecting value at column 1"),
    "a number": (b"5", "not 5"),
    "a string": (b'"text"', "a row is an object with"),
    "a list": (b'["text"]', "a row is an object with"),
    "null": (b"null", "not null"),
    "no keys": (b"{}", "keys none match no known format"),
    "unknown keys": (b'{"words": "x"}', "keys words match no known format"),
    "token ids": (b'{"input_ids": [1, 2], "labels": [1, 2]}', "keys input_ids, labels match no known format"),
    "token ids of no vocabulary": (b'{"input_ids": [-1, 9e9, true, null], "labels": [1]}', "match no known format"),
    "no messages": (row(messages=[]), "messages is an empty list, not a list of messages"),
    "messages that are null": (row(messages=None), "messages is null"),
    "messages that are a text": (row(messages="Hello"), "messages is a string"),
    "a message that is a text": (row(messages=["Hello"]), "messages[0] is a string"),
    "no answer": (said(("user", "Hello")), "messages ends with the user"),
    "an unknown role": (said(("user", "a"), ("bot", "b")), "messages[1].role is 'bot', not one of system, user"),
    "a role of a million letters": (said(("u" * 1_000_000, "a"), ("assistant", "b")), "messages[0].role is 'uuuu"),
    "10,000 unknown keys": (json.dumps(dict.fromkeys(map(str, range(10_000)))).encode(), "keys 0, 1, 2, 3"),
    "a role that is null": (said((None, "a"), ("assistant", "b")), "messages[0].role is None"),
    "a role that is a list": (said((["user"], "a"), ("assistant", "b")), "messages[0].role is ['user']"),
    "content that is null": (said(("user", "a"), ("assistant", None)), "messages[1].content is null"),
    "content that is a number": (said(("user", 5), ("assistant", "b")), "messages[0].content is 5, not a string"),
    "content that is true": (said(("user", True), ("assistant", "b")), "messages[0].content is True"),
    "content that is a list": (said(("user", ["a"]), ("assistant", "b")), "messages[0].content[0] is 'a'"),
    "content that is an object": (said(("user", {"text": "a"}), ("assistant", "b")), "content is an object"),
    "content that is blank": (said(("user", "a"), ("assistant", " \n")), "messages[1].content is empty"),
    "a system message later": (said(("user", "a"), ("system", "b"), ("assistant", "c")), "can only come first"),
    "an image": (row(images=["a.png"]), "images: not supported"),
    "tools that are a number": (row(tools=5), "tools is 5, not a list of functions"),
    "a flag that is a text": (LINE.replace(b'"Hi"', b'"Hi", "train": "no"'), "messages[1].train is 'no'"),
}


def write_third(path, content):
    path.write_bytes(LINE * 2 + content.rstrip(b"\n") + b"\n" + LINE)
    return path


@pytest.fixture
def refused(make_recipe, tmp_path, monkeypatch):
    """Return run(data path) -> what both verbs say of it, without having loaded the model or left anything."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(base_model, "load", load)

    def run(path, **data):
        recipe = make_recipe(data={"train": str(path), "eval_fraction": 0.0, "num_proc": 1, **data})
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        messages = set()
        for verb in (inspect_data, train):
            with pytest.raises(InputError) as caught:
                verb(recipe)
            messages.add(str(caught.value))
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
        assert not (tmp_path / "run").exists()
        assert len(messages) == 1
        return messages.pop()

    return run


@pytest.mark.parametrize("how", WRONG_ROWS)
def test_a_wrong_row_is_named_by_its_line(refused, tmp_path, how):
    content, expected = WRONG_ROWS[how]
    message = refused(write_third(tmp_path / "rows.jsonl", content))
    assert message.startswith(f"{tmp_path}/rows.jsonl has 1 problem\n  line 3  ")
    assert expected in message
    assert "data.on_bad_row=skip" in message
    assert len(message) < 1000


def test_wrong_rows_that_may_be_skipped_are_counted_and_no_other_is_touched(make_recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(content.rstrip(b"\n") + b"\n" + LINE for content, _ in WRONG_ROWS.values()))
    recipe = make_recipe(data={"train": str(path), "eval_fraction": 0.0, "on_bad_row": "skip"})
    (source,) = inspect_data(recipe)["sources"]
    assert (source["rows_dropped"], source["rows_kept"]) == (len(WRONG_ROWS), len(WRONG_ROWS))
    alone = write_jsonl(tmp_path / "good.jsonl", [GOOD])
    (same,) = inspect_data(make_recipe(data={"train": str(alone), "eval_fraction": 0.0}))["sources"]
    assert source["tokens_an_epoch"] == same["tokens_an_epoch"] * len(WRONG_ROWS)


# ---- files -----------------------------------------------------------------------------------------------------------


def zipped(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("rows.jsonl", b"\0" * 10_000_000)


def parquet(path, table=None, **options):
    import pyarrow
    import pyarrow.parquet

    values = {"prompt": [f"Q{n}" for n in range(200)], "completion": [f"A{n}" for n in range(200)]}
    pyarrow.parquet.write_table(pyarrow.table(values) if table is None else table, path, **options)
    return path.read_bytes()


def broken_text(path):
    import pyarrow

    offsets, text = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, text])
    parquet(path, pyarrow.table({"prompt": column, "completion": ["a"]}))


def two_columns_of_a_name(path):
    import pyarrow

    parquet(path, pyarrow.table([pyarrow.array(["a"])] * 3, names=["prompt", "completion", "prompt"]))


def changed_page(path):
    raw = parquet(path, write_page_checksum=True, compression="none", use_dictionary=False)
    at = raw.index(b"Q150")
    path.write_bytes(raw[:at] + b"X" + raw[at + 1 :])


def sparse(path, size=10**9, start=b""):
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


# name: (file name, its bytes or what makes it, what is said of it)
WRONG_FILES = {
    "an empty file": ("d.jsonl", b"", "d.jsonl has no rows"),
    "blank lines": ("d.jsonl", b"\n \r\n\t\n" * 5000, "d.jsonl has no rows"),
    "a byte order mark alone": ("d.json", b"\xef\xbb\xbf", "d.json has no rows"),
    "an empty array": ("d.json", b"[]", "d.json has no rows"),
    "an empty text": ("d.txt", b"", "d.txt has no rows"),
    "an empty table": ("d.csv", b"prompt,completion\n", "d.csv has no rows"),
    "an empty Parquet file": ("d.parquet", b"", "d.parquet is not a complete Parquet file"),
    "gzip": ("d.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINE * 9)[:-9]), "is compressed; unpack it"),
    "a zip bomb": ("d.jsonl.zip", zipped, "is compressed; unpack it"),
    "capitals": ("d.JSONL.GZ", b"x", "is compressed; unpack it"),
    "gzip under another name": ("d.jsonl", lambda path: path.write_bytes(gzip.compress(LINE)), "line 1  not UTF-8"),
    "Parquet under another name": ("d.jsonl", parquet, "line 1  not UTF-8"),
    "lines under another name": ("d.parquet", LINE, "is not a complete Parquet file: after row 0"),
    "a web page": ("d.parquet", b"<!DOCTYPE html>" * 99, "is not a complete Parquet file: after row 0"),
    "Parquet, cut off": ("d.parquet", lambda path: path.write_bytes(parquet(path)[:-9]), "is not a complete Parquet file"),
    "Parquet, a page changed": ("d.parquet", changed_page, "is not a complete Parquet file: after row 0"),
    "Parquet, no text in a text": ("d.parquet", broken_text, "is not a complete Parquet file: after row 0: 'utf-8'"),
    "Parquet, a name twice": ("d.parquet", two_columns_of_a_name, "d.parquet: duplicate column name"),
    "an array, cut off": ("d.json", b"[" + LINE + b"," + LINE[:-20], "d.json line 2: not valid JSON"),
    "an array without commas": ("d.json", b"[" + LINE * 2 + b"]", "d.json line 2: not valid JSON: Expecting ','"),
    "an array and more": ("d.json", b"[" + LINE + b"]\n{}", "d.json line 3: there is text after the end"),
    "100,000 arrays": ("d.json", b"[" * 100_000, "d.json line 1: not valid JSON: nested too deeply"),
    "an object over several lines": ("d.json", b'{\n"a": [1]\n}', "d.json line 1: a JSON object that spans several lines"),
    "a table of UTF-16": ("d.csv", "prompt,completion\na,b\n".encode("utf-16"), "d.csv line 1: not UTF-8 (byte 0xff)"),
    "a quote without end": ("d.csv", b'prompt,completion\na,b\n"c,d\n' * 3, "d.csv line 3: "),
    "a column twice": ("d.csv", b"prompt,prompt\na,b\n", "d.csv line 1: duplicate column name"),
    "a field too many": ("d.csv", b"prompt,completion\na,b,c\n", "line 2  3 fields, the header has 2"),
    "text of Latin-1": ("d.txt", b"a\ncaf\xe9\n", "d.txt line 2: not UTF-8 (byte 0xe9)"),
    "a pipe": ("d.jsonl", os.mkfifo, "cannot read the data file"),
    "a pipe as Parquet": ("d.parquet", os.mkfifo, "cannot read the data file"),
    "a loop of links": ("d.jsonl", lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "a link to nothing": ("d.jsonl", lambda path: path.symlink_to("none"), "no data file at"),
    "an empty folder": ("d.jsonl", lambda path: path.mkdir(), "has no data file (.json, .jsonl"),
    "a folder of one pipe": ("d", lambda path: (path.mkdir(), os.mkfifo(path / "a.jsonl")), "it is a pipe or device"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG_FILES)
def test_a_wrong_file_is_named(refused, tmp_path, how):
    name, content, expected = WRONG_FILES[how]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    message = refused(path)
    assert expected in message
    assert name in message


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/null", "/dev/stdin", "x" * 5000, "no/such/file.jsonl", "no/such/*.jsonl"]
)
def test_what_is_no_file_is_not_waited_for(refused, path):
    message = refused(path)
    assert path in message
    assert any(words in message for words in ("cannot read", "cannot look for", "no data file"))


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("d.jsonl", b"\n", "d.jsonl line 2: longer than 1 MiB"),
        ("d.json", b'[\n"', "d.json line 2: "),
        ("d.csv", b"prompt,completion\n", "d.csv line 2: longer than 1 MiB"),
        ("d.txt", b"a\n", "d.txt line 2: longer than 1 MiB"),
    ],
)
def test_a_row_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name, start, expected):
    monkeypatch.setattr(lines, "LONGEST", 1 << 20)
    sparse(tmp_path / name, 10**12, start)
    (file,) = open_source(Source(path=str(tmp_path / name)))
    with pytest.raises(InputError, match=expected):
        list(file.rows())
    assert file.done < 2**23


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.json", b'[\n"' + b"a" * 3_000_000, "d.json line 2: longer than 1 MiB"),
        ("d.csv", b'prompt,completion\n"' + b"a\n" * 700_000, r"d.csv line 2: field larger than field limit"),
        ("d.txt", b"a\n" * 700_000, "line 1 to .*longer than 1 MiB.*set sample_by: paragraph, or line"),
    ],
)
def test_a_row_of_many_lines_has_an_end_too(tmp_path, monkeypatch, name, content, expected):
    monkeypatch.setattr(lines, "LONGEST", 1 << 20)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        list(open_source(Source(path=str(tmp_path / name)))[0].rows())


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_cached(make_recipe, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD | {"id": 1}] * 3)
    recipe = make_recipe(data={"train": str(path), "eval_fraction": 0.0, "num_proc": 1})
    encode_chunk = tokenized.encode_chunk

    def slow(rows, encoder):
        with open(path, "ab") as file:
            file.write(LINE)
        return encode_chunk(rows, encoder)

    monkeypatch.setattr(tokenized, "encode_chunk", slow)
    with pytest.raises(InputError, match=r"rows.jsonl changed while it was being read"):
        inspect_data(recipe)
    monkeypatch.undo()
    assert inspect_data(recipe)["rows"] == 4


def test_rows_that_are_odd_and_right_are_kept_as_they_are(make_recipe, tmp_path):
    odd = [
        said(("user", "a\0b"), ("assistant", "\u2028\x85\ufeff")),
        said(("user", "<|im_end|>"), ("assistant", "\ud83d\ude42 \u202e")),
        said(("user", "a"), ("assistant", "b"), id=10**900, score=1e308, note=None),
        row(messages=[{"role": "developer", "content": ""}, *GOOD["messages"]]),
        call({}),
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role":"assistant","content":"b"}], "x": '
        + b"[" * 400 + b"]" * 400 + b"}",
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(odd))
    recipe = make_recipe(data={"train": str(path), "eval_fraction": 0.0, "chat_template": "chatml"})
    assert inspect_data(recipe)["rows"] == len(odd)


# ---- fuzzing ---------------------------------------------------------------------------------------------------------

# what Parquet files hold and JSON does not
strange = st.one_of(
    junk, st.dates(), st.datetimes(), st.timedeltas(), st.binary(max_size=4), st.decimals(), st.just(float("inf")),
    st.just(10**400), st.just(datetime.time()), st.just(decimal.Decimal("NaN")),
)  # fmt: skip
conversation = st.fixed_dictionaries(
    {"messages": st.just(GOOD["messages"])},
    optional={
        "tools": st.one_of(
            strange, st.lists(st.fixed_dictionaries({"name": st.just("f")}, optional={"x": strange}), max_size=2)
        )
    },
)
calling = strange.map(
    lambda value: {
        "messages": [
            GOOD["messages"][0],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": value}}}],
            },
        ]
    }
)
SUFFIXES = ["jsonl", "json", "csv", "tsv", "txt", "parquet"]


def fuzz(examples, strategy, test):
    settings(
        max_examples=examples, deadline=None, derandomize=examples < 1000, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(given(strategy)(test))()  # fmt: skip


@st.composite
def files(draw, folder):
    """The name and bytes of a good file of any kind with a few places changed, cut out or doubled."""
    kind = draw(st.sampled_from(SUFFIXES))
    raw = {
        "jsonl": LINE * 3,
        "json": b"[" + b",".join([LINE] * 3) + b"]",
        "csv": b'prompt,completion\n"a ""b""\nc",d\ne,f\n',
        "tsv": b"prompt\tcompletion\na\tb\n",
        "txt": b"One\n\ntwo\r\n",
        "parquet": parquet(folder / "good.parquet") if kind == "parquet" else b"",
    }[kind]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        end = min(len(raw), at + draw(st.integers(0, 12)))
        raw = raw[:at] + draw(st.one_of(st.binary(max_size=6), st.just(raw[at:end] * 2))) + raw[end:]
    return kind, raw


def fuzz_rows(folder, tokenizer, examples):
    encoder = Supervised(tokenizer, Settings("auto", None, "assistant", 512, "truncate", "skip"))

    def is_row_or_problem(value):
        result = tokenized.encode_chunk([Row(7, value)], encoder)
        assert len(result.bad) + len(result.too_long) + (len(result.examples) > 0) == 1
        assert all(place == (7, 0) and text for place, text in result.bad)

    def is_file_or_refusal(named):
        path = folder / f"d.{named[0]}"
        path.write_bytes(named[1])
        try:
            found = list(open_source(Source(path=str(path)))[0].rows())
        except InputError as error:
            if str(path) not in str(error):
                raise
            return
        tokenized.encode_chunk(found, encoder)

    for strategy in (rows, strange, conversation, calling):
        fuzz(examples, strategy, is_row_or_problem)
    fuzz(examples, st.tuples(st.sampled_from(SUFFIXES), st.binary(max_size=200)), is_file_or_refusal)
    fuzz(examples, files(folder), is_file_or_refusal)


def test_any_row_and_any_file_is_taken_or_refused(tmp_path, tokenizer):
    fuzz_rows(tmp_path, tokenizer, 60)


@pytest.mark.slow
def test_any_row_and_any_file_is_taken_or_refused_at_length(tmp_path, tokenizer):
    fuzz_rows(tmp_path, tokenizer, 1000)
