"""One row of any known format -> its conversation. The format is read off the row's own keys.

A format is a file here, and its name in the recipe (recipe.Format). It has

    KEYS     a row that has all of these is of this format
    USED     these, and the others that it may have
    LISTS    those whose value is a list; where it is a string, that is JSON, as in a cell of a CSV file
    read     (row, keys to ignore) -> (Conversation, those of them that messages have); raises ValueError

What else a row holds is a label: it is counted as unused, or the row is refused where it says that the answer is not to be
learned.
"""

from __future__ import annotations

import importlib
import typing
from dataclasses import replace

from ...recipe import Format
from ..conversation import CONTEXT
from ..message import is_empty, kind_of
from ..strict_json import loads

# in the order in which a row's keys are looked for
FORMATS = {name: importlib.import_module(f"{__name__}.{name}") for name in typing.get_args(Format)}
OPTIONAL = {key for known in FORMATS.values() for key in known.USED if key not in known.KEYS}
WORDS = {key for known in FORMATS.values() for key in known.USED if key not in (*known.LISTS, *CONTEXT)}
_SHAPES = [" + ".join(f'"{key}"' for key in known.KEYS) for known in FORMATS.values()]
SHAPES = f"{', '.join(_SHAPES[:-1])}, or {_SHAPES[-1]}"

PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages")
DESIRABLE = ("label", "kto_tag")
# other unknown keys of a row (id, source, ...) are labels; these would change what the model sees
_CHANGES_THE_PROMPT = ("images", "image", "audio", "audios", "videos", "documents")


def read(value, only="auto", ignore=()):
    """Return (format name, Conversation) of a row. only: the one format that is expected; "auto" takes any. ignore: keys,
    of the row or of a message, that are not used.

    Raises:
        ValueError: what is wrong with the row and what is allowed, without file and line.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a row is an object with {SHAPES}, not {kind_of(value)}")
    row = {key: inner for key, inner in value.items() if key not in ignore}
    meant = [key for key in _CHANGES_THE_PROMPT if row.get(key)]
    if meant:
        raise ValueError(
            f"{', '.join(meant)}: not supported, and without it the model would see a different conversation; "
            "to train without it, list it in data.ignore_keys"
        )
    refuse_pair(row)
    name = detect(row)
    known = FORMATS[name]
    if only not in ("auto", name):
        raise ValueError(f"is of format {name}, the recipe says format: {only}")
    refuse_verdict(row, name)
    lists = [key for key in (*known.LISTS, "history") if key in known.USED and isinstance(row.get(key), str)]
    row |= {key: _listed(row[key], key) for key in lists}
    useless = [key for key in CONTEXT if key not in known.USED and not is_empty(row.get(key))]
    if useless:
        raise ValueError(
            f"{', '.join(useless)}: rows of format {name} cannot hold it; put it into the {known.KEYS[0]}, or ignore "
            "it with data.ignore_keys"
        )
    nulls = _count_nulls(row)
    seen = {key: _without_nulls(inner) for key, inner in row.items()}
    conversation, ignored = known.read(seen, ignore)
    unused = {str(key) for key, inner in value.items() if key not in known.USED and not is_empty(inner)} | ignored
    return name, replace(conversation, unused=tuple(sorted(unused)), nulls=nulls)


def detect(keys, what="keys"):
    """Return the name of the format that has these `keys`; raises ValueError if none has."""
    for name, known in FORMATS.items():
        if all(key in keys for key in known.KEYS):
            return name
    raise ValueError(
        f"{what} {', '.join(map(str, keys)) or 'none'} match no known format; give {SHAPES}, or data.columns"
    )


def refuse_pair(row):
    """Raise ValueError where the row has a good and a bad answer."""
    found = [key for key in PREFERENCE if not is_empty(row.get(key))]
    if found:
        raise ValueError(
            f"has {', '.join(found)}: a preference pair, for DPO; supervised training does not take it. Set dpo={{}} to train on "
            "pairs, map the good answer (data.columns.completion: chosen), or leave the keys out with data.ignore_keys"
        )


def refuse_verdict(row, name):
    """Raise ValueError where the row, of format `name`, says that its answer is a good or a bad one: both would be learned."""
    key = None if name == "text" else verdict(row)
    if key is not None:
        raise ValueError(
            f"has {key}: {str(row[key]).lower()}, which marks good and bad answers, for KTO; supervised training does not "
            f"take it, it would learn the bad ones too. Set kto={{}}, or keep the good rows, without {key}"
        )


def verdict(row):
    """Return the key of a row that says whether its answer is a good one, or None."""
    said = {key: row.get(key) for key in DESIRABLE}
    return next((key for key, one in said.items() if str(one).strip().lower() in ("true", "false")), None)


def _listed(text, name):
    """Return the list that stands in `text` as JSON, as in a cell of a CSV file."""
    if not text.strip():
        return None
    try:
        return loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is a string, but not a JSON list: {error}; write it with json.dumps") from None


def _without_nulls(value):
    """Return `value` without the keys whose value is null.

    Arrow and `datasets` fill them in where structs of one column have different keys, in Parquet and in what is written as
    JSON from there. JSON that stands in a string keeps its nulls: nobody fills those in.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _count_nulls(value, shown=False):
    """Return how many null keys stand in what a template would write out: arguments of calls, and tools."""
    if isinstance(value, dict):
        return sum(
            shown if inner is None else _count_nulls(inner, shown or key in ("arguments", "tools", "functions"))
            for key, inner in value.items()
        )
    return sum(_count_nulls(inner, shown) for inner in value) if isinstance(value, list) else 0
