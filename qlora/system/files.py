"""Read files that others wrote, within size limits; say what a file is if it is not what it should be."""

from __future__ import annotations

import difflib
import itertools
import json
import shlex
import stat
import unicodedata
from pathlib import Path

from .errors import InputError

MAX_BYTES = 256 * 2**10  # of a recipe or a template: a second to read
_MOST_NAMES, _ALIKE = 1000, 0.75  # of a folder that are looked at; how like a name has to be, from 0 to 1
_LARGEST_JSON = 2**28  # bytes; the largest tokenizer.json and shard indexes take a tenth of it
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_POINTER = b"version https://git-lfs.github.com/spec/"


def open_file(path, what):
    """Return the ordinary file at `path`, open for reading bytes. what: what it is, for messages.

    Raises:
        FileNotFoundError: there is none.
        InputError: it is a folder, a pipe or a device, which may have no end, or it cannot be read.
    """
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
        reason = "it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or device; save it into a file"
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that holds U+0000
        reason = getattr(error, "strerror", None) or str(error)
    raise InputError(f"cannot read {what} {path}: {reason}")


def did_you_mean(path):
    """Return "; did you mean X?" with the file beside `path`, which is missing, whose name is most like it; "" without one.

    Where both names look the same, as of an archive from a Mac, how to rename it.
    """
    path = Path(path)
    try:
        names = [one.name for one in itertools.islice(path.parent.iterdir(), _MOST_NAMES) if one.is_file()]
    except (OSError, ValueError):
        return ""
    of = {_composed(name).casefold(): name for name in names}
    near = difflib.get_close_matches(_composed(path.name).casefold(), of, n=1, cutoff=_ALIKE)
    if not near:
        return ""
    found = of[near[0]]
    if _composed(found) == _composed(path.name):
        names = [shlex.quote(str(one)) for one in (path.parent / found, path)]
        return f"; a file whose name only looks the same is there (other Unicode characters): mv {' '.join(names)}"
    return f"; did you mean {path.parent / found}?"


def _composed(name):
    return unicodedata.normalize("NFC", name)


def read(path, what):
    """Return the text of a file that is no longer than a recipe or a template.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, is too large, or is not UTF-8 (with the line).
    """
    with open_file(path, what) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise InputError(f"cannot read {what} {path}: it is larger than {MAX_BYTES:,} bytes; is it another file?")
    found = instead(raw[:512]) if raw else None
    if found is not None:
        raise InputError(f"{path} {found}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} line {line}: {not_utf8(error)}") from None


def lines_of(path):
    """Return the lines of a UTF-8 file as JSON Lines has them: they end with a line feed alone; text may have U+2028 or U+0085,
    at which str.splitlines would cut.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is not UTF-8.
    """
    with open(path, encoding="utf-8") as file:
        return list(file)


def not_utf8(error):
    """Return in words what a UnicodeDecodeError of UTF-8 says, and the remedy."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"


def instead(head):
    """Return in words what a file that begins so is instead of what its name says, and the remedy; None if nothing tells."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty; download it again"
    if head.startswith(_POINTER):
        return (
            "is a Git LFS pointer, not the file it stands for; run `git lfs pull` in its folder, or download it again"
        )
    if start.startswith(_WEB_PAGE):
        return "is a web page, so the download did not get the file (a login, or a wrong address); download it again"
    if not any(head):
        return "contains only zeros, as after an interrupted download; download it again"
    return None


def refuse_instead(path):
    """Raise InputError if the file is empty, a Git LFS pointer, a web page or zeros; says which."""
    try:
        with open(path, "rb") as file:
            found = instead(file.read(512))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; it cannot be read") from None
    if found is not None:
        raise InputError(f"{path} {found}")


def read_object(path):
    """Return the dict in a JSON file.

    Raises:
        InputError: it cannot be read, is no JSON, no object, holds NaN, or is nested too deeply or too large.
    """
    path = Path(path)
    refuse_instead(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, too large for such a file; download it again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; it cannot be read") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply; download it again") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; fix it or download it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} contains a {type(found).__name__}, not a JSON object; download it again")
    return found


def _constant(name):
    if name == "NaN":
        raise ValueError("NaN, which is not a number")
    return float(name)  # Infinity: state-space models have limits that are none


def refuse_no_number(name, value):
    """Raise TypeError where a file that a person may have changed has something else; None is none."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} is {value!r}, not a number")


def refuse_foreign(file, option, kind):
    """Raise InputError where `file` is there and does not say in its first 1,000 bytes that a verb, `kind`, has written it."""
    file = Path(file)
    if file.is_dir():
        raise InputError(f"{option}: {file} is a folder; choose another name")
    if not file.is_file():
        return
    try:
        with open(file, "rb") as stream:
            head = stream.read(1000)
    except OSError as error:
        raise InputError(f"{option}: {file}: {error.strerror}; choose another name") from None
    if head and kind.encode() not in head:
        raise InputError(f"{option}: {file} is there and was not written by {kind}; choose another name")
