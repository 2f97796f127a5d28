"""qlora train: recipe -> run folder."""

from __future__ import annotations

import contextlib
import errno
import shlex
import tempfile

from .. import base_model, planner, training
from ..jobs.evaluating import samples
from ..jobs.opening import chosen_task, model_to_train, resumed_run
from ..jobs.opening.prepared_data import prepare
from ..jobs.planning.planned_training import plan_training
from ..jobs.reporting import adapter_norms, findings
from ..recipe import Recipe
from ..runs import record, trackers
from ..runs.checkpoints import Checkpoints
from ..runs.folder import RunDir
from ..system import launched, signals
from ..system.devices import say_device
from ..system.errors import DoesNotFit, InputError, Interrupted, TrainingFailed
from ..system.events import emit, heard_by, note, progress, unheard
from ..system.usual_torch import usual_torch
from ..terminal import shown
from ..terminal.data import say_report
from ..terminal.training import (
    say_findings,
    say_kernels,
    say_micro_batches,
    say_model,
    say_planned,
    say_resumed,
    say_seen,
    say_trained,
)
from ..training import processes, sharding


@shown(steps=True)
@usual_torch()
def train(recipe: Recipe, resume=False, allow_change=()) -> RunDir:
    """Train the adapters that `recipe` describes; return the finished run folder.

    All that can be wrong with recipe, data, tokenizer and output folder is found before a weight is read. The run
    folder has an `adapter/` only once training has ended well.

    resume: go on with the run in recipe.output_dir, from its newest checkpoint that verifies. allow_change: names of
    recipe fields, or of data, rows, tokenizer, chat_template, image_processor, base_model, that may differ from what it was
    begun with.

    Raises:
        DoesNotFit: there is not enough memory; the run folder keeps what was measured until then.
        InputError: the recipe, the data, the model folder or output_dir is wrong; or what is to be resumed; or this is one of
            several processes that cannot train this together.
        Interrupted: by SIGINT or SIGTERM; between two steps, and with a checkpoint, where training had begun.
        TrainingFailed: losses or gradients are not finite, the loss has diverged, or an adapter does not move.
    """
    run, launched_as = RunDir(recipe.output_dir), launched.to_train()
    is_sharded = recipe.memory.sharding is not None
    if is_sharded:
        sharding.refuse_unsupported(recipe, launched_as is not None)
    if launched_as is not None:
        processes.refuse_unsupported(recipe, launched_as.count)
        if launched_as.rank > 0:
            with unheard(), processes.started(launched_as, is_sharded) as all_of_them, launched.alone():
                return _help(recipe, all_of_them)
    with processes.started(launched_as, is_sharded) as all_of_them, _saying_how_to_go_on(run), launched.alone():
        if resume:
            with resumed_run.resumed(recipe, allow_change) as resumed:
                if resumed is None:
                    all_of_them.from_first(None)
                    return run
                return _train(recipe, resumed, all_of_them)
        if allow_change:
            raise InputError("--allow-change is for --resume")
        run.refuse_used()
        return _train(recipe, None, all_of_them)


def _help(recipe, all_of_them):
    """Compute a share of each step of a training that the first process prepares, writes and tells of."""
    beginning = all_of_them.from_first()
    if beginning is None:  # there is nothing to do
        return RunDir(recipe.output_dir)
    resumed, planned = beginning
    all_of_them.refuse_unshared(RunDir(recipe.output_dir).path)
    recipe = recipe if resumed is None else resumed.as_begun(recipe)
    prepared = prepare(recipe)
    fingerprint, asked = resumed_run.of_recipe(prepared.recipe, prepared), samples.questions(prepared)
    with tempfile.TemporaryDirectory() as folder, all_of_them.noticing():
        _train_prepared(prepared, resumed, planned, RunDir(folder), fingerprint, asked, all_of_them)
    return RunDir(recipe.output_dir)


def _train(recipe, resumed, all_of_them):
    """Train from the beginning, or go on with a Resumed run."""
    trackers.refuse_missing(recipe.training.report_to)
    say_device()
    recipe = recipe if resumed is None else resumed.as_begun(recipe)
    prepared = prepare(recipe)
    recipe = prepared.recipe
    if recipe.memory.sharding is not None:
        sharding.refuse_unsupported(recipe, True)  # with what it has taken over from the adapter that it starts from
    say_report(prepared)
    model_to_train.refuse_untrainable(prepared)
    asked = samples.questions(prepared)
    fingerprint = resumed_run.of_recipe(recipe, prepared)
    if resumed is not None:
        resumed.refuse_changes(fingerprint)
    tokens = None if resumed is None else resumed.tokens_per_micro_batch
    link = None if all_of_them.here == all_of_them.count else planner.NETWORK
    together = planner.Together(all_of_them.count, all_of_them.sharded, recipe.memory.offloads_codes, link)
    planned = plan_training(prepared, base_model.default_device(), tokens, together, all_of_them.here)
    processes.refuse_unsupported(recipe, all_of_them.count, planned.tokens_per_micro_batch is not None)
    say_planned(planned)
    say_seen(recipe, prepared.batches)

    with RunDir.create(recipe) if resumed is None else contextlib.nullcontext(resumed.run) as run:
        all_of_them.from_first((resumed, planned))
        with all_of_them.noticing():
            result = _train_prepared(prepared, resumed, planned, run, fingerprint, asked, all_of_them)
    say_trained(result, planned, run)
    return run


def _train_prepared(prepared, resumed, planned, run, fingerprint, asked, all_of_them):
    """Train what is prepared and planned; return a training.Result. In each process; only the `run` of the first is kept."""
    recipe = prepared.recipe
    tokens, share = planned.tokens_per_micro_batch, all_of_them.share
    opened = model_to_train.open_trainable(prepared, fingerprint, resumed, tokens, share)
    all_of_them.refuse_differing(opened.fingerprint)
    _say_processes(all_of_them, resumed, opened)
    if resumed is not None:
        say_resumed(resumed, opened.environment)
    say_model(prepared, opened)
    answers = all_of_them.is_first or all_of_them.sharded  # weights in shares are gathered by all
    # a signal is noted until adapter/ is there: what training has made is never thrown away
    with (
        model_to_train.kernels_of(prepared, opened.model) as installed,
        signals.noted() as stop,
        all_of_them.ended_together(),
    ):
        model_to_train.refuse_unjoinable(recipe, opened.model, installed)
        say_kernels(installed, opened.model.device)
        say_micro_batches(recipe, planned, installed)
        checkpoints = Checkpoints if all_of_them.is_first else processes.WrittenByFirst
        with _told(run, prepared, opened, resumed) if all_of_them.is_first else contextlib.nullcontext():
            result = training.train(
                opened.model,
                prepared.tokenizer,
                training.Rows(prepared.batches, prepared.eval_examples),
                training.Settings(
                    recipe.training,
                    planned.checkpointed_layers,
                    planned.offload,
                    recipe.memory.gradient_checkpointing != "auto",
                    planned.predicted_bytes,
                    planned.limit_bytes,
                    tokens,
                    installed=installed,
                    objective=chosen_task.objective_of(prepared, opened.model, installed, planned, all_of_them.count),
                    predicted_components=planned.components,
                    samples=samples.asked_of(opened.model, prepared.tokenizer, asked) if answers else None,
                    processes=all_of_them,
                ),
                run,
                training.Saving(
                    to=checkpoints(RunDir(recipe.output_dir).checkpoints, opened.environment["id"]),
                    every=recipe.training.save_steps,
                    limit=recipe.training.save_total_limit,
                    fingerprint=opened.fingerprint,
                    resume=resumed and resumed.checkpoint,
                    stop=stop if all_of_them.count == 1 else processes.AgreedStop(stop, all_of_them),
                ),
            )
            emit(record.Trained(result.steps, result.numbers()))
        if all_of_them.is_first:
            model_to_train.save_adapter(run, prepared, opened)
    return result


def _say_processes(all_of_them, resumed, opened):
    """Say how many processes train, and whether a resumed run had others; keep it in environment.json."""
    opened.environment["id"] = all_of_them.from_first(opened.environment["id"])
    now, then = all_of_them.count, 1 if resumed is None else resumed.environment.get("processes", 1)
    if now > 1:
        opened.environment["processes"] = now
        note(
            f"processes {now}, which share the micro-batches of each step; the rows of a step are those of one process"
        )
    if resumed is not None and now != then:
        note(f"processes {now}, the run had {then} until now: the same steps, whose losses differ by rounding")


@contextlib.contextmanager
def _told(run, prepared, opened, resumed):
    """Let the run folder and the trackers hear the training in the block."""
    recipe, environment = prepared.recipe, opened.environment
    reports = recipe.training.report_to
    listeners = [model_to_train.begins(run, prepared, opened, resumed)]
    if reports and recipe.method.saved_in == "adapter":
        listeners.append(adapter_norms.of_checkpoints(recipe.method))
    settings = trackers.flat(recipe.model_dump(mode="json")) | {"device": environment["device"]}
    with trackers.tracked(run, reports, settings), progress("training"), heard_by(*listeners):
        yield


@contextlib.contextmanager
def _saying_how_to_go_on(run):
    """Add to an error that ends the training in the block how the run goes on after it, and keep in the run what it was."""
    try:
        with run.says_how_it_ends():
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"output_dir {run.path}: {error.strerror}; free some space{_how_to_go_on(run)}") from None
    except Interrupted as stopped:
        raise Interrupted(stopped.number, f"stopped{_how_to_go_on(run) or ' before the first step'}") from None
    except DoesNotFit as error:
        how = [_how_to_go_on(run).removeprefix("; ")] if run.checkpoint_steps() else []
        raise DoesNotFit("\n  ".join([str(error), *how])) from None
    except TrainingFailed as failed:
        say_findings(findings.of_run(run))
        lower = " training.learning_rate=LOWER --allow-change training.learning_rate"
        change = lower if "lower training.learning_rate" in str(failed).lower() else ""
        for field in ("quantization.compute_dtype", "model.dtype"):
            if f"set {field}=float32" in str(failed).lower():
                change = f" {field}=float32 --allow-change {field}"
        raise TrainingFailed(f"{failed}{_how_to_go_on(run, change)}") from None


def _how_to_go_on(run, change=""):
    if steps := run.checkpoint_steps():
        return (
            f"; resume after step {steps[-1]} with:  qlora train {shlex.quote(str(run.recipe_file))} --resume{change}"
        )
    return f"; remove {run.path} to start again" if run.recipe_file.exists() else ""
