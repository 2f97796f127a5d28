"""Opens what export merges: base, adapter, tokenizer and proof rows, from a run folder or any PEFT adapter folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import base_model, data, methods
from ...base_model import text_generation
from ...exporter import proof
from ...exporter.configs import TOKENIZER_FILES
from ...methods.weighted_sum import combine
from ...recipe import Data, Export, Model, Quantization, Recipe
from ...runs.folder import RunDir
from ...system.errors import InputError
from ...system.events import note
from ..evaluating.eval_rows import encoder_of_file
from ..exporting.run_facts import origin_of
from . import checkpoint_run
from .chosen_task import proof_of, task_of
from .opened_model import load_tokenizer, open_tokenizer, refuse_changed_base, refuse_other_base, this_machine


@dataclass
class Trained:
    """A base, how it was quantized, and an adapter.

    name: what the user called it. model, quantization, export: sections of the run's recipe, or what they are for an
    adapter that has none. data: fields of the data section, to read other rows like those it was trained on. modules:
    {quantized layer: sha256 of its codes at training, or None}. rows: what the proof uses, data.Examples; rows_from says
    in words where they are from. inputs: folders that are read. fitted: the adapter was started from what quantization
    has lost (LoftQ), so it is right on the quantized base only. live_model: how it is known what the adapter was trained
    on: "recorded" by the run, "declared" by the user, or "assumed". generation: the checkpoint, its folder that whose
    generation_config.json counts. taken_from: {tokenizer, chat_template, generation_config: "adapter", "base", "recipe"
    or "built in"}, None for what there is none of.
    """

    name: str
    checkpoint: base_model.Checkpoint
    config: Any
    model: Model
    quantization: Quantization | None
    export: Export
    data: dict
    modules: dict
    folder: Path
    adapter: methods.Adapter
    tokenizer: Any
    generation: base_model.Checkpoint
    taken_from: dict
    rows: list
    rows_from: str
    inputs: list
    fitted: bool
    live_model: str = "recorded"
    origins: tuple = ()  # exporter.model_card.Origin of each run
    temporary: Any = None  # closes what `folder` is in, if that goes away with the `with` block

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.temporary is not None:
            self.temporary.close()


def open_trained(targets, base=None, data_file=None, overrides=()) -> Trained:
    """Return, for a `with` block, what is in `targets`: a run, a checkpoint of one (RUN/checkpoints/step-N), or a PEFT adapter
    folder that was trained on `base`.

    Several are strings "RUN:WEIGHT" of runs on one base; their adapters are added up. data_file: rows for the proof; by
    default those that the run kept, or a few sentences of our own.

    Raises:
        InputError: neither a run nor an adapter; another base; or something in it that cannot be merged.
    """
    one = len(targets) == 1
    trained = _of_one(targets[0], base, overrides) if one else _of_several(parse_weighted(targets), base, overrides)
    if data_file is not None:
        settings = {**trained.data, "eval": None, "overlong": "truncate"}
        section = Data.of_file(data_file, settings)
        task = trained.checkpoint.task
        encoder = encoder_of_file(section, task.name)
        rows = data.Rows(data.load(section.train, trained.tokenizer, section, seed=0, encoder=encoder))
        if not len(rows):
            raise InputError(f"{data_file}: no rows left for the proof")
        base_model.refuse_rows(rows, trained.config, trained.adapter.config.get("num_virtual_tokens") or 0)
        num_rows = getattr(trained.config.get_text_config(), "vocab_size", None)
        answers = data.as_supervised(rows)
        trained.rows = proof_of(task.file).proof_rows(answers, num_rows)
        trained.rows_from = f"rows of {Path(data_file).name}"
    return trained


def _of_one(target, base, overrides):
    if RunDir.is_run(target):
        if base is not None:
            raise InputError(f"{target} is a run, which records its base; leave --model out, or give {target}/adapter")
        trained = _of_run(RunDir.open(target), overrides)
    elif (run := checkpoint_run.run_of(target)) is not None:
        trained = _of_checkpoint(target, run, base, overrides)
    elif (Path(target) / methods.CONFIG).is_file():
        trained = _of_adapter(Path(target), base, overrides)
    else:
        RunDir.open(target)  # says what is wrong with it
        raise AssertionError(target)
    return trained


def _of_checkpoint(folder, run, base, overrides):
    """Return what a checkpoint of a run has, as if the training had ended there."""
    if base is not None:
        raise InputError(f"{folder} is a checkpoint of {run.path}, which records its base; leave --model out")
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(checkpoint_run.as_run(folder, run, "export"))
        trained = _of_run(made, overrides)
        trained.name, trained.inputs = str(folder), [*trained.inputs, run.path]
        trained.temporary = stack.pop_all()
    return trained


def _of_several(weighted, base, overrides):
    """Return the weighted sum of several runs, as if it had been trained: with the rows of the first."""
    for target, _ in weighted:
        if checkpoint_run.run_of(target) is not None:
            raise InputError(f"{target} is a checkpoint; export it by itself, and add up the adapters of runs")
    found = [_of_one(target, base, overrides) for target, _ in weighted]
    first = found[0]
    for other in found[1:]:
        same = (
            _have_one_base(other.checkpoint, first.checkpoint)
            and other.quantization == first.quantization
            and other.modules == first.modules
        )
        if not same:
            raise InputError(
                f"{other.name}: trained on another base than {first.name}; adapters of different bases cannot be summed"
            )
    weights = [weight for _, weight in weighted]
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        folder = combine([one.folder for one in found], weights, first.config, first.model.trust_remote_code, place)
        read = methods.read(folder)
        temporary = stack.pop_all()
    named = " + ".join(f"{weight:g} * {target}" for target, weight in weighted)
    note(f"adapter   {named}: r = {read.config['r']}, the sum of the ranks")
    return dataclasses.replace(
        first,
        name=named,
        folder=folder,
        adapter=read,
        inputs=[folder for one in found for folder in one.inputs],
        fitted=any(one.fitted for one in found),
        live_model=min(one.live_model for one in found),  # the least certain is the first by the alphabet
        origins=tuple(origin for one in found for origin in one.origins),
        temporary=temporary,
    )


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


def _have_one_base(one, other):
    return one.folder.samefile(other.folder) or one.file_hashes(fully=True) == other.file_hashes(fully=True)


def _of_run(run, overrides):
    recipe, as_trained = Recipe.load(run.recipe_file, overrides), run.recipe()
    for name in ("quantization", recipe.method.key, as_trained.method.key):
        if getattr(recipe, name) != getattr(as_trained, name):
            raise InputError(
                f"{name}: differs from what {run.path} was trained with; export uses the run's, so leave it out"
            )
    checkpoint = base_model.find(recipe.model, task=task_of(recipe))
    trained = methods.read(run.adapter)
    refuse_changed_base(run, checkpoint, fully=True)
    config = base_model.load_config(checkpoint, recipe.model)
    recipe = base_model.settle(recipe, config, checkpoint, this_machine())
    recorded = run.environment()["base_model"]
    digests = recorded.get("quantized_sha256", {})  # runs before 0.2 have none
    rows, rows_from = proof_of(checkpoint.task.file).from_json(run.proof_rows())
    return Trained(
        name=str(run.path),
        checkpoint=checkpoint,
        config=config,
        **_sections(recipe),
        modules={name: digests.get(name) for name in recorded["quantized_modules"]},
        folder=run.adapter,
        adapter=trained,
        tokenizer=load_tokenizer(run, recipe.model, checkpoint),
        generation=checkpoint,
        taken_from=_taken_from("adapter", "adapter", checkpoint.generation_config() and "base")
        if checkpoint.task.file.HAS_TOKENS
        else {"image_processor": "base"},
        rows=rows,
        rows_from=rows_from,
        inputs=[run.path, checkpoint.folder],
        fitted=recipe.method.corrects_quantization,
        origins=(origin_of(run),),
    )


def _sections(recipe):
    """Return the sections that a Trained carries, by its names for them."""
    return {
        "model": recipe.model,
        "quantization": recipe.quantization,
        "export": recipe.export,
        "data": recipe.data.model_dump(),
    }


def _of_adapter(folder, base, overrides):
    trained = methods.read(folder)
    _refuse_classes(folder, trained.config)
    said = trained.config.get("base_model_name_or_path")
    if base is None:
        named = shlex.quote(str(said)) if said else "FOLDER"
        raise InputError(f"{folder} is an adapter; name the model it was trained on: --model {named}")
    # an adapter has no recipe: this one is for what is laid over it, and no row or output folder is ever taken from it
    values = {"model": {"name_or_path": str(base)}, "data": {"train": str(folder)}, "output_dir": str(folder)}
    recipe = Recipe.from_dict(values, overrides)
    other = bool(said) and Path(str(said)).name.lower() != Path(str(base)).name.lower()
    if other:
        note(f"base      {folder} names {said} as its base; merging with {base} instead")
    checkpoint = base_model.find(recipe.model)
    if isinstance(recorded := methods.base_of(folder), dict):
        how = f"--model, or, if it was changed on purpose, remove {folder / methods.MANIFEST}"
        refuse_other_base(folder, recorded, checkpoint, how, fully=True)
    config = base_model.load_config(checkpoint, recipe.model)
    recipe = base_model.settle(recipe, config, checkpoint, this_machine())
    quantized = recipe.quantization
    if base_model.stored_quantization(config):  # with an adapter of this tool its hashes are compared above
        assumed = not isinstance(recorded, dict) and (other or not said)
    else:
        assumed = quantized is not None and not any(one.startswith("quantization") for one in overrides)
    if assumed:
        own = base_model.stored_quantization(config) is not None
        note(f"base      assumed to be {f'the 4-bit weights of {base}' if own else _assumption(quantized)}")
    tokenizer, generation, taken_from = _tokenizer_of_adapter(folder, checkpoint, recipe)
    modules = base_model.names_to_quantize(config, recipe.model) if recipe.quantization else []
    return Trained(
        name=str(folder),
        checkpoint=checkpoint,
        config=config,
        **_sections(recipe),
        modules=dict.fromkeys(modules),
        folder=folder,
        adapter=trained,
        tokenizer=tokenizer,
        generation=generation,
        taken_from=taken_from,
        rows=proof.text_rows(tokenizer),
        rows_from="built-in sentences",
        inputs=[folder, checkpoint.folder],
        fitted=_is_fitted(folder),
        live_model="assumed" if assumed else "declared",
    )


def _refuse_classes(folder, config):
    """Raise InputError if an adapter is of a model with classes: their names are those of its run."""
    kind = config.get("task_type")
    if (folder / base_model.image_processor.FILE).is_file() and not (folder / "tokenizer_config.json").is_file():
        kind = "image classification"  # PEFT has no name for it
    if kind not in (None, text_generation.PEFT_TYPE):
        raise InputError(
            f"{folder}: an adapter for {kind}; its classes have names in the run alone, so export that: qlora export RUN"
        )


def _tokenizer_of_adapter(folder, checkpoint, recipe):
    """Return (tokenizer, Checkpoint whose generation_config.json counts, Trained.taken_from): the adapter's, or the base's."""
    has_tokenizer = (folder / "tokenizer.json").is_file()
    if not has_tokenizer:
        _refuse_half_a_tokenizer(folder)
        note(f"tokenizer taken from {checkpoint.folder}: the adapter has none")
    base_model.refuse_generation(folder)
    has_generation = (folder / "generation_config.json").is_file()
    generation = dataclasses.replace(checkpoint, folder=folder) if has_generation else checkpoint
    generation_config, chat_template = generation.generation_config(), recipe.data.chat_template
    place = folder if has_tokenizer else checkpoint.folder
    has_template = base_model.load_tokenizer(place, recipe.model).chat_template
    tokenizer, template = open_tokenizer(place, recipe.model, generation_config, chat_template)
    whose = "adapter" if has_tokenizer else "base"
    if chat_template is None and not has_template:
        note(f"template  {template}")
    taken_from = _taken_from(
        whose,
        "recipe" if chat_template else whose if has_template else "built in",
        "adapter" if has_generation else generation_config and "base",
    )
    return tokenizer, generation, taken_from


def _taken_from(tokenizer, chat_template, generation_config):
    return {"tokenizer": tokenizer, "chat_template": chat_template, "generation_config": generation_config or None}


def _assumption(quantized):
    kind = f"{quantized.quant_type}{' and double quantization' if quantized.use_double_quant else ''}"
    return (
        f"quantized to {kind} in every linear layer: the adapter does not say. If you know it, give "
        f"quantization.quant_type={quantized.quant_type}, or quantization=null for 16 bit"
    )


def _refuse_half_a_tokenizer(folder):
    """Raise InputError if a folder without tokenizer.json has other files of a tokenizer: the base's would replace them."""
    found = sorted({path.name for name in TOKENIZER_FILES for path in folder.glob(name)})
    if found:
        raise InputError(
            f"{folder}: has {', '.join(found)} but no tokenizer.json, and the base's tokenizer may differ from it. Make one: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}), or move these files away to use "
            "the base's"
        )


def _is_fitted(folder):
    """True if the adapter lies in the folder of a run that started it from what quantization has lost."""
    run = RunDir(folder.parent)
    return run.recipe_file.is_file() and run.recipe().method.corrects_quantization
