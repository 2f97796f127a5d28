"""Opens the model that eval and chat use: a run folder or a checkpoint of it (base + adapter), a model folder, a hub name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import base_model
from ...base_model import text_generation
from ...data import chat
from ...exporter import int8
from ...recipe import Model, Recipe
from ...runs.folder import RunDir, refuse_recipe
from ...system.errors import InputError
from ...system.events import progress
from .chosen_task import task_of


@dataclass
class Subject:
    """A model ready to answer. `run` and `recipe` are None for a plain model. checkpoint: of the run, such as "step-20"; None
    for what it ended with."""

    model: Any
    tokenizer: Any
    stops: set
    recipe: Recipe | None
    run: RunDir | None
    checkpoint: str | None = None


@dataclass(frozen=True)
class Base:
    """What a run was trained on, before a weight is read. recipe: of the run, with what this machine decides."""

    run: RunDir
    recipe: Recipe
    checkpoint: Any
    tokenizer: Any

    def load(self):
        """Return the frozen base model."""
        return base_model.load(self.checkpoint, self.recipe.model, self.recipe.quantization)


def open_subject(target, overrides=()) -> Subject:
    """Load a run folder (NF4 base and its adapter, as it was trained), a checkpoint of one (RUN/checkpoints/step-N), or a plain
    model (16 bits, or the 4-bit or int8 codes it has).

    overrides: `section.field=value` laid over the run's recipe.

    Raises:
        InputError: neither a finished run nor a model; or the base is no longer the one that was trained on.
    """
    from . import checkpoint_run  # which prepares data, for which it opens tokenizers here

    if RunDir.is_run(target):
        return _open_run(RunDir.open(target), overrides)
    if (run := checkpoint_run.run_of(target)) is not None:
        with checkpoint_run.as_run(target, run, "open it") as made:
            return dataclasses.replace(_open_run(made, overrides), run=run, checkpoint=Path(target).name)
    if overrides:
        raise InputError(f"{target} is not a run folder, so there is no recipe for {overrides[0]!r} to change")
    section, checkpoint = _of_model(target)
    in_int8 = int8.is_int8(checkpoint.folder)
    if not in_int8:
        section = unquantized(checkpoint, section)
    task = checkpoint.task.name
    tokenizer, _ = open_tokenizer(checkpoint.folder, section, checkpoint.generation_config(), task=task)
    with progress(f"loading {target}"):
        model = int8.opened(checkpoint.folder) if in_int8 else base_model.load(checkpoint, section, None)
    return Subject(model, tokenizer, _stops(model, tokenizer), None, None)


def task_of_target(target):
    """Return the task of a run folder or a model, a file of base_model/, before a weight is read; raises like open_subject."""
    from . import checkpoint_run

    if RunDir.is_run(target):
        return task_of(RunDir.open(target).recipe()).file
    if (run := checkpoint_run.run_of(target)) is not None:
        return task_of(run.recipe()).file
    return _of_model(target)[1].task.file


def _of_model(target):
    """Return (section, checkpoint) of a model folder or hub name."""
    refuse_recipe(target)
    if not Path(target).exists() and str(target).startswith(("runs/", ".", "/", "~")):
        raise InputError(f"neither a run nor a model at {target}; `qlora train RECIPE` makes a run")
    section = Model(name_or_path=str(target))
    return section, base_model.as_its_files_say(base_model.find(section), section)


def _stops(model, tokenizer):
    """Return the ids at which an answer ends; none of a model that answers with classes."""
    has_classes = base_model.task_of(model).HAS_CLASSES
    return set() if has_classes else chat.stop_token_ids(tokenizer, model.generation_config)


def unquantized(checkpoint, section):
    """Return a recipe's `model` with the dtype in which the checkpoint is computed here without quantization."""
    return base_model.settled(section, None, base_model.load_config(checkpoint, section), this_machine())[0]


def this_machine():
    """Return the base_model.Computer that a model is loaded on here."""
    return base_model.computer(base_model.default_device())


def open_tokenizer(
    folder, section, generation_config, chat_template=None, system_as_user=False, *, task=text_generation.NAME
):
    """Return the tokenizer in `folder`, knowing what a conversation needs, and in words which chat template it has.

    It gets the new tokens of `section` (the recipe's `model`), the template `chat_template` (None: its own, or a built-in
    one; system_as_user: see `chat.set_template`) and the tokens at which generation ends by `generation_config` (None: the model
    has none). task: of another than text-generation there is neither; of images it is the image processor instead.
    """
    if not base_model.Task(task).file.HAS_TOKENS:
        processor = base_model.load_image_processor(folder, section)
        return processor, f"images of {base_model.image_processor.in_words(processor)}"
    tokenizer = base_model.load_tokenizer(folder, section)
    if task != text_generation.NAME:
        return tokenizer, "none: text as it is, with the tokenizer's own special tokens"
    new_tokens = section.new_tokens or []
    base_model.add_tokens(tokenizer, new_tokens, chat.template_text(tokenizer, chat_template, new_tokens))
    template = chat.set_template(tokenizer, chat_template, system_as_user)
    chat.know_stops(tokenizer, generation_config)
    return tokenizer, template


def _open_run(run, overrides):
    from ... import methods

    base = base_of(run, overrides)
    with progress(f"loading {base.checkpoint.name_or_path} and the adapter of {run.path}"):
        model = methods.load(base.load(), run.adapter, base.checkpoint.new_tokens.values())
    return Subject(model, base.tokenizer, _stops(model, base.tokenizer), base.recipe, run)


def base_of(run, overrides=()) -> Base:
    """Return the Base of a finished run; overrides: `section.field=value` laid over its recipe.

    Raises:
        InputError: the base is no longer the one that was trained on, or what says so is damaged.
    """
    from ... import methods

    recipe = Recipe.load(run.recipe_file, overrides)
    methods.read_config(run.adapter)  # what is wrong with it is said before the tokenizer in it is read
    checkpoint = base_model.find(recipe.model, task=task_of(recipe))
    refuse_changed_base(run, checkpoint)
    recipe = base_model.settle(recipe, base_model.load_config(checkpoint, recipe.model), checkpoint, this_machine())
    return Base(run, recipe, checkpoint, load_tokenizer(run, recipe.model, checkpoint))


def load_tokenizer(run, section, checkpoint):
    """Return the run's tokenizer; raises InputError unless it has the checkpoint's new tokens under the same ids."""
    tokenizer, _ = open_tokenizer(run.adapter, section, checkpoint.generation_config(), task=checkpoint.task.name)
    found = base_model.add_tokens(tokenizer, section.new_tokens) if section.new_tokens else {}
    if found != checkpoint.new_tokens:
        raise InputError(
            f"{run.adapter}: its tokenizer has model.new_tokens with the ids {found}, that of {checkpoint.folder} gives "
            f"them {checkpoint.new_tokens}; restore both as they were in training"
        )
    return tokenizer


def refuse_changed_base(run, checkpoint, fully=False):
    """Raise InputError unless the base's files hash to what the run recorded; names the files that changed.

    fully: as `Checkpoint.facts` has it.
    """
    recorded = run.environment()["base_model"]["sha256"]
    refuse_other_base(run.path, recorded, checkpoint, "model.name_or_path=FOLDER", fully)


def refuse_other_base(name, recorded, checkpoint, how, fully=False):
    """Raise InputError unless the base's files hash to `recorded`, what was written when `name` was trained.

    how: the model to take can be named.
    """
    found = checkpoint.file_hashes(fully)
    changed = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    if changed:
        raise InputError(
            f"{checkpoint.folder}: not the base that {name} was trained on ({', '.join(changed)} differ); "
            f"give the model it was trained on with {how}"
        )
