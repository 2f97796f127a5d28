"""What was found out about a run in use, as a report shows it: the forms that it can be served in, and blind votes."""

from __future__ import annotations

from typing import Any

from ...system import files
from ...system.errors import InputError
from ..talking.votes import BASE, SIDES, TIE, TUNED, Votes
from .reported_answers import cut

_TEXT = 600  # characters
_NUMBERS = ("bytes", "tokens_per_second", "first_token_seconds", "loss", "kl")


def served(run, command) -> dict[str, Any]:
    """Return what served.json of a RunDir says; {"missing", "command"} where there is none. command: that makes it.

    Raises:
        InputError: it is damaged.
    """
    file = run.served_files[0]
    if not file.is_file():
        return {"missing": "not measured", "command": command}
    found = files.read_object(file)
    try:
        forms = [{name: one[name] for name in ("name", "what", "message", *_NUMBERS)} for one in found["forms"]]
        for one in forms:
            one["message"] = one["message"] and cut(one["message"], 400)
            for name in _NUMBERS:
                one[name] = one[name] if one[name] is None else float(one[name])
        names = ("command", "date", "device", "rows", "tokens", "loss")
        return {"forms": forms, "notes": [str(one) for one in found["notes"]]} | {name: found[name] for name in names}
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file}: {error!r}; damaged; write it again: {command}") from None


def votes(run, weights, command, most) -> dict[str, Any]:
    """Return {"words", "counts", "won", "others", "left": [won, of], "shown", "left_out"} of votes.jsonl of a RunDir; without a
    vote {"missing", "command"}. weights: {file: sha256} of the run as it is. command: that asks for votes.

    left: how often the answer on the left won where one did, whosever it was. shown: the last `most` votes, the newest first.

    Raises:
        InputError: a line is not a vote.
    """
    if not run.votes_file.is_file():
        return {"missing": "no votes yet", "command": command}
    found = Votes(run.votes_file, weights)
    try:
        decided = [vote["better"] for vote in found.given if vote["winner"] != TIE]
        shown = [
            {"asked": cut(vote["prompt"], _TEXT), "winner": vote["winner"], "time": str(vote["time"])}
            | {who: cut(vote["answers"][who], _TEXT) for who in (BASE, TUNED)}
            for vote in found.given[: -most - 1 : -1]
        ]
    except (LookupError, TypeError) as error:
        raise InputError(f"{found.file}: {error!r}; a line is not a vote of qlora chat --web; remove it") from None
    return {
        "words": found.in_words(),
        "counts": found.counts,
        "won": found.won(),
        "others": found.others,
        "left": [decided.count(SIDES[0]), len(decided)],
        "shown": shown,
        "left_out": len(found.given) - len(shown),
        "command": command,
    }
