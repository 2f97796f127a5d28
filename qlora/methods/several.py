"""Several adapters on one base, each as if it were alone there.

Loading an adapter puts modules, hooks and attributes into the base. They are taken out again, and put back while that adapter
computes. So kinds go together that know nothing of each other, each computes what it computes alone, to the bit, and the base
is the base: PEFT's own way, all adapters inside one another's layers, takes one kind at a time and none beside another.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from ..system.errors import InputError
from . import load, read

_ABSENT = object()


@dataclass
class _Loaded:
    """model: what computes with the adapter. changes: what it is to the base."""

    model: Any
    changes: list


class Several:
    """The adapters on one base by name, of which one is in place, or none.

    fixed: the name of one that has changed the base's own numbers, so that it is alone; else None.
    """

    def __init__(self, base):
        self.base, self._loaded, self._inside = base, {}, None
        self.fixed = None

    @property
    def names(self):
        return list(self._loaded)

    def load(self, name, folder, token_ids=()):
        """Load the adapter in `folder` as `name`; which one is in place stays as it is.

        token_ids: the tokens whose rows were trained. Where it fails or is interrupted, the base is as it was.

        Raises:
            InputError: as methods.load does; or it cannot lie beside those that are there.
        """
        adapter = read(folder)
        changed = adapter.replaces_weights
        if changed and self._loaded:
            raise InputError(
                f"adapter {folder}: has {changed}, so it cannot be loaded beside another; open it by itself"
            )
        self._refuse_fixed("no adapter can lie beside it")
        self._take_out()
        before = [(container, dict(container)) for container in _containers(self.base)]
        changes: list = []
        try:
            model = load(self.base, adapter, token_ids)
        except BaseException:
            _put(_changes(before), before=True)
            raise
        changes = _changes(before)
        if changed:
            self.fixed = name
        else:
            _put(changes, before=True)
        self._loaded[name] = _Loaded(model, changes)

    def choose(self, name):
        """Let the adapter called `name` compute from now on, None: the base alone; return the model that does.

        Raises:
            InputError: another one cannot be taken out.
        """
        if self.fixed is not None:
            if name != self.fixed:
                self._refuse_fixed("the base alone cannot answer")
            return self._loaded[name].model
        if name != self._inside:
            self._take_out()
        if name is None:
            return self.base
        self._inside = name  # before it is there: what is interrupted between is taken out by the next
        _put(self._loaded[name].changes)
        return self._loaded[name].model

    def unload(self, name):
        """Free the memory of an adapter; the base stays.

        Raises:
            InputError: it cannot be taken out.
        """
        self._refuse_fixed("it cannot be unloaded")
        if name == self._inside:
            self._take_out()
        del self._loaded[name]
        gc.collect()  # PEFT's models refer to themselves

    def _take_out(self):
        if self._inside is not None and self.fixed is None:
            _put(self._loaded[self._inside].changes, before=True)
            self._inside = None

    def _refuse_fixed(self, so):
        if self.fixed is not None:
            raise InputError(f"{self.fixed} has trained the base's own weights, so {so}; open the other by itself")


def _containers(model):
    """Yield all that loading an adapter may change: attributes of modules, their children and hooks, and the config."""
    yield vars(model.config)
    for module in model.modules():
        yield vars(module)
        yield from (value for value in vars(module).values() if isinstance(value, dict))


def _changes(before):
    """Return [(container, key, value before, value now)] of what differs; _ABSENT for a key that is not there."""
    return [
        (container, key, then.get(key, _ABSENT), container.get(key, _ABSENT))
        for container, then in before
        for key in {**then, **container}
        if not _same(then.get(key, _ABSENT), container.get(key, _ABSENT))
    ]


def _same(one, other):
    """True of one value, and of two tensors with one memory: DoRA makes of each 4-bit weight another one, in every forward."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.data_ptr() == other.data_ptr()
    return one is other


def _put(changes, before=False):
    """Make the changes, or with `before` undo them; either way they may be made already, or in part."""
    for container, key, then, now in changes:
        value = then if before else now
        if value is _ABSENT:
            container.pop(key, None)
        else:
            container[key] = value
