"""A Jinja chat template -> an Ollama Modelfile whose Go template gives the same prompts, or a refusal.

The Jinja template is not read but watched: it renders conversations of sentinels, and what stands between these is what the
Go template writes. That holds for any template that puts fixed strings between the turns; whether it does is checked on
conversations, with an evaluator of the few Go actions that are written here.

Ollama joins messages of one role that follow each other, and all system messages to one, before it renders. An answer that
comes last is left open, for the model to go on with it.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from ...data import chat
from ...system.errors import InputError

_MARK = "\ue000"  # private use: stands in no template
_IS_LAST = "eq (len (slice $.Messages $i)) 1"

# what the check puts into turns; all of it is text, and nothing else
_TEXTS = [
    "What is 3 plus 4?",
    "two\nlines, \"quoted\" and 'quoted', \\n and \t tab\n\nand a third",
    "{{ .Content }} {% if x %} }} {{ <b>&amp;</b>",
    "naïve café, 漢字, 🙂",
    "user: assistant system\n```python\nprint(1)\n```",
    "7",
]


@dataclass(frozen=True)
class _Strings:
    """What stands between the words of a prompt.

    opening: before the first question. with_system: (before, after) the system text that stands before the first question,
    or None where the template takes none. late_system: the same where it stands before the newest question and that is
    not the first; None if it is always at the start. between: after a question, before its answer. again: after an answer,
    before the next question. closing: after the last question.
    """

    opening: str
    with_system: tuple | None
    late_system: tuple | None
    between: str
    again: str
    closing: str


def modelfile(tokenizer, gguf_name, stops, adds_bos):
    """Return the text of a Modelfile for the file `gguf_name` beside it.

    stops: ids that end an answer. adds_bos: the GGUF file tells llama.cpp to put the start token before each prompt
    (`converter.adds_bos` reads that from the file); the template then leaves it to llama.cpp, so that it stands there once.

    Raises:
        InputError: no Go template of this form gives the same prompts; shows the first conversation that differs.
    """
    strings = _strings(tokenizer)
    bos = (tokenizer.bos_token or "") if adds_bos else ""
    heads = [strings.opening, *([strings.with_system[0]] if strings.with_system else [])]
    if not all(head.startswith(bos) for head in heads):
        raise InputError(
            f"{gguf_name} makes llama.cpp put {bos!r} before each prompt, but the chat template, and so the training, does "
            "not have it; write the file with qlora, or set its tokenizer.ggml.add_bos_token to false"
        )
    template = go_template(strings, bos)
    _refuse_difference(tokenizer, strings, template, bos)
    lines = [f"# {note}" for note in _notes(tokenizer, strings)]
    lines += [f"FROM ./{gguf_name}", f"TEMPLATE {_quoted(template, always=True)}"]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in tokenizer.convert_ids_to_tokens(sorted(stops))]
    return "\n".join(lines) + "\n"


def _quoted(text, always=False):
    if '"""' in text:
        raise InputError('the chat template contains """, which a Modelfile cannot hold')
    return f'"""{text}"""' if always or '"' in text else f'"{text}"'


def _notes(tokenizer, strings):
    notes = []
    if strings.with_system is None:
        notes.append("the chat template has no system role; a system message is ignored")
    if roles := [role for role in ("system", "user", "assistant") if not _keeps_space(tokenizer, strings, role)]:
        notes.append(f"in training, white space around messages of {', '.join(roles)} was stripped; here it is kept")
    if "strftime_now" in chat.written(tokenizer):
        notes.append("the chat template inserts the current date; here it is the date on which this file was made")
    return notes


def _keeps_space(tokenizer, strings, role):
    """True if the chat template leaves white space around the words of `role` as it is."""
    if role == "system" and strings.with_system is None:
        return True

    def text(words):
        turns = [(turn, words if turn == role else "x") for turn in ("system", "user", "assistant", "user")]
        return chat.render(tokenizer, _messages(turns if strings.with_system else turns[1:]), True)

    return text(f" {_MARK}\n") == text(_MARK).replace(_MARK, f" {_MARK}\n")


def _messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def _turns(num_questions, system, text_of):
    """Return [(role, text), ...] that end with a question; text_of(name) gives the words of "S", "U1", "A1", "U2", ..."""
    turns = [("system", text_of("S"))] if system else []
    for number in range(1, num_questions + 1):
        turns += [("user", text_of(f"U{number}")), ("assistant", text_of(f"A{number}"))]
    return turns[:-1]


def _strings(tokenizer):
    """Return the _Strings of the tokenizer's chat template; raises InputError where it has none of this form."""
    names, between = _watch(tokenizer, 2, system=False)
    if names != ["U1", "A1", "U2"]:
        raise InputError(
            f"no Ollama template: given two questions and an answer, the chat template shows only {', '.join(names)}"
        )
    opening, answer, question, closing = between
    try:
        first_names, first = _watch(tokenizer, 1, system=True)
        names, later = _watch(tokenizer, 2, system=True)
    except ValueError:
        return _Strings(opening, None, None, answer, question, closing)
    late = names == ["U1", "A1", "S", "U2"]
    if first_names != ["S", "U1"] or not (late or names == ["S", "U1", "A1", "U2"]):
        raise InputError(f"no Ollama template: given a system message, the chat template shows {', '.join(names)}")
    return _Strings(opening, tuple(first[:2]), tuple(later[2:4]) if late else None, answer, question, closing)


def _watch(tokenizer, num_questions, system):
    """Return (names of the turns in the order in which the template shows them, what stands around them: one more)."""
    turns = _turns(num_questions, system, lambda name: f"{_MARK}{name}{_MARK}")
    pieces = re.split(f"{_MARK}(\\w+){_MARK}", chat.render(tokenizer, _messages(turns), True))
    return pieces[1::2], pieces[0::2]


def go_template(strings, bos=""):
    """Return the Go template of `strings`, without `bos` at the start of the prompt.

    No action has a trim marker, so that every character between actions is the prompt's.
    """
    opening, closing = _text(strings.opening.removeprefix(bos)), _text(strings.closing)
    again, between = _text(strings.again), _text(strings.between)
    if strings.with_system is not None:
        before, after = strings.with_system
        when = f"and $.System ({_IS_LAST})" if strings.late_system else "$.System"
        opening = _either(when, before.removeprefix(bos), after, opening)
        if strings.late_system:
            again = _either(when, strings.late_system[0], strings.late_system[1], again)
    return (
        '{{ $first := true }}{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}'
        f"{{{{ if $first }}}}{opening}{{{{ else }}}}{again}{{{{ end }}}}{{{{ .Content }}}}"
        f"{{{{ if {_IS_LAST} }}}}{closing}{{{{ end }}}}{{{{ $first = false }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{between}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}'
    )


def _either(when, before, after, otherwise):
    return f"{{{{ if {when} }}}}{_text(before)}{{{{ $.System }}}}{_text(after)}{{{{ else }}}}{otherwise}{{{{ end }}}}"


def _text(text):
    return re.sub(r"\{\{|\{$", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)


def conversations(system, spaced=()):
    """Yield lists of (role, text) that end with a question, with and without a system text if `system`.

    spaced: roles whose words have white space around them in some.
    """
    for with_system in (False, True)[: 1 + system]:
        for num_questions in (1, 2, 3, 5):
            for shift in range(len(_TEXTS)):
                for space in ("", " \n")[: 1 + bool(spaced)]:
                    texts = itertools.cycle(_TEXTS[shift:] + _TEXTS[:shift])
                    turns = _turns(num_questions, with_system, lambda _, texts=texts: next(texts))
                    yield [(role, f"{space}{text}{space}" if role in spaced else text) for role, text in turns]


def _refuse_difference(tokenizer, strings, template, bos):
    spaced = [role for role in ("system", "user", "assistant") if _keeps_space(tokenizer, strings, role)]
    for turns in conversations(strings.with_system is not None, spaced):
        expected = chat.render(tokenizer, _messages(turns), True)
        found = bos + render(template, _messages(turns))
        if found != expected:
            at = next(
                (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found)
            )
            raise InputError(
                "no Ollama template gives the same prompts as the chat template, whose strings between turns are not fixed; "
                f"the first conversation that differs: {turns}\n  the chat template: ...{expected[max(0, at - 40) : at + 60]!r}\n"
                f"  the best Go template: ...{found[max(0, at - 40) : at + 60]!r}\n  serve the exported folder with vLLM or the "
                "GGUF file with llama-server, which use the chat template itself"
            )


# --- the few actions of Go's text/template that are written above ----------------------------------------------------


def render(template, messages):
    """Return what Ollama makes of `messages` by `template`, for templates that `go_template` writes.

    Raises:
        ValueError: an action that is not one of those.
    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    nodes, rest = _parse(list(enumerate(pieces)))
    assert not rest, rest
    out: list[str] = []
    _execute(nodes, {".Messages": messages, "$.System": system}, out)
    return "".join(out)


def _parse(pieces, inside=False):
    """Return (nodes, pieces left from the closing `else` or `end` on); odd pieces are actions, the others text."""
    nodes: list = []
    while pieces:
        (index, piece), pieces = pieces[0], pieces[1:]
        if index % 2 == 0:
            nodes.append(("text", piece))
        elif piece == "end" or piece.startswith("else"):
            if not inside:
                raise ValueError(f"{{{{ {piece} }}}} closes nothing")
            return nodes, [(index, piece), *pieces]
        elif piece.startswith(("if ", "range ")):
            node, pieces = _block(piece, pieces)
            nodes.append(node)
        else:
            nodes.append(("do", piece))
    if inside:
        raise ValueError("{{ end }} is missing")
    return nodes, []


def _block(head, pieces):
    """Return (a node of `if` or `range`, pieces after its end)."""
    body, pieces = _parse(pieces, inside=True)
    (_, closing), pieces = pieces[0], pieces[1:]
    if closing == "end":
        otherwise = []
    elif closing == "else":
        otherwise, pieces = _parse(pieces, inside=True)
        pieces = pieces[1:]
    else:  # else if
        node, pieces = _block(closing.removeprefix("else "), pieces)
        otherwise = [node]
    return ("block", head, body, otherwise), pieces


def _execute(nodes, names, out):
    for kind, *node in nodes:
        if kind == "text":
            out.append(node[0])
        elif kind == "do":
            if match := re.fullmatch(r"(\$\w+) :?= (true|false)", node[0]):
                names[match[1]] = match[2] == "true"
            else:
                out.append(_value(node[0], names))
        else:
            head, body, otherwise = node
            if head == "range $i, $m := .Messages":
                for number, message in enumerate(names[".Messages"]):
                    names |= {"$i": number, ".Role": message["role"], ".Content": message["content"]}
                    _execute(body, names, out)
            else:
                _execute(body if _value(head.removeprefix("if "), names) else otherwise, names, out)


def _value(text, names):
    if text in names:
        return names[text]
    if text == _IS_LAST:
        return names["$i"] == len(names[".Messages"]) - 1
    if match := re.fullmatch(r'"([^"\\]*)"', text):
        return match[1]
    if match := re.fullmatch(r'eq (\.\w+) "(\w+)"', text):
        return names[match[1]] == match[2]
    if match := re.fullmatch(r"and (\S+) \((.*)\)", text):
        return _value(match[1], names) and _value(match[2], names)
    raise ValueError(f"{{{{ {text} }}}} is not known here")
