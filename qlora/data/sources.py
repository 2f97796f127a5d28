"""The files and hub data sets that a source of the recipe names -> rows, streamed, each with its true place."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..system.errors import InputError
from . import splits
from .readers import READERS, reader_of
from .readers.lines import Row, first_line, open_file

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_OF_A_RUN = ("recipe.yaml", "environment.json")  # as runs.folder calls them
_BLOCK = 1 << 20


@dataclass
class File:
    """One data file under one source of the recipe. `done` of `size` bytes or rows are read while `rows` runs."""

    path: str
    source: Any
    done: int = field(default=0, compare=False)

    @property
    def folder(self):
        """What paths in its rows start from."""
        return str(Path(self.path).parent)

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
        with open_file(self.path) as file:
            try:
                while block := file.read(_BLOCK):
                    whole.update(block)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        return whole.hexdigest()

    def header(self):
        """Return the columns that every row has, where the file is a table; None for other files and what cannot be read,
        which `rows` explains."""
        reader = reader_of(self.suffix)
        return reader.header(self) if hasattr(reader, "header") else None

    def names_of(self, column):
        """Return None: a file does not name the classes of a column."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, malformed ones with their `problem`; blank lines are passed over.

        Raises:
            InputError: the file is missing or empty, or so broken that no further row can be told apart.
        """
        empty = True
        if self.suffix in _COMPRESSED:
            raise InputError(f"{self.path} is compressed; unpack it and give the unpacked file")
        try:
            for row in reader_of(self.suffix).rows(self):
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
    unit, folder = "row", ""

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

    def names_of(self, column):
        """Return the names of the classes whose numbers `column` holds, None where it is no `datasets.ClassLabel`."""
        return getattr(self.data.features.get(column), "names", None)

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
            f"data set {path}: {first_line(error)}; check name, subset, split and revision, or the network"
        ) from error


def open_source(source, mapped=None):
    """Return the File or HubSplit objects that one source of the recipe names: a file, a glob, or a folder's data files.

    mapped: data.columns, which makes no difference here.

    Raises:
        InputError: there is none, or a folder has training rows beside held-out ones.
    """
    if source.name is not None:
        return [HubSplit(source)]
    try:
        return [File(path, source) for path in _expand(source.path)]
    except OSError as error:
        raise InputError(f"cannot look for data files at {source.path}: {error.strerror or error}") from None


def files_of(folder) -> list[str]:
    """Return the data files of a folder, sorted."""
    files = (file for file in Path(folder).iterdir() if file.suffix.lower() in READERS)
    return sorted(str(file) for file in files if file.name not in _DESCRIPTIONS)


def _expand(path):
    if Path(path).is_dir():
        found = files_of(path)
        if not found:
            raise InputError(f"the folder {path} has no data file ({', '.join(READERS)})")
        splits.refuse_mixed(path, found)
        return found
    if Path(path).exists() or not glob.has_magic(str(path)):
        return [str(path)]
    found = [file for file in _matching(path) if not _run_of(file, path)]
    if not found:
        raise InputError(f"no data file matches {path} (looked in {Path.cwd()})")
    return found


def _matching(pattern):
    return sorted(glob.glob(str(pattern), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)


def _run_of(file, pattern):
    """Return the run folder in which a file lies that `**` has found, or None: what a run has written is not its own data."""
    if "**" not in str(pattern):
        return None
    return next(
        (str(parent) for parent in Path(file).parents if all((parent / name).is_file() for name in _OF_A_RUN)), None
    )


def not_read(source):
    """Return the files of a folder that describe data sets, and the folders of runs that a pattern passes over."""
    if source.path is None:
        return []
    folder = Path(source.path)
    runs = {run for file in _matching(folder) if (run := _run_of(file, folder))}
    return [str(folder / name) for name in _DESCRIPTIONS if (folder / name).is_file()] + sorted(runs)
