"""qlora export: run folder -> a full-precision model folder, proven to be the model that was trained."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from pathlib import Path

import torch

from .. import adapter, base_model, memory
from ..data import chat
from ..errors import InputError, ProofFailed
from ..export import merge, proof, writer
from ..recipe import Recipe
from ..rundir import RunDir, new_folder, refuse_nonempty, write_json
from . import console
from .subject import load_tokenizer, refuse_changed_base


def export(run_folder, out, dtype=None, overrides=()) -> dict:
    """Write the run's merged model to folder `out`; return the contents of its export_report.json.

    Each weight is dequantize(NF4(W)) + scaling * B A, added in float32 and cast once to `dtype` ("float16",
    "bfloat16", "float32"; the recipe's export.dtype by default). The folder is written beside `out`, reloaded by plain
    transformers, compared with the live NF4 + adapter model on held-out rows, and renamed to `out` only if it agrees.

    Raises:
        InputError: no finished run, another base, `out` is not empty, too little disk, a weight too large for `dtype`.
        ProofFailed: the export is not the trained model, or no different from its base; nothing is left at `out`.
    """
    if dtype is not None:
        overrides = [*overrides, f"export.dtype={dtype}"]
    run, out = RunDir.open(run_folder), Path(out)
    recipe = Recipe.load(run.recipe_file, overrides)
    refuse_nonempty(out, "export")
    start = time.monotonic()

    max_bytes = writer.parse_size(recipe.export.max_shard_size)
    checkpoint = base_model.find(recipe.model)
    config = base_model.load_config(checkpoint, recipe.model)
    trained = adapter.read(run.adapter)
    refuse_changed_base(run, checkpoint)
    dtype = recipe.export.dtype
    plan = merge.plan(checkpoint, config, base_model.dtype_of(dtype), recipe.model.trust_remote_code, trained)
    total = plan.num_bytes
    _refuse_full_disk(out, total)
    tokenizer = load_tokenizer(run, recipe.model, checkpoint)
    rows, which = proof.from_json(run.proof_rows())

    device = base_model.default_device()
    quantized = dict.fromkeys(run.environment()["base_model"]["quantized_modules"])
    merging = merge.Merge(checkpoint, plan, trained, merge.Base(quantized, recipe.quantization), device)
    with new_folder(out) as folder:
        with console.counting(f"writing {console.size(total)}", total) as advance:
            writer.write(folder, plan.specs, merging.pieces, max_bytes, advance)
        _write_configs(folder, checkpoint, plan.config, tokenizer, dtype)
        peak = memory.peak_bytes()
        console.say(f"wrote {len(plan.specs)} tensors, {console.size(total)} of {dtype}, {len(merging.modules)} merged")
        with console.status("proving: the trained model against the written folder"):
            live, merged = _compare(checkpoint, recipe, run, rows, folder, device)
        report = {
            "base": recipe.export.base,
            "dtype": dtype,
            "verified": not proof.failures(live.scores, merged, live.base_scores, dtype),
            "rows": {"count": len(rows), "from": which, "positions": live.num_positions},
            "live": {"loss": live.scores.loss, "compute_dtype": "float32"},
            "merged": dataclasses.asdict(merged),
            "base_model": dataclasses.asdict(live.base_scores),
            "limits": {"kl": proof.KL_LIMIT[dtype], "top1": proof.TOP1_LIMIT[dtype], "loss": proof.LOSS_LIMIT[dtype]},
            "modules": merging.modules,
            "new_tokens": checkpoint.new_tokens,
            "seconds": time.monotonic() - start,
            "peak_bytes": peak,
        }
        _show(report)
        failures = proof.failures(live.scores, merged, live.base_scores, dtype)
        if failures:
            raise ProofFailed(
                "\n  ".join([f"the export is not the trained model; nothing was left at {out}:", *failures])
            )
        write_json(folder / "export_report.json", report)
    console.say(f"proven; the model is in {out}: {console.size(total)}, {console.duration(time.monotonic() - start)}")
    return report


def _refuse_full_disk(out, num_bytes):
    parent = next(folder for folder in [out, *out.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes * 1.01:
        raise InputError(
            f"{out}: the model takes {console.size(num_bytes)}, {console.size(free)} are free on that disk"
        )


def _write_configs(folder, checkpoint, config, tokenizer, dtype):
    from transformers import GenerationConfig

    for code in checkpoint.folder.glob("*.py") if config.to_dict().get("auto_map") else []:
        shutil.copy(code, folder)
    config.dtype = base_model.dtype_of(dtype)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = checkpoint.generation_config() or GenerationConfig.from_model_config(config)
    generation.eos_token_id = sorted(chat.stop_token_ids(tokenizer, generation))
    generation.pad_token_id = tokenizer.pad_token_id
    # not save_pretrained: it refuses sampling settings beside do_sample: false, which published models have
    write_json(folder / "generation_config.json", generation.to_diff_dict())


def _compare(checkpoint, recipe, run, rows, folder, device):
    section = recipe.model
    if section.attn_implementation == "flash_attention_2":  # computes in bfloat16 whatever it is given
        section = section.model_copy(update={"attn_implementation": "auto"})
    live_device = device
    if recipe.quantization is None:
        live_device = proof.device_for(2 * sum(path.stat().st_size for path in folder.glob("*.safetensors")), device)
    model = base_model.load(checkpoint, section, recipe.quantization, live_device)
    model = adapter.load(model, run.adapter, checkpoint.new_tokens.values())
    live = proof.Live(model, rows)
    del model
    gc.collect()  # peft models hold themselves in cycles; the merged model needs the room
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return live, live.compare(proof.reload(folder, device, section.trust_remote_code))


def _show(report):
    live, merged, base = report["live"], report["merged"], report["base_model"]
    rows = [
        ["trained (NF4 + adapter, live)", f"{live['loss']:.4f}", "", ""],
        [
            f"exported ({report['dtype']}, reloaded)",
            f"{merged['loss']:.4f}",
            f"{merged['kl']:.1e}",
            f"{merged['top1']:.2%}",
        ],
        ["base (NF4, no adapter)", f"{base['loss']:.4f}", f"{base['kl']:.1e}", f"{base['top1']:.2%}"],
    ]
    count = report["rows"]
    title = f"proof on {count['count']} {count['from']}, {count['positions']} positions"
    console.table(title, ["", "loss", "KL to trained", "same top-1"], rows)
