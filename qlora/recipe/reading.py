"""What a recipe is read from: a YAML file or nested values, with overrides laid over them; and what none may hold."""

from __future__ import annotations

import re

from ..system import files, secrets
from ..system.errors import InputError
from . import error_messages, moved, yaml_document

_NO_SECRETS = (
    "looks like a token or password, which a recipe must not hold: it is copied into the run folder. Take it out (and renew "
    "it, if others have seen the file); set HF_TOKEN in the environment, or log in once with `hf auth login`"
)


def from_file(path, overrides, what="recipe"):
    """Return (nested values, {place in them: line}) of the YAML file `path` with `section.field=value` strings laid over it.

    what: the file is, for messages. A recipe that lies in a run folder means that folder, wherever it was moved or copied
    (moved.py).

    Raises:
        InputError: it is not there, is no YAML mapping, or holds what no recipe may hold.
    """
    try:
        text = files.read(path, f"the {what}")
    except FileNotFoundError:
        raise InputError(f"no {what} at {path}; give the path of a YAML file{files.did_you_mean(path)}") from None
    values, lines = yaml_document.parse(text, path)
    if not isinstance(values, dict):
        fields = "base, variants, output_dir, ..." if what == "comparison" else "sections model, data, output_dir, ..."
        raise InputError(f"{path}: a {what} is one YAML mapping with {fields}")
    moved.settle(values, path)
    return with_overrides(path, values, lines, overrides)


def with_overrides(where, values, lines, overrides):
    """Lay `section.field=value` strings over the nested `values`, which change; return them and `lines` like `from_file`.

    where: what they are read from, for messages.
    """
    _override(values, lines, overrides)
    _refuse_secrets(where, values, lines)
    _refuse_half_characters(where, values, lines)
    return values, lines


def _override(values, lines, overrides):
    """Lay each `section.field=value` over `values`; the value is read as YAML."""
    before: set[tuple] = set()
    for override in overrides:
        key, sign, text = override.partition("=")
        parts, shown = tuple(key.split(".")), f"override {error_messages.dotted((key,))}"
        if not sign or not all(parts):
            raise InputError(f"{shown} is not of the form section.field=value")
        if any(secrets.names_secret(part) for part in parts):
            raise InputError(f"{shown}: {_NO_SECRETS}")
        if overridden := next((other for other in before if other[: len(parts)] == parts), None):
            again = (
                "is given twice"
                if overridden == parts
                else f"would undo {error_messages.dotted(overridden)}, which is given too"
            )
            raise InputError(f"{shown} {again}; keep one")
        before.add(parts)
        if "\n" in text or "\r" in text:
            raise InputError(f'{shown}: the value has more than one line; write a line end as "\\n", in double quotes')
        # the space keeps what begins with % or --- from being more than a value
        value = yaml_document.parse(f" {text}", shown)[0] if text.strip() else None
        node = values
        for index, part in enumerate(parts[:-1]):
            if isinstance(node.get(part), list):
                raise InputError(f"{shown}: {error_messages.dotted(parts[: index + 1])} is a list; give the whole list")
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
            lines.setdefault(parts[: index + 1], "override")
        node[parts[-1]] = value
        for inner in [at for at in lines if at[: len(parts)] == parts]:
            del lines[inner]
        lines[parts] = "override"


def _refuse_secrets(where, values, lines):
    """Raise InputError if a token or password stands in the nested `values`; before anything else, which might repeat it."""
    exposed = [
        f"{error_messages.place(at, lines)}{error_messages.dotted(at)}: {_NO_SECRETS}" for at in _secrets(values)
    ]
    if exposed:
        raise InputError.listing(where, exposed)


def _refuse_half_characters(where, values, lines):
    """Raise InputError if a text in the nested `values` is no valid text: it could not be written into a run folder."""
    wrong = [
        f"{error_messages.place(at, lines)}{error_messages.dotted(at)}: {yaml_document.HALF_A_CHARACTER}"
        for at in _half_characters(values)
    ]
    if wrong:
        raise InputError.listing(where, wrong)


def _half_characters(node, at=()):
    """Yield where in the nested `node` a text has half of a surrogate pair."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _half_characters(value, (*at, key))
    elif isinstance(node, str) and re.search("[\ud800-\udfff]", node):
        yield at


def _secrets(node, at=()):
    """Yield where in the nested `node` a key or text is, or is named like, a token or password."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        here = (*at, key)
        named = isinstance(key, str) and secrets.names_secret(key) and value is not None
        if named or any(isinstance(text, str) and secrets.is_secret(text) for text in (key, value)):
            yield here
        else:
            yield from _secrets(value, here)
