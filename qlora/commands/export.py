"""qlora export: a trained model -> a full-precision model folder, proven to be the model that was trained."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

from .. import base_model
from ..evaluation import metrics
from ..exporter import REPORT, configs, merge, writer
from ..exporter.model_card import card
from ..exporter.reader import Reader
from ..jobs import export_gguf
from ..jobs.export_proof import Prover
from ..jobs.opened_adapter import open_trained
from ..kernels.threads import Cores
from ..system import memory
from ..system.errors import InputError, Interrupted, ProofFailed
from ..system.storage import (
    alone,
    leftover_bytes,
    new_folder,
    refuse_inside,
    refuse_nonempty,
    refuse_partial,
    scratch_folder,
    write_json,
)
from ..terminal import console

_FEW_POSITIONS = 250  # at 250, a top-1 agreement of 99 % is 2 positions


def export(target, out, dtype=None, overrides=(), *, model=None, data=None, compare_bases=False, gguf=None) -> dict:
    """Write the merged model of `target` to folder `out`; return the contents of its export_report.json.

    target: a finished run, or a PEFT adapter folder that was trained on `model`; or a list of "RUN:WEIGHT", whose adapters
    are added up. Each weight is dequantize(NF4(W)) +
    scaling * B A, added in float32 and cast once to `dtype` ("float16", "bfloat16", "float32"; the recipe's export.dtype
    by default). The folder is written beside `out`, compared with the live model on rows (of file `data`, or those that
    the run held out), and renamed to `out` only if it agrees. export.base=original adds to the weights of the files
    instead. compare_bases: measure both, as they are and as served in 4 bit. gguf: "f16", "q8_0" or "q4_k_m", to add a
    GGUF file and an Ollama Modelfile.

    Raises:
        InputError: nothing that was trained, another base, `out` is not empty, too little disk, a weight too large for
            `dtype`, an adapter that does not fit; another process exports to `out`.
        Interrupted: by SIGINT or SIGTERM; nothing is left at `out`.
        ProofFailed: the export is not what it should be; nothing is left at `out`.
    """
    if dtype is not None:
        overrides = [*overrides, f"export.dtype={dtype}"]
    start, out = time.monotonic(), Path(out)
    targets = [target] if isinstance(target, (str, Path)) else list(target)
    try:
        with open_trained(targets, model, data, overrides) as trained:
            inputs = [Path(data)] if data is not None else []
            return _export(trained, out, inputs, compare_bases, gguf, start)
    except Interrupted as stopped:
        left = f"the model in {out} is complete" if (out / REPORT).exists() else f"nothing was left at {out}"
        raise Interrupted(stopped.number, f"export interrupted; {left}") from None


def _export(trained, out, inputs, compare_bases, gguf, start):
    section, recipe = trained.section, trained.recipe
    refuse_nonempty(out, "export")
    refuse_partial(out, [*trained.inputs, *inputs])
    refuse_inside(out, [trained.folder, trained.checkpoint.folder])
    _refuse_meaningless(trained, compare_bases)
    trained.adapter.refuse_untrained()
    plan = merge.plan(
        trained.checkpoint,
        trained.config,
        base_model.dtype_of(section.dtype),
        recipe.model.trust_remote_code,
        trained.adapter,
    )
    _refuse_tokens_without_a_row(trained, plan.config.get_text_config().vocab_size)
    if gguf:
        export_gguf.refuse(trained, plan, gguf)
    more = export_gguf.num_bytes(gguf, plan) if gguf else 0
    _refuse_full_disk(out, plan.num_bytes + max(more, plan.num_bytes if compare_bases else 0))

    device = base_model.default_device()
    prover = None if section.verify == "off" else Prover(trained, plan, device)
    with alone(out, "export"), new_folder(out) as folder:
        with memory.Peak() as peak:
            merging = _write(trained, plan, folder, section.base, device)
        wrote = time.monotonic() - start
        report = {
            "base": section.base,
            "dtype": section.dtype,
            "verify": section.verify,
            "verified": False,
            "live_model": trained.live_model,
            "origins": trained.taken_from,
            **_what_merging_did(trained, merging),
            "new_tokens": trained.checkpoint.new_tokens,
            "kept_tensors": len(plan.kept),
            "bytes": plan.num_bytes,
            "write_seconds": wrote,
            "peak_bytes": peak.bytes,
        }
        rows = []
        if prover:
            report |= prover.prove(folder)
            if compare_bases:
                other = "original" if section.base == "dequantized" else "dequantized"
                with scratch_folder(folder) as second:
                    _write(trained, plan, second, other, device)
                    report["comparison"] = prover.compare({section.base: folder, other: second})
            rows = _table(report)
            console.table(_title(report), ["", "loss", "perplexity", "KL to trained", "same top-1"], rows)
            _refuse_unproven(report, out)
        _warn(report)
        _advise(report)
        if gguf:
            report["gguf"] = export_gguf.add_gguf(trained, folder, out.name, gguf, plan)
        report["seconds"] = time.monotonic() - start
        write_json(folder / REPORT, report)
        quantized = recipe.quantization.quant_type.upper() if recipe.quantization else None
        base = trained.checkpoint.name_or_path
        text = card(out.name, base, trained.adapter.config, report, quantized, rows, trained.origins)
        (folder / "README.md").write_text(text, encoding="utf-8")
    verdict = "proven" if report["verified"] else "NOT VERIFIED (export.verify: off)"
    if report["verified"] and trained.live_model == "assumed":
        verdict = "matches the assumed model; what the adapter was really trained on is not recorded"
    console.say(
        f"{verdict}; the model is in {out}: {console.size(plan.num_bytes)}, {console.duration(time.monotonic() - start)}"
    )
    return report


def _refuse_tokens_without_a_row(trained, num_rows):
    """Raise InputError if the tokenizer can make an id that the embedding has no row for: generation would fail there."""
    vocabulary = trained.tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= num_rows)
    if beyond:
        raise InputError(
            f"{trained.folder}: {len(beyond)} tokens of its tokenizer have no row in the embedding, which has {num_rows:,} "
            f"({beyond[0][1]!r} has id {beyond[0][0]:,}). The training enlarged the embedding but did not save it; save it with "
            "the adapter (modules_to_save), or remove these tokens from tokenizer.json"
        )


def _refuse_meaningless(trained, compare_bases):
    """Raise InputError where the original base would be wrong, or is no other than the one that was trained on."""
    if trained.section.base == "dequantized" and not compare_bases:
        return
    if trained.fitted and trained.section.base == "original":
        raise InputError(
            f"{trained.name}: lora.init_lora_weights loftq makes the adapter correct the quantization error; on the "
            "original weights that correction would be wrong. Export with --base dequantized"
        )
    if trained.recipe.quantization is None:
        what = "--base original" if trained.section.base == "original" else "--compare-bases"
        raise InputError(f"{trained.name}: the base was not quantized, so there is only one base; leave {what} out")
    if base_model.stored_quantization(trained.config):
        raise InputError(f"{trained.checkpoint.folder}: has its weights in 4 bit only; leave --compare-bases out")
    if compare_bases and trained.section.verify == "off":
        raise InputError("--compare-bases needs the measurements that export.verify: off skips; drop one of the two")


def _refuse_full_disk(out, num_bytes):
    parent = next(folder for folder in [out, *out.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free + leftover_bytes(out)  # which is replaced
    needed = num_bytes + 64 * 2**20  # tokenizer, configs, report
    if free < needed:
        raise InputError(
            f"{out}: the model needs {console.size(needed)}, and {console.size(free)} are free on that disk; "
            "free some space, or choose another disk"
        )


def _write(trained, plan, folder, base, device):
    """Write the merged model into `folder`; return the Merge that made its tensors."""
    max_bytes = writer.parse_size(trained.section.max_shard_size)
    how = merge.Base(trained.modules, trained.recipe.quantization, base == "original")
    with (
        console.writing("writing ", plan.num_bytes) as advance,
        Reader(trained.checkpoint) as reader,
        Cores(device) as cores,
    ):
        merging = merge.Merge(reader, plan, trained.adapter, how, device, cores.map)
        writer.write(folder, plan.written, merging.pieces, max_bytes, advance)
    different = sorted(name for name, same in merging.digests.items() if not same)
    if different:
        layers = f"{len(different)} layer{'s' if len(different) > 1 else ''}"
        raise InputError.listing(
            f"{trained.name}: re-quantized weights differ from those used in training in {layers}; the run",
            [f"{name}: different 4-bit codes" for name in different],
            "export with the versions in environment.json, and on a GPU if it was trained on one",
        )
    dtype = trained.section.dtype
    configs.write(
        folder, trained.checkpoint, trained.recipe.model, plan.config, trained.tokenizer, dtype, trained.generation
    )
    console.say(
        f"wrote     {len(plan.specs)} tensors, {console.size(plan.num_bytes)} of {dtype}, {len(merging.modules)} merged"
        + (f", {len(plan.kept)} that are not text copied unchanged" if plan.kept else "")
        + (f"; {len(merging.digests)} have the same 4-bit codes as in training" if merging.digests else "")
    )
    return merging


def _what_merging_did(trained, merging):
    """Return the part of the report that says, for each module and for the whole, what merging and casting changed."""
    total = {key: math.sqrt(sum(one[key] ** 2 for one in merging.modules)) for key in ("delta_norm", "cast_error")}
    lossy = [one for one in merging.modules if one["cast_loss"] is not None]
    worst = max(lossy, key=lambda one: one["cast_loss"], default=None)
    return {
        "modules": merging.modules,
        "cast": {
            "loss": total["cast_error"] / total["delta_norm"] if total["delta_norm"] else None,
            "limit": merge.CAST_LOSS_LIMIT,
            "worst": {key: worst[key] for key in ("name", "cast_loss")} if worst else None,
            "underflows": merging.underflows,
        },
        "quantized": {"modules": len(trained.modules), "same_codes_as_training": len(merging.digests)},
    }


def _warn(report):
    """Say what storing the model in its dtype cost, where that is much."""
    cast, dtype = report["cast"], report["dtype"]
    if cast["loss"] is not None and cast["loss"] > cast["limit"]:
        remedy = {
            "bfloat16": "--dtype float16 keeps 8 times as much, float32 all",
            "float16": "--dtype float32 keeps all",
        }
        console.say(
            f"WARNING   storing in {dtype} loses {cast['loss']:.0%} of what training changed (the worst: "
            f"{cast['worst']['name']}, {cast['worst']['cast_loss']:.0%}); {remedy.get(dtype, '')}"
        )
    if cast["underflows"]:
        name, count = max(cast["underflows"].items(), key=lambda item: item[1])
        console.say(
            f"          {sum(cast['underflows'].values()):,} values underflow to 0 in {dtype}, most of them "
            f"in {name} ({count:,})"
        )


def _advise(report):
    """Say which base is the better one, where both were compared."""
    for how in ("served in", report["dtype"]):
        pair = [one for one in report.get("comparison", ()) if how in one["model"]]
        if pair:
            best, worse = sorted(pair, key=lambda one: one["loss"])
            where = best["model"].partition(", ")[2]
            console.say(
                f"better    {where}: the {best['model'].split()[0]} base, loss {best['loss']:.4f} against {worse['loss']:.4f}"
            )


def _table(report):
    """Return the rows of the table that is shown and goes into the model card."""

    def row(name, loss, kl=None, top1=None):
        cells = [f"{loss:.4f}", f"{metrics.perplexity(loss):.3f}"]
        return [name, *cells, "" if kl is None else f"{kl:.1e}", "" if top1 is None else f"{top1:.2%}"]

    quantized = "quantized" if report["quantized"]["modules"] else "base"
    written = f"{report['base']} base, {report['dtype']}"
    scored = [
        (f"exported ({report['dtype']}, {report['base']} base)", report["merged"]),
        *((one["model"], one) for one in report.get("comparison", ()) if one["model"] != written),
        ("base, without the adapter", report["base_model"]),
    ]
    return [
        row(
            f"{'assumed' if report['live_model'] == 'assumed' else 'trained'} ({quantized} + adapter, live)",
            report["live"]["loss"],
        ),
        *(row(name, one["loss"], one["kl"], one["top1"]) for name, one in scored),
    ]


def _title(report):
    count = report["rows"]
    few = "; too few to show small differences, --data FILE takes more rows"
    positions = count["positions"]
    return (
        f"proof on {count['count']} {count['from']}, {positions} positions{few if positions <= _FEW_POSITIONS else ''}"
    )


def _refuse_unproven(report, out):
    if not report["verified"]:
        what = "the trained model" if report["base"] == "dequantized" else "the adapter on the original base"
        raise ProofFailed(
            "\n  ".join([f"the export differs from {what}; nothing was left at {out}:", *report["failures"]])
        )
