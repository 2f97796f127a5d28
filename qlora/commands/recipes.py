"""qlora recipes: what ships, shown and copied."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..jobs.planning import shipped_recipes
from ..system.cards import card_of
from ..system.errors import InputError
from ..system.events import note
from ..system.storage import write_text
from ..system.units import size
from ..terminal import shown
from ..terminal.tables import show, text_table


@shown()
def list_recipes(card=None) -> dict:
    """Print the recipes that ship with qlora; return {"recipes": [{"name", "path", "model", "task", "method", "about"}]}.

    card: also plan each for it, with rows of data.max_length: adds {"planned": {"card", "peak_bytes", "fits", "message",
    "several_cards"}}. That reads each model's config.json, on this machine or from the hub.

    Raises:
        InputError: no recipes came with this installation, or the card is unknown.
    """
    found = shipped_recipes.described()
    if card is not None:
        card_of(card)
        from ..jobs.planning.recipe_on_card import planned

        for one in found:
            one["planned"] = planned(one["name"], card)
    header = ["name", "model", "task", "method", *(["memory"] if card else []), "about"]
    rows = [[one["name"], one["model"], one["task"], one["method"], *([_memory(one["planned"])] if card else []), one["about"]]
            for one in found]  # fmt: skip
    text_table("recipes" + (f", planned for {found[0]['planned']['card']}" if card else ""), header, rows)
    note("next      qlora recipes show NAME; qlora recipes copy NAME --out recipe.yaml; qlora recipes --card 4090")
    return {"recipes": found}


def _memory(planned):
    if planned["several_cards"]:
        return "for several cards: qlora plan --processes"
    if planned["peak_bytes"] is None:
        return "no config.json here"
    return size(planned["peak_bytes"]) + ("" if planned["fits"] else ", does not fit")


@shown()
def show_recipe(name) -> str:
    """Print the text of a recipe that ships with qlora, and return it.

    Raises:
        InputError: there is none of that name; says which are near.
    """
    text = shipped_recipes.path_of(name).read_text(encoding="utf-8")
    for line in text.splitlines():
        show(line)
    return text


@shown()
def copy_recipe(name, out=None) -> str:
    """Copy a recipe that ships with qlora to `out`, by default its own file name; return that path. Nothing is overwritten.

    Raises:
        InputError: there is none of that name, or `out` exists.
    """
    path = shipped_recipes.path_of(name)
    out = Path(path.name if out is None else out)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists; qlora recipes never overwrites: choose another name with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, path.read_text(encoding="utf-8"))
    note(f"recipe    {out}")
    note(f"next      qlora train {shlex.quote(str(out))} data.train=FILE")
    return str(out)
