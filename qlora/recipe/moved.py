"""A run folder that was moved, copied, or is used from another directory: where what its recipe names is now."""

from __future__ import annotations

import glob
from pathlib import Path

from ..system import files
from ..system.errors import InputError


def settle(values, recipe_file):
    """Change the `values` of a recipe that lies in a run folder to what is true of that folder now; others are left alone.

    Its output_dir is the folder that it lies in. Relative paths that lead nowhere from the current directory are looked for
    where the run was trained, and in the folders above it; a base model first where it was read. What is found so is held
    against the recorded hashes by every verb that opens it.
    """
    recipe_file = Path(recipe_file)
    folder = recipe_file.parent.absolute()
    if recipe_file.name != "recipe.yaml" or not (folder / "environment.json").is_file():
        return
    try:
        environment = files.read_object(folder / "environment.json")
    except InputError:
        return  # is said where it is needed
    if isinstance(values.get("output_dir"), str) and Path(values["output_dir"]).resolve() != folder.resolve():
        values["output_dir"] = str(recipe_file.parent) if recipe_file.parent.name else str(folder)
    directory = environment.get("directory")
    places = [Path(directory)] if isinstance(directory, str) else []
    places += folder.parents
    base = environment.get("base_model")
    base = base if isinstance(base, dict) else {}
    model, data = values.get("model"), values.get("data")
    if isinstance(model, dict) and base.get("revision") is None:
        _settle(model, "name_or_path", places, base.get("folder"))
    if isinstance(data, dict):
        _settle(data, "chat_template", places)
        for sources in (data.get("train"), data.get("eval")):
            for source in sources if isinstance(sources, list) else ():
                if isinstance(source, dict):
                    _settle(source, "path", places)


def _settle(section, field, places, recorded=None):
    """Replace the relative path in `field` by the first existing candidate, unless it exists from here."""
    path = section.get(field)
    if not isinstance(path, str) or Path(path).is_absolute() or _leads_somewhere(path):
        return
    candidates = [recorded] if isinstance(recorded, str) else []
    candidates += [str(place / path) for place in places]
    section[field] = next((place for place in candidates if _leads_somewhere(place)), path)


def _leads_somewhere(path):
    try:
        return Path(path).exists() or (glob.has_magic(path) and any(True for _ in glob.iglob(path, recursive=True)))  # noqa: PTH207
    except (OSError, ValueError):
        return False
