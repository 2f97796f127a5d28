"""What a run folder says, gathered for a report: one value of plain numbers and texts, bounded in size. Imports no torch.

What a folder does not have is {"missing": what to do}; what is damaged is refused, by file and line.
"""

from __future__ import annotations

import itertools
import math
import shlex
from pathlib import Path
from statistics import median
from typing import Any

from ...evaluation.intervals import OF_LOSS
from ...exporter import REPORT
from ...runs import record
from ...runs.folder import RunDir, extract_of
from ...system import files
from ...system.adapter_files import MANIFEST
from ...system.errors import InputError
from . import findings, reported_samples, reported_use, verdicts
from .adapter_norms import norms
from .reported_answers import answers, cut

_FOLDERS = 1000  # beside a run, that may hold an export of it
_EVENTS, _SOURCES, _REASONS, _CLASSES, _SAMPLES, _SAMPLE_TOKENS = 50, 50, 20, 30, 3, 600
_OF_EXPORT = ("verified", "verify", "base", "dtype", "bytes", "seconds", "gguf", "live_model", "rows", "why")


def facts(run: RunDir, exports, most_points, most_rows, most_samples, most_votes) -> dict[str, Any]:
    """Return what is known of a run, finished or not.

    exports: folders that are said to hold its export; those beside it are found. most_points: of a curve; most_rows: of answers;
    most_samples: (questions, steps) of the samples; most_votes: the last ones.

    Raises:
        InputError: no run, or a file of it is damaged; names the file.
    """
    if not run.recipe_file.is_file():
        raise InputError(f"{run.path} is not a run folder: it has no recipe.yaml")
    recipe = run.recipe()
    lines = record.read(run) if run.metrics_file.is_file() else []
    environment = _object(run.environment_file)
    data = _object(run.data_report_file)
    name, scores = _scores(run)
    found = {
        "path": str(run.path),
        "name": run.path.name,
        "task": recipe.task,
        "method": recipe.method.key,
        "base": recipe.model.name_or_path,
        "started_from": recipe.model.adapter_name_or_path,
        "state": _state(run, recipe, lines, data),
        "curves": curves(lines, most_points),
        "best": reported_samples.best(lines),
        "samples": _samples(run, lines, *most_samples),
        "events": _events(lines),
        "speed": _speed(lines, environment),
        "memory": _memory(run),
        "data": _data(run, recipe, data, environment),
        "scores": _scores_shown(run, name, scores),
        "other_scores": _other_scores(run, name),
        "answers": _answers(run, name, scores, most_rows),
        "votes": reported_use.votes(run, _made_of(run), command("chat", run.path, "--web"), most_votes),
        "norms": norms(run.adapter)
        if run.adapter.is_dir()
        else {"missing": "nothing is saved before the training ends"},
        "exports": _exports(run, exports),
        "served": reported_use.served(run, command("compare", run.path, "--served")),
        "recipe": run.recipe_file.read_text(encoding="utf-8"),
        "commands": {
            "train": command("train", run.recipe_file, "output_dir=ANOTHER_FOLDER"),
            "plan": command("plan", run.recipe_file),
            "norms": command("report", run.path, "--json"),
        },
        "environment": _environment(environment),
    }
    found["findings"] = [vars(one) for one in findings.of_run(run)]
    found["verdicts"] = verdicts.of(found)
    return found


def command(*words):
    return shlex.join(["qlora", *map(str, words)])


def _object(file):
    return files.read_object(file) if file.is_file() else None


# ---- training --------------------------------------------------------------------------------------------------------


def _state(run, recipe, lines, data):
    """Return {"what": finished, training, stopped, does not fit, failed or ended, "message", "step", "of"}."""
    training = recipe.training
    step = max((line.step for line in lines), default=0)
    total = training.max_steps
    if not total and data and data.get("steps_per_epoch"):
        total = math.ceil(data["steps_per_epoch"] * training.num_train_epochs)
    found: dict[str, Any] = {"what": "finished", "message": "", "step": step, "of": total or None}
    go_on = command("train", run.recipe_file, "--resume")
    if run.in_use() and not run.adapter.is_dir():  # a finished one is measured by who has it
        found |= {"what": "training", "message": "it was training when this page was made"}
    elif (ended := run.ended()) is not None:
        found |= {"what": str(ended.get("status")), "message": cut(str(ended.get("message")))}
    elif not run.adapter.is_dir():
        message = f"it ended without a word: killed, or the machine stopped; go on with: {go_on}"
        found |= {"what": "ended", "message": message}
    return found


def curves(lines, most):
    """Return {name: [[step, value], ...]} of a training, at most `most` points each, see `thinned`."""
    found: dict = {}
    for line in lines:
        if isinstance(line, record.Step | record.Evaluation):
            for name, value in record.to_json(line).items():
                if name not in ("step", "epoch", "time", "tokens") and isinstance(value, int | float):
                    found.setdefault(name, []).append([line.step, value])
    return {name: thinned(points, most) for name, points in found.items()}


def thinned(points, most):
    """Return at most `most` of [[x, y], ...]: the first, the last, and of each stretch between its least and its greatest."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= most:
        return finite
    first, *inner, last = finite
    size = math.ceil(len(inner) / ((most - 2) // 2))
    stretches = (inner[start : start + size] for start in range(0, len(inner), size))
    ends = (sorted((min(one, key=_y), max(one, key=_y))) for one in stretches)
    return [first, *(point for pair in ends for point in pair), last]


def _y(point):
    return point[1]


def _samples(run, lines, *most):
    try:
        return reported_samples.samples(lines, *most)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{run.metrics_file}: a sample: {error!r}; the run folder is damaged") from None


def _events(lines):
    """Return {"shown": [[step, words], ...], "left_out"} of steps that were skipped, and of memory that ran out."""
    found = []
    for line in lines:
        if isinstance(line, record.Skipped):
            rows = f" (rows {', '.join(map(str, line.rows[:8]))})" if line.rows else ""
            found.append([line.step, f"skipped: {line.not_taken}{rows}"])
        elif isinstance(line, record.LessMemory):
            found.append([line.step, f"{line.out_of_memory}; since then {line.change}"])
    return {
        "shown": [[step, cut(words, 400)] for step, words in found[:_EVENTS]],
        "left_out": max(0, len(found) - _EVENTS),
    }


def _speed(lines, environment):
    steps = [line for line in lines if isinstance(line, record.Step)]
    if not steps:
        return {"missing": "no step was logged"}
    per_second = [line.tokens_per_second for line in steps if line.tokens_per_second is not None]
    counts = (environment or {}).get("parameters") or {}
    return {
        "tokens": steps[-1].tokens,
        "seconds": steps[-1].time,
        "tokens_per_second": median(per_second) if per_second else None,
        "trainable_parameters": counts.get("trainable"),
        "parameters": counts.get("total"),
        "device": (environment or {}).get("device"),
    }


def _memory(run):
    found = _object(run.memory_file)
    if found is None:
        return {"missing": "nothing was measured: the training did not come to an end that could be noted"}
    names = ("predicted_bytes", "rehearsed_bytes", "peak_bytes", "limit_bytes", "reserve_bytes", "layers",
             "checkpointed_layers", "offload", "tokens_per_micro_batch", "out_of_memory", "predicted_components",
             "measured_components")  # fmt: skip
    return {name: found.get(name) for name in names} | {"less_memory": len(found.get("less_memory", ()))}


# ---- data ------------------------------------------------------------------------------------------------------------


def _data(run, recipe, report, environment):
    if report is None:
        return {"missing": "no data_report.json: the training did not begin"}
    try:
        sources = [_source(one) for one in report["sources"][:_SOURCES]]
        names = ("rows", "eval_rows", "tokens", "length", "ends_with_stop_token", "packing_efficiency",
                 "steps_per_epoch", "duplicates", "eval_rows_in_training", "contradictory", "preference", "judged",
                 "image_sizes")  # fmt: skip
        found = {name: report[name] for name in names if report.get(name) is not None}
        counts = ("rows", "eval_rows", "steps_per_epoch", "duplicates", "eval_rows_in_training", "contradictory")
        of_pairs = [*found.get("preference", {}).values(), *found.get("judged", {}).values()]
        numbers = [*(found.get(name, 0) for name in counts), *(one for one in of_pairs if one is not None)]
        if not all(isinstance(one, (int, float)) for one in numbers):
            raise TypeError("a count is no number")
        found |= {"sources": sources, "sources_left_out": len(report["sources"]) - len(sources)}
        if report.get("classes"):
            found["classes"] = report["classes"][:_CLASSES]
            found["classes_left_out"] = max(0, len(report["classes"]) - _CLASSES)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{run.data_report_file}: {error!r}; the run folder is damaged") from None
    found["sample"] = _sample(run, recipe, environment)
    found["command"] = command("data", run.recipe_file)
    return found


def _source(one):
    reasons = sorted(one["reasons"].items(), key=lambda pair: -pair[1])
    return {
        **{
            name: one.get(name, 0)
            for name in ("rows_read", "rows_kept", "rows_dropped", "rows_truncated", "rows_split")
        },
        "path": cut(one["path"], 200),
        "format": one["format"],
        "reasons": [[cut(reason, 200), count] for reason, count in reasons[:_REASONS]],
    }


def _sample(run, recipe, environment):
    """Return {"rows": [[[text, is trained], ...], ...], "from"} of some rows as the model sees them."""
    if recipe.task != "text-generation":
        return {"missing": "rows have one class each; no token of them is trained"}
    if not run.proof_rows_file.is_file():
        return {"missing": "no rows were kept: the training did not begin"}
    base = ((environment or {}).get("base_model") or {}).get("folder") or ""
    places = [run.adapter / "tokenizer.json", Path(base) / "tokenizer.json"]
    place = next((one for one in places if one.is_file()), None)
    if place is None:
        return {"missing": f"no tokenizer.json to read them with; see them by: {command('data', run.recipe_file)}"}
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(place))
    except Exception as error:  # what tokenizers raises has no class of its own
        raise InputError(f"{place}: {error}; the run folder is damaged") from None
    content = run.proof_rows()
    try:
        rows = [_pieces(tokenizer, row["input_ids"], row["labels"]) for row in content["rows"][:_SAMPLES]]
        return {"rows": rows, "from": content["from"]}
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{run.proof_rows_file}: {error!r}; the run folder is damaged") from None


def _pieces(tokenizer, ids, labels):
    pairs = list(zip(ids, (label >= 0 for label in labels), strict=True))  # -100: not trained on
    groups = itertools.groupby(pairs[:_SAMPLE_TOKENS], key=lambda pair: pair[1])
    found = [
        [tokenizer.decode([token for token, _ in group], skip_special_tokens=False), trained]
        for trained, group in groups
    ]
    left = len(pairs) - _SAMPLE_TOKENS
    return [*found, [f" [... {left:,} more tokens]", False]] if left > 0 else found


# ---- scores and answers ----------------------------------------------------------------------------------------------


def _scores(run):
    """Return (name, scores) of the run's own held-out rows: eval.json, or else the newest of another number of them."""
    if (found := run.scores()) is not None:
        return None, found
    for file in sorted(run.evals.glob("held-out-*.json"), key=lambda one: -one.stat().st_mtime):
        return file.stem, run.scores(file.stem)
    return None, None


def _scores_shown(run, name, scores):
    if scores is None:
        return {"missing": f"not evaluated: {command('eval', run.path)}"}
    file = run.score_files(name)[0]
    try:
        of_loss = [name + end for name in OF_LOSS for end in ("", "_interval")]
        names = ("rows", *of_loss, "tokens", "metrics", "change", "forgetting", "latency", "majority", "judge")
        found = {name: scores.get(name) for name in names}
        found["command"] = scores.get("data", {}).get("command") or command("eval", run.path)
        found["extract"] = extract_of(scores)
        before = scores.get("before") or {}
        found["before"] = before and {name: before.get(name) for name in (*of_loss, "metrics")}
        if labels := scores.get("labels"):
            found["classes"] = _classes(labels, scores["per_class"], scores["confusion"])
        float(found["loss"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: {error!r}; the run folder is damaged; run: {command('eval', run.path)}") from None
    return found


def _classes(labels, per_class, confusion):
    """Return {"number", "per_class", "left_out", "labels" and "confusion" of few, "mistakes" of many}."""
    worst = sorted((one for one in per_class if one["rows"]), key=lambda one: one["f1"])[:_CLASSES]
    chosen = per_class if len(per_class) <= _CLASSES else worst
    found = {"number": len(labels), "per_class": chosen, "left_out": len(per_class) - len(chosen)}
    if len(labels) <= 12:
        return found | {"labels": labels, "confusion": confusion}
    pairs = [
        [labels[right], labels[answer], count]
        for right, row in enumerate(confusion)
        for answer, count in enumerate(row)
        if count and right != answer
    ]
    return found | {"mistakes": sorted(pairs, key=lambda one: -one[2])[:_CLASSES]}


def _other_scores(run, own):
    found = []
    for file in sorted(run.evals.glob("*.json"))[:50]:
        if file.stem != own:
            scores = run.scores(file.stem)
            said = scores.get("data") or {}
            one = {name: scores.get(name) for name in ("rows", "loss", "metrics")}
            found.append({"name": file.stem, **one, "command": said.get("command")})
    return found


def _answers(run, name, scores, most_rows):
    file = run.score_files(name)[1]
    if scores is None:
        return {"missing": f"not evaluated: {command('eval', run.path)}"}
    if not file.is_file():
        return {"missing": f"no answers were kept (an older version); again: {command('eval', run.path)}"}
    return answers(file, scores["metrics"], most_rows)


# ---- export ----------------------------------------------------------------------------------------------------------


def _exports(run, named):
    """Return what export_report.json says of each export of this run: in the folders `named`, and in those beside the run.

    An export knows the hashes of what it was made of. An older one does not, and counts where it is named.
    """
    hashes = _made_of(run)
    beside = itertools.islice(run.path.parent.glob(f"*/{REPORT}"), _FOLDERS)
    places = dict.fromkeys([*(Path(one) / REPORT for one in named), *beside])
    found = []
    for place in sorted(places, key=lambda one: -one.stat().st_mtime):
        report = files.read_object(place)
        made_of = report.get("adapter_sha256")
        is_named = any(place.parent.samefile(one) for one in named)
        if (hashes and made_of == hashes) or (is_named and made_of is None):
            found.append(_export(run, place, report))
        elif is_named:
            raise InputError(f"{place.parent} was not exported from {run.path}: it was made of other weights")
    return found


def _made_of(run):
    """Return {file: sha256} of the weights that the run has now; of an unfinished one nothing."""
    entries = (_object(run.adapter / MANIFEST) or {}).get("files") or {}
    return {name: entry["sha256"] for name, entry in entries.items() if name.endswith(".safetensors")}


def _export_command(run, report):
    words = ["export", run.path, "--out", "ANOTHER_FOLDER"]
    words += ["--int8"] if report.get("int8") else ["--dtype", report["dtype"]] if report.get("dtype") else []
    return command(*words, *(["--base", report["base"]] if report.get("base") == "original" else []))


def _export(run, place, report):
    models = {"live": "as trained, live", "merged": verdicts.EXPORTED, "beside": verdicts.BESIDE,
              "beside_original": "exported, beside the base in 16 bit", "base_model": "base alone"}  # fmt: skip
    try:
        shown = {name: report.get(name) for name in _OF_EXPORT} | {"cast": report.get("cast")}
        if int8 := report.get("int8"):  # the folder has that; what it was made of was proven first
            models |= {"merged": "merged, before int8", "int8": verdicts.EXPORTED}
            shown |= {"dtype": f"int8, the rest in {int8['dtype_beside']}", "cast": None}
        scores = [[said, report[name]] for name, said in models.items() if report.get(name)]
        scores += [[one["model"], one] for one in report.get("comparison") or ()]
        names = ("loss", "kl", "top1", "logits")
        modules = [one for one in report.get("modules") or () if one.get("cast_loss") is not None]
        worst = sorted(modules, key=lambda one: -one["cast_loss"])[:5]
        return {
            "path": str(place.parent),
            "command": _export_command(run, report),
            "made_of_this_run": report.get("adapter_sha256") is not None,
            **shown,
            "scores": [[said, {name: one.get(name) for name in names}] for said, one in scores],
            "worst_modules": [[one["name"], one["cast_loss"], one["delta_norm"]] for one in worst],
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: {error!r}; the exported folder is damaged") from None


def _environment(found):
    if found is None:
        return {"missing": "no environment.json: the training did not begin"}
    base = found.get("base_model") or {}
    hashes = list((base.get("sha256") or {}).items())
    return {
        "versions": found.get("versions"),
        "device": found.get("device"),
        "git_commit": found.get("git_commit"),
        "compute_dtype": str(found.get("compute_dtype")),
        "base_model": {
            "name_or_path": base.get("name_or_path"),
            "revision": base.get("revision"),
            "sha256": hashes[:40],
            "left_out": max(0, len(hashes) - 40),
        },
        "data": [[part.get("path"), part.get("sha256")] for part in (found.get("data") or ())[:_SOURCES]],
    }
