"""What training with each method would cost on a card: the recipe's own data, with one method after another."""

from __future__ import annotations

from dataclasses import dataclass

from ... import planner
from ...recipe import Recipe
from ...system.errors import InputError
from ..opening.prepared_data import Prepared, with_method_of
from .plan_job import Budget, job_of, without_data


@dataclass(frozen=True)
class MethodPlan:
    """The plan of one method, or why there is none. trained: how many numbers are."""

    name: str
    plan: planner.Plan | None
    trained: int = 0
    why_none: str = ""


def method_recipes(recipe: Recipe) -> dict[str, Recipe | str]:
    """Return {name: the recipe with that method and nothing else changed, or why that cannot be}.

    The recipe's own method has its own fields, others their defaults; `full` and the second `lora` have a 16-bit base.
    """
    own = recipe.method.key
    names = [own, *(name for name in Recipe.names_of_methods() if name != own)]
    sixteen = {"quantization": None}
    asked = {name: ({name: {}}, sixteen if name == "full" else {}) for name in names}
    asked["lora: {use_dora: true}"] = ({"lora": {"use_dora": True}}, {})
    asked["lora, 16-bit base"] = ({"lora": {}}, sixteen)
    found: dict[str, Recipe | str] = {}
    for label, (section, others) in asked.items():
        [(name, fields)] = section.items()
        values = {key: value for key, value in recipe.model_dump().items() if key not in names}
        kept = getattr(recipe, name) if name == own else None
        values |= {name: ({} if kept is None else kept.model_dump()) | fields, **others}
        try:
            found[label] = Recipe.from_dict(values)
        except InputError as error:
            found[label] = str(error).partition("\n")[2].strip()
    return found


def plan_methods(recipe: Recipe, prepared: Prepared | None, budget: Budget, on) -> list[MethodPlan]:
    """Return the MethodPlan of each method, the recipe's own first.

    prepared: the recipe's data, None where it is not there. on: the base_model.Computer that is to train.

    Raises:
        InputError: there is a plan of none.
    """
    found = []
    for name, changed in method_recipes(recipe).items():
        if isinstance(changed, str):
            found.append(MethodPlan(name, None, why_none=changed))
            continue
        try:
            if prepared is None:
                job = without_data(changed, budget.kind, budget, on)
            else:
                job = job_of(with_method_of(prepared, changed, on), budget.kind, budget)
            found.append(MethodPlan(name, planner.plan(job), int(job.outline.trained.sum())))
        except (planner.NoPlan, InputError) as error:
            found.append(MethodPlan(name, None, why_none=str(error)))
    if all(one.plan is None for one in found):
        raise InputError(found[0].why_none)
    return found


def advice(found: list[MethodPlan], num_rows: int | None) -> list[str]:
    """Return what to take and why, in sentences with the plan's own numbers; nothing that the numbers do not say.

    num_rows: training rows, None if they are not known.
    """
    plans = {one.name: one for one in found if one.plan is not None and one.plan.fits}
    if not plans:
        return ["No method fits. A smaller model, shorter rows (data.max_length) or a larger card would."]
    lines = []
    lora, full = plans.get("lora"), plans.get("full")
    if full is not None:
        lines.append(
            f"Full fine-tuning fits too ({_gib(full)}): it has {full.trained:,} numbers to learn with"
            + ("" if num_rows is None else f", and {num_rows:,} rows to learn them from")
            + ". Compare it with LoRA before you take it: qlora compare."
        )
    elif lora is not None:
        lines.append(f"Full fine-tuning does not fit; LoRA does ({_gib(lora)}), on a 4-bit base.")
    if lora is not None:
        lines.append(
            f"Not sure: lora ({lora.trained:,} numbers). It merges into one model that every server loads, and is what others "
            "are measured by."
        )
    small = [plans[name] for name in ("ia3", "prompt_tuning") if name in plans]
    if small and lora is not None:
        words = " and ".join(
            f"{one.name} ({one.trained:,}, {lora.trained / max(1, one.trained):,.0f} times fewer)" for one in small
        )
        lines.append(f"Many tasks on one base, each in kilobytes: {words}. They learn less.")
    lines.append(
        "Which is right for these rows no plan can say: qlora compare trains them and shows the scores with intervals."
    )
    return lines


def _gib(one):
    return f"{one.plan.peak_bytes / 2**30:.2f} of {one.plan.budget_bytes / 2**30:.2f} GiB"
