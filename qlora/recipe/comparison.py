"""A comparison: variants of a recipe, with settings and seeds; YAML in, one frozen value out, and the recipe of each training."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from ..system.errors import InputError
from . import Recipe, error_messages, reading
from .fields import Name, PathText, Positive, Section

BUILT_IN = "built-in"
AFTER = "after"
FILE, RESULT = "comparison.yaml", "comparison.json"  # in its output_dir: what is compared, and what came of it
# of its rows, and of its summary as means over seeds
NUMBERS = (
    "loss", "perplexity", "bits_per_byte", "forgetting", "seconds", "peak_bytes", "trainable_parameters", "trainable_share",
    "saved_bytes", "latency_seconds",
)  # fmt: skip
# what else lies there, and cannot be a training's folder
_OTHERS = {"recipes", "logs", "failed", "lock", FILE, *(f"comparison.{kind}" for kind in ("json", "csv", "md", "png"))}
_PLAIN = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,60}"
_LONGEST_NAME = 200  # of a training: a file system takes 255, and files are called so with an ending
_MOST = 1000  # trainings


class Comparison(Section):
    """variants: {name: what it changes in the recipe, dotted or nested}, with a `sweep` of its own where it has one; with
    `after`, it starts from the recipe and the adapter of a variant above it."""

    base: PathText
    """a recipe; what it says holds wherever a variant says nothing else"""
    variants: dict[Name, dict[Name, Any]] = Field(min_length=1)
    """name: what it changes"""
    sweep: dict[Name, list[Any]] = Field({})
    """field: values; every variant is trained with each"""
    seeds: list[int] | None = Field(None, min_length=1)
    """values of training.seed, each for every training"""
    metric: Name = "loss"
    """what decides, and is measured: loss, bits_per_byte, or a metric of qlora eval such as exact_match or rougeL"""
    metrics: list[Name] = Field([])
    """further metrics to measure, see qlora eval --metric"""
    extract: Name | None = None
    """the part of answers that is compared, see qlora eval --extract"""
    max_rows: Positive | None = None
    """held-out rows that are measured; null: 100, of a model that answers with classes all"""
    data: PathText | None = None
    """rows that all are evaluated on, see qlora eval --data; null: those that they hold out, which have to be the same"""
    forgetting: PathText | None = BUILT_IN
    """rows that were not trained on, whose loss is measured before and after; null: not measured"""
    output_dir: PathText
    """a new or empty folder; the trainings are its subfolders"""
    _file: str = PrivateAttr("the comparison")  # that it was read from
    _lines: dict[tuple, Any] = PrivateAttr({})  # {place in it: line}

    @field_validator("variants", mode="before")
    @classmethod
    def _nothing_changed(cls, variants):
        """`name:` and no more is the recipe as it is."""
        if isinstance(variants, dict):
            return {name: {} if changes is None else changes for name, changes in variants.items()}
        return variants

    @model_validator(mode="after")
    def _names(self):
        for name, changes in self.variants.items():
            if not re.fullmatch(_PLAIN, name):
                raise ValueError(f"variants.{name}: a name of letters, digits, _ . + and -; a folder is called so")
            if name.casefold() in _OTHERS:
                raise ValueError(f"variants.{name}: output_dir has a file or folder of that name; rename the variant")
            own = changes.get("sweep", {})
            if not (isinstance(own, dict) and all(isinstance(values, list) and values for values in own.values())):
                raise ValueError(f"variants.{name}.sweep: should be fields with lists of values")
            self._refuse_start(name)
            self._refuse_no_effect(name)
        for field, values in self.sweep.items():
            if not values:
                raise ValueError(f"sweep.{field}: should be a list of values")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one of them is listed twice")
        return self

    def sweep_of(self, variant) -> dict[str, list]:
        return self.variants[variant].get("sweep", self.sweep)

    def _refuse_start(self, name):
        """Raise ValueError if a variant is to start from what is not known before it is trained."""
        if AFTER not in self.variants[name]:
            return
        start, above = self.variants[name][AFTER], list(self.variants)[: list(self.variants).index(name)]
        if start not in above:
            raise ValueError(
                f"variants.{name}.after: should be a variant above it, which is trained before"
                + (f": {', '.join(above)}" if above else "; there is none")
            )
        if math.prod(map(len, self.sweep_of(start).values())) > 1:
            raise ValueError(
                f"variants.{name}.after: {start} is trained with several settings; give it `sweep: {{}}` and the one from which "
                f"{name} starts"
            )

    def _refuse_no_effect(self, name):
        """Raise ValueError if a variant, or its sweep, sets what something else decides."""
        changes = {key: value for key, value in self.variants[name].items() if key not in ("sweep", AFTER)}
        given = list(_leaves(changes))
        of_each = [_leaves_of(field, values) for field, values in self.sweep_of(name).items()]
        swept = [field for fields in of_each for field in fields]
        for fields, what in ((given, "sets"), (swept, "its sweep sets")):
            if twice := next((one for number, one in enumerate(fields) if _within(one, fields[:number])), None):
                raise ValueError(f"variants.{name}: {what} {twice} twice; keep one")
        if both := next((one for one in swept if _within(one, given)), None):
            raise ValueError(
                f"variants.{name}: sets {both}, which its sweep sets too; leave one out, or give {name} `sweep: {{}}`"
            )
        decided = {"output_dir": "the folder of each training is in the comparison's output_dir"}
        decided |= {} if self.seeds is None else {"training.seed": "seeds has its values"}
        if AFTER in self.variants[name]:
            decided["model.adapter_name_or_path"] = f"it starts from {self.variants[name][AFTER]}"
        for field, why in decided.items():
            if field in (*given, *swept):
                raise ValueError(f"variants.{name}: {field} has no effect, because {why}; leave it out")

    @classmethod
    def load(cls, path, overrides=()) -> Comparison:
        """Return the comparison in the YAML file `path`, with `field=value` strings laid over it.

        Raises:
            InputError: all problems of the file together, each with its line, field and remedy.
        """
        values, lines = reading.from_file(path, overrides, what="comparison")
        try:
            found = cls.model_validate(values)
        except ValidationError as error:
            raise error_messages.refusal(path, error, values, lines, cls) from None
        found._file, found._lines = str(path), lines
        return found

    def lines_of(self, variant) -> dict[tuple, Any]:
        """Return {place in the recipe of a variant: line} of what the comparison's file sets there."""
        changes = self.variants[variant]
        own, sweep = ("variants", variant), ("sweep",)
        swept = (*own, *sweep) if "sweep" in changes else sweep
        found = self.lines_of(changes[AFTER]) if AFTER in changes else {}
        for at, line in self._lines.items():
            for before in (own, swept):
                if at[: len(before)] == before and len(at) > len(before):
                    found[tuple(".".join(map(str, at[len(before) :])).split("."))] = line
        return found


@dataclass(frozen=True)
class Entry:
    """One training of a comparison. settings: {dotted field: value} of the sweep. name: of its folder. after: the name of the one
    whose adapter it starts from."""

    variant: str
    settings: Mapping[str, Any]
    seed: int
    name: str
    recipe: Recipe
    after: str | None = None


def entries(comparison: Comparison) -> list[Entry]:
    """Return the trainings of a comparison, variant by variant; the seeds of a setting after one another.

    Raises:
        InputError: a variant is no valid recipe; says which, and what is wrong with it.
    """
    values, _ = reading.from_file(comparison.base, ())
    _refuse_too_many(comparison)
    found: dict[str, Entry] = {}
    for variant in comparison.variants:
        for settings in _settings(comparison, variant):
            for seed in comparison.seeds or (None,):
                entry = _entry(comparison, values, variant, settings, seed)
                key = entry.name.casefold()  # one folder on some file systems
                if key in found:
                    raise InputError(
                        f"two trainings would be called {entry.name}; rename a variant, or a value of the sweep"
                    )
                found[key] = entry
    return list(found.values())


def _refuse_too_many(comparison):
    """Raise InputError before more recipes are made than anybody trains."""
    sizes = [math.prod(map(len, comparison.sweep_of(variant).values())) for variant in comparison.variants]
    count = sum(sizes) * len(comparison.seeds or (None,))
    if count > _MOST:
        raise InputError(
            f"the comparison has {count:,} trainings, every value of a sweep with every other, more than {_MOST:,}; take values "
            "out of sweep or seeds"
        )


def _refuse_name(name):
    """Raise InputError where no folder can be called as a training."""
    if len(name) > _LONGEST_NAME:
        raise InputError(
            f"a training would be called {name[:80]}..., {len(name):,} characters, more than {_LONGEST_NAME}; shorten the name "
            "of the variant, or sweep fewer fields at once"
        )


def _leaves(changes, before=""):
    """Yield the dotted name of each field that nested `changes` set."""
    for key, value in changes.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def _leaves_of(field, values):
    """Return the dotted name of each field that one of the `values` of a swept `field` sets."""
    return list(dict.fromkeys(leaf for value in values for leaf in _leaves({field: value})))


def _within(field, others):
    """Return whether one of `others` sets the dotted `field` too, or a part of it, or what it is a part of."""
    return any(f"{field}.".startswith(f"{other}.") or other.startswith(f"{field}.") for other in others)


def _settings(comparison, variant):
    """Return {dotted field: value} of each setting of a variant."""
    sweep = comparison.sweep_of(variant)
    return [dict(zip(sweep, chosen, strict=True)) for chosen in itertools.product(*sweep.values())]


def _entry(comparison, base, variant, settings, seed):
    values = _values(comparison, base, variant, settings, seed)
    _refuse_name(values["output_dir"].rpartition("/")[2])
    where = f"{comparison._file}, variant {variant} of {comparison.base},"
    recipe = Recipe.of_values(where, values, comparison.lines_of(variant))
    start = recipe.model.adapter_name_or_path if AFTER in comparison.variants[variant] else None
    after = None if start is None else start.rpartition("/")[2]
    return Entry(variant, settings, recipe.training.seed, recipe.output_dir.rpartition("/")[2], recipe, after)


def _values(comparison, base, variant, settings, seed):
    """Return the nested values of a training's recipe."""
    changes = {key: value for key, value in comparison.variants[variant].items() if key not in ("sweep", AFTER)}
    start = comparison.variants[variant].get(AFTER)
    if start is None:
        values = copy.deepcopy(base)
    else:
        (alone,) = _settings(comparison, start)
        values = _values(comparison, base, start, alone, seed)
        _set(values, ["model", "adapter_name_or_path"], values["output_dir"])
    for names in (Recipe.names_of_methods(), Recipe.names_of_objectives()):
        _leave_other(values, changes, names)
    for key, value in [*changes.items(), *settings.items()]:
        _set(values, key.split("."), value)
    if seed is not None:  # of the training alone: every seed is measured on the same rows
        same = values.get("data", {}).get("seed")
        default = Recipe.model_fields["training"].default.seed
        _set(values, ["data", "seed"], values.get("training", {}).get("seed", default) if same is None else same)
        _set(values, ["training", "seed"], seed)
    name = "-".join([variant, *(_word(key, value) for key, value in settings.items())])
    name += "" if seed is None else f"-seed-{seed}"
    values["output_dir"] = f"{comparison.output_dir.rstrip('/')}/{name}"
    return values


def settings_in_words(settings) -> str:
    """Return the settings of a sweep as a few words: the last part of each field, and its value."""
    return ", ".join(
        f"{field.rpartition('.')[2]} {value:g}" if isinstance(value, float) else f"{field.rpartition('.')[2]} {value}"
        for field, value in settings.items()
    )


def _leave_other(values, changes, names):
    """Take the base's section out of `values` where a variant gives another of `names`: they exclude each other."""
    given = {key.split(".")[0] for key, value in changes.items() if value is not None} & {*names}
    if given:
        for name in {*names} - given:
            values.pop(name, None)


def _set(values, parts, value):
    """Set the field at `parts`; a mapping changes those fields alone that it names."""
    *outer, last = parts
    node = values
    for part in outer:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        for key, inner in value.items():
            _set(node[last], [key], inner)
    else:
        node[last] = copy.deepcopy(value)


def _word(field, value):
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", f"{field.rpartition('.')[2]}-{value}")[:80]
