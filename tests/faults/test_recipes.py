"""Recipes and overrides that are wrong, hostile or hold a token: exit code 2, one message that names the place, in no time.

What is merely odd still loads. Which value is wrong for which field is in tests/recipe/test_recipe.py where it is the field's own
rule; here is what no field may take, and what YAML, shells and people do to a file.
"""

import io
import os
import re
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora import cli, process
from qlora.recipe import Recipe, yaml_document
from qlora.system.errors import InputError

TOP = "model: {name_or_path: m}\ndata: {train: d.jsonl}\noutput_dir: o\n"  # three lines
HF_TOKEN = "hf_" + "abcdEFGH" * 4
BOMB = "x0: &x0 [a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


class NoInput(io.TextIOBase):
    def read(self, *args):
        raise AssertionError("asked a question")

    readline = read


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Return run(recipe path, *overrides) -> the message of `qlora train` that ended with 2 and left all as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", NoInput())

    def listing():
        return {
            path: path.read_bytes() if path.is_file() and path.stat().st_size < 1e6 else None
            for path in tmp_path.rglob("*")
        }

    def run(path, *overrides):
        before, start = listing(), time.monotonic()
        monkeypatch.setattr(sys, "argv", ["qlora", "train", str(path), *overrides])
        with pytest.raises(SystemExit) as ended:
            process._run(cli.app)
        assert time.monotonic() - start < 10  # a tenth of a second alone; what hangs or grows takes for ever
        out, message = capsys.readouterr()
        assert ended.value.code == 2, message
        assert not out
        assert message.startswith("qlora: ")
        assert len(message) < 6000
        assert listing() == before
        return message

    return run


def line(number, text):
    return f"line {number}", text


# name: (what comes after TOP, or bytes that are the whole file; what the message says)
WRONG = {
    # keys that stand twice, at every level
    "a section twice": ("output_dir: p", line(4, "output_dir is given twice, first in line 3")),
    "a field twice": ("lora:\n  r: 1\n  r: 2", line(6, "lora.r is given twice, first in line 5")),
    "a field twice in braces": ("lora: {r: 1, r: 2}", line(4, "lora.r is given twice")),
    "a pattern twice": ("lora: {rank_pattern: {q: 1, q: 2}}", line(4, "lora.rank_pattern.q is given twice")),
    "a source's key twice": (
        b"model: {name_or_path: m}\noutput_dir: o\ndata:\n  train:\n  - {path: a, path: b}\n",
        line(5, "data.train.0.path is given twice"),
    ),
    "a key twice, once in quotes": ('lora: {r: 1, "r": 2}', line(4, "lora.r is given twice")),
    # what YAML makes of words
    "yes": ("lora: {use_dora: yes}", line(4, "lora.use_dora: should be true or false, found 'yes'")),
    "on": ("lora: {use_dora: on}", line(4, "should be true or false, found 'on'")),
    "off is kernels' word": ("data.packing: off", line(4, "data.packing: unknown field")),
    "on as a key": ("on: 1", line(4, "on: unknown field; known here: task, model, ")),
    "minutes": ("training: {max_steps: 12:30:00}", line(4, "should be a valid integer, found '12:30:00'")),
    "old octal": ("training: {max_steps: 0123}", line(4, "should be a valid integer, found '0123'")),
    "a date": ("kernels: 2020-01-01", line(4, "'2020-01-01' is not one of 'auto', 'off'")),
    "a time stamp": ("training: {seed: 2020-01-01T10:00:00Z}", line(4, "should be a valid integer")),
    "a home": ("export: ~/x", line(4, "export: should be fields")),
    "half a float": ("training: {learning_rate: 2e}", line(4, "should be a valid number, found '2e'")),
    "a number in quotes": ("training: {learning_rate: '2e-4'}", line(4, "should be a valid number, found '2e-4'")),
    "a comma": ("training: {learning_rate: '0,1'}", line(4, "should be a valid number, found '0,1'")),
    "nothing": ("lora:", "lora: null leaves nothing to train; leave it out for the defaults"),
    "a year as revision": (
        b"model: {name_or_path: m, revision: 2024}\ndata: {train: d}\noutput_dir: o\n",
        line(1, "model.revision: should be a valid string (in quotes, if it looks like something else), found 2024"),
    ),
    # numbers that no machine holds
    "5,000 digits": (f"training: {{max_steps: {'9' * 5000}}}", line(4, "(5,002 characters)")),
    "400 digits": (f"training: {{max_steps: {'9' * 400}}}", line(4, "should be a valid integer")),
    "20 digits": (f"training: {{max_steps: {'9' * 20}}}", line(4, "should be less than or equal to 2147483647")),
    "400 digits for a rate": (f"training: {{learning_rate: {'9' * 400}}}", line(4, "should be a valid number")),
    "overflow": ("training: {learning_rate: 1e999}", line(4, "should be a finite number, found inf")),
    "underflow": ("training: {learning_rate: 1e-999}", line(4, "should be greater than 0, found 0.0")),
    "minus nothing": ("training: {learning_rate: -0.0}", line(4, "should be greater than 0, found -0.0")),
    "a rate of a million": ("training: {learning_rate: 1e6}", line(4, "should be less than or equal to 1000")),
    "epochs without end": ("training: {num_train_epochs: 1e300}", line(4, "should be less than or equal to 1000000")),
    "a hexadecimal of 5,000 digits": (f"training: {{seed: 0x{'f' * 5000}}}", line(4, "should be a valid integer")),
    "too many layers": (f"memory: {{gradient_checkpointing: {'9' * 30}}}", line(4, "or a number of layers, found 999")),
    "a share that is none": ("adalora: {tinit: .nan}", line(4, "adalora.tinit: should be a valid integer")),
    "a size of 400 digits": (f"memory: {{budget: {'9' * 400}GB}}", line(4, "give a size such as 5GB")),
    "a size of other digits": ("memory: {budget: '²GB'}", line(4, "give a size such as 5GB")),
    "a size without unit": ("memory: {budget: '5'}", line(4, "give a size such as 5GB")),
    "a negative size": ("export: {max_shard_size: -5GB}", line(4, "export.max_shard_size: give a size such as 5GB")),
    # texts
    "NUL in a path": (
        b'model: {name_or_path: m}\ndata: {train: d}\noutput_dir: "a\\0b"\n', line(3, "without the character U+0000")
    ),
    "a line end in a path": (
        b'model: {name_or_path: m}\ndata: {train: "d\\n.jsonl"}\noutput_dir: o\n', line(2, "without the character U+000A")
    ),
    "an escape sequence": ('kernels: "\\e[31m"', line(4, "'\\x1b[31m' is not one of")),
    "an escape sequence as key": ('"\\e[31m": 1', line(4, "'\\x1b[31m': unknown field")),
    "a blank name": (b'model: {name_or_path: " "}\ndata: {train: d}\noutput_dir: o\n', line(1, "should not be blank")),
    "a home in a path": (
        b"model: {name_or_path: m}\ndata: {train: ~/d.jsonl}\noutput_dir: o\n", line(2, "~ is not expanded")
    ),
    "a home as output": (b"model: {name_or_path: m}\ndata: {train: d}\noutput_dir: ~/runs\n", line(3, "full path")),
    "no regular expression": ("lora: {target_modules: '('}", line(4, "lora.target_modules: should be a regular expression")),
    "no regular expression as a pattern": ("lora: {rank_pattern: {'(': 1}}", line(4, "should be a regular expression")),
    "100,000 letters": (f"kernels: {'x' * 100_000}", line(4, "(100,002 characters) is not one of 'auto', 'off'")),
    "an unknown name of 900 letters": (f"{'x' * 900}: 1", line(4, "(902 characters): unknown field")),
    # names that are nearly right, or stand elsewhere
    "a Cyrillic letter": ("l\u043era: {r: 4}", line(4, "'l\\u043era': unknown field; did you mean lora?")),
    "a Cyrillic letter inside": ("lora: {l\u043era_alpha: 4}", line(4, "did you mean lora.lora_alpha?")),
    "full width": ("\uff4c\uff4f\uff52\uff41: {r: 4}", line(4, "did you mean lora?")),
    "no width": ("lora\u200b: {r: 4}", line(4, "'lora\\u200b': unknown field; did you mean lora?")),
    "a space that does not break": ("lora\u00a0: {r: 4}", line(4, "did you mean lora?")),
    "capitals": ("LORA: {r: 4}", line(4, "LORA: unknown field; did you mean lora?")),
    "camels": ("lora: {loraAlpha: 4}", line(4, "did you mean lora.lora_alpha?")),
    "a hyphen": ("lora: {lora-alpha: 4}", line(4, "did you mean lora.lora_alpha?")),
    "a field of another section": ("lora: {learning_rate: 1}", line(4, "did you mean training.learning_rate?")),
    "a field at the top": ("r: 4", line(4, "did you mean lora.r?")),
    "section and field in one": ("model_name_or_path: m", line(4, "did you mean model.name_or_path?")),
    "a section inside another": ("training: {lora: {r: 4}}", line(4, "did you mean lora, which is a top-level field?")),
    "a source's key in data": (
        b"model: {name_or_path: m}\ndata: {path: d}\noutput_dir: o\n", line(2, "did you mean data.train.path?")
    ),
    "another tool's name": ("lora: {rank: 4}", line(4, "did you mean lora.r?")),
    "too deep": ("lora: {r: {r: {r: 4}}}", line(4, "lora.r: should be a valid integer")),
    "a key that is a number": ("5: 1", line(4, "5: unknown field")),
    "a key that is nothing": ("~: 1", line(4, "~: unknown field")),
    "an empty key": ('"": 1', line(4, "'': unknown field")),
    "a key with a bracket": ('"list[": 1', line(4, "list[: unknown field")),
    "a key named as a type": ("lora: {str: 1}", line(4, "lora.str: unknown field")),
    "a list as key": ("? [a, b]\n: 1", line(4, "a key must be a word")),
    "a mapping as key": ("? {a: b}\n: 1", line(4, "a key must be a word")),
    "an alias as key": ("lora: &a {r: 4}\n*a : 1", line(5, "a key must be a word")),
    "10,000 unknown fields": ("".join(f"k{n}: 1\n" for n in range(3000)), line(4, "... and 2,980 more")),
    # sections and lists that are something else
    "a section that is a list": ("lora: [r]", line(4, "lora: should be fields with values")),
    "a section that is a text": (b"model: m\ndata: {train: d}\noutput_dir: o\n", line(1, "model: should be fields")),
    "sources that are a number": (b"model: {name_or_path: m}\ndata: {train: 5}\noutput_dir: o\n", line(2, "{path: ...} or")),
    "sources in lists of lists": (b"model: {name_or_path: m}\ndata: {train: [[d]]}\noutput_dir: o\n", line(2, "{path: ...}")),
    "a source of two kinds": (
        b"model: {name_or_path: m}\ndata: {train: {path: a, name: b}}\noutput_dir: o\n", line(2, "give either path")
    ),
    "a source of no kind": (b"model: {name_or_path: m}\ndata: {train: {}}\noutput_dir: o\n", line(2, "give either path")),
    "the second source": (
        b"model: {name_or_path: m}\noutput_dir: o\ndata:\n  train:\n  - a\n  - path: b\n    wieght: 2\n",
        line(7, "data.train.1.wieght: unknown field; did you mean data.train.1.weight?"),
    ),
    "a column of no shape": (
        b"model: {name_or_path: m}\ndata: {train: d, columns: {promt: q}}\noutput_dir: o\n", line(2, "'promt' is not one of")
    ),
    "an empty column": (b"model: {name_or_path: m}\ndata: {train: d, columns: {prompt: ''}}\noutput_dir: o\n",
                        line(2, "data.columns.prompt")),
    # YAML
    "a tab": (b"lora:\n\tr: 4\n", line(2, "'\\t' that cannot start any token; indent with spaces")),
    "an open brace": ("lora: {r: 4", line(5, "(in the value that begins in line 4): not valid YAML")),
    "an open quote": ("kernels: 'a", line(5, "(in the value that begins in line 4): not valid YAML")),
    "an unknown escape": ('kernels: "\\q"', line(4, "unknown escape character 'q'")),
    "a character past Unicode": ('kernels: "\\U00110000"', ("r.yaml: not valid YAML", "")),
    "half a surrogate": ('kernels: "\\ud800"', line(4, "half of a surrogate pair")),
    "rows instead of a recipe": (b'{"text": "a"}\n{"text": "b"}\n', line(2, "does not belong to the mapping before it; is this")),
    "a Python object": ("lora: !!python/object/apply:os.system [touch canary]", line(4, "python/object/apply:os.system is not")),
    "an unknown tag": ("lora: !mine {r: 4}", line(4, "the tag !mine is not supported")),
    "a tag on a number": ("lora: {r: !mine 4}", line(4, "the tag !mine is not supported")),
    "a tag on a key": ("lora: {!mine r: 4}", line(4, "the tag !mine is not supported")),
    "binary": ("kernels: !!binary aGVsbG8=", line(4, "is not supported; a recipe has plain values")),
    "a set": ("lora: !!set {r}", line(4, "is not supported")),
    "YAML 1.1": (b"%YAML 1.1\n---\n" + TOP.encode() + b"lora: {use_dora: yes}\n", line(2, "recipes are YAML 1.2")),
    "YAML 9.9": (b"%YAML 9.9\n---\n" + TOP.encode(), line(1, "not valid YAML")),
    "an alias of nothing": ("lora: *nothing", line(4, "*nothing has no &nothing before it; put a text in quotes")),
    "an alias of itself": ("lora: &a {r: *a}", line(4, "*a refers to a value that contains it")),
    "an alias where it does not belong": ("lora: &a {r: 4}\nexport: *a", line(5, "export.r: unknown field")),
    "a merge key": ("x: &a {r: 4}\nlora:\n  <<: *a", line(6, "merge keys (<<) are not supported")),
    "a merge of itself": ("lora: &a\n  <<: *a", line(5, "merge keys (<<) are not supported")),
    "a bomb of aliases": (BOMB + "lora: *x9", ("more than 10,000 values, counting what aliases repeat", "")),
    "a bomb as rows": (BOMB.encode() + b"model: {name_or_path: m}\ndata: {train: *x9}\n", ("more than 10,000 values", "")),
    "20,000 values": ("lora: {target_modules: [" + "a, " * 20_000 + "]}", line(4, "more than 10,000 values")),
    "5,000 brackets": ("lora: " + "[" * 5000, line(4, "nested too deeply")),
    "5,000 brackets, closed": ("lora: " + "[" * 5000 + "]" * 5000, line(4, "nested too deeply")),
    "5,000 braces": ("lora: " + "{a: " * 5000 + "}" * 5000, line(4, "nested too deeply")),
    "400 steps inwards": ("lora:\n" + "".join(" " * n + "a:\n" for n in range(1, 400)), line(25, "nested too deeply")),
    "two documents": ("---\n" + TOP, line(4, "a second document begins")),
    "text after the end": ("...\nmore", line(5, "a second document begins")),
    "an empty file": (b"", ("r.yaml: is empty; a recipe has sections", "")),
    "nothing but comments": (b"# lora\n\n# data\n", ("r.yaml: is empty", "")),
    "a list": (b"- model\n- data\n", ("a recipe is one YAML mapping", "")),
    "a word": (b"recipe", ("a recipe is one YAML mapping", "")),
    "null": (b"null", ("a recipe is one YAML mapping", "")),
    # files
    "UTF-16": (TOP.encode("utf-16"), line(1, "not UTF-8 (byte 0xff); save the file as UTF-8")),
    "UTF-16 without a mark": (TOP.encode("utf-16-le"), line(1, "the character U+0000 is not allowed")),
    "Latin-1": (TOP.encode() + b"# caf\xe9\n", line(4, "not UTF-8 (byte 0xe9)")),
    "NUL": (TOP.encode() + b"lora: {r: 4}\0\n", line(4, "the character U+0000 is not allowed")),
    "a program": (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 20, ("r.yaml line", "not UTF-8")),
    "a million letters": (TOP.encode() + b"# " + b"x" * 1_000_000, ("larger than 262,144 bytes", "is it another file?")),
    # contradictions
    "held out twice": (
        b"model: {name_or_path: m}\ndata: {train: d, eval: e, eval_fraction: 0.1}\noutput_dir: o\n", line(2, "exclude each other")
    ),
    "a micro-batch shorter than a row": ("training: {tokens_per_micro_batch: 8}", ("is less than data.max_length 2048", "")),
    "rows and tokens": (
        "training: {tokens_per_micro_batch: 4096, per_device_train_batch_size: 2}", ("exclude each other; keep one", "")
    ),
    "grouped and joined": ("training: {group_by_length: true, tokens_per_micro_batch: 4096}", ("is for whole rows", "")),
    "a revision of a file": (
        b"model: {name_or_path: m}\ndata: {train: {path: d, revision: x}}\noutput_dir: o\n", line(2, "not to a path")
    ),
    "DoRA of AdaLoRA": ("adalora: {use_dora: true}", line(4, "adalora.use_dora: ")),
}  # fmt: skip


def test_there_are_a_hundred_and_twenty_three():
    assert len(WRONG) + len(WRONG_OVERRIDES) + len(SECRETS) >= 123


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_recipe_is_one_message_with_its_place(refused, tmp_path, how):
    content, expected = WRONG[how]
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else f"{TOP}{content}\n".encode("utf-8", "surrogatepass"))
    message = refused(path)
    assert "r.yaml" in message
    for part in expected:
        assert part in message
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "/dev/zero", "/dev/stdin", "a loop", "100 MB", "a long name"])
def test_what_is_no_file_is_not_waited_for(refused, tmp_path, kind):
    path = tmp_path / "r.yaml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a loop":
        path.symlink_to(path)
    elif kind == "100 MB":
        with open(path, "wb") as file:
            file.truncate(100_000_000)
    elif kind == "a long name":
        path = "x" * 5000
    else:
        path = kind
    with open(os.devnull) as null:
        kept = os.dup(0)
        os.dup2(null.fileno(), 0)
        try:
            message = refused(path)
        finally:
            os.dup2(kept, 0)
            os.close(kept)
    assert "cannot read the recipe" in message


RESOLVED = Recipe.from_dict({"model": {"name_or_path": "m"}, "data": {"train": "d"}, "output_dir": "o"}).model_dump()
FIELDS = [
    f"{name}.{field}" if field else name
    for name, section in RESOLVED.items()
    for field in (section if isinstance(section, dict) else [None])
]


WRONG_EVERYWHERE = [".nan", "-.inf", "1e999", "-1", "-0.5", '""', "[[[1]]]", "{a: {b: 1}}", '"a\\0"', "[.nan]"]


@pytest.mark.parametrize("field", FIELDS)
def test_no_field_takes_what_is_wrong_everywhere(field):
    values = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "output_dir": "o"}
    for value in WRONG_EVERYWHERE:
        with pytest.raises(InputError) as caught:
            Recipe.from_dict(values, [f"{field}={value}"])
        assert re.search(rf"override  {re.escape(field)}\b", str(caught.value)), value


# ---- overrides -------------------------------------------------------------------------------------------------------

WRONG_OVERRIDES = {
    "no sign": (["lora.r"], "override lora.r is not of the form section.field=value"),
    "no key": (["=4"], "is not of the form section.field=value"),
    "a hole": (["lora..r=4"], "override lora..r is not of the form"),
    "an unknown field": (["lora.rr=4"], "override  lora.rr: unknown field; did you mean lora.r?"),
    "an unknown section": (["lroa.r=4"], "override  lroa: unknown field; did you mean lora?"),
    "too deep": (["lora.r.x.y=4"], "override  lora.r: should be a valid integer"),
    "nothing": (["lora.r="], "override  lora.r: should be a valid integer, found None"),
    "four deep and nothing": (["a.b.c.d="], "override  a: unknown field"),
    "not YAML": (["lora.r=[1"], "override lora.r line 1: not valid YAML"),
    "a second field behind a line end": (["lora.r=4\noutput_dir: elsewhere"], "the value has more than one line"),
    "a second document": (["lora.r=4\n---\nx"], "the value has more than one line"),
    "a carriage return": (["output_dir=a\rb"], "the value has more than one line"),
    "a directive": (["output_dir=%YAML 1.1"], "override output_dir line 1: not valid YAML"),
    "a tag": (["lora.r=!!python/object:os.system x"], "override lora.r line 1: the tag"),
    "brackets": (["lora.r=" + "[" * 5000], "override lora.r line 1: nested too deeply"),
    "twice": (["lora.r=4", "lora.r=8"], "override lora.r is given twice; keep one"),
    "undone": (["lora.r=4", "lora={}"], "override lora would undo lora.r, which is given too; keep one"),
    "into a list": (["data.train.0.path=x"], "override data.train.0.path: data.train is a list; give the whole list"),
    "a whole section that is wrong": (["lora={r: 4, rr: 5}"], "override  lora.rr: unknown field; did you mean lora.r?"),
    "an escape": (["lora.\x1b[31mr=4"], "override  lora.'\\x1b[31mr': unknown field"),
    "half a surrogate": (["output_dir=\udcff"], "output_dir"),
}


@pytest.mark.parametrize("how", WRONG_OVERRIDES)
def test_a_wrong_override_is_one_message_with_its_field(refused, tmp_path, how):
    overrides, expected = WRONG_OVERRIDES[how]
    path = tmp_path / "r.yaml"
    path.write_text(TOP.replace("{train: d.jsonl}", "{train: [d.jsonl]}"))
    assert expected in refused(path, *overrides)


def test_an_alias_is_a_copy_that_an_override_changes_alone(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name_or_path: m}\noutput_dir: o\n"
        "data:\n  train: {path: d, columns: &c {prompt: q, completion: a}}\n  columns: *c\n"
    )
    recipe = Recipe.load(path, ["data.columns.prompt=other"])
    assert recipe.data.columns == {"prompt": "other", "completion": "a"}
    assert recipe.data.train[0].columns == {"prompt": "q", "completion": "a"}


# ---- tokens ----------------------------------------------------------------------------------------------------------

# made up, in the form that each service gives them
TOKENS = [
    HF_TOKEN,
    "sk-proj-" + "a1B2" * 10,
    "sk-ant-api03-" + "a1B2" * 10,
    "sk-or-v1-" + "a1b2" * 16,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "glpat-" + "a1B2" * 5,
    "AKIA" + "A1B2" * 4,
    "AIza" + "a1B2c" * 7,
    "xoxb-" + "1234-" * 4 + "abcd",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
]
PASSWORD = "Correct-horse7"
SECRETS = {
    **{
        f"a token: {token[:8]}": (f"model: {{name_or_path: m, revision: {token}}}", "line 1  model.revision", token)
        for token in TOKENS
    },
    "a password in the model's address": (
        f"model: {{name_or_path: 'https://me:{PASSWORD}@host/model'}}", "line 1  model.name_or_path", PASSWORD
    ),
    "a password in the data's address": (
        f"model: {{name_or_path: m}}\ndata: {{train: [a, 's3://me:{PASSWORD}@host/rows']}}", "line 2  data.train.1", PASSWORD
    ),
    "a signed address": (
        f"model: {{name_or_path: 'https://host/m?X-Amz-Signature={PASSWORD}'}}", "line 1  model.name_or_path", PASSWORD
    ),
    "a token among the fields": (f"model: {{name_or_path: m, token: {PASSWORD}}}", "line 1  model.token", PASSWORD),
    "a hub token": (f"hub_token: {PASSWORD}", "line 1  hub_token", PASSWORD),
    "a key": (f"training: {{wandb_api_key: {PASSWORD}}}", "line 1  training.wandb_api_key", PASSWORD),
    "a password": (f"data: {{train: {{name: a/b, password: {PASSWORD}}}}}", "line 1  data.train.password", PASSWORD),
    "a token as a key": (f"lora: {{{HF_TOKEN}: 1}}", "line 1  lora.", HF_TOKEN),
    "a token that is a number": ("token: 12345678", "line 1  token", "12345678"),
    "a token where a number belongs": (f"lora: {{r: {HF_TOKEN}}}", "line 1  lora.r", HF_TOKEN),
    "a token in what is not YAML": (f"lora: *{HF_TOKEN}", "line 1", HF_TOKEN),
    "a token twice": (f"token: a\ntoken: {HF_TOKEN}", "line 2", HF_TOKEN),
    "a token as a tag": (f"lora: !{HF_TOKEN} x", "line 1", HF_TOKEN),
}  # fmt: skip


@pytest.mark.parametrize("how", SECRETS)
def test_a_token_in_a_recipe_is_refused_and_not_repeated(refused, tmp_path, how):
    text, place, secret = SECRETS[how]
    path = tmp_path / "r.yaml"
    path.write_text(text + "\n")
    message = refused(path)
    assert place in message
    assert secret not in message
    if "looks like a token" in message:
        assert "set HF_TOKEN in the environment" in message
        assert "hf auth login" in message
    else:
        assert how in ("a token in what is not YAML", "a token twice", "a token as a tag")


@pytest.mark.parametrize(
    "override",
    [f"model.revision={HF_TOKEN}", f"hub_token={PASSWORD}", f"model.token={PASSWORD}", f"lora.r={HF_TOKEN}",
     f"data.train=https://me:{PASSWORD}@host/x", f"{HF_TOKEN}", f"{HF_TOKEN}=1", f"lora.r=[{HF_TOKEN}", f"token={HF_TOKEN}\n"],
)  # fmt: skip
def test_a_token_in_an_override_is_refused_and_not_repeated(refused, tmp_path, override):
    path = tmp_path / "r.yaml"
    path.write_text(TOP)
    message = refused(path, override)
    assert "override" in message
    assert HF_TOKEN not in message
    assert PASSWORD not in message


# ---- what is odd, and right ------------------------------------------------------------------------------------------

PLAIN = Recipe.from_dict({"model": {"name_or_path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "o"})


def model(**fields):
    return {"model": {"name_or_path": "m"} | fields}


ODD = {
    "a byte order mark": (b"\xef\xbb\xbf" + TOP.encode(), {}),
    "CRLF": (TOP.replace("\n", "\r\n").encode(), {}),
    "comments": (f"# hf_ tokens go into the environment\n{TOP}# end: [{{".encode(), {}),
    "no line end at the end": (TOP.strip().encode(), {}),
    "a document mark": (f"%YAML 1.2\n---\n{TOP}...\n".encode(), {}),
    "JSON": (b'{"model": {"name_or_path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "o"}', {}),
    "question marks": (b"? model\n: {name_or_path: m}\n? data\n: {train: d.jsonl}\n? output_dir\n: o\n", {}),
    "no number without a point": (TOP + "training: {learning_rate: 3e-4}", {"training": {"learning_rate": 0.0003}}),
    "a number with a sign": (TOP + "training: {max_steps: +1_000}", {"training": {"max_steps": 1000}}),
    "a hexadecimal number": (TOP + "training: {seed: 0x10}", {"training": {"seed": 16}}),
    "an anchor": (
        TOP + "training: {logging_steps: &n 5, eval_steps: *n}", {"training": {"logging_steps": 5, "eval_steps": 5}}
    ),
    "an anchor of a list": (
        "model: {name_or_path: m}\ndata: {train: &d [d.jsonl], eval: *d}\noutput_dir: o",
        {"data": {"train": "d.jsonl", "eval": "d.jsonl"}},
    ),
    "a text that says so": (TOP.replace(": m}", ": m, revision: !!str 12}"), model(revision="12")),
    "a commit of digits": (TOP.replace(": m}", ": m, revision: 0123456}"), model(revision="0123456")),
    "a date as revision": (TOP.replace(": m}", ": m, revision: 2024-05-01}"), model(revision="2024-05-01")),
    "a path of other scripts": (TOP.replace("output_dir: o", "output_dir: прогон/走る 🙂"), {"output_dir": "прогон/走る 🙂"}),
    "tokens, which are not secrets": (
        TOP.replace(": m}", ": m, new_tokens: [<token>, <sk->, hf_small]}"), model(new_tokens=["<token>", "<sk->", "hf_small"])
    ),
    "a name that is no secret": (TOP.replace(": m}", ": org/sk-learn-hf_tiny}"), model(name_or_path="org/sk-learn-hf_tiny")),
    "1,000 names": (
        TOP + f"lora: {{target_modules: [{', '.join(f'layers.{n}.q' for n in range(1000))}]}}",
        {"lora": {"target_modules": [f"layers.{n}.q" for n in range(1000)]}},
    ),
    "a template of many lines": (
        "model: {name_or_path: m}\noutput_dir: o\ndata:\n  train: d.jsonl\n  columns:\n    completion: c\n    prompt: |\n"
        "      {{ a }}\n      {{ b }}\n",
        {"data": {"train": "d.jsonl", "columns": {"prompt": "{{ a }}\n{{ b }}\n", "completion": "c"}}},
    ),
    "words that YAML 1.1 takes for others": (
        TOP + "lora: {target_modules: [on, yes, no, y, 1:30]}", {"lora": {"target_modules": ["on", "yes", "no", "y", "1:30"]}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ODD)
def test_what_is_odd_but_right_loads_and_reads_back_equal(tmp_path, how):
    content, changes = ODD[how]
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    recipe = Recipe.load(path)
    values = {"model": {"name_or_path": "m"}, "data": {"train": "d.jsonl"}, "output_dir": "o"} | changes
    assert recipe == Recipe.from_dict(values)
    assert (recipe == PLAIN) == (not changes)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe


# ---- fuzzing ---------------------------------------------------------------------------------------------------------

WORDS = ["model", "data", "training", "lora", "name_or_path", "train", "path", "output_dir", "r", "learning_rate", "kernels",
         "{", "}", "[", "]", ":", ": ", ", ", "- ", "? ", "| ", "> ", "&a ", "*a", "<<", "!!str ", "!x ", "%YAML 1.2",
         "---", "...", "#", "'", '"', "\\", "\t", "\n", "\n  ", "~", "null", "true", "yes", "1", "0x1", "1e3", ".inf",
         ".nan", "2020-01-01",
         "\0", "\x85", "\u2028", "\ufeff", "\ud800", "é", "🙂", "=", "@", "`"]  # fmt: skip
pieces = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=40).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def mutated(draw):
    """The bytes of a valid recipe with a few places changed, cut out or doubled."""
    text = Recipe.from_dict(
        {"model": {"name_or_path": "m"}, "data": {"train": ["d", {"name": "a/b"}]}, "output_dir": "o"}
    ).to_yaml()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        end = min(len(text), at + draw(st.integers(0, 20)))
        text = text[:at] + draw(st.one_of(pieces, st.just(text[at:end] * 2))) + text[end:]
    return text


def is_recipe_or_refusal(folder, raw, overrides=()):
    path = folder / "r.yaml"
    path.write_bytes(raw)
    try:
        recipe = Recipe.load(path, overrides)
    except InputError as error:
        if "r.yaml" not in str(error) and "override" not in str(error):
            raise
        return
    path.write_bytes(recipe.to_yaml().encode())
    assert Recipe.load(path) == recipe


def check(examples):
    fuzz = settings(
        max_examples=examples, deadline=None, derandomize=examples < 1000, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip

    def run(strategy, test):
        fuzz(given(strategy)(test))()

    return run


def fuzz_recipes(folder, examples):
    run = check(examples)
    run(pieces, lambda text: is_recipe_or_refusal(folder, text.encode("utf-8", "surrogatepass")))
    run(st.binary(max_size=200), lambda raw: is_recipe_or_refusal(folder, raw))
    run(mutated(), lambda text: is_recipe_or_refusal(folder, text.encode("utf-8", "surrogatepass")))
    run(
        st.tuples(st.sampled_from([*FIELDS, "lora", "data", "x.y"]), st.one_of(pieces, values.map(str))),
        lambda pair: is_recipe_or_refusal(folder, TOP.encode(), [f"{pair[0]}={pair[1]}"]),
    )
    run(
        st.tuples(st.sampled_from(FIELDS), values),
        lambda pair: is_dict_or_refusal(pair[0].split("."), pair[1]),
    )


def is_dict_or_refusal(parts, value):
    changed = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "output_dir": "o"}
    if len(parts) == 2:
        changed.setdefault(parts[0], {})[parts[1]] = value
    else:
        changed[parts[0]] = value
    try:
        recipe = Recipe.from_dict(changed)
    except InputError:
        return
    assert Recipe.model_validate(yaml_document.parse(recipe.to_yaml(), "back")[0]) == recipe


def test_half_a_character_is_refused_in_a_recipe_from_python():
    values = {"model": {"name_or_path": "m"}, "data": {"train": ["d", "\ud800"]}, "output_dir": "o"}
    with pytest.raises(InputError, match=r"data\.train\.1: half of a surrogate pair"):
        Recipe.from_dict(values)


def test_any_text_is_a_recipe_that_reads_back_equal_or_a_refusal(tmp_path):
    fuzz_recipes(tmp_path, 25)


@pytest.mark.slow
def test_any_text_is_a_recipe_that_reads_back_equal_or_a_refusal_at_length(tmp_path):
    fuzz_recipes(tmp_path, 3000)
