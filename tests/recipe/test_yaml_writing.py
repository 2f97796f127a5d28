"""What is written as YAML says the same to every reader: ours, ruamel.yaml by YAML 1.2 and by 1.1, PyYAML."""

import warnings
from pathlib import Path

import pytest
import yaml as pyyaml
from ruamel.yaml import YAML
from ruamel.yaml.error import MantissaNoDotYAML1_1Warning

from qlora.recipe import Recipe, as_yaml, on_one_line, yaml_document

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
# classes, names and paths that one version of YAML or the other takes for something else
WORDS = [
    "yes", "no", "on", "off", "y", "n", "Yes", "NO", "true", "False", "null", "~", "", "1e-3", "1e5", "0.5", "0123", "0o17",
    "0x1f", "1_000", "12:30:00", "190:20:30", "2024-01-01", "2024-01-01 10:00:00", ".inf", ".nan", "=", "<<", "- a", "a: b",
    "#x", "a #b", "'q'", '"q"', "a\nb", "a\tb", " lead", "trail ", "Grüße, Welt", "很好 🙂", "\u2028x", "a\x85b", "\ufeffx",
    "{a}", "[a]", "*a", "&a", "!a", "%a", "@a", "|", ">", "?", "-", "---", "...", "a" * 1200, "word " * 300,
    "key: value\n  more\n", "x\r\ny", "\x07",
]  # fmt: skip
NUMBERS = [
    1e-5,
    2e-4,
    1e16,
    1e22,
    1e-300,
    1.5e-7,
    123456.789,
    0.1,
    1.0,
    -0.0,
    float("inf"),
    3,
    -7,
    10**20,
    True,
    False,
    None,
]


def by_ruamel(version):
    def read(text):
        yaml = YAML(typ="safe", pure=True)
        yaml.version = version
        with warnings.catch_warnings():
            warnings.simplefilter("error", MantissaNoDotYAML1_1Warning)
            return yaml.load(text)

    return read


READERS = {
    "ours": lambda text: yaml_document.parse(text, "x")[0],
    "ruamel 1.2": by_ruamel(None),
    "ruamel 1.1": by_ruamel((1, 1)),
    "PyYAML": pyyaml.safe_load,
}
each_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@each_reader
@pytest.mark.parametrize("value", [*WORDS, *NUMBERS], ids=lambda value: repr(value)[:20])
def test_a_value_is_read_as_what_it_was(read, value):
    for text in (as_yaml({"k": value, "l": [value]}), f"k: {on_one_line(value)}\nl: {on_one_line([value])}\n"):
        found = read(text)
        assert repr(found) == repr({"k": value, "l": [value]}), text  # repr: 1 is not True, -0.0 not 0


@each_reader
def test_the_recipe_of_a_run_says_to_others_what_it_says_here(read):
    recipe = Recipe.from_dict(
        {
            "model": {"name_or_path": "no", "new_tokens": ["<a>", "12:30:00"]},
            "data": {"train": "über/no.jsonl", "columns": {"prompt": "on", "completion": "2024-01-01"}},
            "training": {"learning_rate": 1e-5, "report_to": "none"},
            "output_dir": "1e-3",
        }
    )
    assert read(recipe.to_yaml()) == yaml_document.parse(recipe.to_yaml(), "x")[0]
    assert Recipe.from_dict(read(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_that_ships_says_to_others_what_it_says_here(path):
    text = path.read_text(encoding="utf-8")
    ours = READERS["ours"](text)
    for name, read in READERS.items():
        assert repr(read(text)) == repr(ours), name
