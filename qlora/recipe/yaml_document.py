"""A YAML file -> plain values and the line of each. No file makes this run code, hang, or take much time or memory.

YAML 1.2: 2e-4 is a number, `on` and `yes` are words, 12:30:00 and a date too. Read from the parser's events, not its
constructors: what comes out is None, bool, int, float, str, list and dict, whatever the tags say.
"""

from __future__ import annotations

import copy
import re

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver

from ..system.errors import InputError

MAX_VALUES = 10_000  # with what aliases repeat
MAX_DEPTH = 20

HALF_A_CHARACTER = "half of a surrogate pair, which is not valid text; write the character itself"


def parse(text, where):
    """Return (value, {(key or index, ...): line from 1}) of the one YAML document in `text`; `where` is for messages.

    Raises:
        InputError: no YAML 1.2, no document or several, a key twice, a tag, a merge key, or more than a recipe can need.
    """
    return _Reader(text, where).document()


class _Reader:
    def __init__(self, text, where):
        self.where, self.text = where, text
        self.lines, self.anchors, self.count = {}, {}, 0
        self._events = YAML(typ="safe", pure=True).parse(text)

    def document(self):
        self.next()
        start = self.next()
        if isinstance(start, StreamEndEvent):
            raise InputError(f"{self.where}: is empty; a recipe has sections model, data, output_dir, ...")
        if start.version not in (None, (1, 2)):
            raise self.refusal(start, "recipes are YAML 1.2; remove the %YAML line")
        value = self.value(self.next(), ())
        self.next()
        after = self.next()
        if isinstance(after, DocumentStartEvent):
            raise self.refusal(
                after, "a second document begins; a recipe is one document, so remove the line --- or ..."
            )
        return value, self.lines

    def next(self):
        try:
            event = next(self._events)
            if isinstance(event, ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
                raise self.refusal(event, HALF_A_CHARACTER)
            return event
        except MarkedYAMLError as error:
            raise InputError(f"{self.where}{_lines_of(error)}: not valid YAML: {_problem(error)}") from None
        except ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            raise InputError(
                f"{self.where} line {line}: not valid YAML: the character U+{error.character:04X} is not allowed"
            ) from None
        except (YAMLError, ValueError) as error:  # ValueError: "\U00110000" in quotes
            raise InputError(f"{self.where}: not valid YAML: {error}") from None

    def value(self, event, at):
        line = event.start_mark.line + 1
        self.lines.setdefault(at, line)
        self.count += 1
        if isinstance(event, AliasEvent):
            return self.aliased(event)
        before, anchor, end = self.count, event.anchor, None
        if anchor is not None:
            self.anchors[anchor] = None  # an alias within itself finds this
        if len(at) > MAX_DEPTH:
            raise self.refusal(event, "nested too deeply; a recipe has sections and fields")
        if isinstance(event, ScalarEvent):
            made = self.scalar(event)
        elif event.tag is not None:
            raise self.tagged(event)
        elif isinstance(event, MappingStartEvent):
            made = {}
            while not isinstance(end := self.next(), MappingEndEvent):
                key = self.key(end, at, made)
                made[key] = self.value(self.next(), (*at, key))
        else:
            made = []
            while not isinstance(end := self.next(), SequenceEndEvent):
                made.append(self.value(end, (*at, len(made))))
        if anchor is not None:
            self.anchors[anchor] = made, self.count - before + 1
        if self.count > MAX_VALUES:
            raise self.refusal(event, f"more than {MAX_VALUES:,} values, counting what aliases repeat")
        return made

    def key(self, event, at, made):
        if not isinstance(event, ScalarEvent):
            raise self.refusal(event, "a key must be a word, not a list, a mapping or an alias")
        if event.tag is not None:
            raise self.tagged(event)
        key, line = event.value, event.start_mark.line + 1
        if key == "<<" and event.implicit[0]:
            raise self.refusal(
                event, "merge keys (<<) are not supported; write the fields out, or repeat a whole value as *name"
            )
        if key in made:
            dotted = ".".join(map(str, (*at, key)))
            raise self.refusal(event, f"{dotted} is given twice, first in line {self.lines[(*at, key)]}; keep one")
        self.lines[(*at, key)] = line
        return key

    def scalar(self, event):
        if event.tag is None:
            return _plain(event.value) if event.implicit[0] else event.value
        if event.tag == "tag:yaml.org,2002:str":
            return event.value
        raise self.tagged(event)

    def aliased(self, event):
        if event.anchor not in self.anchors:
            raise self.refusal(event, f'*{event.anchor} has no &{event.anchor} before it; put a text in quotes: "*..."')
        if self.anchors[event.anchor] is None:
            raise self.refusal(event, f"*{event.anchor} refers to a value that contains it")
        made, count = self.anchors[event.anchor]
        self.count += count
        if self.count > MAX_VALUES:
            raise self.refusal(event, f"more than {MAX_VALUES:,} values, counting what aliases repeat")
        return copy.deepcopy(made)  # an override changes one place

    def tagged(self, event):
        return self.refusal(event, f"the tag {event.tag} is not supported; a recipe has plain values, so remove it")

    def refusal(self, event, what):
        return InputError(f"{self.where} line {event.start_mark.line + 1}: {what}")


_RESOLVER = VersionedResolver(version=(1, 2))


def _plain(text):
    """Return what an unquoted word means. An ambiguous number (0123), or an unusable one, stays a text."""
    kind = str(_RESOLVER.resolve(ScalarNode, text, (True, False))).rpartition(":")[2]
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int" and len(text) < 40:
            return int(text, 0)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text
    return text


def _lines_of(error):
    mark, began = error.problem_mark or error.context_mark, error.context_mark
    if mark is None:
        return ""
    since = (
        f" (in the value that begins in line {began.line + 1})" if began is not None and began.line != mark.line else ""
    )
    return f" line {mark.line + 1}{since}"


def _problem(error):
    problem = error.problem or error.context
    if "<document start>" in problem:
        return "this does not belong to the mapping before it; is this file a recipe?"
    return f"{problem}; indent with spaces" if "'\\t'" in problem else problem
