"""What train and data share: everything before weights are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import base_model, data
from ...data import chat
from ...recipe import Recipe
from ...system.errors import InputError
from ...system.events import note
from . import started_from
from .chosen_task import class_weights_of, encoder_of, settle_labels, task_of
from .opened_model import open_tokenizer, this_machine


@dataclass
class Prepared:
    """Model files found, rows tokenized.

    recipe: with the quantization that the model's files have, and the dtype that is computed in. template: in words, which
    chat template is used. parts: the data files, held-out ones last. examples, eval_examples: data.Rows. batches: what
    training takes one after another: the examples, or the Packs or Batches they are joined into.
    """

    recipe: Recipe
    checkpoint: base_model.Checkpoint
    config: Any
    tokenizer: Any
    template: str
    parts: list
    examples: data.Rows
    eval_examples: data.Rows
    batches: Any
    report: dict


def prepare(recipe: Recipe, weights=True, on=None) -> Prepared:
    """Read and tokenize the data of `recipe` for its model; raises InputError for whatever is wrong with either.

    weights: False if the model's weights need not be there. on: the base_model.Computer that is to train; None: this machine.
    """
    checkpoint = base_model.find(recipe.model, weights, task_of(recipe))
    base_model.load_config(checkpoint, recipe.model)  # what is wrong with it is said before the data is read
    recipe, checkpoint = settle_labels(recipe, checkpoint)
    config = base_model.load_config(checkpoint, recipe.model)
    recipe = _settled(recipe, config, checkpoint, on)
    generation_config, has_classes = checkpoint.generation_config(), checkpoint.task.file.HAS_CLASSES
    how = (recipe.data.chat_template, recipe.data.system_as_user)
    tokenizer, template = open_tokenizer(checkpoint.folder, recipe.model, generation_config, *how, task=recipe.task)
    if not checkpoint.task.file.HAS_TOKENS:
        base_model.image_processor.refuse_other_shape(tokenizer, config, checkpoint.folder)
    else:
        _say_of_tokens(checkpoint.folder, tokenizer, recipe.model.new_tokens or ())

    seed, encoder = recipe.seed_of_rows, encoder_of(recipe.task, recipe.objective)
    parts = data.load(recipe.data.train, tokenizer, recipe.data, seed, encoder)
    eval_parts = data.load(recipe.data.eval or [], tokenizer, recipe.data, seed, encoder)
    rows = data.Rows(parts)
    if not len(rows):
        raise InputError(_nothing_left("train", parts))
    if eval_parts and not len(data.Rows(eval_parts)):
        raise InputError(_nothing_left("evaluate", eval_parts))
    once, held_out = data.hold_out(rows, recipe.data.eval_fraction, seed)
    held_out = data.Rows(eval_parts) if eval_parts else held_out
    examples = data.weighted(once, recipe.training.seed)
    if not len(examples):
        raise InputError("no rows left to train on: the weights in data.train are too small")
    for some in (examples, held_out):
        base_model.refuse_rows(some, config, recipe.method.num_positions)
    batches = _batches(examples, recipe)
    report = data.report(
        examples,
        [*parts, *eval_parts],
        None if has_classes else chat.stop_token_ids(tokenizer, generation_config),
        batches,
        recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps,
    )
    named = [*recipe.data.train, *(recipe.data.eval or [])]
    report["ignored_nothing"] = _ignored_nothing(recipe.data.ignore_keys, report)
    report["not_read"] = sorted({path for source in named for path in encoder.not_read(source)})
    report |= {"eval_rows": len(held_out), **data.copies(once, held_out)}
    if recipe.objective is not None:
        what = data.unpaired if examples.are_unpaired else data.preference
        report |= what.describe(examples, held_out, parts)
    if has_classes:
        report |= data.labels.balance(examples, held_out, recipe.data.labels)
        class_weights_of(recipe.data, examples)  # what is wrong with them is said before a weight is read
    if not checkpoint.task.file.HAS_TOKENS:
        report["image_sizes"] = data.image_sizes(examples)
    parts = [*parts, *eval_parts]
    return Prepared(recipe, checkpoint, config, tokenizer, template, parts, examples, held_out, batches, report)


def _say_of_tokens(folder, tokenizer, new_tokens):
    if not base_model.follows_its_file(folder, tokenizer, new_tokens):
        note(
            f"tokenizer transformers makes other tokens than {folder / 'tokenizer.json'} says: it builds a "
            f"{type(tokenizer).__name__} from the file's vocabulary alone. Training and export have its tokens; see them with "
            "`qlora data RECIPE --row 1 --tokens`"
        )


def _settled(recipe, config, checkpoint, on):
    """Return `recipe` with what the model's files, the computer and the adapter that it starts from decide."""
    return started_from.settle(base_model.settle(recipe, config, checkpoint, on or this_machine()), checkpoint)


def with_method_of(prepared: Prepared, recipe: Recipe, on=None) -> Prepared:
    """Return the same rows, read once, for another `recipe` of the same model and data: another method, another base.

    Raises:
        InputError: as `prepare` does of the method.
    """
    recipe = recipe.model_copy(update={"data": prepared.recipe.data})  # with the classes that were found
    recipe = _settled(recipe, prepared.config, prepared.checkpoint, on)
    for some in (prepared.examples, prepared.eval_examples):
        base_model.refuse_rows(some, prepared.config, recipe.method.num_positions)
    return dataclasses.replace(prepared, recipe=recipe)


def prepared_if_there(recipe, on=None):
    """Return the Prepared data of `recipe`, or None where its files or its tokenizer are not on this machine.

    on: see `prepare`.
    """
    paths = [source.path for source in recipe.data.train if source.path is not None]
    absent = [path for path in paths if not any(letter in path for letter in "*?[") and not Path(path).exists()]
    checkpoint = base_model.find(recipe.model, weights=False, task=task_of(recipe))
    if base_model.whole_config(checkpoint.folder) is not None:
        note("model     a multimodal checkpoint: planning the text half, which is what is trained")
    has_tokens = checkpoint.task.file.HAS_TOKENS
    needed = "tokenizer.json" if has_tokens else base_model.image_processor.FILE
    if not absent and (checkpoint.folder / needed).is_file():
        return prepare(recipe, weights=False, on=on)
    why = f"no file at {absent[0]}" if absent else f"{checkpoint.folder} has no {needed}"
    assumed = "rows of data.max_length tokens, all of them trained" if has_tokens else "images as the model takes them"
    note(f"data      {why}: assuming {assumed}")
    return None


def _batches(examples, recipe):
    tokens = recipe.training.filled_to
    if recipe.data.packing:
        return data.pack(examples, tokens or recipe.data.max_length)
    if tokens is not None:
        return data.Batches(examples, examples.lengths, tokens, recipe.training.seed)
    return examples


def _nothing_left(to, parts):
    lines = [f"  {part.path}: {dropped_rows(part.summary)}" for part in parts]
    return "\n".join([f"no rows left to {to} on", *lines])


def refuse_pointless(report):
    """Raise InputError where training on the rows of `report` teaches the model never to stop, or only one class or verdict."""
    trained = [one["label"] for one in report.get("classes", ()) if one["rows"]]
    if len(trained) == 1:
        raise InputError(f"every training row has the label {trained[0]!r}; there is nothing to tell apart")
    unpaired = report.get("judged")
    if unpaired is not None and not (unpaired["desirable"] and unpaired["undesirable"]):
        only = "good" if unpaired["desirable"] else "bad"
        other = "; supervised training (without kto) learns them" if unpaired["desirable"] else ""
        raise InputError(f"every training row is a {only} answer; there is nothing to tell apart{other}")
    if report.get("ends_with_stop_token") == 0:
        raise InputError(
            "no row ends with a stop token, because all are truncated, so the model would never learn to stop; "
            "raise data.max_length, or set data.overlong to truncate_prompt or drop"
        )


def _ignored_nothing(ignore_keys, report):
    """Return the keys of data.ignore_keys that no row has."""
    found = {key for source in report["sources"] for key in source["unused"]}
    return [key for key in ignore_keys or () if key not in found]


def dropped_rows(source):
    """Return in words how many rows of a source were dropped, and why. source: an entry of a report's "sources"."""
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in source["reasons"].items())
    return f"{source['rows_dropped']:,} of {source['rows_read']:,} rows dropped: {reasons}"
