"""What a shell proposes after TAB, beside verbs and options. Imports nothing heavy: a person waits."""

from __future__ import annotations

from functools import partial

import typer

from .system import cards, shipped
from .system.errors import InputError


def recipe_actions(incomplete: str):
    return [action for action in ("show", "copy") if action.startswith(incomplete)]


def recipe_names(incomplete: str):
    """Names of recipes that ship, as `qlora recipes` lists them."""
    try:
        return [name for name in shipped.paths() if name.startswith(incomplete)]
    except InputError:  # none came with this installation
        return []


def card_names(incomplete: str):
    """Cards that a plan knows, without the spaces in their names."""
    wanted = incomplete.lower()
    return [name for name in map(cards.short, cards.CARDS) if name.startswith(wanted)]


card_option = partial(typer.Option, autocompletion=card_names)
action_argument = partial(typer.Argument, autocompletion=recipe_actions)
name_argument = partial(typer.Argument, autocompletion=recipe_names)
