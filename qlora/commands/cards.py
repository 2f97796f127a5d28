"""qlora plan --card list: the cards that a plan knows. Without the libraries of models."""

from __future__ import annotations

from ..system.cards import listing
from ..system.units import size
from ..terminal import shown
from ..terminal.tables import table


@shown()
def list_cards() -> dict:
    """Print the cards that a plan knows, with what a process sees of their memory; return them as {"cards": [...]}."""
    found = listing()
    rows = [
        [one["name"], size(one["memory_bytes"]), f"{one['flops'] / 1e12:.0f}", f"{one['bandwidth'] / 1e9:,.0f}",
         "yes" if one["bfloat16"] else "no", one["link"]] for one in found
    ]  # fmt: skip
    table("cards, by the memory that a process sees", ["card", "memory", "TFLOPS", "GB/s", "bfloat16", "link"], rows)
    return {"cards": found}
