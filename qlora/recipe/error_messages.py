"""What is wrong with a recipe, in words: line, field, what was found, what is allowed, and the name that was meant."""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from typing import Any

from pydantic import BaseModel

from ..system.errors import InputError


def refusal(where, error, values, lines, schema):
    """Return the InputError for pydantic's ValidationError `error` of `values` as a `schema`, a class of sections."""
    problems = _one_a_field(error.errors(include_url=False), values)
    explained = (_explain(problem, lines, schema) for problem in problems)
    return InputError.listing(where, list(itertools.islice(explained, 20)), total=len(problems))


def _one_a_field(problems, values):
    """Return pydantic's problems, those of the members of a union joined: what a deeper one explains, and one a field."""
    found: dict[tuple, Any] = {}
    for problem in problems:
        at = _location(problem["loc"], values)
        if at in found:
            found[at] |= {"msg": f"{found[at]['msg']} or {said(problem).removeprefix('should be ')}", "type": "union"}
        else:
            found[at] = problem | {"loc": at, "msg": said(problem)}
    inner = {at[:end] for at in found for end in range(len(at))}
    return [problem for at, problem in found.items() if at not in inner or not problem["type"].endswith("_type")]


def _location(parts, values):
    """Return the place in `values` without what pydantic adds to it: the tried members of a union, and [key]."""
    node, kept = values, []
    for part in parts:
        there = part in node if isinstance(node, dict) else isinstance(part, int)
        tag = isinstance(part, str) and re.match(r"(str|bool)$|literal|constrained-|function-|list\[|\[key\]", part)
        if there or not tag:
            kept.append(part)
        if there:
            node = node[part] if isinstance(node, dict) or (isinstance(node, list) and part < len(node)) else None
    return tuple(kept)


_TYPES = {
    "model_type": "should be fields with values (leave it out for the defaults)",
    "bool_type": "should be true or false",
    "string_type": "should be a valid string (in quotes, if it looks like something else)",
}


def said(problem):
    """Return what one problem of pydantic says, as a sentence about the value."""
    if problem["type"] == "literal_error":
        return f"should be {problem['ctx']['expected'].replace(' or ', ', ')}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return _TYPES.get(problem["type"], message)


def _explain(problem, lines, schema):
    """Return one line for one problem of pydantic: line, dotted field, what was found, what to do."""
    location = problem["loc"]
    if not location and (named := _named(problem["msg"], lines)) is not None:  # of a validator of the whole
        return f"{place(named, lines)}{problem['msg']}"
    at = f"{place(location, lines)}{dotted(location) or 'recipe'}"
    kind, found = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        return f"{at}: unknown field{_did_you_mean(location, schema)}"
    if kind == "missing":
        return f"{at}: required, but not given"
    if kind == "literal_error":
        return f"{at}: {shown(found)} is not one of {problem['ctx']['expected'].replace(' or ', ', ')}"
    return f"{at}: {problem['msg']}" + ("" if isinstance(found, dict) else f", found {shown(found)}")


def _named(message, lines):
    """Return the place of the field with whose dotted name a message begins; None where it begins with none."""
    field = message.partition(": ")[0]
    return max((at for at in lines if at and f"{field}.".startswith(f"{dotted(at)}.")), key=len, default=None)


def place(location, lines):
    """Return "line 7  ", or what else there is to say of where the value at `location` was given."""
    known = next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), None)
    return {None: "", "override": "override  "}.get(known, f"line {known}  ")


def dotted(location):
    """Return the place in the recipe as text; what is not plain in it is quoted, with the characters that look like others."""
    return ".".join(
        str(part) if isinstance(part, int) or re.fullmatch(r"[!-~]{1,80}", str(part)) else shown(str(part), ascii)
        for part in location
    )


def shown(value, written=repr):
    """Return the value as text of 120 characters at most."""
    text = written(value)
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text):,} characters)"


def _fields(section):
    """Return {dotted name: section class or None} of a section class's own fields."""
    return {
        name: next((kind for kind in _kinds(field.annotation) if issubclass(kind, BaseModel)), None)
        for name, field in section.model_fields.items()
    }


def _kinds(annotation):
    """Return the classes that an annotation is made of: those in list[...] and X | None, too."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return [annotation] if isinstance(annotation, type) else []
    return [kind for argument in arguments for kind in _kinds(argument)]


# what other tools call it
_SYNONYMS = {
    "rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "train_on_inputs": "data.train_on",
    "neat_packing": "data.packing",
    "sample_packing": "data.packing",
    "base_model": "model.name_or_path",
}


def _did_you_mean(location, schema):
    section: Any = schema
    for part in location[:-1]:
        section = section if isinstance(part, int) else _fields(section).get(part) or section
    name, prefix = _plain_letters(location[-1]), "".join(f"{part}." for part in location[:-1])
    here = {field: f"{prefix}{field}" for field in section.model_fields}
    if name in here:
        return f"; did you mean {here[name]}?"
    sections = {parent: kind for parent, kind in _fields(schema).items() if kind}
    if name in schema.model_fields:
        return f"; did you mean {name}, which is a top-level field?"
    inside = {
        f"{parent}.{field}": kind for parent in sections for field, kind in _fields(sections[parent]).items() if kind
    }
    elsewhere = {}
    # what comes later is the likelier place, and the default method before the others
    default = [("lora", sections["lora"])] if "lora" in sections else []  # a comparison has no sections
    for parent, kind in [*reversed(inside.items()), *sections.items(), *default]:
        elsewhere |= {f"{parent}_{field}": f"{parent}.{field}" for field in kind.model_fields}
        elsewhere |= {field: f"{parent}.{field}" for field in kind.model_fields}
    known = elsewhere | _SYNONYMS
    if name in known:
        return f"; did you mean {known[name]}?"
    here |= {other: field for other, field in _SYNONYMS.items() if field in here.values()}
    near = difflib.get_close_matches(name[:80], here, n=1, cutoff=0.45)
    return f"; did you mean {here[near[0]]}?" if near else f"; known here: {', '.join(section.model_fields)}"


def _plain_letters(name):
    """Return the name in lower case, words joined by _, without look-alikes of Unicode as far as it knows them."""
    text = "".join(letter for letter in unicodedata.normalize("NFKC", str(name)) if letter.isprintable())
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text.strip()).replace("-", "_").lower()
