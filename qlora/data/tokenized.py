"""Rows -> token ids on disk: on all cores, in bounded memory, and once, whatever else of the recipe changes.

A file's rows are kept in a folder of the cache under a hash of all that they depend on: the file's contents, the tokenizer
with its template, the recipe's settings for data, and this package's own code. Training reads them memory-mapped.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..system.errors import InputError
from ..system.events import progress
from ..system.storage import new_folder, write_json
from . import chat, formats, length, words
from .examples import IGNORE_INDEX, Example, encode

CHUNK = 256  # rows that a worker takes at a time
_LONGEST_REASON = 400  # letters; a row may hold a role of a million
SHOWN = 20  # bad or dropped rows that are named; the rest are counted
_POOL_FROM = 1 << 20  # bytes (rows of a hub data set) under which starting workers costs more than it saves
_ALIKE = 3  # rows with the same problem that are shown in full
_KEPT_DAYS = 30
_EXAMPLE = np.dtype([("end", "<i8"), ("line", "<i8"), ("key", "<u8"), ("trained", "<i4"), ("last", "<i4")])


@dataclass(frozen=True)
class Settings:
    """What of the recipe decides how a row is tokenized."""

    format: str
    columns: dict | None
    train_on: str
    max_length: int
    overlong: str
    on_bad_row: str
    ignore_keys: tuple = ()
    thoughts: str = "keep"


class Part:
    """The tokenized rows of one file, on disk. summary: counts of rows, see `_Tally`."""

    def __init__(self, folder, file, digest, settings, weight):
        self.path, self.unit, self.digest, self.file = file.path, file.unit, digest, file
        self.settings, self.weight = settings, weight
        self.summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self.rows = _mapped(folder / "examples.bin", _EXAMPLE)
        self.tokens = _mapped(folder / "tokens.bin", np.dtype("<i4"))
        self.trained = _mapped(folder / "trained.bin", np.dtype("?"))
        self.ends = self.rows["end"]
        self.lengths = np.diff(self.ends, prepend=0)

    def example(self, index):
        span = slice(self.ends[index] - self.lengths[index], self.ends[index])
        ids = self.tokens[span]
        return Example(ids.tolist(), np.where(self.trained[span], ids, IGNORE_INDEX).tolist())


def _mapped(path, dtype):
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def tokenize(file, tokenizer, settings, weight=1.0, pick=None, num_proc=None) -> Part:
    """Return the Part of `file`, from the cache if nothing that it depends on has changed.

    pick: the numbers of the rows to take, from 0, or None for all. num_proc: processes; None for all cores.

    Raises:
        InputError: rows are bad or too long and the recipe does not say to leave them out; all of the file together.
    """
    stamp, digest = file.stamp(), file.digest()
    folder = _cache() / _key(file, digest, tokenizer, settings, pick)
    if folder.is_dir():
        os.utime(folder)
    else:
        tally = _Tally(settings)
        try:
            results = _results(_chunks(file, pick, tally), _Job(tokenizer, settings), _workers(file, num_proc))
            results = _naming(file, results)
            with new_folder(folder, shared=True) as partial, contextlib.closing(results):
                _write(partial, results, tally, file)
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
        _forget_unused(folder.parent)
    return Part(folder, file, digest, settings, weight)


def _naming(file, results):
    """Yield `results`; what the system refuses meanwhile is said of the data file, not of the cache."""
    try:
        yield from results
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file, error):
    return InputError(f"{file.path}: cannot be read and tokenized: {error.strerror or error}")


def _workers(file, num_proc):
    if file.size < (_POOL_FROM if file.unit == "line" else 10_000):
        return 1
    return num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@functools.cache
def _cache():
    """Return the folder of tokenized files: $QLORA_CACHE, or ~/.cache/qlora; one that goes with the process if neither can
    be written."""
    root = Path(
        os.environ.get("QLORA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qlora"
    )
    folder = root / "tokenized"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        import atexit

        folder = Path(tempfile.mkdtemp(prefix="qlora-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def _forget_unused(cache):
    """Remove what no run has used for _KEPT_DAYS."""
    for folder in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if folder.stat().st_mtime < time.time() - _KEPT_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def _key(file, digest, tokenizer, settings, pick):
    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    names = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    parts = [
        digest,
        Path(file.path).suffix.lower(),
        file.source.sample_by,
        backend,
        names,
        tokenizer.chat_template,
        sorted(chat.known_stops(tokenizer)),
        asdict(settings),
        None if pick is None else hashlib.sha256(np.sort(np.fromiter(pick, np.int64)).tobytes()).hexdigest(),
        _code_digest(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code_digest():
    """Return a hash of what turns rows into ids: this package's code for data, and the libraries it calls."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2", "numpy")]
    return hashlib.sha256(b"\0".join([*code, *map(str.encode, versions)])).hexdigest()


# ---- rows -> results, in this process or in several --------------------------------------------------------------------


@dataclass
class _Result:
    """What became of a chunk of rows. Arrays of the Examples, and what happened to the other rows."""

    tokens: np.ndarray
    trained: np.ndarray
    examples: np.ndarray
    rows: int
    formats: collections.Counter
    counts: collections.Counter  # of rows to which something was done, see `_Tally.summary`
    bad: list  # (line, what is wrong)
    too_long: list  # (line, what is wrong, the reason to count)
    unused: collections.Counter  # keys that are in no conversation
    columns: set  # of the mapped columns that a row may lack: those found


class _Job:
    """Turns a chunk of rows into a _Result."""

    def __init__(self, tokenizer, settings):
        self.tokenizer, self.settings = tokenizer, settings

    def __call__(self, chunk):
        settings, seen = self.settings, collections.Counter()
        ids, labels, examples, bad, too_long = [], [], [], [], []
        unused, columns, mapped = collections.Counter(), set(), formats.optional_columns(settings.columns)
        counts: collections.Counter = collections.Counter()
        masks = settings.thoughts == "mask"
        for row in chunk:
            columns |= mapped & row.value.keys() if isinstance(row.value, dict) else set()
            try:
                if row.problem is not None:
                    raise ValueError(row.problem)
                name, conversation = read(row.value, settings)
                encoded = encode(self.tokenizer, conversation, settings.train_on, masks)
                fitted = length.fit(
                    self.tokenizer,
                    conversation,
                    encoded,
                    settings.train_on,
                    settings.max_length,
                    settings.overlong,
                    masks,
                )
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                bad.append((row.line, reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."))
                continue
            except length.TooLong as error:
                too_long.append((row.line, *error.args))
                continue
            seen[name] += 1
            unused.update({*conversation.unused, *frozenset().union(*(example.left_out for example in encoded))})
            counts["rows_truncated"] += fitted.cut
            counts["rows_split"] += fitted.split
            counts["rows_merged"] += conversation.merged
            counts["rows_with_nulls"] += conversation.nulls > 0
            counts["rows_without_thoughts"] += conversation.dropped_thoughts
            if len(encoded) > 1:
                lengths = [len(example.input_ids) for example in encoded]
                counts.update({"conversations_by_answer": 1, "answers_by_answer": len(lengths)})
                counts.update({"tokens_by_answer": sum(lengths), "tokens_of_conversations": max(lengths)})
            key = conversation.key()
            for example in fitted.examples:
                ids.extend(example.input_ids)
                labels.extend(example.labels)
                last = next((label for label in reversed(example.labels) if label != IGNORE_INDEX), -1)
                examples.append((len(ids), row.line, key, example.num_trained, last))
        return _Result(
            np.array(ids, "<i4"),
            np.array(labels, "<i4") != IGNORE_INDEX,
            np.array(examples, _EXAMPLE),
            len(chunk),
            seen,
            counts,
            bad,
            too_long,
            unused,
            columns,
        )


def read(value, settings):
    """Return (format name, Conversation) of a row under `settings`; raises ValueError for what is wrong with it."""
    name, conversation = formats.read(value, settings.columns, settings.format, settings.ignore_keys)
    if settings.thoughts == "drop":
        messages = words.without_thoughts(conversation.messages)
        dropped = messages != conversation.messages
        conversation = dataclasses.replace(conversation, messages=messages, dropped_thoughts=dropped)
    return name, conversation


_job: Any = None


def _start_worker(job):
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = job


def _end_with_parent():
    """End this worker when the main process has, however: nobody else would tell it that no more rows come."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(chunk):
    return _job(chunk)


def _results(chunks, job, workers):
    """Yield the _Result of each chunk, in order. No more than a few chunks a worker are in memory."""
    if workers == 1:
        yield from map(job, chunks)
        return
    # fork where it is the custom: nothing is imported again, and a script needs no `if __name__ == "__main__"`
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
            waiting = collections.deque()
            try:
                for chunk in chunks:
                    with warnings.catch_warnings():
                        # the children tokenize and end; they touch no thread's lock
                        warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
                        waiting.append(pool.submit(_run_job, chunk))
                    if len(waiting) > 3 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:  # nobody wants the rest
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except concurrent.futures.BrokenExecutor:
        raise InputError("a tokenizing process died, probably of too little memory; set data.num_proc=1") from None


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


_COUNTS = (
    "rows_truncated",
    "rows_split",
    "rows_merged",  # consecutive messages of the assistant became one turn
    "rows_with_nulls",  # nulls were removed from tool calls or tools
    "rows_without_thoughts",  # data.thoughts is drop, and there were some
    "conversations_by_answer",  # became a training row an answer
    "answers_by_answer",
    "tokens_by_answer",  # of all these rows
    "tokens_of_conversations",  # of the longest of each conversation
)


@dataclass
class _Alike:
    """Refused rows with the same kind of problem: how many, and (line, what is wrong) of the first."""

    count: int = 0
    first: list = field(default_factory=list)


class _Tally:
    """Counts what became of the rows of one file."""

    def __init__(self, settings):
        self.refuses_bad, self.refuses_long = settings.on_bad_row == "error", settings.overlong == "error"
        self.rows = self.not_picked = self.num_refused = self.num_too_long = self.largest_token = 0
        self.counts: collections.Counter = collections.Counter()
        self.unused, self.missing = collections.Counter(), formats.optional_columns(settings.columns)
        self.formats, self.reasons = collections.Counter(), collections.Counter()
        self.refused: dict = {}  # kind of problem: _Alike
        self.dropped: list = []  # (line, text): the first of them

    def add(self, result):
        self.rows += result.rows
        self.counts += result.counts
        self.formats += result.formats
        self.unused += result.unused
        self.missing -= result.columns
        self.largest_token = max(self.largest_token, int(result.tokens.max(initial=0)))
        for line, text in result.bad:
            self._leave_out(line, text, _sort_of(text), self.refuses_bad)
        for line, text, reason in result.too_long:
            self.num_too_long += self.refuses_long
            self._leave_out(line, text, reason, self.refuses_long)

    def _leave_out(self, line, text, reason, refused):
        if refused:
            self.num_refused += 1
            kind = _sort_of(text)
            if kind in self.refused or len(self.refused) < SHOWN:
                same = self.refused.setdefault(kind, _Alike())
                same.count += 1
                same.first += [(line, text)] if len(same.first) < 2 * _ALIKE else []
        else:
            self.reasons[reason] += 1
            self.dropped += [(line, text)] if len(self.dropped) < SHOWN else []

    def refuse(self, path, unit):
        """Raise InputError if there are rows that the recipe does not say to leave out."""
        if not self.num_refused:
            return
        remedies = []
        if self.num_too_long:
            remedies.append("raise data.max_length, or set data.overlong to drop, truncate_prompt, truncate or split")
        if self.num_refused > self.num_too_long:
            remedies.append("fix these rows, or skip them with data.on_bad_row=skip")
        lines = self._problems(unit)
        more = self.num_refused - sum(count for count, _ in lines)
        raise InputError.listing(
            path, [text for _, text in lines], "; ".join(remedies), total=self.num_refused, more=more
        )

    def _problems(self, unit):
        """Return [(number of rows, what is wrong with them), ...] in order: one for each of the first _ALIKE rows with a kind of
        problem, and one for all the others of that kind."""
        found = []
        for same in self.refused.values():
            found += [(line, 1, f"{unit} {line}  {text}") for line, text in same.first[:_ALIKE]]
            rest = [line for line, _ in same.first[_ALIKE:]]
            if rest:
                more = same.count - _ALIKE
                lines = ", ".join(map(str, rest)) + (", ..." if more > len(rest) else "")
                found.append((rest[0], more, f"{unit}{'s' if len(rest) > 1 else ''} {lines}  likewise ({more:,} rows)"))
        return [(count, text) for _, count, text in sorted(found)[:SHOWN]]

    def refuse_missing_columns(self, path):
        """Raise InputError if a column that rows may lack is in none of them."""
        if self.missing and self.rows:
            raise InputError(
                f"{path}: no row has {', '.join(map(repr, sorted(self.missing)))}, which data.columns names; "
                "correct the name or remove it"
            )

    def summary(self, unit):
        """Return the counts as a JSON object."""
        left_out = sum(self.reasons.values())
        reasons = dict(self.reasons.most_common())
        if self.not_picked:
            reasons["not in the sample of max_rows"] = self.not_picked
        return {
            "format": ", ".join(
                f"{name} {count:,}" if len(self.formats) > 1 else name for name, count in self.formats.most_common()
            ),
            "rows_read": self.rows + self.not_picked,
            "rows_kept": self.rows - left_out,
            "rows_dropped": left_out + self.not_picked,
            **{key: self.counts[key] for key in _COUNTS},
            "reasons": reasons,
            "unused": dict(sorted(self.unused.items(), key=lambda item: (-item[1], item[0]))),
            "largest_token": self.largest_token,
            "dropped_rows": [{"row": f"{unit} {line}", "reason": text} for line, text in self.dropped],
        }


def _sort_of(text):
    """Return the reason without what is special to one row: numbers, and what is quoted."""
    return re.sub(r"\d+", "N", re.sub(r"(?<!\w)'[^']*'", "'...'", text))[:120]


def _write(folder, results, tally, file):
    """Append each result's arrays to the folder's files."""
    offset = read = 0
    with (
        progress(f"tokenizing {file.path}", max(1, file.size), "bytes" if file.unit == "line" else "rows") as advance,
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "trained.bin", "wb") as trained,
        open(folder / "examples.bin", "wb") as examples,
    ):
        for result in results:
            tally.add(result)
            result.examples["end"] += offset
            offset += len(result.tokens)
            result.tokens.tofile(tokens)
            result.trained.tofile(trained)
            result.examples.tofile(examples)
            done = min(file.done, file.size)
            advance(done - read, f"{tally.rows:,} rows")
            read = done
