"""Opens the model that eval and chat use: a run folder (base + adapter) or any model folder or hub name."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import base_model
from ..base_model import text_generation
from ..data import chat
from ..recipe import Model, Recipe
from ..runs.folder import RunDir
from ..system.errors import InputError
from ..system.events import progress
from .chosen_task import task_of


@dataclass
class Subject:
    """A model ready to answer. `run` and `recipe` are None for a plain model.

    voices: {run folder as it was named, None for the base alone: (PEFT's name of its adapter, tokenizer, stops)};
    speaking: which of them answers.
    """

    model: Any
    tokenizer: Any
    stops: set
    recipe: Recipe | None
    run: RunDir | None
    voices: dict = field(default_factory=dict)
    speaking: str | None = None


def open_subject(target, overrides=()) -> Subject:
    """Load a run folder (NF4 base and its adapter, as it was trained) or a plain model (16 bits, or the 4-bit codes it has).

    overrides: `section.field=value` laid over the run's recipe.

    Raises:
        InputError: neither a finished run nor a model; or the base is no longer the one that was trained on.
    """
    if RunDir.is_run(target):
        return _open_run(RunDir.open(target), overrides)
    if overrides:
        raise InputError(f"{target} is not a run folder, so there is no recipe for {overrides[0]!r} to change")
    if not Path(target).exists() and str(target).startswith(("runs/", ".", "/", "~")):
        raise InputError(f"neither a run nor a model at {target}; `qlora train RECIPE` makes a run")
    section = Model(name_or_path=str(target))
    checkpoint = base_model.as_its_files_say(base_model.find(section), section)
    base_model.load_config(checkpoint, section)  # what is wrong with config.json is said of that file
    task = checkpoint.task.name
    tokenizer, _ = open_tokenizer(checkpoint.folder, section, checkpoint.generation_config(), task=task)
    with progress(f"loading {target}"):
        model = base_model.load(checkpoint, section, None)
    return Subject(model, tokenizer, _stops(model, tokenizer), None, None)


def _stops(model, tokenizer):
    """Return the ids at which an answer ends; none of a model that answers with classes."""
    has_classes = base_model.task_of(model).HAS_CLASSES
    return set() if has_classes else chat.stop_token_ids(tokenizer, model.generation_config)


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
    from .. import methods

    recipe = Recipe.load(run.recipe_file, overrides)
    methods.read_config(run.adapter)  # what is wrong with it is said before the tokenizer in it is read
    checkpoint = base_model.find(recipe.model, task=task_of(recipe))
    refuse_changed_base(run, checkpoint)
    recipe = base_model.settle(recipe, base_model.load_config(checkpoint, recipe.model), checkpoint, this_machine())
    tokenizer = load_tokenizer(run, recipe.model, checkpoint)
    with progress(f"loading {checkpoint.name_or_path} and the adapter of {run.path}"):
        model = base_model.load(checkpoint, recipe.model, recipe.quantization)
        model = methods.load(model, run.adapter, checkpoint.new_tokens.values())
    stops = _stops(model, tokenizer)
    voices = {str(run.path): ("default", tokenizer, stops), None: (None, tokenizer, stops)}
    return Subject(model, tokenizer, stops, recipe, run, voices, str(run.path))


def switch(subject, name):
    """Let the adapter of run `name` answer, loading it if it is new; None: the base alone.

    Raises:
        InputError: not a finished run on the same base, or an adapter that cannot lie beside another. Nothing changes.
    """
    from .. import methods

    if subject.run is None:
        raise InputError("a plain model has no adapters; open a run: qlora chat RUN")
    if name != str(subject.run.path):
        methods.read(subject.run.adapter).refuse_more_than_low_rank(
            "cannot be switched off; open the other run by itself"
        )
    if name not in subject.voices:
        run = RunDir.open(name)
        recipe = run.recipe()
        ours, theirs = (one.environment()["base_model"] for one in (subject.run, run))
        if recipe.quantization != subject.recipe.quantization or ours["sha256"] != theirs["sha256"]:
            raise InputError(f"{name}: trained on another base than {subject.run.path}")
        methods.read_config(run.adapter)  # what is wrong with it is said before the tokenizer in it is read
        tokenizer, _ = open_tokenizer(run.adapter, recipe.model, subject.model.generation_config)
        _refuse_other_tokens(name, tokenizer, subject)
        own = f"voice{len(subject.voices)}"
        methods.add(subject.model, run.adapter, own)
        stops = chat.stop_token_ids(tokenizer, subject.model.generation_config)
        subject.voices[name] = (own, tokenizer, stops)
    chosen, subject.tokenizer, subject.stops = subject.voices[name]
    methods.activate(subject.model, chosen)
    subject.speaking = name


def _refuse_other_tokens(name, tokenizer, subject):
    """Raise InputError unless run `name` has the tokens of the run that was opened: the embedding has rows for those."""
    ours, theirs = subject.voices[str(subject.run.path)][1].get_vocab().items(), tokenizer.get_vocab().items()
    if ours != theirs:
        token, number = min(ours ^ theirs, key=lambda one: (one[1], one[0]))
        raise InputError(
            f"{name}: its tokenizer has other tokens than that of {subject.run.path} ({len(ours ^ theirs)} differ, such as "
            f"{token!r} with id {number}); open it by itself: qlora chat {shlex.quote(name)}"
        )


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
