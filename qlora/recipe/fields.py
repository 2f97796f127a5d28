"""What fields of the recipe may hold: kinds of numbers, names, paths and sizes; and what every section is."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1  # a count that the libraries can take
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, lt=1)]
Number = Annotated[float, Field(gt=0)]


def _one_line(text):
    """A name: not blank, and without line ends and other characters that nobody sees."""
    strange = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Zl", "Zp")), None)
    if not text.strip():
        raise ValueError("should not be blank")
    if strange is not None:
        raise ValueError(f"should be one line of plain text, without the character U+{ord(strange):04X}")
    return text


def _path(text):
    """A name or path, of which `~` is no part: it is the shell that knows whose home it is."""
    if text.startswith("~"):
        raise ValueError("should be a full path; ~ is not expanded (write ./~ for a folder of that name)")
    return _one_line(text)


def _expression(text):
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"should be a regular expression ({error})") from None
    return _one_line(text)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text):
    """Return bytes of "5GB" (10**9) or "5GiB" (2**30); raises ValueError otherwise."""
    text = text.strip().upper()
    unit = next((unit for unit in _UNITS if text.endswith(unit)), None)
    number = text.removesuffix(unit or "").strip()
    count = float(number) * _UNITS[unit] if unit and re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", number) else 0
    if not 1 <= count < 2**63:
        raise ValueError("give a size such as 5GB or 23.5GiB")
    return int(count)


def _size(text):
    parse_size(text)
    return text


def _attention(name):
    """One of transformers' implementations, or a kernel of the hub that transformers 5.23 loads: code, so of one owner only."""
    if name in ATTENTION or re.fullmatch(r"kernels-community/\w[\w.-]*(@[\w.-]+)?(:\w+)?", name):
        return name
    if "/" in name:
        raise ValueError(
            "should be kernels-community/NAME or kernels-community/NAME@REVISION, if it is a kernel of the hub: those of "
            "other owners are code that nobody has looked at, and are not run"
        )
    raise ValueError(f"should be one of {', '.join(ATTENTION)}, kernels-community/NAME")


ATTENTION = "auto sdpa eager flex_attention flash_attention_2 flash_attention_3 flash_attention_4".split()
Name = Annotated[str, AfterValidator(_one_line)]
Attention = Annotated[str, AfterValidator(_attention)]
Expression = Annotated[str, AfterValidator(_expression)]
PathText = Annotated[str, AfterValidator(_path)]
Size = Annotated[str, AfterValidator(_size)]
Names = Annotated[list[Name], Field(min_length=1)]


class Section(BaseModel):
    """A section of the recipe. The words below a field are its documentation, of which docs/recipe.md is made."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
