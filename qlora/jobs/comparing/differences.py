"""What differs between runs: recipe, data, versions, base model. Imports no torch."""

from __future__ import annotations

from pathlib import Path


def between(*runs) -> dict[str, list]:
    """Return {what: [[name, of the first run, of the second, ...]]} of what is not the same in all of these RunDirs."""
    recipes = [_flat(run.recipe().model_dump(exclude={"output_dir"})) for run in runs]
    environments = [run.environment() if run.environment_file.is_file() else {} for run in runs]
    files = [{Path(part["path"]).name: part["sha256"][:12] for part in found.get("data", ())} for found in environments]
    versions = [found.get("versions", {}) | {"device": found.get("device")} for found in environments]
    bases = [_flat(found.get("base_model", {}).get("sha256", {})) for found in environments]
    parts = {"recipe": recipes, "data": files, "versions": versions, "base model": bases}
    return {
        what: [
            [name, *values]
            for name in sorted({name for one in found for name in one})
            for values in [[one.get(name) for one in found]]
            if any(value != values[0] for value in values)
        ]
        for what, found in parts.items()
    }


def _flat(values, before=""):
    """Return {dotted name: value} of nested mappings."""
    found: dict = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and value
        found |= _flat(value, f"{before}{name}.") if inner else {f"{before}{name}": value}
    return found
