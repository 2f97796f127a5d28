"""qlora export: a trained model -> a full-precision model folder, proven to be the model that was trained."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from .. import base_model
from ..exporter import REPORT
from ..exporter.gguf.adapter import KIND as ADAPTER
from ..exporter.proof import refuse_unproven
from ..jobs.exporting.export_beside import card_beside, plan_beside, report_beside, write_beside
from ..jobs.exporting.export_folder import card_of, plan_export, report_of, write_model
from ..jobs.exporting.export_gguf import add_gguf, write_adapter
from ..jobs.exporting.export_int8 import add_int8
from ..jobs.exporting.export_proof import Prover
from ..jobs.opening import checkpoint_run
from ..jobs.opening.opened_adapter import open_trained
from ..system import launched, memory
from ..system.devices import say_device
from ..system.errors import Interrupted
from ..system.events import note
from ..system.storage import alone, new_folder, refuse_inside, scratch_folder, write_json
from ..system.usual_torch import usual_torch
from ..terminal import shown
from ..terminal.export import advise, say_done, show_proof, warn


@shown()
@usual_torch()
def export(target, out, dtype=None, overrides=(), *, model=None, data=None, compare_bases=False, gguf=None) -> dict:
    """Write the merged model of `target` to folder `out`; return the contents of its export_report.json.

    target: a finished run, a checkpoint of one (RUN/checkpoints/step-N), or a PEFT adapter folder that was trained on `model`; or
    a list of "RUN:WEIGHT", whose adapters are added up. Each weight is dequantize(NF4(W)) and what the adapter does to it, in
    float32, cast once to `dtype` ("float16", "bfloat16", "float32"; the recipe's export.dtype by default). The folder is written
    beside `out`, compared with the live model on rows (of file `data`, or those that the run held out), and renamed to `out` only
    if it agrees.
    export.base=original adds to the weights of the files instead. compare_bases: measure both, as they are and as served
    in 4 bit. gguf: "f16", "q8_0" or "q4_k_m", to add a GGUF file and an Ollama Modelfile; "adapter" to write nothing but a LoRA
    adapter, for llama.cpp's --lora, to the file `out`. export.int8=true writes the merged
    model in dynamic int8 instead, proven too. What cannot become one with its base is written as an adapter alone, proven beside
    the base that it was trained on.

    Raises:
        InputError: nothing that was trained, another base, `out` is not empty, too little disk, a weight too large for
            `dtype`, an adapter that does not fit; another process exports to `out`.
        Interrupted: by SIGINT or SIGTERM; nothing is left at `out`.
        ProofFailed: the export is not what it should be; nothing is left at `out`.
    """
    launched.refuse_several("qlora export RUN --out FOLDER")
    say_device()
    if dtype is not None:
        overrides = [*overrides, f"export.dtype={dtype}"]
    start, out = time.monotonic(), Path(out)
    targets = [target] if isinstance(target, (str, Path)) else list(target)
    refuse_inside(out, [run.checkpoints for one in targets if (run := checkpoint_run.run_of(one)) is not None])
    try:
        with open_trained(targets, model, data, overrides) as trained:
            inputs = [] if data is None else [Path(data)]
            unused = {"--dtype": dtype, "--compare-bases": compare_bases, "--int8": trained.export.int8,
                      "export.base": trained.export.base == "original"}  # fmt: skip
            if gguf == ADAPTER:
                return write_adapter(trained, out, unused | {"--data": data})
            if trained.adapter.unmergeable:
                unused["--gguf"] = gguf
                return _export_beside(trained, plan_beside(trained, out, inputs, unused), out, start)
            plan = plan_export(trained, out, inputs, compare_bases, gguf)
            return _export(trained, plan, out, compare_bases, gguf, start)
    except Interrupted as stopped:
        left = f"the model in {out} is complete" if (out / REPORT).exists() else f"nothing was left at {out}"
        raise Interrupted(stopped.number, f"export interrupted; {left}") from None


def _export(trained, plan, out, compare_bases, gguf, start):
    """Write, prove, describe; the folder is renamed to `out` at the end of the block. start: of the clock."""
    device, base = base_model.default_device(), trained.export.base
    prover = None if trained.export.verify == "off" else Prover(trained, plan, device)
    int8 = trained.export.int8
    with (
        alone(out, "export"),
        new_folder(out) as folder,
        scratch_folder(folder) if int8 else contextlib.nullcontext(folder) as merged,
    ):
        with memory.Peak() as peak:
            merging = write_model(trained, plan, merged, base, device)
        report = report_of(trained, plan, merging, time.monotonic() - start, peak.bytes)
        if prover:
            report |= prover.prove(merged)
        if int8 and not report.get("failures"):
            report |= add_int8(trained, merged, folder, prover, report)
        if prover:
            if compare_bases:
                other = "original" if base == "dequantized" else "dequantized"
                with scratch_folder(folder) as second:
                    write_model(trained, plan, second, other, device)
                    report["comparison"] = prover.compare({base: folder, other: second})
            show_proof(report)
            refuse_unproven(report, out)
        warn(report)
        advise(report)
        if gguf:
            report["gguf"] = add_gguf(trained, folder, out.name, gguf, plan)
        report["seconds"] = time.monotonic() - start
        write_json(folder / REPORT, report)
        (folder / "README.md").write_text(card_of(trained, report, out.name), encoding="utf-8")
    say_done(report, out)
    return report


def _export_beside(trained, plan, out, start):
    """What `_export` does for an adapter that stays one. plan: of its base."""
    note(f"WARNING   {trained.adapter.kind} {trained.adapter.unmergeable}. The adapter is exported alone")
    prover = None if trained.export.verify == "off" else Prover(trained, plan, base_model.default_device())
    with alone(out, "export"), new_folder(out) as folder:
        write_beside(trained, folder)
        report = report_beside(trained, folder)
        if prover:
            report |= prover.prove_beside(folder)
            show_proof(report)
            refuse_unproven(report, out)
        report["seconds"] = time.monotonic() - start
        write_json(folder / REPORT, report)
        if text := card_beside(trained, report, out.name):
            (folder / "README.md").write_text(text, encoding="utf-8")
    say_done(report, out)
    return report
