"""Files that others wrote: read as what they should be, or named as what they are instead."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import InputError

_LARGEST_JSON = 2**28  # bytes; the largest tokenizer.json and shard indexes take a tenth of it
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")
_POINTER = b"version https://git-lfs.github.com/spec/"


def instead(path):
    """Return in words what a file is that cannot be what its name says, and the remedy; None if nothing gives it away."""
    with open(path, "rb") as file:
        head = file.read(512)
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
        return "is filled with zeros, as an interrupted download leaves it; download it again"
    return None


def refuse_instead(path):
    """Raise InputError if the file is empty, a Git LFS pointer, a web page or zeros; says which."""
    try:
        found = instead(path)
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
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, which no such file has; download it again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_constant)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; it cannot be read") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply for what it should be; download it again") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; mend it or download it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not a JSON object; download it again")
    return found


def _constant(name):
    if name == "NaN":
        raise ValueError("NaN, which is no number")
    return float(name)  # Infinity: state-space models have limits that are none
