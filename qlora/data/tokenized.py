"""Rows -> token ids on disk: on all cores, in bounded memory, and once, whatever else of the recipe changes.

A file's rows are kept in a folder of the cache under a hash of all that they depend on: the file's contents, the tokenizer
with its template, the recipe's settings for data, and this package's own code. Training reads them memory-mapped.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..system.errors import InputError
from ..system.events import progress
from ..system.storage import new_folder, write_json
from . import cache, columns, processes, strict_json
from .encoder import Encoder, TooLong
from .readers.lines import Place
from .tally import Tally

CHUNK = 256  # rows that a worker takes at a time
_POOL_FROM = 1 << 20  # bytes (rows of a hub data set) under which starting workers costs more than it saves
_LONGEST_REASON = 400  # letters; a row may hold a role of a million


class Part:
    """The tokenized rows of one file, on disk. summary: counts of rows, see `Tally`. arrays: the encoder's ARRAYS of all rows.

    Raises:
        OSError, ValueError, LookupError: the folder is damaged.
    """

    def __init__(self, folder, file, digest, encoder, weight):
        self.path, self.unit, self.digest, self.file = file.path, file.unit, digest, file
        self.encoder, self.weight = encoder, weight
        self.summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if self.summary.keys() != Tally(encoder).summary(file.unit).keys():
            raise LookupError(f"{folder}: no summary")
        self.rows = _mapped(folder / "examples.bin", _example(encoder))
        self.arrays = [_mapped(folder / f"{name}.bin", np.dtype(kind)) for name, kind in encoder.ARRAYS.items()]
        self.ends = self.rows["end"]
        if any(len(array) != (self.ends[-1] if len(self.ends) else 0) for array in self.arrays):
            raise ValueError(f"{folder}: cut off")
        self._sizes = np.diff(self.ends, prepend=0)
        self.lengths = self._sizes if encoder.LENGTH is None else np.full(len(self.rows), encoder.LENGTH, np.int64)

    def where(self, index):
        """Return the file and line of the row that the example at `index` comes from, and the file that it names."""
        path = getattr(self.example(index), "path", None)
        row = self.rows[index]
        return f"{self.path} {self.unit} {Place(row['line'], row['row'])}" + (f" ({path})" if path else "")

    def example(self, index):
        span = slice(self.ends[index] - self._sizes[index], self.ends[index])
        return self.encoder.restored([array[span] for array in self.arrays], self.rows[index])


def _example(encoder):
    """Return the dtype of what is known of an example: where its tokens end, the row that it is of, and the encoder's NUMBERS."""
    return np.dtype([("end", "<i8"), ("line", "<i8"), ("row", "<i8"), ("key", "<u8"), *encoder.NUMBERS.items()])


def _mapped(path, dtype):
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def tokenize(file, encoder: Encoder, weight=1.0, pick=None, num_proc=None) -> Part:
    """Return the Part of `file`, from the cache if nothing that it depends on has changed.

    encoder: what makes examples of its rows. pick: the numbers of the rows to take, from 0, or None for all. num_proc:
    processes; None for all cores.

    Raises:
        InputError: rows are bad or too long and the recipe does not say to leave them out; all of the file together.
    """
    stamp, digest = file.stamp(), file.digest()
    folder = cache.folder() / _key(file, digest, encoder, pick)
    if not _is_whole(folder, file, encoder):
        tally = Tally(encoder)
        try:
            encode = functools.partial(encode_chunk, encoder=encoder)
            results = _naming(file, processes.results(_chunks(file, pick, tally), encode, _workers(file, num_proc)))
            with new_folder(folder, shared=True) as partial, contextlib.closing(results):
                _write(partial, results, encoder, tally, file)
                if file.stamp() != stamp:
                    raise InputError(f"{file.path} changed while it was being read; run again when it is complete")
                tally.refuse(file.path, file.unit)
                tally.refuse_missing_columns(file.path)
                write_json(partial / "summary.json", tally.summary(file.unit))
        except OSError as error:
            if not folder.is_dir():  # else another process was faster
                raise (
                    _unreadable(file, error)
                    if error.filename == file.path
                    else InputError(f"{folder}: {error.strerror or error}; set QLORA_CACHE to a folder with room")
                ) from None
        cache.forget_unused()
    return Part(folder, file, digest, encoder, weight)


def _is_whole(folder, file, encoder):
    """True if this folder of the cache is there and can be used, and is kept for longer now; a damaged one is removed."""
    if not folder.is_dir():
        return False
    try:
        Part(folder, file, None, encoder, 1.0)
    except (OSError, ValueError, LookupError, AttributeError):  # AttributeError: JSON of another kind
        shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir():
            raise InputError(f"{folder}: damaged; remove it, or set QLORA_CACHE to another folder") from None
        return False
    with contextlib.suppress(OSError):  # another user's, or just removed by another process
        os.utime(folder)
    return True


def _naming(file, results):
    """Yield `results`; what the system refuses meanwhile is said of the data file, not of the cache."""
    try:
        yield from results
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file, error):
    return InputError(f"{file.path}: cannot be read and tokenized: {error.strerror or error}")


def _workers(file, num_proc):
    least = getattr(file, "pool_from", _POOL_FROM if file.unit == "line" else 10_000)
    if file.size < least:
        return 1
    return num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _key(file, digest, encoder, pick):
    settings = asdict(encoder.settings)
    del settings["folder"]  # a folder that was moved holds the same rows
    parts = [
        digest,
        Path(file.path).suffix.lower(),
        file.source.sample_by,
        type(encoder).__name__,
        encoder.identity(),
        settings,
        None if pick is None else hashlib.sha256(np.sort(np.fromiter(pick, np.int64)).tobytes()).hexdigest(),
        _code_digest(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code_digest():
    """Return a hash of what turns rows into ids: this package's code for data, and the libraries it calls."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy")]
    return hashlib.sha256(b"\0".join([*code, *map(str.encode, versions)])).hexdigest()


# ---- rows -> chunks of examples -----------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """What became of some rows: their examples, as arrays, and what happened to the other rows."""

    arrays: dict  # of the encoder's ARRAYS
    examples: np.ndarray
    rows: int
    formats: collections.Counter
    counts: collections.Counter  # of rows to which something was done, see the encoder's COUNTS
    bad: list  # (Place, what is wrong)
    too_long: list  # (Place, what is wrong, the reason to count)
    unused: collections.Counter  # keys that are in no example
    columns: set  # of the mapped columns that a row may lack: those found


def encode_chunk(rows, encoder):
    """Return the Chunk of some `rows`, a list of sources.Row."""
    formats, counts, unused = collections.Counter(), collections.Counter(), collections.Counter()
    arrays, examples, bad, too_long = [[] for _ in encoder.ARRAYS], [], [], []
    found, mapped = set(), columns.optional(encoder.settings.columns)
    for row in rows:
        found |= mapped & row.value.keys() if isinstance(row.value, dict) else set()
        try:
            if row.problem is not None:
                raise ValueError(row.problem)
            encoded = encoder.encode(row.value)
        except (ValueError, RecursionError) as error:
            reason = strict_json.reason(error)
            bad.append((row.place, reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."))
            continue
        except TooLong as error:
            too_long.append((row.place, *error.args))
            continue
        formats[encoded.format] += 1
        unused.update(encoded.unused)
        counts.update(encoded.counts)
        for example in encoded.examples:
            values, numbers = encoder.stored(example)
            for array, more in zip(arrays, values, strict=True):
                array.extend(more)
            examples.append((len(arrays[0]), *row.place, encoded.key, *numbers))
    made = {name: np.array(array, kind) for (name, kind), array in zip(encoder.ARRAYS.items(), arrays, strict=True)}
    return Chunk(made, np.array(examples, _example(encoder)), len(rows), formats, counts, bad, too_long, unused, found)


def _chunks(file, pick, tally):
    rows = iter(file.rows())
    if pick is not None:
        rows = _picked(rows, pick, tally)
    while chunk := list(itertools.islice(rows, CHUNK)):
        yield chunk


def _picked(rows, pick, tally):
    for number, row in enumerate(rows):
        if number in pick:
            yield row
        else:
            tally.not_picked += 1


def _write(folder, results, encoder, tally, file):
    """Append each Chunk's arrays to the folder's files."""
    offset = read = 0
    unit = "bytes" if file.unit == "line" else "rows"
    doing = "tokenizing" if encoder.LENGTH is None else "reading"
    with contextlib.ExitStack() as stack, progress(f"{doing} {file.path}", max(1, file.size), unit) as advance:
        names = (*encoder.ARRAYS, "examples")
        opened = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
        for result in results:
            tally.add(result)
            result.examples["end"] += offset
            offset += len(next(iter(result.arrays.values())))
            for name, array in {**result.arrays, "examples": result.examples}.items():
                array.tofile(opened[name])
            done = min(file.done, file.size)
            advance(done - read, f"{tally.rows:,} rows")
            read = done
