"""What train trains: the base in 4 bit with the adapters attached, and what the run folder says of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import Any

from ... import base_model, data, kernels, methods
from ...exporter import REPORT, merge
from ...kernels import attention
from ...runs.environment import environment
from ...runs.record import Begun
from ...system import files
from ...system.errors import InputError
from ...system.events import progress
from ...system.storage import new_folder, write_json
from . import resumed_run, started_from
from .chosen_task import proof_of
from .prepared_data import refuse_pointless


@dataclass
class ModelToTrain:
    """A model whose adapters alone require gradients, on its base.

    environment: contents of environment.json. fingerprint: what a resumed run is compared with.
    """

    model: Any
    environment: dict
    fingerprint: dict


def refuse_untrainable(prepared):
    """Raise InputError for what can be known of Prepared data and its model before a weight is read.

    What export will need is among it: better to know now than after the training.
    """
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    refuse_pointless(prepared.report)
    _refuse_what_quantizing_undoes(recipe.quantization, checkpoint.folder)
    if recipe.data.packing:
        attention.refuse_unsupported(prepared.config, recipe.data.max_length)
    merge.plan(checkpoint, prepared.config, base_model.dtype_of(recipe.export.dtype), recipe.model.trust_remote_code)


def _refuse_what_quantizing_undoes(quantization, folder):
    """Raise InputError if the base is an export of ours that 4 bit would make the model before its training again.

    A merge onto dequantized weights lies so near the points of the grid that quantizing rounds it back to them: held-out
    loss 1.03 after it, where the export has 0.065 (docs/export.md).
    """
    if quantization is None or not (folder / REPORT).is_file():
        return
    report = files.read_object(folder / REPORT)
    quantized = report.get("quantized")
    if report.get("base") == "dequantized" and isinstance(quantized, dict) and quantized.get("modules"):
        raise InputError(
            f"model.name_or_path {folder}: an export with the dequantized base; quantizing it to "
            f"{quantization.quant_type} again would undo its training. Export the run with --base original "
            "and train on that, or set quantization: null"
        )


def open_trainable(prepared, fingerprint, resumed=None, tokens=None, share=None) -> ModelToTrain:
    """Load the base of Prepared data, quantize it and attach the adapters.

    fingerprint: of the recipe, see resumed_run.of_recipe. resumed: the Resumed run that goes on, or None.
    tokens: of joined micro-batches, for environment.json. share: the base_model.Share of the base that this process holds; None:
    the whole base.

    Raises:
        InputError: the base is not causal, or no longer what the resumed run was begun with.
    """
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    with progress(f"loading {checkpoint.name_or_path}"):
        recorded = {} if resumed is None else resumed.environment["base_model"].get("quantized_sha256", {})
        share = share and replace(share, recorded=recorded, offload=recipe.memory.offloads_codes)
        model = base_model.load(checkpoint, recipe.model, recipe.quantization, share=share)
        base_model.restore_codes(model, recorded)  # of a run on another device, maybe
        if share is not None:
            base_model.gather_in_layers(model, share.offload)
        quantized, hashes = base_model.digests(model), checkpoint.file_hashes()
        of_base = resumed_run.of_base(hashes, quantized)
        if resumed is not None:
            resumed.refuse_changes(of_base)
        checkpoint.task.file.refuse_unsuitable(model, checkpoint)
        model = methods.attach(
            model,
            recipe.method,
            recipe.training.seed,
            checkpoint.new_tokens.values(),
            checkpoint,
            data.as_supervised(prepared.examples),
            started_from.folder_of(recipe.model),
        )
        if share is not None and share.offload:  # PEFT puts adapters where the codes are
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(model.device)
    trainable, total = base_model.num_parameters(model)
    found = environment(model.device) | {
        "parameters": {"trainable": trainable, "total": total},
        "base_model": {
            "name_or_path": checkpoint.name_or_path,
            "folder": str(checkpoint.folder.resolve()),
            "revision": checkpoint.revision,
            "sha256": hashes,
            "quantized_modules": sorted(quantized),
            "quantized_sha256": quantized,
            "prequantized": base_model.stored_quantization(prepared.config) is not None,
            "kept_tensors": len(checkpoint.half.kept) if checkpoint.half else 0,
        },
        "compute_dtype": base_model.asked(recipe.model, recipe.quantization),  # settled by now
        "data": [{"path": part.path, "sha256": part.digest} for part in prepared.parts],
        "tokens_per_micro_batch": tokens,
        # by content, so that an evaluation is of these rows whatever happens to their file
        "held_out": [f"{key:016x}" for key in prepared.eval_examples.one_each().keys],
    }
    if resumed is not None:
        found["id"] = resumed.environment["id"]
    return ModelToTrain(model, found, fingerprint | of_base)


def begins(run, prepared, trainable, resumed=None):
    """Return a listener that writes what the run is into its folder once the training has begun.

    Until then a finished run that is to go on is as it was.
    """

    def hear(event):
        if isinstance(event, Begun):
            _write(run, prepared, trainable, resumed)

    return hear


def _write(run, prepared, trainable, resumed):
    if resumed is not None:
        resumed.begin(prepared.recipe)
    run.ended_file.unlink(missing_ok=True)
    held_out, proof = prepared.eval_examples, proof_of(prepared.checkpoint.task.file)
    rows = data.as_supervised(held_out if len(held_out) else prepared.examples)
    rows = proof.proof_rows(rows, getattr(prepared.config.get_text_config(), "vocab_size", None))
    write_json(run.data_report_file, prepared.report)
    write_json(run.proof_rows_file, proof.to_json(rows, "held-out rows" if len(held_out) else "training rows"))
    write_json(run.environment_file, trainable.environment)


def save_adapter(run, prepared, trainable):
    """Write adapter/ or model/, with the tokenizer and a manifest, into the run folder: whole or not at all."""
    checkpoint = prepared.checkpoint
    with new_folder(run.path / prepared.recipe.method.saved_in) as folder:
        methods.save(trainable.model, folder, checkpoint.name_or_path, checkpoint.revision)
        if checkpoint.task.file.HAS_TOKENS:
            base_model.save_tokenizer(prepared.tokenizer, folder)
        else:  # as it is: transformers would write it anew, with settings of its own version
            shutil.copyfile(
                checkpoint.folder / base_model.image_processor.FILE, folder / base_model.image_processor.FILE
            )
        methods.seal(folder, trainable.environment["base_model"]["sha256"])


def kernels_of(prepared, model):
    """Return the block in which a model is trained on Prepared data: kernels.installed."""
    return kernels.installed(model, kernels.setting_of(prepared.recipe, prepared.config))


def refuse_unjoinable(recipe, model, installed):
    """Raise InputError if rows are to be packed and neither the kernels nor the model's own attention can join them."""
    if recipe.data.packing and not (installed.joined or attention.joins(model.get_base_model())):
        raise InputError("data.packing: rows of this architecture cannot be joined; set data.packing=false")
