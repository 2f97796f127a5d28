"""The questions with choices that a model is asked, after examples of a file or of the run's own training rows."""

from __future__ import annotations

from ...data import multiple_choice
from ...data.sources import File, open_source
from ...evaluation import choices
from ...evaluation.choices import Prompted
from ...recipe import Recipe
from ...system.errors import InputError
from ..opening.checkpoint_run import run_at


def prompted(target, overrides, asked, max_rows=None) -> tuple[list[Prompted], dict]:
    """Return the questions of the file `asked.choices` (evaluation.asked.Asked), the first max_rows, and what they are of:
    {"files", "rows", "rows_in_all", "shots", "examples"}. target, overrides: of what is asked, see `open_subject`.

    Raises:
        InputError: a file is missing or wrong, or there are not enough examples.
    """
    all_questions = multiple_choice.read(asked.choices)
    questions, shots = all_questions[:max_rows], asked.shots or 0
    sources = _sources(target, overrides, asked) if shots else []
    examples = [one for path in sources for one in multiple_choice.read(path)]
    return [choices.ask(one, examples, shots, asked.by_text) for one in questions], {
        "files": [{"path": str(asked.choices), "sha256": File(str(asked.choices), None).digest()}],
        "rows": len(questions),
        "rows_in_all": len(all_questions),
        "shots": shots,
        "examples": [{"path": path, "sha256": File(path, None).digest()} for path in sources],
    }


def _sources(target, overrides, asked) -> list[str]:
    """Return the paths of the files that examples are taken from."""
    if asked.examples is not None:
        return [str(asked.examples)]
    run = run_at(target)
    recipe = None if run is None else Recipe.load(run.recipe_file, overrides)
    files = [file for source in recipe.data.train for file in open_source(source)] if recipe else []
    found = [file for file in files if isinstance(file, File)]
    for file in found:
        first = next(iter(file.rows())).value
        if not isinstance(first, dict) or not {"question", "answer"} <= first.keys():
            found = []
            break
    if not found:
        raise InputError(
            f"--shots {asked.shots}: there are no training rows with `question`, `choices` and `answer` to take; "
            "give --examples FILE"
        )
    return [file.path for file in found]
