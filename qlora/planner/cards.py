"""The cards that a plan knows: how fast they compute and read, and how much they hold. Another card is a line here."""

from __future__ import annotations

from dataclasses import dataclass

from ..system.errors import InputError

GiB = 2**30


@dataclass(frozen=True)
class Card:
    """flops: dense bfloat16 with sums in float32, a second; bandwidth: bytes a second; memory: bytes a process sees."""

    name: str
    flops: float
    bandwidth: float
    memory: int


# The makers' sheets give several numbers a card. These are without sparsity, and with sums in float32, which is what torch
# computes: on GeForce cards half of the headline.
CARDS = (
    Card("RTX 3090", 71e12, 936e9, 24 * GiB),  # NVIDIA Ampere GA102 whitepaper, table 9
    Card("RTX 4090", 165.2e12, 1008e9, 24 * GiB),  # NVIDIA Ada GPU architecture whitepaper, appendix A
    Card("RTX 5090", 209.5e12, 1792e9, 32 * GiB),  # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A
    Card("A10G", 70e12, 600e9, int(22.5 * GiB)),  # NVIDIA A10G data sheet (AWS G5); 24 GB less the bits of ECC
    Card("A100 40GB", 312e12, 1555e9, 40 * GiB),  # NVIDIA A100 data sheet
    Card("A100 80GB", 312e12, 2039e9, 80 * GiB),  # the same, SXM
    Card("H100", 989.4e12, 3350e9, 80 * GiB),  # NVIDIA H100 data sheet, SXM, without sparsity
    Card("H200", 989.4e12, 4800e9, int(140.4 * GiB)),  # NVIDIA H200 data sheet, SXM, without sparsity
)


def card_of(name):
    """Return the Card that `name` means, in any spelling: "4090", "rtx4090", "NVIDIA A100-SXM4-80GB"; raises InputError."""
    card = find(name)
    if card is None:
        raise InputError(f"--card {name!r}: unknown card; known are {', '.join(card.name for card in CARDS)}")
    return card


def find(name):
    """Return the Card that a name means, None if it is none of these: half a name is not guessed at."""
    wanted = _letters(name)
    for card in CARDS:
        words = [_letters(word) for word in card.name.split() if word != "RTX"]
        if all(word in wanted for word in words) and not any(other in wanted for other in ("ti", "laptop", "nvl")):
            return card
    return None


def _letters(name):
    return "".join(letter for letter in name.lower() if letter.isalnum())
