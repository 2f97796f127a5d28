"""qlora.open: a run or a model kept in memory, with several adapters on it; there is no verb of that name."""

from __future__ import annotations

from ..jobs.opening.routed import Routed, open_routed
from ..system.devices import say_device
from ..system.usual_torch import usual_torch
from ..terminal import shown


@shown()
@usual_torch()
def open(target, adapters=None, adapter=None, overrides=()) -> Routed:
    """Return a run or a model that stays in memory, with more adapters on its base: {name: run folder}.

    target: a run folder, a model folder or a hub name. The adapter of a run is called like its folder; "base" is the base
    alone. adapter: the name that answers where none is given, None for that of the run. overrides: `section.field=value` laid
    over the run's recipe. See Routed for answer, answers, load, unload and close.

    with qlora.open("runs/a", adapters={"b": "runs/b"}) as model:
        model.answer("What can you do?", adapter="b")

    Raises:
        InputError: no finished runs, or not on one base.
    """
    say_device()
    return open_routed(target, adapters, adapter, overrides)
