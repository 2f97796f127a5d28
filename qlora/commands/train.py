"""qlora train: recipe -> run folder."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import platform
import shlex
import subprocess
import uuid
from pathlib import Path

from ..jobs import resumed_run
from ..recipe import Recipe, parse_size
from ..runs.folder import RunDir
from ..runs.record import Begun
from ..system import files
from ..system.errors import DoesNotFit, InputError, Interrupted, TrainingFailed
from ..system.events import heard_by
from ..system.storage import free_disk_bytes, new_folder, write_json
from ..terminal import console

PACKAGES = (
    "qlora-trainer",
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
)
_WORTH_SAYING = 2**30  # bytes of a GPU; a desktop takes less


def train(recipe: Recipe, resume=False, allow_change=()) -> RunDir:
    """Train the adapters that `recipe` describes; return the finished run folder.

    All that can be wrong with recipe, data, tokenizer and output folder is found before a weight is read. The run
    folder has an `adapter/` only once training has ended well.

    resume: go on with the run in recipe.output_dir, from its newest checkpoint that verifies. allow_change: names of
    recipe fields, or of data, rows, tokenizer, chat_template, base_model, that may differ from what it was begun with.

    Raises:
        DoesNotFit: there is not enough memory; the run folder keeps what was measured until then.
        InputError: the recipe, the data, the model folder or output_dir is wrong; or what is to be resumed.
        Interrupted: by SIGINT or SIGTERM; between two steps, and with a checkpoint, where training had begun.
        TrainingFailed: losses or gradients are not finite, the loss has diverged, or an adapter does not move.
    """
    run = RunDir(recipe.output_dir)
    try:
        if resume:
            with resumed_run.resumed(recipe, allow_change) as resumed:
                return run if resumed is None else _train(recipe, resumed)
        if allow_change:
            raise InputError("--allow-change is for --resume")
        run.refuse_used()
        return _train(recipe, None)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"output_dir {run.path}: {error.strerror}; free some space{_how_to_go_on(run)}") from None
    except Interrupted as stopped:
        raise Interrupted(stopped.number, f"stopped{_how_to_go_on(run) or ' before the first step'}") from None
    except TrainingFailed as failed:
        lower = " training.learning_rate=LOWER --allow-change training.learning_rate"
        change = lower if "lower training.learning_rate" in str(failed).lower() else ""
        raise TrainingFailed(f"{failed}{_how_to_go_on(run, change)}") from None


def _how_to_go_on(run, change=""):
    steps = [path.name.removeprefix("step-") for path in run.checkpoints.glob("step-*")]
    newest = max((int(step) for step in steps if step.isdigit()), default=None)
    if newest is not None:
        return f"; resume after step {newest} with:  qlora train {shlex.quote(str(run.recipe_file))} --resume{change}"
    return f"; remove {run.path} to start again" if run.recipe_file.exists() else ""


def _train(recipe, resumed):
    """Train from the beginning, or go on with a Resumed run."""
    from .. import base_model, kernels, methods, training
    from ..exporter import merge, proof
    from ..jobs.prepared_data import prepare, refuse_pointless, say_report
    from ..runs.checkpoints import Checkpoints
    from ..system import signals

    prepared = prepare(recipe)
    recipe = prepared.recipe
    say_report(prepared)
    refuse_pointless(prepared.report)
    _refuse_what_quantizing_undoes(recipe.quantization, prepared.checkpoint.folder)
    if recipe.data.packing:
        kernels.attention.refuse_unsupported(prepared.config)
    fingerprint = resumed_run.of_recipe(recipe, prepared)
    if resumed is not None:
        resumed.refuse_changes(fingerprint)
    checkpoint, tokenizer = prepared.checkpoint, prepared.tokenizer
    checkpointed_layers, offload, predicted = _plan(recipe, prepared, base_model.default_device())

    # what export will need: better to know now than after the training
    merge.plan(checkpoint, prepared.config, base_model.dtype_of(recipe.export.dtype), recipe.model.trust_remote_code)

    with RunDir.create(recipe) if resumed is None else contextlib.nullcontext(resumed.run) as run:
        vocab_size = prepared.config.get_text_config().vocab_size
        held_out = prepared.eval_examples
        rows = proof.proof_rows(held_out if len(held_out) else prepared.examples, vocab_size)
        with console.status(f"loading {checkpoint.name_or_path}"):
            model = base_model.load(checkpoint, recipe.model, recipe.quantization)
            quantized, hashes = base_model.digests(model), checkpoint.file_hashes()
            of_base = resumed_run.of_base(hashes, quantized)
            if resumed is not None:
                resumed.refuse_changes(of_base)
            base_model.refuse_not_causal(model, checkpoint)
            model = methods.attach(
                model,
                recipe.method,
                recipe.training.seed,
                checkpoint.new_tokens.values(),
                checkpoint,
                prepared.examples,
            )
        prequantized = base_model.stored_quantization(prepared.config) is not None
        half = checkpoint.half
        environment = _environment(checkpoint, quantized, prequantized, hashes, prepared.parts, model.device)
        environment["base_model"]["kept_tensors"] = len(half.kept) if half else 0
        if resumed is not None:
            _say_resumed(resumed, environment)
            environment["id"] = resumed.environment["id"]
        # by content, so that an evaluation is of these rows whatever happens to their file
        environment["held_out"] = [f"{key:016x}" for key in held_out.one_each().keys]

        def begin(event):
            """Write what the run is as it begins; until then a finished run that is to go on is as it was."""
            if not isinstance(event, Begun):
                return
            if resumed is not None:
                resumed.begin(recipe)
            write_json(run.data_report_file, prepared.report)
            write_json(run.proof_rows_file, proof.to_json(rows, "held-out rows" if len(held_out) else "training rows"))
            write_json(run.environment_file, environment)

        _print_model(checkpoint, model, quantized, prequantized, recipe, half)
        # a signal is noted until adapter/ is there: what training has made is never thrown away
        with (
            kernels.installed(model, recipe.kernels) as installed,
            console.Steps() as steps,
            heard_by(begin, steps),
            signals.noted() as stop,
        ):
            if recipe.data.packing and not (installed.joined or kernels.attention.joins(model.get_base_model())):
                raise InputError("data.packing: rows of this architecture cannot be joined; set data.packing=false")
            _print_kernels(installed, model.device)
            result = training.train(
                model,
                tokenizer,
                training.Rows(prepared.batches, held_out),
                training.Settings(recipe.training, checkpointed_layers, offload, predicted, installed=installed),
                run,
                training.Saving(
                    to=Checkpoints(run.checkpoints, environment["id"]),
                    every=recipe.training.save_steps,
                    limit=recipe.training.save_total_limit,
                    fingerprint=fingerprint | of_base,
                    resume=resumed and resumed.checkpoint,
                    stop=stop,
                ),
            )
            with new_folder(run.adapter) as folder:
                methods.save(model, folder, checkpoint.name_or_path, checkpoint.revision)
                tokenizer.save_pretrained(folder)
                methods.seal(folder, hashes)
    console.say(
        f"trained {result.steps} steps, {result.tokens:,} tokens in {console.duration(result.seconds)}: "
        f"{result.tokens / result.step_seconds:,.0f} tokens/s in the steps, {result.tokens / result.seconds:,.0f} including "
        f"evaluations and checkpoints; {_peak(result, predicted)}; "
        f"loss {result.loss:.4f}" + ("" if result.eval_loss is None else f", held-out {result.eval_loss:.4f}")
    )
    named = shlex.quote(str(run.path))
    console.say(f"adapter in {run.adapter}; next: qlora eval {named}, qlora export {named} --out FOLDER")
    return run


def _refuse_what_quantizing_undoes(quantization, folder):
    """Raise InputError if the base is an export of ours that 4 bit would make the model before its training again.

    A merge onto dequantized weights lies so near the points of the grid that quantizing rounds it back to them: held-out
    loss 1.03 after it, where the export has 0.065 (docs/export.md).
    """
    from ..exporter import REPORT

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


def _say_resumed(resumed, environment):
    """Print where the run goes on, and what is not as it was though it may be."""
    then = resumed.environment
    console.say(f"resumed   from {resumed.checkpoint}, {console.duration(resumed.state['seconds'])} of training")
    kinds = {"device": (then["device"], environment["device"])}
    kinds |= {name: (then["versions"].get(name), now) for name, now in environment["versions"].items()}
    for name, (old, now) in kinds.items():
        if old != now:
            console.say(f"          {name} was {old}, is {now}: numbers may differ in their last digits")


def _plan(recipe, prepared, device):
    """Print the plan; return (layers to checkpoint, whether to offload, the peak predicted in the terms of memory.Peak).

    Without a plan, the last is None and the rehearsal says what does not fit.

    Raises:
        DoesNotFit: it does not; says what would.
        InputError: the model has fewer layers than are to be checkpointed, or offloading has nothing to move.
    """
    from .. import planner
    from ..jobs.plan_job import free_bytes, held_by_others, job_of, refuse_layers
    from ..system import memory

    budget = free_bytes(device) if recipe.memory.budget is None else parse_size(recipe.memory.budget)
    try:
        job = job_of(recipe, prepared, device.type, budget)
    except planner.NoPlan as error:
        num_layers = prepared.config.get_text_config().num_hidden_layers
        refuse_layers(recipe.memory, num_layers)
        setting = recipe.memory.gradient_checkpointing
        setting = device.type == "cuda" if setting == "auto" else setting
        layers = num_layers * setting if isinstance(setting, bool) else setting
        console.say(f"plan      none: this architecture cannot be traced on the meta device ({error})")
        return layers, recipe.memory.offload is True, None
    found = planner.plan(job)
    if not found.fits:
        lines = [
            f"does not fit: {console.size(found.peak_bytes)} are needed ({found.where}), {console.size(budget)} are "
            f"{'free' if recipe.memory.budget is None else 'memory.budget'}; what would help, best first:"
        ]
        lines += [
            f"  {change['set']}: {console.size(change['peak_bytes'])}{', fits' if change['fits'] else ''}"
            for change in planner.suggestions(job)
        ]
        others = held_by_others(device)
        if recipe.memory.budget is None and others > _WORTH_SAYING:
            lines.append(f"  other processes hold {console.size(others)} of the GPU; nvidia-smi lists them")
        raise DoesNotFit("\n".join(lines))
    _refuse_full_disk(recipe, found)
    where = ", layer inputs offloaded to CPU memory" if found.offload else ""
    console.say(
        f"plan      peak {console.size(found.peak_bytes)} of {console.size(budget)} ({found.where}); "
        f"{found.checkpointed_layers} of {found.num_layers} layers checkpointed{where}"
    )
    if device.type == "cpu":
        return found.checkpointed_layers, found.offload, memory.anonymous_bytes() + found.peak_bytes
    return found.checkpointed_layers, found.offload, found.cuda_bytes


def _refuse_full_disk(recipe, found):
    """Raise InputError where the disk has no room for the checkpoints that will be there at a time, and the adapter."""
    from ..runs.checkpoints import Checkpoints

    training, run = recipe.training, RunDir(recipe.output_dir)
    count = 0
    if training.save_steps is not None:
        saves = None if found.steps is None else -(-found.steps // training.save_steps)
        limit = None if training.save_total_limit is None else training.save_total_limit + 1  # the new one comes first
        count = min((number for number in (saves, limit) if number is not None), default=1)
    there = Checkpoints(run.checkpoints, None).num_bytes()
    needed = max(0, count * found.checkpoint_bytes - there) + found.components["adapter"]
    free = free_disk_bytes(run.path)
    if needed > free:
        fewer = ", set a lower training.save_total_limit or higher training.save_steps" if count > 1 else ""
        raise InputError(
            f"output_dir {run.path}: {count} checkpoints of {console.size(found.checkpoint_bytes)} and the adapter need "
            f"{needed:,} bytes more, {free:,} are free; free some{fewer}, or set output_dir=ANOTHER_FOLDER"
        )


def _print_kernels(installed, device):
    """Print which kernels replace the model's own modules."""
    names = {"lora": "LoRA layers", "swiglu": "SwiGLU blocks", "rmsnorm": "RMSNorms"}
    parts = [f"{count} {names[kind]}" for kind, count in installed.modules.items()]
    parts += ["batches without padding"] if installed.joined else []
    parts += ["chunked loss"] if installed.loss and device.type == "cpu" else []
    parts += ["freed memory reused"] if installed.memory else []
    console.say(f"kernels   {', '.join(parts) or 'off'}")
    for kind, classes in installed.refused.items():
        console.say(f"          {names[kind]}: not used for {', '.join(classes)}, because the results differ")


def _peak(result, predicted):
    return f"peak {console.size(result.peak_bytes)}" + (f" (predicted {console.size(predicted)})" if predicted else "")


def _environment(checkpoint, quantized, prequantized, hashes, parts, device):
    import torch

    return {
        "id": uuid.uuid4().hex,  # checkpoints say whose they are
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "git_commit": _git_commit(),
        "directory": str(Path.cwd()),  # relative paths of the recipe start here
        "base_model": {
            "name_or_path": checkpoint.name_or_path,
            "folder": str(checkpoint.folder.resolve()),
            "revision": checkpoint.revision,
            "sha256": hashes,
            "quantized_modules": sorted(quantized),
            "quantized_sha256": quantized,
            "prequantized": prequantized,
        },
        "data": [{"path": part.path, "sha256": part.digest} for part in parts],
    }


def _git_commit():
    """Return the commit of the checkout that the package lies in, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _kind(lora):
    if lora.peft_type == "ADALORA":
        return f"AdaLoRA, ranks {lora.init_r} to {lora.target_r} on average"
    start = "" if lora.init_lora_weights is True else f", from {lora.init_lora_weights}"
    return f"{'DoRA, ' if lora.use_dora else ''}r = {lora.r}{start}"


def _print_model(checkpoint, model, quantized, prequantized, recipe, half):
    from .. import base_model

    trainable, total = base_model.num_parameters(model)
    how = f"{len(quantized)} linear layers in {recipe.quantization.quant_type}" if quantized else "not quantized"
    how += " (the folder's own codes)" if prequantized else ""
    console.say(f"base      {checkpoint.name_or_path}: {total - trainable:,} parameters, {how}, on {model.device}")
    if half is not None:
        console.say(f"          multimodal checkpoint: training the text half; {half}")
    console.say(f"adapter   {_kind(recipe.method)}, {trainable:,} trainable parameters ({trainable / total:.2%})")
    if checkpoint.new_tokens:
        console.say(
            f"tokens    rows of {len(checkpoint.new_tokens)} tokens are trained, {len(checkpoint.added)} of them new to the "
            f"tokenizer; {model.get_input_embeddings().weight.shape[0]:,} embeddings"
        )
