"""The export of what cannot become one with its base: the adapter in a folder of its own, proven beside that base."""

from __future__ import annotations

import shutil

import torch

from ... import base_model, methods
from ...exporter import merge, report
from ...exporter.model_card import adapter_card
from ...system import files
from ...system.errors import InputError
from ...system.storage import refuse_inside, refuse_nonempty, refuse_partial


def plan_beside(trained, out, inputs, unused):
    """Return the merge.Plan of the base of a Trained adapter, whose files the proof reads; nothing of it is written.

    inputs: paths that are read, beside those of `trained`. unused: {option: whether it was given}, of those that a merge has.

    Raises:
        InputError: an option that means nothing here, or `out` is not empty or holds what is read.
    """
    given = [name for name, there in unused.items() if there]
    if given:
        raise InputError(
            f"{trained.name}: {trained.adapter.kind} {trained.adapter.unmergeable}. The adapter is exported as it is, so "
            f"leave {', '.join(given)} out"
        )
    refuse_nonempty(out, "export")
    refuse_partial(out, [*trained.inputs, *inputs])
    refuse_inside(out, [trained.folder, trained.checkpoint.folder])
    return merge.plan(trained.checkpoint, trained.config, torch.bfloat16, trained.model.trust_remote_code)


def write_beside(trained, folder):
    """Write the adapter of a Trained into `folder`, with what it needs of the tokenizer."""
    manifest = trained.folder / methods.MANIFEST
    names = [methods.CONFIG, methods.WEIGHTS]
    if manifest.is_file():
        names = [*files.read_object(manifest)["files"], methods.MANIFEST]
    for name in names:
        shutil.copyfile(trained.folder / name, folder / name)
    if not (folder / "tokenizer.json").is_file():
        base_model.save_tokenizer(trained.tokenizer, folder)


def report_beside(trained, folder) -> dict:
    """Return export_report.json of a folder that is written and not yet proven."""
    checkpoint = trained.checkpoint
    return {
        "base": "beside",
        "serve_with": {
            "name_or_path": checkpoint.name_or_path,
            "revision": checkpoint.revision,
            "sha256": checkpoint.file_hashes(),
            "quantization": trained.quantization and trained.quantization.model_dump(),
        },
        "why": trained.adapter.unmergeable,
        "verify": trained.export.verify,
        "verified": False,
        "live_model": trained.live_model,
        "adapter_sha256": methods.weight_hashes(trained.folder),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def card_beside(trained, found, title):
    """Return the text of README.md of the exported adapter, None where the run it is of is not known."""
    if not trained.origins:
        return None
    quantization = trained.quantization and trained.quantization.model_dump()
    rows = report.scores_beside(found) if "live" in found else []
    name = trained.checkpoint.name_or_path
    return adapter_card(title, name, trained.adapter.config, quantization, trained.origins[0], rows=rows)
