"""The folder of an export: what cannot become one is refused ahead, and the merged model is written into it."""

from __future__ import annotations

from ... import base_model, methods
from ...exporter import configs, merge, report, writer
from ...exporter.model_card import card
from ...exporter.reader import Reader
from ...kernels.threads import Cores
from ...recipe import parse_size
from ...system.errors import InputError
from ...system.events import note
from ...system.storage import free_disk_bytes, leftover_bytes, refuse_inside, refuse_nonempty, refuse_partial
from ...system.units import size
from ..opening.chosen_task import refuse_classes
from . import export_gguf, export_int8


def plan_export(trained, out, inputs=(), compare_bases=False, gguf=None):
    """Return the merge.Plan of a Trained adapter, exported to folder `out`; reads no weight.

    inputs: paths that are read, beside those of `trained`. compare_bases, gguf: as in `export`.

    Raises:
        InputError: `out` is not empty or holds what is read, the disk is too small, or a correct export is not possible.
    """
    refuse_nonempty(out, "export")
    refuse_partial(out, [*trained.inputs, *inputs])
    refuse_inside(out, [trained.folder, trained.checkpoint.folder])
    _refuse_meaningless(trained, compare_bases)
    trained.adapter.refuse_untrained()
    plan = merge.plan(
        trained.checkpoint,
        trained.config,
        base_model.dtype_of(trained.export.dtype),
        trained.model.trust_remote_code,
        trained.adapter,
    )
    if trained.checkpoint.task.file.HAS_TOKENS:
        _refuse_tokens_without_a_row(trained, plan.config.get_text_config().vocab_size)
    if gguf:
        refuse_classes(trained.checkpoint.task.file, f"--gguf {gguf}")
        export_gguf.refuse(trained, plan, gguf)
    more = export_gguf.num_bytes(gguf, plan) if gguf else 0
    if trained.export.int8:
        export_int8.refuse(trained, plan, {"--gguf": gguf, "--compare-bases": compare_bases})
        more = export_int8.num_bytes(plan)
    refuse_full_disk(out, plan.num_bytes + max(more, plan.num_bytes if compare_bases else 0))
    return plan


def _refuse_meaningless(trained, compare_bases):
    """Raise InputError where the original base would be wrong, or is no other than the one that was trained on."""
    if trained.export.base == "dequantized" and not compare_bases:
        return
    if trained.fitted and trained.export.base == "original":
        raise InputError(
            f"{trained.name}: lora.init_lora_weights loftq makes the adapter correct the quantization error; on the "
            "original weights that correction would be wrong. Export with --base dequantized"
        )
    if trained.quantization is None:
        what = "--base original" if trained.export.base == "original" else "--compare-bases"
        raise InputError(f"{trained.name}: the base was not quantized, so there is only one base; leave {what} out")
    if base_model.stored_quantization(trained.config):
        raise InputError(f"{trained.checkpoint.folder}: has its weights in 4 bit only; leave --compare-bases out")
    if compare_bases and trained.export.verify == "off":
        raise InputError("--compare-bases needs the measurements that export.verify: off skips; drop one of the two")


def _refuse_tokens_without_a_row(trained, num_rows):
    """Raise InputError if the tokenizer can make an id that the embedding has no row for: generation would fail there. Those that
    the base's own has too, such as a pad token that was added beside the vocabulary, no row of the training has made."""
    found = {(number, token) for token, number in trained.tokenizer.get_vocab().items() if number >= num_rows}
    own = base_model.load_tokenizer(trained.checkpoint.folder, trained.model).get_vocab() if found else {}
    beyond = sorted((number, token) for number, token in found if own.get(token) != number)
    if beyond:
        raise InputError(
            f"{trained.folder}: {len(beyond)} tokens of its tokenizer have no row in the embedding, which has {num_rows:,} "
            f"({beyond[0][1]!r} has id {beyond[0][0]:,}). The training enlarged the embedding but did not save it; save it with "
            "the adapter (modules_to_save), or remove these tokens from tokenizer.json"
        )


def refuse_full_disk(out, num_bytes):
    """Raise InputError unless there is room for that many bytes of weights, and what lies beside them, where `out` is made."""
    free = free_disk_bytes(out) + leftover_bytes(out)  # which is replaced
    needed = num_bytes + 64 * 2**20  # tokenizer, configs, report
    if free < needed:
        raise InputError(
            f"{out}: the model needs {size(needed)}, and {size(free)} are free on that disk; "
            "free some space, or choose another disk"
        )


def write_model(trained, plan, folder, base, device):
    """Write the merged model into `folder`; return the merge.Merge that made its tensors.

    base: "dequantized" or "original".

    Raises:
        InputError: a weight is too large for the dtype, or the base quantizes to other codes than in training.
    """
    max_bytes = parse_size(trained.export.max_shard_size)
    how = merge.Base(trained.modules, trained.quantization, base == "original")
    with Reader(trained.checkpoint) as reader, Cores(device) as cores:
        merging = merge.Merge(reader, plan, trained.adapter, how, device, cores.map)
        writer.write(folder, plan.written, merging.pieces, max_bytes)
    different = sorted(name for name, same in merging.digests.items() if not same)
    if different:
        layers = f"{len(different)} layer{'s' if len(different) > 1 else ''}"
        raise InputError.listing(
            f"{trained.name}: re-quantized weights differ from those used in training in {layers}; the run",
            [f"{name}: different 4-bit codes" for name in different],
            "export with the versions in environment.json, and on a GPU if it was trained on one",
        )
    dtype = trained.export.dtype
    configs.write(folder, trained.checkpoint, trained.model, plan.config, trained.tokenizer, dtype, trained.generation)
    note(
        f"wrote     {len(plan.specs)} tensors, {size(plan.num_bytes)} of {dtype}, {len(merging.modules)} merged"
        + (f", {len(plan.kept)} that are not text copied unchanged" if plan.kept else "")
        + (f"; {len(merging.digests)} have the same 4-bit codes as in training" if merging.digests else "")
    )
    return merging


def report_of(trained, plan, merging, seconds, peak_bytes) -> dict:
    """Return export_report.json of a folder that is written and not yet proven. seconds, peak_bytes: of the writing."""
    task = trained.checkpoint.task
    labels = {"labels": list(task.labels)} if task.file.HAS_CLASSES else {}
    return {
        "base": trained.export.base,
        "dtype": trained.export.dtype,
        "verify": trained.export.verify,
        "verified": False,
        "live_model": trained.live_model,
        "origins": trained.taken_from,
        "adapter_sha256": methods.weight_hashes(trained.folder),
        **report.of_merging(merging, len(trained.modules)),
        "new_tokens": trained.checkpoint.new_tokens,
        "kept_tensors": len(plan.kept),
        **labels,
        "bytes": plan.num_bytes,
        "write_seconds": seconds,
        "peak_bytes": peak_bytes,
    }


def card_of(trained, found, title) -> str:
    """Return the text of the model card of the exported model. found: its export_report.json, whole."""
    quantized = trained.quantization.quant_type.upper() if trained.quantization else None
    rows = report.scores(found) if "live" in found else []
    name = trained.checkpoint.name_or_path
    task = trained.checkpoint.task.file
    return card(title, name, trained.adapter.config, found, quantized, rows, trained.origins, task)
