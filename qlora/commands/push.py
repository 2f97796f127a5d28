"""qlora push: upload the adapter of a run, or an exported model, to the hub; private by default."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich.text import Text

from ..jobs.exporting.push_files import CARD, files_to_push
from ..system import hub, launched, units
from ..system.errors import Interrupted
from ..system.events import note
from ..terminal import shown
from ..terminal.tables import show, table


@shown()
def push(target, repo, *, public=False, base=None, license=None, dry_run=False) -> dict:
    """Upload a run's adapter, or an exported and proven model folder; return {"repo", "private", "files", "url", "commit"}.

    repo: OWNER/NAME on the hub, made as a private one unless `public`. base: what a base that was a local folder is called
    on the hub. license: for the card; without it the card names none. dry_run: print files and card, upload nothing
    ("url" and "commit" are None). The token is that of the environment (HF_TOKEN) or of the hub login.

    Raises:
        InputError: not a finished run and not a proven model, a file that is not what it should be or holds a token, no
            token, or the hub cannot be reached or refuses. The repository is as it was.
        Interrupted: by SIGINT or SIGTERM; the repository has all of the files or none.
    """
    launched.refuse_several(f"qlora push {shlex.quote(str(target))} {shlex.quote(str(repo))}")
    hub.refuse_name(repo)
    if base is not None:
        hub.refuse_name(base)
    files = files_to_push(target, repo, base, license)
    text = files[CARD].decode()
    hub.refuse_secrets(files)
    sizes = {name: hub.num_bytes(content) for name, content in sorted(files.items())}
    private = "public" if public else "private"
    table(f"{target} to {repo}, {private}", ["", "size"], [[name, units.size(size)] for name, size in sizes.items()])
    result = {
        "repo": repo,
        "private": not public,
        "files": [{"name": name, "bytes": size} for name, size in sizes.items()],
        "url": None,
        "commit": None,
    }
    if "license:" not in text:
        note("license   not set in the model card; look up the base model's license and set yours with --license ID")
    if dry_run:
        show(Text(text))
        note("nothing was uploaded")
        return result
    if not sys.stderr.isatty():
        disable_progress_bars()  # of the hub's library
    note(f"uploading {units.size(sum(sizes.values()))}")
    try:
        url, commit = hub.send(files, repo, public, f"{Path(target).name}, by qlora push")
    except Interrupted as stopped:
        raise Interrupted(stopped.number, f"push interrupted; {repo} has either all of its files or none") from None
    note(f"pushed    {len(files)} files, {private}: {url}")
    return result | {"url": url, "commit": commit}
