"""A settings file of another tool on its way to a recipe: each of its fields is carried over, or named with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..system import secrets
from .commented import Line
from .optimizers import OPTIMIZERS, SCHEDULES


@dataclass
class Draft:
    """tool: whose file. values: its fields that nobody has looked at yet. lines: of the recipe. carried: {their field: ours};
    not_needed, no_counterpart: {their field: why}; defaults: {our field: what they assume where the file is silent}; unset: their
    fields that are null."""

    tool: str
    values: dict
    lines: list[Line] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)
    not_needed: dict[str, str] = field(default_factory=dict)
    no_counterpart: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, str] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.unset = [str(name) for name, value in self.values.items() if value is None or value in ("", [], {})]
        self.values = {str(name): value for name, value in self.values.items() if str(name) not in self.unset}

    def take(self, name, default=None):
        """Return the value of their field `name`, which is dealt with then."""
        return self.values.pop(name, default)

    def put(self, ours, value, theirs):
        """Set our field `ours` by their field `theirs`; what is said twice is named."""
        if any(line.field == ours for line in self.lines):
            self.lacks(theirs, value, f"{ours} is set already")
            return
        self.lines.append(Line(ours, value, theirs))
        self.carried[theirs] = ours

    def lacks(self, theirs, value, why=""):
        """Name a field that is not carried over, and why; a value that may be a password is not repeated."""
        said = "(not repeated)" if secrets.names_secret(theirs.rpartition(".")[2]) else _short(value)
        self.no_counterpart[theirs] = f"{said}; {why}" if why else said

    def lacks_8_bit(self, theirs, value):
        self.lacks(
            theirs, value, "no 8 bit here: the base is in 16 bit, and in 4 bit if quantization: null is taken out"
        )

    def carry(self, rules):
        """Carry over every field that `rules`, {their field: (ours, function of the value)}, has; ValueError says why not."""
        for theirs, (ours, read) in rules.items():
            if theirs in self.values:
                value = self.take(theirs)
                try:
                    self.put(ours, read(value), theirs)
                except (ValueError, TypeError) as error:
                    self.lacks(theirs, value, str(error))

    def leave(self, reasons):
        """Note the fields that mean nothing here, {their field: why}."""
        for theirs, why in reasons.items():
            if theirs in self.values:
                self.take(theirs)
                self.not_needed[theirs] = why

    def assume(self, defaults):
        """Set what the tool does where its file is silent, {our field: value}, where that is not our default."""
        for ours, value in defaults.items():
            if not any(line.field == ours for line in self.lines):
                self.lines.append(Line(ours, value, f"the default of {self.tool}"))
                self.defaults[ours] = str(value)

    def finish(self):
        """Name what is left, and return self."""
        for theirs, value in self.values.items():
            self.lacks(theirs, value)
        self.values = {}
        return self

    def footer(self):
        """Return the comments that end the recipe: what it does not carry over."""
        lines = [f"no counterpart: {name}: {why}" for name, why in self.no_counterpart.items()]
        lines += [f"not needed: {name}: {why}" for name, why in self.not_needed.items()]
        return lines + ([f"unset there: {', '.join(self.unset)}"] if self.unset else [])


def flag(value) -> bool:
    """Return a bool; YAML 1.1, which these tools read, has yes and no."""
    words = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
    found = words.get(str(value).lower())
    if found is None:
        raise ValueError("should be true or false")
    return found


def whole(value) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError("not a whole number here")
    return int(float(value))


def number(value) -> float:
    """Return a float; YAML 1.1 reads 1e-4 as a word, and so these tools take words."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    found = float(value)
    return int(found) if found.is_integer() else found


def share(value) -> float:
    if not 0 <= number(value) < 1:
        raise ValueError("a number of rows; here it is a share, data.eval_fraction")
    return number(value)


def text(value) -> str:
    return str(value)


def names(value) -> Any:
    """Return a list of names, which may be given with commas; "all" and "all-linear" are every linear layer."""
    found = [one.strip() for one in value.split(",")] if isinstance(value, str) else [str(one) for one in value]
    return "all-linear" if found in (["all"], ["all-linear"]) else found


def optimizer(value) -> str:
    found = {"adamw_bnb_8bit": "adamw_8bit", "adamw_hf": "adamw_torch"}.get(str(value), str(value))
    if found not in OPTIMIZERS:
        raise ValueError(f"training.optim has {', '.join(OPTIMIZERS)}; the default is kept")
    return found


def scheduler(value) -> str:
    if value not in SCHEDULES:
        raise ValueError(f"training.lr_scheduler_type has {', '.join(SCHEDULES)}; the default is kept")
    return value


def warmup(draft, steps, max_steps):
    """Carry their warmup_steps over, which is training.warmup_ratio here, where the number of steps is known."""
    value = draft.take(steps)
    if value is None:
        return
    total = draft.values.get(max_steps)
    if not number(value):
        draft.put("training.warmup_ratio", 0.0, steps)
    elif total and number(total) > number(value):
        draft.put("training.warmup_ratio", round(number(value) / number(total), 4), steps)
    else:
        draft.lacks(steps, value, "a share of the steps here, training.warmup_ratio; its default is kept")


def _short(value):
    said = secrets.redacted(str(value))
    return said if len(said) <= 60 else f"{said[:57]}..."


# what both tools call as transformers' TrainingArguments do, and so do we: {their field: (ours, function of the value)}
OF_TRAINER = {
    **{name: (f"training.{name}", whole) for name in ("max_steps", "gradient_accumulation_steps", "logging_steps",
                                                      "eval_steps", "save_steps", "save_total_limit", "seed")},
    **{name: (f"training.{name}", number) for name in ("learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm",
                                                       "neftune_noise_alpha")},
    "output_dir": ("output_dir", text),
}  # fmt: skip
