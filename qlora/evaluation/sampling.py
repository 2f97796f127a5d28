"""How the tokens of an answer are chosen: the likeliest each time, or drawn by chance."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch

from ..system.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """max_new_tokens: of an answer. temperature: 0 takes the likeliest token. top_p: draws among the likeliest that have this
    probability together; 1: among all. top_k: among so many; 0: among all. seed: the same one gives the same answer; None:
    another each time.

    Raises:
        InputError: a value that means nothing; names all of them.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self):
        problems = [
            f"{name} is {getattr(self, name)!r}; give {allowed}"
            for name, (fits, allowed) in _ALLOWED.items()
            if not fits(getattr(self, name))
        ]
        if problems:
            raise InputError("\n  ".join(problems))

    @classmethod
    def of(cls, **values) -> Sampling:
        """Return a Sampling of these settings; raises InputError for a name that is none of them, or one without effect."""
        made = cls().changed(**values)
        if made.without_effect:
            raise InputError(f"{made.without_effect}; give temperature too, such as temperature=0.7")
        return made

    def changed(self, **values) -> Sampling:
        """Return this one with other values; raises InputError for a name that is no setting."""
        for name in values:
            if name not in _ALLOWED:
                raise InputError(f"no setting {name!r}; there are {', '.join(_ALLOWED)}")
        return dataclasses.replace(self, **values)

    def typed(self, text) -> Sampling:
        """Return this one with the NAME=VALUE of `text`, several with spaces between; raises InputError for what is wrong."""
        values: dict = {}
        for word in text.split():
            name, equals, value = word.partition("=")
            if not equals:
                raise InputError(f"{word}: write NAME=VALUE, such as temperature=0.7")
            values[name] = _number(value)
        return self.changed(**values)

    def __str__(self):
        return " ".join(f"{field.name}={getattr(self, field.name)}".lower() for field in dataclasses.fields(self))

    @property
    def is_greedy(self):
        return self.temperature == 0

    @property
    def without_effect(self):
        """In words, the settings that change nothing, as nothing is drawn; empty where there are none."""
        plain = Sampling()
        names = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) != getattr(plain, name)]
        if not names or not self.is_greedy:
            return ""
        return f"{', '.join(names)}: without effect at temperature 0, which takes the likeliest token each time"

    def in_effect(self):
        """Return {name: value} of the settings that change what is answered."""
        return {"max_new_tokens": self.max_new_tokens} if self.is_greedy else dataclasses.asdict(self)

    def settings(self):
        """Return what transformers' GenerationConfig calls these."""
        if self.is_greedy:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        values = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, **values}

    @contextlib.contextmanager
    def drawing(self, device):
        """Draw with the seed, if there is one, while the block runs; the random numbers of others stay as they are."""
        if self.is_greedy or self.seed is None:
            yield
            return
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_ALLOWED = {
    "max_new_tokens": (lambda value: _is_count(value, 1), "a number from 1"),
    # logits divided by less are infinite in 16 bit
    "temperature": (lambda value: _is_number(value) and (value == 0 or 0.01 <= value <= 10), "0, or 0.01 to 10"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, up to 1"),
    "top_k": (lambda value: _is_count(value, 0), "a number from 0 (all)"),
    "seed": (lambda value: value is None or (_is_count(value, 0) and value < 2**63), "a number from 0, or none"),
}


def _number(text):
    """Return the number that `text` says, None for "none"; text that is none as it is, to be refused by its name."""
    if text.lower() == "none":
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
