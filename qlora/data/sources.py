"""Files and hub data sets -> rows, streamed, each with its true place. Strict readers of our own for text formats: the
Arrow-backed loaders re-type good rows beside a bad one without a word, and count lines from a block's start."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..system import files
from ..system.errors import InputError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", *_SEPARATORS)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_BLOCK = 1 << 20
_LONGEST = 64 << 20  # bytes or characters of one row: a hundred times what a model can take


class Row(NamedTuple):
    """One record: the line it starts on (Parquet and hub: its number), from 1, and what it holds, or what is wrong."""

    line: int
    value: Any
    problem: str | None = None


@dataclass
class File:
    """One data file under one source of the recipe. `done` of `size` bytes or rows are read while `rows` runs."""

    path: str
    source: Any
    done: int = field(default=0, compare=False)

    @property
    def unit(self):
        return "row" if self.suffix == ".parquet" else "line"

    @property
    def suffix(self):
        return Path(self.path).suffix.lower()

    @property
    def size(self):
        return Path(self.path).stat().st_size

    def stamp(self):
        """Return what changes when the file is written to or replaced; None if there is none."""
        try:
            now = Path(self.path).stat()
        except OSError:
            return None
        return now.st_mtime_ns, now.st_size, now.st_ino

    def digest(self):
        """Return the sha256 of the contents, in hex; raises InputError if the file cannot be read."""
        whole = hashlib.sha256()
        with _open(self.path) as file:
            try:
                while block := file.read(_BLOCK):
                    whole.update(block)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        return whole.hexdigest()

    def header(self):
        """Return the columns that every row has, where the file is a table; None for other files and what cannot be read,
        which `rows` explains."""
        if self.suffix == ".parquet":
            return _parquet_header(self)
        return next((row.value for row in _table_rows(self, names=True)), None) if self.suffix in _SEPARATORS else None

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, malformed ones with their `problem`; blank lines are passed over.

        Raises:
            InputError: the file is missing or empty, or so broken that no further row can be told apart.
        """
        suffix, empty = self.suffix, True
        if suffix in _COMPRESSED:
            raise InputError(f"{self.path} is compressed; unpack it and give the unpacked file")
        reader = {".parquet": _parquet_rows, ".txt": _text_rows, **dict.fromkeys(_SEPARATORS, _table_rows)}
        try:
            for row in reader.get(suffix, _json_rows)(self):
                empty = False
                yield row
        except OSError as error:  # a disk or network drive that fails under way
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        if empty:
            raise InputError(f"{self.path} has no rows")


@dataclass
class HubSplit:
    """One split of a data set on the hub, fetched by `datasets` into its own cache."""

    source: Any
    done: int = field(default=0, compare=False)
    unit = "row"

    def __post_init__(self):
        subset = f"/{self.source.subset}" if self.source.subset else ""
        self.path = f"{self.source.name}{subset}:{self.source.split}"
        self._data: Any = None

    @property
    def data(self):
        if self._data is None:
            self._data = _load_hub(self.source, self.path)
        return self._data

    @property
    def size(self):
        return len(self.data)

    def stamp(self):
        return self.digest()

    def digest(self):
        """Return what `datasets` calls the fingerprint: it changes with the files, the revision and the split."""
        return hashlib.sha256(f"{self.path} {self.source.revision} {self.data._fingerprint}".encode()).hexdigest()

    def header(self):
        return self.data.column_names

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order; raises InputError if the split cannot be had or is empty."""
        if not len(self.data):
            raise InputError(f"{self.path} has no rows")
        for number, value in enumerate(self.data, start=1):
            self.done = number
            yield Row(number, value)


def _load_hub(source, path):
    import datasets

    try:
        return datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # whatever a remote file makes of itself: the library raises a dozen kinds
        raise InputError(
            f"data set {path}: {_first_line(error)}; check name, subset, split and revision, or the network"
        ) from error


def open_source(source):
    """Return the File or HubSplit objects that one source of the recipe names: a file, a glob, or a folder's data files.

    Raises:
        InputError: there is none.
    """
    if source.name is not None:
        return [HubSplit(source)]
    try:
        return [File(path, source) for path in _expand(source.path)]
    except OSError as error:
        raise InputError(f"cannot look for data files at {source.path}: {error.strerror or error}") from None


def _expand(path):
    if Path(path).is_dir():
        found = sorted(
            str(file)
            for file in Path(path).iterdir()
            if file.suffix.lower() in _SUFFIXES and file.name not in _DESCRIPTIONS
        )
        if not found:
            raise InputError(f"the folder {path} has no data file ({', '.join(_SUFFIXES)})")
        return found
    if Path(path).exists() or not glob.has_magic(str(path)):
        return [str(path)]
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not found:
        raise InputError(f"no data file matches {path} (looked in {Path.cwd()})")
    return found


def not_read(source):
    """Return the files of a folder that describe data sets and are therefore not read as rows."""
    folder = Path(source.path) if source.path is not None else None
    return [str(folder / name) for name in _DESCRIPTIONS if (folder / name).is_file()] if folder else []


def _open(path):
    try:
        return files.open_file(path, "the data file")
    except FileNotFoundError:
        raise InputError(f"no data file at {path} (looked in {Path.cwd()})") from None


def _json_rows(file):
    with _open(file.path) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf")
        while not start.strip() and (more := stream.read(4096)):
            start = more
        stream.seek(0)
        if start.lstrip()[:1] == b"[":
            yield from _array_rows(file, stream)
        else:
            yield from _line_rows(file, stream)


def _lines(path, stream):
    """Yield (number, line) of a file, bytes or text; raises InputError where one is longer than any row."""
    number = 0
    while line := stream.readline(_LONGEST + 1):
        number += 1
        if len(line) > _LONGEST:
            raise _too_long(path, f"line {number}")
        yield number, line


def _too_long(path, place, remedy="split it or remove it"):
    return InputError(f"{path} {place}: longer than {_LONGEST >> 20} MiB, too long for one row; {remedy}")


def _line_rows(file, stream):
    for number, line in _decoded_lines(file, stream):  # not splitlines: U+2028 may stand inside a string
        if isinstance(line, Row):
            yield line
        elif line.strip():
            try:
                yield Row(number, loads(line))
            except ValueError as error:
                if line.strip() == "{":
                    raise InputError(
                        f"{file.path} line {number}: a JSON object that spans several lines; write one array of objects, or "
                        "one object per line (JSON Lines)"
                    ) from None
                yield Row(number, None, f"not valid JSON: {error}; expected one JSON object per line")


def _decoded_lines(file, stream):
    """Yield (number, text of the line), or (number, Row with the problem) where it is not UTF-8."""
    for number, raw in _lines(file.path, stream):
        file.done += len(raw)
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield number, Row(number, None, _not_utf8(raw, error))


def _not_utf8(raw, error):
    return f"not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8"


def _refuse_encoding(path):
    """Raise InputError with the line of the first byte that is not UTF-8."""
    with _open(path) as stream:
        for number, raw in _lines(path, stream):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path} line {number}: {_not_utf8(raw, error)}") from None
    raise InputError(f"{path}: not UTF-8; save the file as UTF-8")


def _table_rows(file, names=False):
    """Rows of a table with a header; every value is a string. A quoted field may hold separators and line ends. names:
    the header alone, as a row."""
    path, header, line = file.path, None, 1
    csv.field_size_limit(_LONGEST)
    _open(path).close()
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(_counted(file, stream), delimiter=_SEPARATORS[file.suffix], strict=True)
        try:
            for fields in reader:
                start, line = line, reader.line_num + 1
                if not any(value.strip() for value in fields):
                    continue
                if header is None:
                    header = fields
                    if len(set(header)) != len(header):
                        raise InputError(f"{path} line {start}: duplicate column name in the header")
                    if names:
                        yield Row(start, header)
                        return
                elif len(fields) != len(header):
                    yield Row(start, None, f"{len(fields)} fields, the header has {len(header)}")
                else:
                    yield Row(start, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise InputError(f"{path} line {line}: {error}; cannot tell where this row ends") from None
        except UnicodeDecodeError:
            _refuse_encoding(path)


def _counted(file, stream):
    for _, line in _lines(file.path, stream):
        file.done += len(line)
        yield line


def _text_rows(file):
    """Rows {"text"} of a plain text file: the whole of it, its paragraphs (between blank lines), or its lines."""
    by = file.source.sample_by
    with _open(file.path) as stream:
        start, lines, size = 1, [], 0
        for number, line in _decoded_lines(file, stream):
            if isinstance(line, Row):
                raise InputError(f"{file.path} line {number}: {line.problem}")
            if by == "line":
                yield from _text_row(number, [line], by)
            elif by == "paragraph" and not line.strip():
                yield from _text_row(start, lines, by)
                start, lines, size = number + 1, [], 0
            else:
                lines.append(line)
                size += len(line)
                if size > _LONGEST:
                    raise _too_long(file.path, f"line {start} to {number}", "set sample_by: paragraph, or line")
        yield from _text_row(start, lines, by)


def _text_row(line, lines, by):
    text = "".join(lines)
    if text.strip():
        yield Row(line, {"text": text if by == "document" else text.rstrip("\r\n")})


def _parquet_rows(file):
    import pyarrow
    import pyarrow.parquet

    _open(file.path).close()
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            if len(set(names)) != len(names):
                raise InputError(f"{file.path}: duplicate column name")
            total = max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(batch_size=64):  # of 64 rows, which may be long
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
                file.done = file.size * number // total
    # OSError: pages that cannot be unpacked; ValueError and OverflowError: bytes that are no text, dates that are none
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{file.path} is not a complete Parquet file: after row {number}: {_first_line(error)}"
        ) from None


def _parquet_header(file):
    import pyarrow
    import pyarrow.parquet

    _open(file.path).close()
    try:
        return pyarrow.parquet.read_schema(file.path).names
    except (pyarrow.ArrowException, OSError, ValueError):
        return None


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _array_rows(file, stream):
    """Rows of one JSON array, read block by block: no more than a block and the longest row are in memory."""
    buffer = _Buffer(file, stream)
    buffer.peek()
    buffer.skip(1)  # the bracket
    line = buffer.line
    try:
        while buffer.peek() != "]":
            line = buffer.line
            yield Row(line, buffer.value())
            if buffer.peek() not in (",", "]"):
                raise ValueError(f"Expecting ',' or ']' at column {buffer.column()}")
            if buffer.peek() == ",":
                buffer.skip(1)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.path} line {buffer.line}: not valid JSON: {_reason(error)}") from None
    buffer.skip(1)
    if buffer.peek():
        raise InputError(f"{file.path} line {buffer.line}: there is text after the end of the JSON array")


class _Buffer:
    """A window on a text stream that grows until one JSON value lies in it, and knows its line."""

    def __init__(self, file, stream):
        import codecs

        self.file, self.stream, self.text, self.at, self.line, self.ended = file, stream, "", 0, 1, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.last_line_end = -1

    def more(self, size=_BLOCK):
        """Append a block; return False at the end of the file."""
        raw = self.stream.read(size)
        self.file.done += len(raw)
        try:
            decoded = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError:
            _refuse_encoding(self.file.path)
        self.text, self.at, self.last_line_end = self.text[self.at :] + decoded, 0, self.last_line_end - self.at
        self.ended = not raw
        return not self.ended

    def skip(self, count):
        end = self.text.find("\n", self.at, self.at + count)
        while end >= 0:
            self.line, self.last_line_end = self.line + 1, end
            end = self.text.find("\n", end + 1, self.at + count)
        self.at += count

    def peek(self):
        """Return the next character that is no white space, or "" at the end."""
        while True:
            end = self.at
            while self.text[end : end + 1] in _SPACE:
                end += 1
            self.skip(end - self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def column(self):
        return self.at - self.last_line_end

    def value(self):
        self.peek()
        size = _BLOCK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut_off and len(self.text) - self.at > _LONGEST:
                    raise _too_long(self.file.path, f"line {self.line}") from None
                if not cut_off or not self.more(size):
                    self.skip(error.pos - self.at)
                    raise ValueError(f"{error.msg.removesuffix(' at')} at column {self.column()}") from None
                size *= 2
            else:
                if end < len(self.text) or self.ended or not self.more(size):
                    self.skip(end - self.at)
                    return value


_SPACE = (" ", "\t", "\n", "\r")


def _no_duplicates(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object"
        )
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not valid JSON")


def _finite(text):
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole(text):
    if len(text) > 1000:  # Python itself refuses more than 4300 digits, or as many as it is told
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
)


def loads(text):
    """Return what the JSON `text` holds; raises ValueError for all that is not strict JSON, has a key twice, or cannot be
    kept as it is."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def _reason(error):
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
