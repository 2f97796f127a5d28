"""Checkpoints of a run: complete or absent, verified by hash, safetensors and JSON only.

checkpoints/step-20/
  tensors.safetensors  weights/NAME: float32 masters; optimizer/NAME/KEY: its state, as it is; ranks/NAME: a methods.Schedule's
  state.json           random numbers, sums and counters, the fingerprint of what must not change
  trainer_state.json   step and epoch, as transformers reads them
  manifest.json        the run, the step, size and sha256 of the others
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..system.errors import InputError
from ..system.storage import free_disk_bytes, fsync, listed, new_folder, sha256, write_json
from .folder import step_of
from .record import CheckpointSaved

MANIFEST, TENSORS, STATE, TRAINER_STATE = "manifest.json", "tensors.safetensors", "state.json", "trainer_state.json"
_FILES = {TENSORS, STATE, TRAINER_STATE}
_FORMAT = 2

# ---- files -----------------------------------------------------------------------------------------------------------


class Damaged(InputError):
    """A folder that is not a complete checkpoint of this run; names the bad file."""


class Checkpoints:
    """The checkpoints of one run, in `folder`. run: the id of the run."""

    def __init__(self, folder, run):
        self.folder, self.run = Path(folder), run

    def write(self, step, tensors, state, trainer_state, limit=None):
        """Return CheckpointSaved; keep the newest `limit` of this run's, removing others once the new one has verified.

        Raises:
            InputError: there is no room, or what was written does not read back; older ones are as they were.
        """
        begin = time.monotonic()
        path = self.folder / f"step-{step}"
        tensors = _apart(tensors)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                fsync(self.folder.parent)
            self._clear(path)
            if free_disk_bytes(self.folder) < num_bytes:  # so that nothing else finds the disk full
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with new_folder(path) as folder:
                write_json(folder / STATE, state)
                write_json(folder / TRAINER_STATE, trainer_state)
                save_file(tensors, folder / TENSORS)
                (folder / TENSORS).chmod((folder / STATE).stat().st_mode)  # safetensors ignores the umask: 0600
                files = {name: listed(folder / name) for name in sorted(_FILES)}
                write_json(folder / MANIFEST, {"format": _FORMAT, "run": self.run, "step": step, "files": files})
        except (OSError, SafetensorError) as error:
            free = free_disk_bytes(self.folder)
            why = getattr(error, "strerror", None) or error
            raise InputError(
                f"{path}: {why}; a checkpoint needs {num_bytes:,} bytes, {free:,} are free. Older checkpoints are intact"
            ) from None
        self.verify(path)
        self.rotate(path, limit)
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        return CheckpointSaved(path, step, num_bytes, time.monotonic() - begin)

    def verify(self, path):
        """Raise Damaged unless `path` is a complete checkpoint of this run; names the bad file."""
        manifest = self._manifest(path)
        if manifest.get("run") != self.run:
            raise Damaged(f"{path / MANIFEST}: belongs to another run")
        if manifest.get("format") != _FORMAT or manifest.get("step") != step_of(path):
            raise Damaged(f"{path / MANIFEST}: format {manifest.get('format')}, step {manifest.get('step')}")
        files = manifest.get("files")
        if not isinstance(files, dict) or set(files) != _FILES:
            raise Damaged(f"{path / MANIFEST}: lists other files than a checkpoint has")
        for name in sorted(files):
            file, expected = path / name, files[name]
            try:
                size = file.stat().st_size
                if size != expected["bytes"]:
                    raise Damaged(f"{file}: has {size:,} bytes, not {expected['bytes']:,}")
                if sha256(file) != expected["sha256"]:
                    raise Damaged(f"{file}: its content has changed since it was written")
            except OSError as error:
                raise Damaged(f"{file}: {error.strerror}") from None
            except (TypeError, KeyError, ValueError):
                raise Damaged(f"{path / MANIFEST}: is not a checkpoint manifest") from None

    def of_step(self, step):
        """Return the folder of the checkpoint after `step`; raises Damaged unless it verifies."""
        path = self.folder / f"step-{step}"
        self.verify(path)
        return path

    def listed(self):
        """Return [(step, whether it is the best)] of the folders, oldest first; the best is that of which the newest knows."""
        found = self._all()
        best = best_of(found[0]) if found else None
        return [(step_of(path), step_of(path) == best) for path in reversed(found)]

    def newest(self):
        """Return (the newest checkpoint that verifies, or None; [why newer ones do not])."""
        skipped = []
        for path in self._all():
            try:
                self.verify(path)
            except Damaged as error:
                skipped.append(str(error))
            else:
                return path, skipped
        return None, skipped

    def num_bytes(self):
        """Return the size of all checkpoint folders; those set aside are kept and not counted."""
        return sum(file.stat().st_size for path in self._all() for file in path.glob("*"))

    def remove_leftovers(self):
        """Remove what a killed process left half written or half removed. Needs the lock of the run."""
        for path in self.folder.glob("step-*.partial"):
            shutil.rmtree(path)

    def set_aside(self, step):
        """Rename the checkpoints of later steps, so that training is not resumed from them."""
        for path in self._all():
            if step_of(path) > step and self._is_ours(path):
                self._rename(path, "diverged")

    def _rename(self, path, why):
        number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.{why}-{n}").exists())
        path.rename(path.with_name(f"{path.name}.{why}-{number}"))

    def _all(self):
        """Return the checkpoint folders, newest first."""
        found = [path for path in self.folder.glob("step-*") if step_of(path) is not None]
        return sorted(found, key=step_of, reverse=True)

    def _manifest(self, path):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except OSError as error:
            raise Damaged(f"{path / MANIFEST}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise Damaged(f"{path / MANIFEST}: is not JSON") from None
        if not isinstance(manifest, dict):
            raise Damaged(f"{path / MANIFEST}: is not a checkpoint manifest")
        return manifest

    def _is_ours(self, path):
        try:
            return self._manifest(path).get("run") == self.run
        except Damaged:
            return False

    def rotate(self, path, limit):
        """Keep `path`, which is verified, the newest before it, `limit` in all, and the best that these know of; remove others,
        later ones included."""
        step = step_of(path)
        ours = [path for path in self._all() if self._is_ours(path)]
        later = [path for path in ours if step_of(path) > step]
        before = [path for path in ours if step_of(path) < step]
        old = before[limit - 1 :] if limit is not None else []
        best = {best_of(kept) for kept in [path, *before] if kept not in old} if old else set()
        for path in [*later, *(path for path in old if step_of(path) not in best)]:
            self._remove(path)

    def _remove(self, path):
        """Rename a folder before removing it, so that a half-removed one never has the name of a checkpoint."""
        gone = path.with_name(f"{path.name}.partial")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)

    def _clear(self, path):
        """Make room for a new checkpoint where one did not verify; if it may not be ours, it is renamed and kept."""
        if not path.exists():
            return
        if self._is_ours(path):
            self._remove(path)
        else:
            self._rename(path, "damaged")


def read_state(path):
    """Return the contents of state.json of a verified checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def best_of(path):
    """Return the step of the best evaluation that a checkpoint knows of; None where it knows of none, or cannot be read."""
    try:
        return read_state(path)["best"]["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_tensors(path):
    """Return {name: tensor on the CPU}."""
    return load_file(path / TENSORS)


def _apart(tensors):
    """Return the tensors on the CPU, contiguous and without shared memory, which safetensors does not accept."""
    seen, apart = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def under(prefix, tensors):
    """Return {name without `prefix/`: tensor} of the tensors with that prefix."""
    return {
        name.removeprefix(f"{prefix}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}/")
    }


# ---- optimizer -------------------------------------------------------------------------------------------------------


def places(optimizer):
    """Return [(parameter, its group, (number of the group, number in the group))], as bitsandbytes counts them."""
    return [
        (parameter, group, (at, within))
        for at, group in enumerate(optimizer.param_groups)
        for within, parameter in enumerate(group["params"])
    ]


def optimizer_state(optimizer, names):
    """Return (its tensors, {NAME/KEY: tensor}; what else it knows, {NAME: {KEY: number}}).

    names: of its parameters, in order. Learning rates and the like are not in it: they come from the recipe.
    """
    tensors, numbers = {}, {}
    for name, (parameter, *_) in zip(names, places(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


@torch.no_grad()
def restore_optimizer(optimizer, names, tensors, numbers, settle=lambda: None):
    """Give an optimizer that has taken no step the state that `optimizer_state` returned.

    Of bitsandbytes: in buffers of its own making, so that those are paged that a first step would page; its
    load_state_dict (0.50.2) leaves them all in the GPU's memory. settle: is called between their making and their filling.

    Raises:
        InputError: the state is of another optimizer, or of other shapes.
    """
    made: dict = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        made.setdefault(parameter, {})[key] = tensor
    state, filled = {}, []
    for at, (name, (parameter, group, place)) in enumerate(zip(names, places(optimizer), strict=True)):
        values = made.pop(name, {})
        if not values:
            continue
        if hasattr(optimizer, "init_state"):
            optimizer.init_state(group, parameter, *place)
            expected = {key: value for key, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
        else:
            expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        if _kinds(expected) != _kinds(values):
            raise InputError(
                f"the checkpoint's optimizer state of {name} is {_kinds(values)}, this optimizer's is {_kinds(expected)}; "
                "resume with the training.optim of the run"
            )
        if hasattr(optimizer, "init_state"):
            filled.append((expected, values))
            optimizer.state[parameter].update(numbers.get(name, {}))
        else:
            state[at] = {**values, **numbers.get(name, {})}
    assert not made, f"optimizer state of {list(made)}, which are not trained"
    settle()
    for buffers, values in filled:
        for key, value in values.items():
            buffers[key].copy_(value)
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _kinds(tensors):
    return {key: (str(value.dtype).removeprefix("torch."), *value.shape) for key, value in sorted(tensors.items())}


# ---- random numbers --------------------------------------------------------------------------------------------------


def random_state(device):
    """Return the states of Python's, numpy's and torch's generators, that of `device` too, as JSON takes them."""
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state(device).tolist()).hex() if device.type == "cuda" else None,
    }


def restore_random_state(state, device):
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["torch"])), dtype=torch.uint8))
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(state["cuda"])), dtype=torch.uint8), device)
