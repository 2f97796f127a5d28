"""A training as a person sees it: what is trained, how, each step, and what came of it."""

from __future__ import annotations

import math
import shlex
import time
from collections import deque

from .. import base_model, methods
from ..jobs.planning.planned_training import for_each_of
from ..jobs.reporting import findings
from ..runs import record
from ..system.events import Progress, emit, note
from ..system.units import duration, size
from . import lines, live
from .bars import EVERY, RECENT

TRAINING = "training"  # the Progress of the steps


class Steps:
    """Tells of the steps of a training: a view above the bar of `bars` on a terminal, a plain line now and then elsewhere."""

    def __init__(self, bars):
        self.bars, self.view = bars, live.View()
        self.said = self.last_save = time.monotonic()
        self.recent = deque()  # (step, when) of those logged in the last RECENT seconds, and the one before them
        self.total, self.counts = 0, "tokens"

    def hear(self, event):
        self.view.hear(event)
        if isinstance(event, Progress):
            if event.what == TRAINING and event.ended:
                self.bars.panel = None
        elif isinstance(event, record.Begun):
            if live.is_wanted():
                self.bars.panel = self.view
            self.total, self.counts = event.total_steps, event.counts
            self.recent.clear()
            self.said = self.last_save = time.monotonic()
        elif isinstance(event, record.Step):
            self._show(event)
        elif isinstance(event, record.Skipped):
            lines.say(f"          step {event.step}  skipped: {event.not_taken}")
        elif isinstance(event, record.LessMemory):
            what = "" if event.reserve else "out of memory "
            lines.say(f"memory    {what}{event.out_of_memory}; run again, and so from here on: {event.change}")
        elif isinstance(event, record.Rescaled):
            lines.say(
                f"          step {event.step}  skipped: a gradient overflowed float16; loss scale now {event.loss_scale:,.0f}"
            )
        elif isinstance(event, record.Evaluation):
            more = "".join(f", {name} {value:.4f}" for name, value in event.metrics.items())
            lines.say(f"          step {event.step}  held-out loss {event.eval_loss:.4f}{more}")
        elif isinstance(event, record.Samples):
            for sample in event.samples:
                _say_sample(event.step, sample)
        elif isinstance(event, record.Best):
            _say_best(event)
        elif isinstance(event, record.CheckpointSaved):
            now = time.monotonic()
            share = event.seconds / max(now - self.last_save, 1e-9)
            lines.say(
                f"          step {event.step}  checkpoint of {size(event.num_bytes)} in {event.seconds:.2f}s, "
                f"{share:.1%} of the time since the last"
            )
            self.last_save = now

    def _show(self, event):
        step, total = event.step, self.total
        now = time.monotonic()
        self.recent.append((step, now))
        while len(self.recent) > 2 and now - self.recent[1][1] > RECENT:
            self.recent.popleft()
        loss, rate = f"{event.loss:.4f}", f"{event.tokens_per_second:,.0f}"
        if lines.can_redraw():
            detail = "" if self.bars.panel is not None else f"loss {loss}  {rate} {self.counts}/s"
            self.bars.draw(Progress(TRAINING, step, total, "steps", detail))
            return
        if now - self.said > EVERY or step == total or len(self.recent) == 1:
            # the first step is slow (allocation, warm-up), and the machine may have had less to do before
            first, start = self.recent[0]
            left = f"  {duration((now - start) / (step - first) * (total - step))} left" if first < step < total else ""
            lines.say(f"training  step {step}/{total}  loss {loss}  {rate} {self.counts}/s{left}")
            self.said = now


def _say_sample(step, sample):
    asked, expected, answer = live.texts_of(sample)
    lines.say(f"          step {step}  asked     {asked}")
    lines.say(f"          step {step}  expected  {expected}")
    lines.say(f"          step {step}  answer    {answer}")


def _say_best(event):
    name = {"eval_loss": "held-out loss", "eval_accuracy": "held-out accuracy"}[event.metric]
    if event.stopped_after is not None:
        many = f"{event.stopped_after} evaluation{'s' * (event.stopped_after > 1)}"
        lines.say(f"stopped   after step {event.step}: {many} in a row no better than that of step {event.best_step}")
    kept = event.best_step if event.loaded else event.step
    last = " (the last)" if kept == event.step else ""
    lines.say(
        f"best      step {event.best_step}, {name} {event.value:.4f}; what was trained is kept as of step {kept}{last}"
    )


def say_seen(recipe, batches):
    """Say how much of the training rows max_steps will see, or what part of an epoch in num_train_epochs becomes. batches: what
    a step takes so many of."""
    training, total = recipe.training, len(batches)
    if training.max_steps is None:
        an_epoch, epochs = math.ceil(total / training.rows_per_step), training.num_train_epochs
        many = math.ceil(an_epoch * epochs)
        if many != an_epoch * epochs:
            note(
                f"steps     {many:,}, {many / an_epoch:.3g} epochs: training.num_train_epochs={epochs:g} is rounded up to whole "
                f"steps, of which an epoch has {an_epoch:,}"
            )
        return
    steps, seen = (
        f"{training.max_steps:,} step{'s' * (training.max_steps > 1)}",
        training.max_steps * training.rows_per_step,
    )
    what = "packed rows" if recipe.data.packing else "micro-batches of rows" if training.filled_to else "rows"
    if seen <= total:
        note(f"steps     {steps}, in which {seen:,} of {total:,} {what} are seen ({seen / total:.0%})")
    else:
        epochs = training.max_steps / math.ceil(total / training.rows_per_step)
        note(f"steps     {steps}, in which all {total:,} {what} are seen, {epochs:.1f} times")


def say_planned(planned):
    """Say what a jobs.planning.planned_training.Planned run is to take; the live view has the numbers of it."""
    emit(planned)
    found = planned.plan
    if found is None:
        note(f"plan      none: this architecture cannot be planned ({planned.why_none})")
        return
    where = ", layer inputs offloaded to CPU memory" if found.offload else ""
    note(
        f"plan      peak {size(found.peak_bytes)} of "
        f"{size(found.budget_bytes)}{for_each_of(planned.sharers)} ({found.where}); "
        f"{found.checkpointed_layers} of {found.num_layers} layers checkpointed{where}"
    )
    held = planned.components.get("process")
    if held:
        note(
            f"          with the {size(held)} that the process holds already: {size(planned.predicted_bytes)} predicted"
        )


def say_resumed(resumed, environment):
    """Say where the run goes on, and what is not as it was though it may be."""
    then = resumed.environment
    note(f"resumed   from {resumed.checkpoint}, {duration(resumed.state['seconds'])} of training")
    kinds = {"device": (then["device"], environment["device"])}
    kinds |= {name: (then["versions"].get(name), now) for name, now in environment["versions"].items()}
    for name, (old, now) in kinds.items():
        if old != now:
            note(f"          {name} was {old}, is {now}: numbers may differ in their last digits")


def say_kernels(installed, device):
    """Say which kernels replace the model's own modules."""
    names = {"lora": "LoRA layers", "swiglu": "SwiGLU blocks", "rmsnorm": "RMSNorms", "liger": "RMSNorms by Liger"}
    parts = [f"{count} {names[kind]}" for kind, count in installed.modules.items()]
    parts += ["batches without padding"] if installed.joined else []
    parts += ["chunked loss"] if installed.loss and device.type == "cpu" else []
    note(f"kernels   {', '.join(parts) or 'off'}")
    for kind, classes in installed.refused.items():
        note(f"          {names[kind]}: not used for {', '.join(classes)}, because the results differ")
    for kind, reason in installed.failed.items():
        note(f"          {names[kind]}: installed, but does not run here; {reason}")


def say_micro_batches(recipe, planned, installed):
    """Say how the rows of a step are computed, where the recipe leaves that open."""
    training, tokens = recipe.training, planned.tokens_per_micro_batch
    if not training.joins_steps or recipe.data.packing:
        return
    if tokens is not None and installed.joined:
        rows = training.rows_per_step
        many = f"{rows:,} rows a step, joined into" if rows > 1 else "one row a step:"
        note(f"batches   {many} micro-batches of at most {tokens:,} tokens")
        if planned.tokens_before is not None:
            note(f"          {planned.tokens_before:,} before; they no longer fit, so last digits may differ")
        return
    why = "rows of this model are not joined" if planned.plan is not None else "without a plan"
    why = "kernels are off" if recipe.kernels == "off" else why
    rows, count = training.per_device_train_batch_size, training.gradient_accumulation_steps
    note(f"batches   {count:,} micro-batch{'es' * (count > 1)} of {rows:,} row{'s' * (rows > 1)} a step: {why}")


def say_model(prepared, opened):
    """Say what is trained, and on what. opened: a jobs.opening.model_to_train.ModelToTrain."""
    recipe, checkpoint, model = prepared.recipe, prepared.checkpoint, opened.model
    trainable, total = base_model.num_parameters(model)
    own = model.trained_by.saved_in == "model"  # what is trained is the base's
    of_base = opened.environment["base_model"]
    num_quantized = len(of_base["quantized_modules"])
    how = f"{num_quantized} linear layers in {recipe.quantization.quant_type}" if num_quantized else "not quantized"
    how += " (the folder's own codes)" if of_base["prequantized"] else ""
    how += f", computing in {opened.environment['compute_dtype']}"
    frozen = total if own else total - trainable
    note(f"base      {checkpoint.name_or_path}: {frozen:,} parameters, {how}, on {model.device}")
    if checkpoint.half is not None:
        note(f"          multimodal checkpoint: training the text half; {checkpoint.half}")
    label, summary = "trained" if own else "adapter", methods.trainable(model).summary
    note(f"{label}   {summary}, {trainable:,} trainable parameters ({trainable / total:.2%})")
    if checkpoint.new_tokens:
        note(
            f"tokens    rows of {len(checkpoint.new_tokens)} tokens are trained, {len(checkpoint.added)} of them new to the "
            f"tokenizer; {model.get_input_embeddings().weight.shape[0]:,} embeddings"
        )


def say_findings(found):
    """Say why a training went wrong, if that can be said: jobs.reporting.findings.Findings."""
    for one in found:
        note(f"why       {one.name}: {one.words}. Change {one.change}")


def say_trained(result, planned, run):
    """Say what came of the training of a run. result: a training.Result."""
    peak = f"peak {size(result.peak_bytes)}"
    peak += f" (predicted {size(planned.predicted_bytes)})" if planned.predicted_bytes else ""
    counts = "tokens" if planned.plan is None else planned.plan.counts
    note(
        f"trained {result.steps} steps, {result.tokens:,} {counts} in {duration(result.seconds)}: "
        f"{result.tokens / result.step_seconds:,.0f} {counts}/s in the steps, {result.tokens / result.seconds:,.0f} including "
        f"evaluations and checkpoints; {peak}; "
        f"loss {result.loss:.4f}" + ("" if result.eval_loss is None else f", held-out {result.eval_loss:.4f}")
    )
    say_findings(findings.of_run(run))
    named = shlex.quote(str(run.path))
    note(f"{run.adapter.name} in {run.adapter}; next: qlora eval {named}, qlora export {named} --out FOLDER")
