"""Where labelled images are: a folder with a folder for each class, or a table that names image files. Both are data files here.

Order and contents are the same on every machine: files are sorted by their names' code points, classes are names and not
positions, and the hash of such a data file is that of its images too.
"""

from __future__ import annotations

import concurrent.futures
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..system import files
from ..system.errors import InputError
from . import columns, sources, splits
from .readers import READERS
from .readers.lines import Row

IMAGE, LABEL = "image", "label"
_IMAGES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}  # .txt and .json may say something of a folder of classes
_LITTER = {"thumbs.db", "desktop.ini"}  # of file managers; those that begin with a dot too
_BLOCK = 1 << 20


@dataclass
class ImageFolder:
    """A folder with a folder for each class, as a data file: rows of a path within it and the class. names: what these two are
    called, as data.columns has it for tables beside it."""

    path: str
    source: Any
    names: tuple = (IMAGE, LABEL)
    done: int = field(default=0, compare=False)
    unit = "image"
    pool_from = 64  # images under which starting workers costs more than it saves

    def __post_init__(self):
        self._found: Any = None

    @property
    def folder(self):
        """What the paths in its rows start from."""
        return self.path

    @property
    def found(self):
        """[(path within the folder, class)], sorted."""
        if self._found is None:
            self._found = _classes(Path(self.path))
        return self._found

    @property
    def size(self):
        return len(self.found)

    def stamp(self):
        """Return what changes when an image is added, removed or written to."""
        return _stamps([Path(self.path) / name for name, _ in _classes(Path(self.path))])

    def digest(self):
        """Return the sha256 of names and contents, in hex."""
        names = [name for name, _ in self.found]
        return _joined(names, _digests([Path(self.path) / name for name in names]))

    def header(self):
        return None

    def names_of(self, column):
        """Return None: the rows name their classes."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows, numbered from 1."""
        for number, (name, label) in enumerate(self.found, start=1):
            self.done = number
            yield Row(number, dict(zip(self.names, (name, label), strict=True)))


@dataclass
class ImageTable(sources.File):
    """A data file whose rows name image files, relative to its own folder. column: where the name is."""

    column: str = IMAGE
    pool_from = 4096  # bytes, as above

    def stamp(self):
        return super().stamp(), _stamps(self._images())

    def digest(self):
        """Return the sha256 of the file and of all images that it names, in hex."""
        images = self._images()
        return _joined([super().digest()], _digests(images))

    def _images(self):
        named = (row.value.get(self.column) for row in self.rows() if isinstance(row.value, dict))
        return [Path(self.folder) / name for name in named if isinstance(name, str)]


def open_source(source, mapped):
    """Return the ImageFolder or ImageTables that one source of the recipe names. mapped: data.columns, or None.

    Raises:
        InputError: there are none.
    """
    if source.name is not None:
        raise InputError(
            f"data set {source.name}: images of a data set on the hub are not read; save them as files, in a folder for each "
            "class, and give that folder as path"
        )
    if Path(source.path).suffix.lower() in _IMAGES and Path(source.path).is_file():
        raise InputError(
            f"{source.path} is one image; give the folder that has a folder for each class, or a table with the columns {IMAGE} "
            f"and {LABEL}"
        )
    names = tuple((mapped or {}).get(name, name) for name in (IMAGE, LABEL))
    paths = _paths(source.path)
    folders = [path for path in paths if _is_of_classes(path)]
    for name, column in zip((IMAGE, LABEL), names, strict=True):
        if columns.is_template(column) and (folders or name == IMAGE):
            raise InputError(f"data.columns.{name} {column!r}: a template; images need the name of a column here")
    if folders:
        return [
            ImageFolder(str(path), source, names) if path in folders else ImageTable(str(path), source, column=names[0])
            for path in paths
        ]
    return [ImageTable(file.path, source, column=names[0]) for file in sources.open_source(source)]


def not_read(source):
    """Return the files of the source that are no rows: those beside folders of classes, or what describes data sets."""
    folders = [path for path in _paths(source.path) if _is_of_classes(path)]
    beside = [path for folder in folders for path in folder.iterdir() if path.is_file() and not _is_litter(path.name)]
    return [str(path) for path in beside] if folders else sources.not_read(source)


def are_images(path):
    """Return whether `path` is an image, or a folder that has images in it and no data file."""
    path = Path(path)
    if not path.is_dir():
        return path.suffix.lower() in _IMAGES
    some = itertools.islice(path.rglob("*"), 1000)
    return not sources.files_of(path) and any(file.suffix.lower() in _IMAGES for file in some)


def _paths(path):
    """Return what a path or a glob leads to, sorted."""
    found = [path] if not glob.has_magic(path) or Path(path).exists() else sorted(glob.glob(path))  # noqa: PTH207
    return [Path(one) for one in found]


def _is_of_classes(folder):
    """True for a folder with folders in it and no tables, or with neither."""
    try:
        if not folder.is_dir():
            return False
        there = [path for path in folder.iterdir() if not _is_litter(path.name)]
    except OSError as error:
        raise InputError(f"cannot look for images in {folder}: {error.strerror or error}") from None
    kinds = {path.suffix.lower() for path in there if path.is_file()}
    return not kinds & (_TABLES if any(path.is_dir() for path in there) else READERS.keys())


def _classes(root):
    """Return [(path within `root`, class)] of all files in its folders, sorted by class and path.

    Raises:
        InputError: it has no folders, an empty one, images beside them, or they are those of splits.
    """
    try:
        there = sorted(path for path in root.iterdir() if not _is_litter(path.name))
        folders = [path.name for path in there if path.is_dir()]
        beside = [path.name for path in there if not path.is_dir() and path.suffix.lower() in _IMAGES]
        images = {name: _files(root / name) for name in folders}
        _refuse_splits(root, folders)
    except OSError as error:
        raise InputError(f"cannot read the folder {root}: {error.strerror or error}") from None
    if not folders:
        raise InputError(
            f"the folder {root} has no folders in it; put the images of each class into a folder with its name, or give a "
            f"table with the columns {IMAGE} and {LABEL}"
        )
    if beside:
        raise InputError(
            f"the folder {root} has images beside the folders of classes, such as {beside[0]}; move all {len(beside):,} of "
            "them into the folder of their class, or away"
        )
    empty = [name for name in folders if not images[name]]
    if empty:
        raise InputError(f"the folder {root} has no images of {', '.join(empty)}; put some there, or remove the folder")
    return [(f"{name}/{path}", name) for name in folders for path in images[name]]


def _is_litter(name):
    return name.startswith(".") or name.lower() in _LITTER


def _files(folder):
    """Return the paths within `folder` of all files in it and in its folders, sorted, with / between folders.

    Raises:
        InputError: there is a link to a folder, which may lead back here, or to images that are read already.
        OSError: a folder cannot be read.
    """
    found = []
    for place, inside, names in os.walk(folder, onerror=_raise):
        inside[:] = [name for name in inside if not _is_litter(name)]
        within = Path(place).relative_to(folder)
        if links := sorted(name for name in inside if (Path(place) / name).is_symlink()):
            raise InputError(
                f"the folder {place} has a link to a folder, {links[0]}, which is not followed; put the images themselves there, "
                f"or give a table with the columns {IMAGE} and {LABEL}"
            )
        found += [(within / name).as_posix() for name in names if not _is_litter(name)]
    return sorted(found)


def _raise(error):
    raise error


def _refuse_splits(root, folders):
    """Raise InputError where folders are those of splits, each with its own folders of classes."""
    found = [name for name in folders if name.lower() in splits.WORDS and _has_folders_only(root / name)]
    if len(found) > 1 or (found and len(found) == len(folders)):
        named = ", ".join(found)
        train = next((name for name in found if splits.WORDS[name.lower()] == splits.TRAIN), found[0])
        raise InputError(
            f"the folder {root} has the folders {named}, which are not classes; give each by itself, such as "
            f"data.train={root / train}"
        )


def _has_folders_only(folder):
    there = [path for path in folder.iterdir() if not _is_litter(path.name)]
    return bool(there) and all(path.is_dir() for path in there)


def _stamps(paths):
    whole = hashlib.sha256()
    for path in paths:
        try:
            now = path.stat()
            whole.update(f"{path} {now.st_mtime_ns} {now.st_size} {now.st_ino}\n".encode(errors="surrogateescape"))
        except (OSError, ValueError):
            whole.update(f"{path}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def _digests(paths):
    """Return the sha256 of each file, in hex; "" where there is none, or a pipe or a device. By all cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_digest, paths))


def _digest(path):
    whole = hashlib.sha256()
    try:
        with files.open_file(path, "the image") as file:
            while block := file.read(_BLOCK):
                whole.update(block)
    except (OSError, InputError):
        return ""
    return whole.hexdigest()


def _joined(names, digests):
    lines = "\n".join([*names, *digests])
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()
