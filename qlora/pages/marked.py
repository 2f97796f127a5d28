"""Where an answer and what was expected differ, word by word."""

from __future__ import annotations

import difflib
import re

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MOST = 600  # words that are compared; matching takes the square of them


def pieces(text, other) -> list[tuple[str, bool]]:
    """Return `text` as [(piece, is it in `other` too, in this place), ...]."""
    if text.strip() == other.strip():
        return [(text, True)]
    words, others = _WORDS.findall(text), _WORDS.findall(other)
    if max(len(words), len(others)) > _MOST:
        return [(text, False)] if text else []
    found: list[tuple[str, bool]] = []
    end = 0
    for block in difflib.SequenceMatcher(None, words, others, autojunk=False).get_matching_blocks():
        found += [("".join(words[end : block.a]), False), ("".join(words[block.a : block.a + block.size]), True)]
        end = block.a + block.size
    return [(piece, same) for piece, same in found if piece]
