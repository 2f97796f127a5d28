"""qlora report: runs, a comparison, exports -> one page that needs nothing else, and the same numbers as JSON."""

from __future__ import annotations

from pathlib import Path

from ..jobs.reporting import reported
from ..pages.report import page
from ..system import files
from ..system.errors import InputError
from ..system.events import Found, emit, note
from ..system.storage import write_json, write_text
from ..system.units import size
from ..terminal import shown
from ..terminal.tables import show

_ENDS = (".html", ".htm")


@shown()
def report(targets, out=None) -> dict:
    """Write a page on what `targets` are to the file `out`, and the same numbers beside it as JSON; return these.

    targets: a run folder, or several, or a comparison (its folder or its YAML file); beside one run, folders that it was
    exported to. out: ends in .html; an older report there is replaced, any other file is not. None: nothing is written.

    Raises:
        InputError: a target is none of these, or is damaged, with file and line; `out` is another file, or cannot be written.
    """
    targets = [targets] if isinstance(targets, (str, Path)) else list(targets)
    if not targets:
        raise InputError("give the run to report on; `qlora adapters` lists what there is")
    place = None if out is None else _checked(out)
    text, found = page(reported.gather(targets))
    for run in found["runs"]:
        show(f"{run['path']}: {run['state']['what']} at step {run['state']['step']:,}")
        for one in run["verdicts"]:
            show(f"  {one['question']} {one['answer']}: {one['words']}")
        for one in run["findings"]:
            show(f"  Why? {one['name']}: {one['words']}. Change {one['change']}")
    emit(Found(found))
    if place is not None:
        _write(place, text, found)
    return found


def _checked(out):
    """Return the path of a page; raises InputError where it, or its JSON twin, is not ours to write."""
    place = Path(out)
    if place.suffix.lower() not in _ENDS:
        raise InputError(f"--out {out}: should end in .html; the same numbers are written beside it as .json")
    if not place.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {place.parent}; make it, or choose another")
    for file in (place, place.with_suffix(".json")):
        files.refuse_foreign(file, f"--out {out}", reported.KIND)
    return place


def _write(place, text, found):
    twin = place.with_suffix(".json")
    try:
        write_json(twin, found)
        write_text(place, text)
    except OSError as error:
        raise InputError(f"--out {place}: {error.strerror or error}; choose another place") from None
    note(f"page      {place}, {size(place.stat().st_size)}; the numbers are in {twin}")
