"""qlora chat --web: a run and its base side by side in the browser."""

from __future__ import annotations

import time
from pathlib import Path

from ..evaluation.sampling import Sampling
from ..jobs.opening.checkpoint_run import run_of
from ..jobs.talking.side_by_side import SideBySide
from ..pages.side_by_side import LOCAL, refuse_without_gradio
from ..pages.side_by_side import serve as started
from ..runs.folder import RunDir
from ..system import signals
from ..system.errors import InputError, Interrupted
from ..system.events import note
from ..terminal import shown
from .open import open


@shown()
def serve(
    target, system=None, overrides=(), *, adapters=None, adapter=None, port=None, host=None, votes=None, **sampling
):
    """Show a run beside its base in the browser until Ctrl-C; votes on their answers are kept in file `votes`, by default
    votes.jsonl in the run folder. The other arguments are those of `chat`, which the settings on the page begin with.

    Raises:
        InputError: gradio is not installed, there is no base to compare with, or the port is taken.
    """
    refuse_without_gradio()
    chosen, host = Sampling.of(**sampling), host or LOCAL
    if votes is not None and not Path(votes).absolute().parent.is_dir():
        raise InputError(f"--votes {votes}: there is no folder {Path(votes).parent}")
    with open(target, adapters, adapter, overrides) as model:
        run = run_of(target) or RunDir(target)
        compared = SideBySide(model, votes or run.votes_file)
        address, stop = started(compared, chosen, system, host, port)
        try:
            note(f"web       {address} ({'this machine only' if host == LOCAL else 'whoever reaches this machine'})")
            note(f"votes     {compared.votes.file}: {compared.votes.in_words()}")
            if compared.votes.others:
                note(f"          {compared.votes.others} more in that file are of other models and do not count")
            note("          Ctrl-C ends")
            while True:
                time.sleep(3600)
        except (KeyboardInterrupt, Interrupted) as stopped:
            if not signals.is_ctrl_c(stopped):
                raise
            note("stopped; the votes are kept")
        finally:
            stop()
