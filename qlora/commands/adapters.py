"""qlora adapters: what has been trained, in which folder, and how good it is; and several of them joined into one."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from rich.text import Text

from .. import adapter
from ..runs.folder import RunDir
from ..system.errors import InputError, ProofFailed, QLoRAError
from . import console


def adapters(folder="runs") -> list:
    """Return what is known of every run, checkpoint and adapter under `folder`, newest first.

    Each is {"path", "kind", "base", "state", "steps", "loss", "eval_loss", "metrics", "time"}; what is not known is None.
    state: "finished", "unfinished", or what is wrong with it in words.

    Raises:
        InputError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the folder that holds your runs (`qlora train RECIPE` makes one)")
    runs = {path.parent for path in [folder / "recipe.yaml", *folder.rglob("recipe.yaml")] if path.is_file()}
    own = {run / "adapter" for run in runs}
    others = {path.parent for path in folder.rglob(adapter.CONFIG)} - own
    found = [*map(_of_run, runs), *(_entry(path) for path in others)]
    found.sort(key=lambda one: -one["time"])
    _show(folder, found)
    return found


def _entry(path, folder=None):
    """Return the entry of the adapter in `path`, as part of run `folder` where it is one."""
    entry = dict.fromkeys(("kind", "base", "steps", "loss", "eval_loss", "metrics"))
    entry |= {"path": str(folder or path), "state": "finished", "time": (folder or path).stat().st_mtime}
    try:
        config = adapter.read_config(path)
        name = adapter.kind(config)
        entry["kind"] = f"{name} r={config.get('target_r') if name == 'AdaLoRA' else config['r']}"
        entry["base"] = config.get("base_model_name_or_path")
        entry["time"] = (path / adapter.CONFIG).stat().st_mtime
    except InputError as error:
        entry["state"] = f"damaged: {error}"
    except (OSError, KeyError, TypeError) as error:
        entry["state"] = f"damaged: {path / adapter.CONFIG}: {error!r}"
    return entry


def _of_run(folder):
    run = RunDir(folder)
    if not run.adapter.is_dir():
        entry = _entry(folder, folder) | {"state": "unfinished", "time": folder.stat().st_mtime}
    else:
        entry = _entry(run.adapter, folder)
    try:
        entry["base"] = run.recipe().model.name_or_path
        for record in run.records():
            entry["steps"] = record["step"]
            entry["loss"] = record.get("loss", entry["loss"])
            entry["eval_loss"] = record.get("eval_loss", entry["eval_loss"])
        if run.eval_file.is_file():
            entry["metrics"] = json.loads(run.eval_file.read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError, QLoRAError) as error:
        if entry["state"] == "finished":
            entry["state"] = f"damaged: {str(error).splitlines()[0]}"
    return entry


def _show(folder, found):
    console.show(f"{len(found)} in {folder}")
    for one in found:
        base = f" on {Path(one['base']).name}" if one["base"] else ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"]))
        trained = [(one["kind"] or "") + base, "" if one["steps"] is None else f"{one['steps']:,} steps", when]
        scores = [f"{name} {one[key]:.4f}" for name, key in _LOSSES.items() if one[key] is not None]
        scores += [f"{name.replace('_', ' ')} {value:.0%}" for name, value in (one["metrics"] or {}).items()]
        console.show("")
        console.show(Text(one["path"]))  # whole, to be pasted
        console.show(f"          {', '.join(filter(None, trained))}")
        if scores:
            console.show(f"          {', '.join(scores)}")
        if one["state"] != "finished":
            console.show(f"          {one['state']}")


_LOSSES = {"loss": "loss", "held-out loss": "eval_loss"}


# ---- several as one --------------------------------------------------------------------------------------------------


def parse_weighted(targets):
    """Return [(path, weight)] of "RUN:0.7" strings; raises InputError where a weight is missing or no number."""
    found = []
    for target in targets:
        path, colon, weight = str(target).rpartition(":")
        try:
            number = float(weight) if colon else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number == 0:
            raise InputError(
                f"{target}: needs a weight other than 0; to combine adapters write RUN:WEIGHT, as in runs/a:0.7 runs/b:0.3"
            )
        found.append((path, number))
    paths = [path for path, _ in found]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise InputError(
            f"{', '.join(twice)}: listed more than once; list each adapter once, with the sum of its weights"
        )
    return found


def combine(folders, weights, config, trust_remote_code, out):
    """Write one LoRA whose update is the weighted sum of several into folder `out`; return where it lies.

    folders: adapter folders for one base, with this transformers config. Through PEFT's add_weighted_adapter, which
    sets factors side by side ("cat"): the sum is exact, and the rank the sum of the ranks.

    Raises:
        InputError: an adapter that is more than low-rank updates.
        ProofFailed: what PEFT made is not that sum.
    """
    from peft import PeftModel

    from .. import base_model

    read = [adapter.read(folder) for folder in folders]
    for folder, one in zip(folders, read, strict=True):
        one.refuse_more_than_low_rank("cannot be added to another")
        if one.config.get("use_dora"):
            raise InputError(f"adapter {folder}: DoRA adapters rescale the weights, so they cannot be summed")
    # PEFT wants a model to put the adapters on; their sum does not depend on its weights, so it gets none
    model = base_model.on_meta(config, trust_remote_code)
    layers = adapter.shapes(model)
    for one in read:
        one.refuse_mismatch(layers, {}, {}, ())
    base_model.replace_by_stand_ins(model)
    names = [f"adapter{number}" for number in range(len(folders))]
    peft_model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        peft_model.load_adapter(folder, adapter_name=name)
    for name, one in zip(names, read, strict=True):
        # PEFT gives the sum the settings of the first: peft 0.21 keeps use_rslora, which scales it by the root of its rank,
        # and what leaves layers out. The layers themselves have been scaled already.
        peft_model.peft_config[name] = dataclasses.replace(
            peft_model.peft_config[name],
            use_rslora=False,
            target_modules=sorted(one.updates),
            exclude_modules=None,
            layers_to_transform=None,
        )
    peft_model.add_weighted_adapter(names, weights, "combined", combination_type="cat")
    peft_model.save_pretrained(out, selected_adapters=["combined"])
    folder = Path(out) / "combined"
    _refuse_another_sum(adapter.read(folder), read, weights)
    return folder


def _refuse_another_sum(found, parts, weights):
    """Raise ProofFailed unless `found` updates each layer by the weighted sum of what `parts` do to it.

    The proof of the export cannot see it: its live model has the same sum.
    """
    layers = {name for part in parts for name in part.updates}
    wrong = layers ^ found.updates.keys()
    for name in layers & found.updates.keys():
        x_I = torch.linspace(-1, 1, found.updates[name].shape[1])
        total = sum(
            weight * _delta(part.updates[name], x_I)
            for part, weight in zip(parts, weights, strict=True)
            if name in part.updates
        )
        if not torch.allclose(_delta(found.updates[name], x_I), total, rtol=2e-2, atol=1e-2 * total.abs().max().item()):
            wrong.add(name)
    if wrong:
        raise ProofFailed(
            f"PEFT combined the adapters wrongly in {len(wrong)} layers, such as {min(wrong)}; nothing was exported"
        )


def _delta(update, x_I):
    return update.scaling * (update.B_OR.float() @ (update.A_RI.float() @ x_I))
