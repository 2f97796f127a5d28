"""qlora: 4-bit LoRA fine-tuning on one consumer GPU, with proof.

    from qlora import Recipe, train, evaluate, export, chat

    run = train(Recipe.load("recipes/quickstart.yaml"))
    scores = evaluate(run.path)
    report = export(run.path, "out/model")
    answer = chat("out/model", "Hello!")

    with qlora.open(run.path, adapters={"b": "runs/b"}) as model:  # stays in memory, several adapters on one base
        answer = model.answer("Hello!", adapter="b")

They print as the command line does, their libraries too, and nothing in a block `with qlora.quiet():`; a function of your own
hears each step in a block `with qlora.heard_by(function):`. Names are imported when first used, so that `import qlora` and
`qlora --help` stay fast.
"""

import importlib
import os
import sys

# Nothing leaves the machine unless asked: trl 1.16 sends GPU and architecture at each training.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if "huggingface_hub" in sys.modules:  # has read the environment already
    sys.modules["huggingface_hub"].constants.HF_HUB_DISABLE_TELEMETRY = True

__version__ = "0.2.0"

_HOME = {
    "Recipe": "recipe",
    "RunDir": "runs.folder",
    "QLoRAError": "system.errors",
    "InputError": "system.errors",
    "DoesNotFit": "system.errors",
    "ProofFailed": "system.errors",
    "TrainingFailed": "system.errors",
    "Interrupted": "system.errors",
    "init": "commands.init",
    "migrate": "commands.init",
    "list_recipes": "commands.recipes",
    "show_recipe": "commands.recipes",
    "copy_recipe": "commands.recipes",
    "doctor": "commands.doctor",
    "train": "commands.train",
    "plan": "commands.plan",
    "list_cards": "commands.cards",
    "plan_methods": "commands.plan",
    "plan_processes": "commands.plan",
    "inspect_data": "commands.data",
    "evaluate": "commands.eval",
    "export": "commands.export",
    "compare": "commands.compare",
    "compare_runs": "commands.compare",
    "compare_served": "commands.served",
    "report": "commands.report",
    "adapters": "commands.adapters",
    "chat": "commands.chat",
    "open": "commands.open",
    "push": "commands.push",
    "quiet": "terminal",
    "heard_by": "system.events",
}
__all__ = [name for name in _HOME if name != "open"]  # `from qlora import *` leaves Python's own open alone


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
