"""qlora init and qlora recipes as a user has them: what is written is a recipe that fits, or nothing is written."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora import cli, process
from qlora.commands import ask as questions
from qlora.commands import recipes as recipes_verb
from qlora.commands.ask import ask
from qlora.commands.init import init
from qlora.commands.plan import plan
from qlora.commands.recipes import copy_recipe, list_recipes, show_recipe
from qlora.jobs.opening.prepared_data import prepare
from qlora.jobs.planning import first_recipe, recipe_on_card
from qlora.jobs.planning.data_looked_at import look
from qlora.recipe import Recipe
from qlora.system.errors import DoesNotFit, InputError
from tests.classifiers import ROWS
from tests.conftest import CONVERSATIONS, messages, write_jsonl


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])


def test_the_recipe_fits_each_line_has_its_reason_and_nothing_is_overwritten(tiny_model, rows, tmp_path):
    out = tmp_path / "new" / "mine.yaml"
    given = ["training.learning_rate=0.005", "quantization=null"]
    found = init(tiny_model(), rows, "4090", "small", out, given)
    recipe = Recipe.load(out)
    assert found["plan"]["fits"]
    assert recipe.model_dump() == found["values"]
    assert (recipe.lora.r, recipe.training.learning_rate, recipe.quantization) == (4, 0.005, None)
    fields = [line for line in out.read_text().splitlines() if ": " in line and not line.startswith("#")]
    assert len(fields) >= 10
    assert all("# " in line for line in fields), fields
    assert f"qlora train {out}" in out.read_text()
    with pytest.raises(InputError, match="never overwrites"):
        init(tiny_model(), rows, "4090", "small", out)


@pytest.mark.parametrize(("count", "said"), [(1, "nothing is held out"), (3, "1 row held out")])
def test_of_few_rows_one_is_held_out_and_of_one_none(tiny_model, tmp_path, count, said):
    file = write_jsonl(tmp_path / "few.jsonl", [{"text": f"All that there is, {n}."} for n in range(count)])
    init(tiny_model(), file, "4090", "small", tmp_path / "few.yaml")
    assert said in (tmp_path / "few.yaml").read_text()
    found = prepare(Recipe.load(tmp_path / "few.yaml"), weights=False)
    assert (len(found.examples), len(found.eval_examples)) == (max(1, count - 1), count > 1)


def test_images_are_told_where_to_begin(tmp_path):
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    (tmp_path / "pets" / "cats" / "a.jpg").write_bytes(b"x")
    for data in (tmp_path / "pets", tmp_path / "pets" / "cats" / "a.jpg"):
        with pytest.raises(
            InputError, match="init chooses for text; for images begin with:  qlora recipes copy vit-base/folders"
        ):
            init("none", data, "4090", "small", tmp_path / "pets.yaml")


def test_a_folder_with_train_valid_and_test_is_trained_on_evaluated_on_and_left(tiny_model, tmp_path):
    (tmp_path / "mine").mkdir()
    rows = [{"prompt": f"Say {n}", "completion": "word " * n} for n in range(1, 13)]
    for name, some in (("train", rows[:10]), ("valid", rows[10:]), ("test", rows[:1])):
        write_jsonl(tmp_path / "mine" / f"{name}.jsonl", some)
    out = tmp_path / "mine.yaml"
    init(tiny_model(), tmp_path / "mine", "4090", "small", out)
    data = Recipe.load(out).data
    assert [source.path for source in (*data.train, *data.eval)] == [
        f"{tmp_path}/mine/{name}.jsonl" for name in ("train", "valid")
    ]
    assert data.eval_fraction == 0
    assert "not read: test.jsonl" in out.read_text()
    longest = prepare(Recipe.load(out), weights=False).eval_examples.lengths.max()
    assert data.max_length >= longest > prepare(Recipe.load(out), weights=False).examples.lengths.max()
    found = init(tiny_model(), tmp_path / "mine", "4090", "small", tmp_path / "b.yaml", ["data.eval_fraction=0.2"])
    assert found["values"]["data"]["eval"] is None


def test_rows_that_are_too_long_in_any_of_several_files_are_dropped(tiny_model, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, words in (("a", 3), ("b", 3000)):
        rows = [{"prompt": f"Say {n}", "completion": "word " * words} for n in range(1 if name == "b" else 12)]
        write_jsonl(tmp_path / "mine" / f"{name}.jsonl", rows)
    init(tiny_model(), tmp_path / "mine", "4090", "small", tmp_path / "mine.yaml")
    assert "1 row is longer than the model's positions" in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize(("width", "rate"), [(576, 5e-4), (1024, 5e-4), (2048, 2e-4), (None, 2e-4)])
def test_a_small_model_starts_with_a_higher_rate(width, rate):
    line = first_recipe._rate(SimpleNamespace(**({} if width is None else {"hidden_size": width})))
    assert (line.field, line.value) == ("training.learning_rate", rate)


def test_labels_beside_texts_make_it_classification(tiny_base, tmp_path):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("sentence", "label"), *((row["text"], row["label"]) for row in ROWS)])
    init(tiny_base(), path, "24GiB", "small", tmp_path / "mine.yaml")
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert recipe.task == "text-classification"
    assert recipe.data.columns == {"text": "sentence", "label": "label"}
    assert "2 classes: neg (40), pos (40)" in (tmp_path / "mine.yaml").read_text()


def test_what_does_not_fit_says_what_would(tiny_model, rows, tmp_path):
    with pytest.raises(DoesNotFit, match=r"no recipe fits(.|\n)*a card such as RTX"):
        init(tiny_model(), rows, "10MiB", "small", tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(
    ("row", "objective"),
    [({"chosen": "b", "rejected": "c"}, "dpo"), ({"completion": "b"}, "kto")],
)
def test_rows_that_are_preferred_or_judged_get_their_objective(tiny_model, tmp_path, row, objective):
    verdicts = [{"label": n % 2 == 0} if objective == "kto" else {} for n in range(12)]
    rows = [{"prompt": f"Say {n}", **row, **verdict} for n, verdict in enumerate(verdicts)]
    rows = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = init(tiny_model(), rows, "4090", "small", tmp_path / "mine.yaml")
    assert found["values"]["training"]["learning_rate"] == 5e-6
    assert f"\n{objective}: {{}}" in (tmp_path / "mine.yaml").read_text()


def test_a_recipe_for_several_cards_is_listed_as_one():
    planned = recipe_on_card.planned("qwen3-32b/several_cards", "3090")
    assert planned["several_cards"]
    assert planned["peak_bytes"] is None
    assert planned["message"].endswith("qlora plan qwen3-32b/several_cards --processes 2 --card 3090")
    assert recipes_verb._memory(planned) == "for several cards: qlora plan --processes"


def test_another_objective_for_pairs_is_kept(tiny_model, tmp_path):
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"Say {n}", "chosen": "b", "rejected": "c"} for n in range(12)]
    )
    init(tiny_model(), rows, "4090", "small", tmp_path / "mine.yaml", overrides=["orpo={}"])
    said = (tmp_path / "mine.yaml").read_text()
    assert "orpo: {}" in said
    assert "dpo: " not in said


@pytest.mark.parametrize(
    ("row", "task", "columns"),
    [
        ({"question": "q", "answer": "a"}, "text-generation", {"prompt": "question", "completion": "answer"}),
        ({"mr": "q", "ref": "a"}, "text-generation", {"prompt": "mr", "completion": "ref"}),
        ({"text": "long", "summary": "short"}, "text-generation", {"prompt": "text", "completion": "summary"}),
        ({"instruction": "q", "output": "a", "label": 1}, "text-generation", None),
        ({"text": "t"}, "text-generation", None),
        ({"text": "t", "label": 1}, "text-classification", None),
        ({"premise": "t", "hypothesis": "u", "label": 1}, "text-classification",
         {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
    ],
)  # fmt: skip
def test_columns_say_the_task(row, task, columns, tmp_path):
    found = look(write_jsonl(tmp_path / "rows.jsonl", [row] * 3))
    assert (found.task, found.columns) == (task, columns)


def test_columns_that_say_nothing_are_asked_for(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}])
    with pytest.raises(InputError, match=r"columns a, b match no known format(.|\n)*\{prompt: a, completion: b\}"):
        look(path)


def test_columns_of_any_names_are_offered_by_what_they_hold(tmp_path):
    rows = [
        {"Nr": n, "Anfrage": f"Wo bleibt Paket {n}?", "Art der": "ab"[n % 2], "Datum": f"{n}.3.2026"} for n in range(9)
    ]
    with pytest.raises(InputError) as caught:
        look(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert """data.columns='{text: Anfrage, label: "Art der"}' for classes (2 in""" in str(caught.value)
    assert """data.columns='{prompt: Anfrage, completion: "Art der"}' for answers""" in str(caught.value)


def test_a_column_that_is_a_word_of_yaml_is_offered_in_quotes(tmp_path):
    rows = [{"null": f"Wo bleibt Paket {n}?", "no": "ab"[n % 2]} for n in range(9)]
    with pytest.raises(InputError) as caught:
        look(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert """data.columns='{text: "null", label: "no"}' for classes (2 in""" in str(caught.value)


def test_columns_that_name_a_label_make_it_classification(tiny_base, tmp_path):
    rows = [{"Text": row["text"], "Art": row["label"]} for row in ROWS]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    init(tiny_base(), path, "24GiB", "small", tmp_path / "mine.yaml", ["data.columns={text: Text, label: Art}"])
    assert Recipe.load(tmp_path / "mine.yaml").task == "text-classification"


def test_many_labels_are_no_classes(tmp_path):
    rows = [{"text": f"t{number}", "label": f"said {number}"} for number in range(50)]
    assert look(write_jsonl(tmp_path / "rows.jsonl", rows)).task == "text-generation"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init"], "--model, --data, --card missing"),
        (["init", "--from", "x.yml", "--goal", "speed"], "--from reads all from its file"),
        (["init", "--model", "none", "--data", "none.jsonl", "--card", "4090"], "no data file at none.jsonl"),
        (["init", "--model", "none", "--data", "none.jsonl", "--card", "4090", "--goal", "best"], "--goal 'best'"),
        (["init", "--model", "none", "--data", "none.jsonl", "--card", "4091"], "unknown card"),
        (["recipes", "show"], "type qlora recipes"),
        (["recipes", "show", "bert/sst2"], "did you mean"),
        (["recipes", "--out", "x"], "--out is for"),
        (["recipes", "--card", "4091"], "unknown card"),
    ],
)
def test_wrong_arguments_exit_2(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlora", *arguments])
    with pytest.raises(SystemExit, match="2"):
        process._run(cli.app)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_on_a_terminal_what_is_missing_is_asked_for(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr(questions, "_answer", lambda question, default=None: asked.append(question) or default or "x")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ask(model="m") == ("m", "x", "4090", "quality")
    assert [question.partition(":")[0] for question in asked] == ["data", "card", "goal"]


def test_the_goals_are_explained_where_one_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(questions, "_answer", lambda question, default=None: default)
    ask("m", "x", "cpu")
    assert "  speed    the shortest training\n" in capsys.readouterr().err


def test_what_is_missing_is_said_before_anything_heavy_is_imported(tmp_path):
    """A process of its own: this one has imported torch long ago."""
    heavy = "print({'torch', 'transformers'} & {*sys.modules})"
    code = f"import sys\nfrom qlora import cli\ntry:\n    cli.main()\nfinally:\n    {heavy}"
    for given, missing in (
        ([], "--model, --data, --card"),
        (["--card", "4090"], "--model, --data"),
        (["--data", "x"], "--model, --card"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "init", *given], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert (done.returncode, done.stdout) == (2, "set()\n"), done.stderr
        assert done.stderr.startswith(f"qlora: qlora init: {missing} missing, and there is no terminal")


@pytest.mark.parametrize(
    ("card", "said"),
    [("cpu", "not planned for a processor; the training says"), ("3GiB", "not planned without the card's name")],
)
def test_a_plan_without_a_time_says_why(card, said, tiny_model, rows, tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    init(tiny_model(), rows, card, "small", out)
    assert f"# time: {said}" in out.read_text()
    capsys.readouterr()
    plan(Recipe.load(out), **({"card": card} if card == "cpu" else {"vram": card}))
    shown = capsys.readouterr().out
    assert f"speed     {said}" in shown


def test_an_answer_may_begin_with_the_home_folder_which_no_shell_has_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(questions, "_answer", lambda question, default=None: f"~/{question.partition(':')[0]}")
    assert ask(card="cpu", goal="quality") == (f"{tmp_path}/model", f"{tmp_path}/data", "cpu", "quality")


def test_what_ships_is_listed_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = Path(cli.__file__).parents[1] / "recipes"
    names = [one["name"] for one in list_recipes()["recipes"]]
    assert names == [path.relative_to(root).with_suffix("").as_posix() for path in sorted(root.rglob("*.yaml"))]
    assert copy_recipe("gpt2") == "imdb.yaml"
    assert Path("imdb.yaml").read_text() == show_recipe("recipes/gpt2/imdb.yaml")
    with pytest.raises(InputError, match="never overwrites"):
        copy_recipe("gpt2/imdb")


def test_pairs_are_given_the_learning_rate_of_their_objective(tiny_model, tmp_path):
    pairs = [{"prompt": f"Say {n}", "chosen": f"{n}.", "rejected": "No."} for n in range(12)]
    rows = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    found = init(str(tiny_model("llama")), str(rows), "cpu", out=tmp_path / "mine.yaml", overrides=["dpo={}"])
    assert f"qlora plan {tmp_path / 'mine.yaml'} --card cpu" in (tmp_path / "mine.yaml").read_text()
    assert found["values"]["training"]["learning_rate"] == 5e-6
    text = (tmp_path / "mine.yaml").read_text()
    assert "dpo's usual start" in text
    assert "the longest pair, both its answers counted, has" in text
