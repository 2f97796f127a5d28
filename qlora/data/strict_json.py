"""JSON as the standard has it: no NaN, no key twice, nothing that cannot be kept as it is."""

from __future__ import annotations

import json
import math


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


DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
)


def loads(text):
    """Return what the JSON `text` holds; raises ValueError for all that is not strict JSON, has a key twice, or cannot be
    kept as it is."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(reason(error)) from None


def reason(error):
    """Return what is wrong with the JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
