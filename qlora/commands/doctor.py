"""qlora doctor: whether this machine can train, by trying it."""

from __future__ import annotations

import dataclasses

from ..jobs.checks import checks
from ..terminal import shown
from ..terminal.tables import show, text_table


@shown()
def doctor(folder="runs") -> dict:
    """Return {"checks": [{"name", "ok", "found", "remedy"}]}: versions, device, a real NF4 step, optimizer, disk, memory.

    folder: where runs are to be written; it need not exist, and nothing is left there. A library that is broken, or a
    card that cannot be used, is a check that is not ok. remedy: a command, a variable or a field of the recipe; of a check
    that is ok what would be better, or None. Nothing is sent.
    """
    found = list(checks(folder))
    _show(found)
    return {"checks": [dataclasses.asdict(check) for check in found]}


def _show(found):
    rows = []
    for check in found:
        rows.append(["ok" if check.ok else "PROBLEM", check.name, check.found])
        if check.remedy:
            rows.append(["", "", ("try: " if check.ok else "do: ") + check.remedy])
    text_table("qlora doctor", ["", "check", "found"], rows)
    wrong = [check.name for check in found if not check.ok]
    show(f"{len(wrong)} of {len(found)} are a problem: {', '.join(wrong)}" if wrong else "ready to train")
