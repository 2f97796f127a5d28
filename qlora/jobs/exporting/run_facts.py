"""What a model card says of a run: base, data, settings and what was measured, without paths of this machine."""

from __future__ import annotations

from pathlib import Path

from ...evaluation.asked import cut_in_words
from ...evaluation.intervals import in_words
from ...evaluation.judge import win_rate_in_words
from ...exporter.model_card import Origin
from ...recipe import as_yaml
from ...runs import record
from ...runs.folder import extract_of
from ...system.errors import InputError
from ..opening.chosen_task import task_of

_OF_DATA = {"max_length", "overlong", "on_bad_row", "packing", "train_on", "eval_fraction"}
_OF_CLASSES = {"max_length", "overlong", "on_bad_row", "eval_fraction", "labels", "class_weights"}


def origin_of(run) -> Origin:
    """Return what is known of a finished run; raises InputError where its folder is damaged."""
    recipe, environment = run.recipe(), run.environment()
    sources = [*recipe.data.train, *(recipe.data.eval or [])]
    datasets = sorted({source.name for source in sources if source.name is not None})
    try:
        base = environment["base_model"]
        return Origin(
            name=run.path.name,
            # without a revision it was a folder here, whatever it is called: models/tiny is no name of the hub
            base={
                "name_or_path": base["name_or_path"] if base["revision"] else Path(base["name_or_path"]).name,
                "revision": base["revision"],
                "sha256": base["sha256"],
                "kept_tensors": base.get("kept_tensors", 0),  # older runs have none
                "prequantized": base.get("prequantized", False),  # older runs do not say
            },
            data=[(_shown(part["path"], datasets), part["sha256"]) for part in environment["data"]],
            datasets=datasets,
            counts=_counts(run),
            measured=_measured(run),
            settings=_settings(recipe),
            versions=environment["versions"],
            device=environment["device"],
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{run.path}: the record of the training is damaged ({error!r})") from None


def _shown(path, datasets):
    """Return a data file without its folders; a data set of the hub as it is called."""
    return path if any(path.startswith(name) for name in datasets) else Path(path).name


def _counts(run):
    report = run.data_report()
    steps = max(line.step for line in record.read(run))
    trained = report["tokens"].get("trained")
    classes = ", ".join(f"{one['label']} {one['rows']:,}" for one in report.get("classes", ()))
    return (
        f"{report['rows']:,} rows to train on, {report['eval_rows']:,} held out; {report['tokens']['total']:,} "
        f"{'images' if 'image_sizes' in report else 'tokens'}"
        f"{f', {trained:,} of them trained' if trained is not None else ''}; {steps:,} steps."
        + (f" Rows a class: {classes}." if classes else "")
    )


def _measured(run):
    """Return rows [what, before, after] as text."""
    lines = record.read(run)
    losses = [line.loss for line in lines if isinstance(line, record.Step)]
    held_out = [line.eval_loss for line in lines if isinstance(line, record.Evaluation | record.Best)]
    rows = [["loss in training, first and last step", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]] if losses else []
    rows += [["held-out loss at the end", "", f"{held_out[-1]:.4f}"]] if held_out else []
    if (after := run.scores()) is not None:
        before = after["before"]
        where = f" on {after['rows']} rows (qlora eval)"
        rows.append([f"loss{where}", f"{before['loss']:.4f}", f"{after['loss']:.4f}"])
        rows += [
            [
                f"{name.replace('_', ' ')}{where}{cut_in_words(extract_of(after))}",
                in_words(before["metrics"][name], name=name),
                in_words(metric, name=name),
            ]
            for name, metric in after["metrics"].items()
        ]
        if judged := after.get("judge"):
            rows.append([f"answers preferred by a judge{where}", "", win_rate_in_words(judged)])
    return rows


def _settings(recipe):
    """Return the sections that decide what is learned as YAML, without places and without what is not set."""
    sections = {"quantization", recipe.method.key, "training"} | ({recipe.objective.key} if recipe.objective else set())
    values = recipe.model_dump(exclude_none=True, include=sections)
    has_classes = task_of(recipe).file.HAS_CLASSES
    fields = _OF_CLASSES if has_classes else _OF_DATA
    fields = fields if task_of(recipe).file.HAS_TOKENS else fields - {"max_length", "overlong"}
    values["data"] = recipe.data.model_dump(include=fields, exclude_none=has_classes)
    values |= {"task": recipe.task} if has_classes else {}
    return as_yaml(values)
