"""qlora report: one page that needs nothing else, and the same numbers as JSON, of whatever a run folder has come to."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from qlora import cli, methods
from qlora.commands.adapters import adapters
from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.report import report
from qlora.commands.served import compare_served
from qlora.commands.train import train
from qlora.jobs.reporting.adapter_norms import norms
from qlora.jobs.reporting.reported_samples import samples
from qlora.jobs.talking.votes import Votes
from qlora.runs import record
from qlora.runs.folder import RunDir
from qlora.system.errors import InputError
from qlora.system.units import size
from tests.conftest import AUTO

CHAPTERS = {"scores", "training", "memory", "data", "answers", "norms", "export", "recipe", "environment"}


class Page(HTMLParser):
    """A page's tags, ids, classes and text; refuses what a page by itself must not have."""

    def __init__(self, file):
        super().__init__()
        self.source = Path(file).read_text(encoding="utf-8")
        self.tags, self.ids, self.classes, self.text = [], [], [], ""
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert tag not in {"script", "link", "iframe", "object", "img"}
        assert not [name for name in found if name.startswith("on") or name in ("src", "srcset", "action")]
        assert found.get("href", "#").startswith("#")
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.classes += (found.get("class") or "").split()

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def finished(trained_once, tmp_path_factory):
    """A finished run that was evaluated, and exported beside it; do not write to it."""
    folder = tmp_path_factory.mktemp("reported")
    run = Path(shutil.copytree(trained_once().path, folder / "run"))
    evaluate(run)
    export(run, folder / "exported", "float32")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may change, without the export."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(file, function):
    found = json.loads(file.read_text())
    function(found)
    file.write_text(json.dumps(found))


def test_a_page_of_a_finished_run_says_all_of_it(finished, tmp_path):
    found = report(finished, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert set(page.ids) >= CHAPTERS
    assert len(page.ids) == len(set(page.ids))
    assert "missing" not in page.classes
    assert json.loads((tmp_path / "page.json").read_text()) == found
    assert "default-src 'none'" in page.source
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source
    [one] = found["runs"]
    learned, proven, fits = one["verdicts"]
    scores = json.loads((finished / "eval.json").read_text())
    low = scores["change"]["loss"]["low"]
    assert f"{low:+.4f}" in learned["words"]
    assert learned["words"] in page.text
    assert proven["answer"] == fits["answer"] == "yes"
    assert one["norms"] == norms(finished / "adapter")
    answers = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    right = sum(row["after"]["exact_match"] == [1.0, 1.0] for row in answers)
    counts = one["answers"]["counts"]
    assert one["answers"]["metric"] == "exact_match"
    assert counts.get("right", 0) + counts.get("fixed", 0) == right < len(answers) == sum(counts.values())
    low, high = (f"{end:.4f}" for end in scores["bits_per_byte_interval"])
    assert f"bits per byte{scores['before']['bits_per_byte']:.4f}" in page.text
    assert f"{scores['bits_per_byte']:.4f} ({low} to {high})" in page.text
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert one["curves"]["loss"] == [[line["step"], line["loss"]] for line in lines if "loss" in line]
    sample = "".join(text for text, is_trained in one["data"]["sample"]["rows"][0] if is_trained)
    assert re.fullmatch(r"\d plus \d is \d\.<\|im_end\|>", sample)
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "page.json"}


def test_memory_is_predicted_and_counted_by_component(finished):
    [one] = report(finished)["runs"]
    each = getattr(torch, AUTO).itemsize + 4  # a float32 master
    memory, parameters = one["memory"], json.loads((finished / "environment.json").read_text())["parameters"]
    assert memory["measured_components"]["adapter"] == each * parameters["trainable"]
    assert memory["predicted_components"]["adapter"] == each * parameters["trainable"]
    assert sum(memory["predicted_components"].values()) == memory["predicted_bytes"]
    assert memory["limit_bytes"] > memory["peak_bytes"] > 0


def test_an_export_is_known_by_what_it_was_made_of(finished, run, tmp_path):
    exported = finished.parent / "exported"
    assert json.loads((exported / "export_report.json").read_text())["adapter_sha256"] == methods.weight_hashes(
        finished / "adapter"
    )
    assert report(run)["runs"][0]["verdicts"][1]["answer"] == "not known"
    found = report([run, exported])["runs"][0]  # the same weights, from wherever
    assert found["verdicts"][1]["answer"] == "yes"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(exported / "export_report.json", other)
    stored = {"dtype_beside": "bfloat16", "loss": 1.5, "kl": 0.25, "top1": 0.9}
    change(other / "export_report.json", lambda one: one.update(int8=stored))
    proven = report([run, other])["runs"][0]["verdicts"][1]["words"]
    assert "(int8, the rest in bfloat16) answers as the live model: KL 2.5e-01, same first choice at 90.00%" in proven
    change(other / "export_report.json", lambda one: one.update(adapter_sha256={"adapter_model.safetensors": "0"}))
    assert len(report(run)["runs"][0]["exports"]) == 0  # beside it, and of something else
    with pytest.raises(InputError, match=r"was not exported from .*other weights"):
        report([run, other])
    with pytest.raises(InputError, match="is only an export; name its run"):
        report(exported)


def test_what_is_not_there_is_said_with_the_command_for_it(run, tmp_path):
    for name in ("eval.json", "answers.jsonl", "memory.json", "proof_rows.json"):
        (run / name).unlink()
    report(run, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert f"not evaluated: qlora eval {run}" in page.text
    assert f"not exported here: qlora export {run} --out FOLDER" in page.text
    assert "nothing was measured" in page.text
    assert "without an interval" in page.text or "no losses" in page.text
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"eval_loss"' not in line]
    first = next(line for line in lines if '"loss"' in line)
    (run / "metrics.jsonl").write_text(f"{first}\n")  # stopped after its first step
    learned = report(run)["runs"][0]["verdicts"][0]["words"]
    assert learned == f"not evaluated; loss {json.loads(first)['loss']:.4f} at step 1 alone"


def test_a_run_that_stopped_or_failed_says_where_and_why(run, tmp_path):
    with RunDir(run).locked():
        assert report(run)["runs"][0]["state"]["what"] == "finished"  # `qlora compare RUN --served` has it
        shutil.rmtree(run / "adapter")
        assert report(run)["runs"][0]["state"]["what"] == "training"
    state = report(run)["runs"][0]["state"]
    assert (state["what"], state["step"], state["of"]) == ("ended", 2, 2)
    assert "ended without a word" in state["message"]
    (run / "ended.json").write_text(json.dumps({"status": "failed", "message": "the loss has diverged: <9.7>"}))
    report(run, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "Failed after step 2 of 2" in page.text
    assert "the loss has diverged: <9.7>" in page.text
    assert "norm by layer" not in page.text


HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></div><img src=x onerror=alert(1)>",
    "abc\u202egnp.exe",
    "a\x00b\x1b[31m",
    "\ud800",
    "שלום (1)",
    "x" * 5_000,
    "",
    "{{ 7*7 }}",
]


def test_hostile_answers_are_shown_and_many_are_bounded(run, tmp_path):
    file = run / "answers.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    rows = []
    for number in range(1_000):
        text = HOSTILE[number % len(HOSTILE)]
        row = line | {"prompt": [{"role": "user", "content": text}], "expected": HOSTILE[(number + 1) % len(HOSTILE)]}
        row |= {side: {**line[side], "answer": text, "exact_match": [float(right), 1.0]}
                for side, right in (("before", number % 5 == 0), ("after", number % 2 == 0))}  # fmt: skip
        rows.append(json.dumps(row))
    file.write_text("\n".join(rows) + "\n")
    found = report(run, tmp_path / "page.html")["runs"][0]["answers"]
    page = Page(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2_000_000
    assert found["counts"] == {"got worse": 100, "wrong": 400, "fixed": 400, "right": 100}
    assert len(found["shown"]) + found["left_out"] == 1_000
    assert page.classes.count("answer") == len(found["shown"]) == 200
    assert (page.classes.count("isworse"), page.classes.count("iswrong")) == (100, 100)
    assert "800 rows are not on this page" in page.text
    for shown in (
        "<script>alert(1)</script>",
        "abc<U+202E>gnp.exe",
        "a␀b␛[31m",
        "3,500 more characters",
        "{{ 7*7 }}",
        "שלום (1)",
    ):
        assert shown in page.text
    assert not re.search("[\x00\x1b\u202e]", page.source)


def test_a_page_stays_small_however_long_its_answers(run, tmp_path, monkeypatch):
    from qlora.pages import report as pages

    monkeypatch.setattr(pages, "_LARGEST", 60_000)
    line = (run / "answers.jsonl").read_text().splitlines()[0]
    (run / "answers.jsonl").write_text(f"{line}\n" * 500)
    found = report(run, tmp_path / "page.html")["runs"][0]["answers"]
    assert (tmp_path / "page.html").stat().st_size <= 60_000
    assert 1 <= len(found["shown"]) < 100
    assert f"{500 - len(found['shown']):,} rows are not on this page" in Page(tmp_path / "page.html").text


def test_numbers_that_are_not_finite_and_files_of_older_versions_are_shown(run, tmp_path):
    def broken(found):
        found |= {"loss": float("nan"), "metrics": {"exact_match": 0.5}}
        found["change"] = {"exact_match": {"value": float("nan"), "low": None, "high": None}}

    change(run / "eval.json", broken)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["loss"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')
    [one] = report(run, tmp_path / "page.html")["runs"]
    assert one["verdicts"][0]["answer"] == "not shown"
    assert len(one["curves"]["loss"]) == sum("loss" in line for line in lines) - 1
    assert json.loads((tmp_path / "page.json").read_text())["runs"][0]["scores"]["loss"] is None
    assert "nan" not in Page(tmp_path / "page.html").text.split()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n{"loss"\n', r"metrics\.jsonl line 2: .*damaged"),
        ("answers.jsonl", '{"after": {"answer": "x"}}\nnot json\n', r"answers\.jsonl line 2: .*damaged"),
        ("answers.jsonl", "[]\n", r"answers\.jsonl line 1: .*damaged"),
        ("eval.json", '{"metrics": {}}', r"eval\.json: .*damaged"),
        ("eval.json", "{", r"eval\.json: .*line 1"),
        ("data_report.json", '{"sources": [], "duplicates": "many"}', r"data_report\.json: TypeError.*damaged"),
        (
            "data_report.json",
            '{"sources": [], "preference": {"tied": "many"}}',
            r"data_report\.json: TypeError.*damaged",
        ),
        ("data_report.json", "{}", r"data_report\.json: .*sources.*damaged"),
        ("memory.json", "[]", r"memory\.json contains a list"),
        ("proof_rows.json", '{"rows": [{}], "from": "x"}', r"proof_rows\.json: .*input_ids.*damaged"),
        ("environment.json", "\x00\x00", r"environment\.json contains only zeros"),
        ("ended.json", "", r"ended\.json is empty"),
        ("served.json", '{"forms": [{}]}', r"served\.json: .*damaged; write it again: qlora compare .* --served"),
        ("votes.jsonl", '{"messages": []}\n', r"votes\.jsonl line 1: not a vote"),
        ("metrics.jsonl", '{"step": 1, "samples": [{}]}\n', r"metrics\.jsonl: a sample: .*prompt.*damaged"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(run, tmp_path, name, content, expected):
    (run / name).write_text(content)
    with pytest.raises(InputError, match=expected):
        report(run, tmp_path / "page.html")
    assert not list(tmp_path.glob("page*"))


def test_no_other_file_is_overwritten(run, tmp_path):
    page = tmp_path / "page.html"
    report(run, page)
    report(run, page)  # its own is
    for file, out, expected in (
        (page, page, r"page\.html is there and was not written by qlora report"),
        (page.with_suffix(".json"), page, r"page\.json is there and was not written by qlora report"),
        (None, tmp_path / "page.txt", "should end in .html"),
        (None, tmp_path / "no" / "page.html", "there is no folder"),
    ):
        kept = file and file.read_text()
        if file:
            file.write_text("mine")
        with pytest.raises(InputError, match=expected):
            report(run, out)
        if file:
            assert file.read_text() == "mine"
            file.write_text(kept)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        report(run, tmp_path / "folder.html")


def test_what_is_no_run_is_refused_by_name(finished, tmp_path, capsys):
    with pytest.raises(InputError, match=r"no run at .*qlora adapters"):
        report(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no run .* no comparison .* and no export"):
        report(tmp_path)
    with pytest.raises(InputError, match="named twice"):
        report([finished, finished])
    with pytest.raises(InputError, match=r"give --out PAGE\.html"):
        cli.app(["report", str(finished)], standalone_mode=False)
    capsys.readouterr()
    cli.app(["report", str(finished), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["runs"][0]["path"] == str(finished)


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_several_runs_have_their_curves_together_and_what_differs(finished, run, tmp_path):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    other = run.rename(tmp_path / "other")
    found = report([finished, other], tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert found["differences"]["recipe"] == [["training.learning_rate", 0.01, 0.02]]
    assert not found["differences"]["data"]
    assert [one["name"] for one in found["curves"]] == ["run", "other"]
    assert "run, step 1: " in page.text
    assert set(page.ids) >= {f"run{n}-{name}" for n in (1, 2) for name in CHAPTERS}
    assert len(page.ids) == len(set(page.ids))


@pytest.fixture
def compared(finished, tmp_path):
    """The folder of a comparison with one best training, and one that did not fit."""
    folder = tmp_path / "compared"
    shutil.copytree(finished, folder / "lora-seed-1")
    row = {"variant": "lora", "settings": {}, "seed": 1, "run": str(folder / "lora-seed-1"), "status": "done", "message": "",
           "metrics": {"exact_match": {"value": 0.5, "low": 0.2, "high": 0.8}}, "loss": 1.0}  # fmt: skip
    numbers = {
        "forgetting": 0.01,
        "seconds": 3.0,
        "peak_bytes": 2**29,
        "trainable_share": 0.1,
        "saved_bytes": 1000,
        "loss": 1.0,
    }
    one = {
        "variant": "lora",
        "settings": {},
        "seeds": 1,
        "mean": 0.5,
        "low": 0.2,
        "high": 0.8,
        "spread": None,
        "chosen": True,
        "best": True,
    }
    failed = row | {
        "variant": "full<b>",
        "run": str(folder / "full"),
        "status": "does not fit",
        "message": "7 GiB",
        "metrics": {},
        "loss": None,
    }
    found = {"name": "methods", "metric": "exact_match", "lower_is_better": False, "command": "qlora compare methods.yaml",
             "rows": [row, failed], "summary": [one | numbers], "notes": ["a note"]}  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(found))
    return folder


def test_a_comparison_is_one_page_with_its_table_and_its_runs(compared, tmp_path):
    found = report(compared, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    best, ended = found["comparison"]["verdicts"]
    assert best["answer"] == "lora"
    assert (ended["answer"], ended["command"]) == ("no", "qlora compare methods.yaml --resume")
    assert "50.0%" in page.text
    assert "full<b>, seed 1: does not fit7 GiB" in page.text
    assert "run1-scores" in page.ids
    (compared / "comparison.json").write_text('{"rows": []}')
    with pytest.raises(InputError, match=r"comparison\.json: .*damaged; write it again: qlora compare --resume"):
        report(compared)


def test_adapters_lists_a_comparison_as_what_it_is(compared, run, capsys):
    listed = adapters(compared.parent)
    kinds = {Path(one["path"]).name: one for one in listed}
    assert kinds["run"]["comparison"] is None
    assert kinds["compared"]["kind"] == "comparison"
    assert kinds["compared"]["state"] == "1 of 2 trainings ended well"
    training = kinds["lora-seed-1"]["comparison"]
    assert (training["variant"], training["seed"], training["best"], training["score"]["value"]) == (
        "lora",
        1,
        True,
        0.5,
    )
    shown = capsys.readouterr().out
    assert re.search(r"lora +1 +50% \(20% to 80%\) +best", shown)
    assert re.search(r"full<b> +1 +does not fit", shown)
    assert "lora-seed-1" not in shown  # a line of its comparison, no entry of its own
    change(compared / "comparison.json", lambda one: one.update(metric="bits_per_byte", lower_is_better=True))
    change(compared / "comparison.json", lambda one: one["rows"][0].update(bits_per_byte=1.25))
    adapters(compared.parent)
    assert re.search(r"lora +1 +1\.2500 +best", capsys.readouterr().out)  # no share
    assert report(compared)["comparison"]["verdicts"][0]["words"].startswith("bits per byte 0.5000 (0.2000 to 0.8000)")
    (compared / "comparison.json").write_text("{}")
    [damaged] = [one for one in adapters(compared) if one["kind"] == "comparison"]
    assert damaged["state"].startswith("damaged: ")


def test_classes_have_their_matrix_and_the_many_only_their_mistakes(run, tmp_path):
    def with_classes(number):
        labels = [f"class {n}<i>" for n in range(number)]
        each = [{"label": label, "rows": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5} for label in labels]
        matrix = [[1 if a in (b, (b + 1) % number) else 0 for a in range(number)] for b in range(number)]
        return lambda found: found.update(labels=labels, per_class=each, confusion=matrix)

    change(run / "eval.json", with_classes(3))
    report(run, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert (page.classes.count("right"), page.classes.count("mistake")) == (3, 6)
    change(run / "eval.json", with_classes(200))
    found = report(run, tmp_path / "page.html")["runs"][0]["scores"]["classes"]
    assert (len(found["mistakes"]), len(found["per_class"]), found["left_out"]) == (30, 30, 170)


def test_every_chapter_with_a_table_says_its_command(finished, tmp_path):
    report(finished, tmp_path / "page.html")
    chapters = re.split(r'<h2 id="(\w+)">', Page(tmp_path / "page.html").source)
    for name, content in zip(chapters[1::2], chapters[2::2], strict=True):
        assert "<table" not in content or 'class="command"' in content or name == "environment", name
    [one] = report([finished])["runs"]
    assert one["exports"][0]["command"] == f"qlora export {finished} --out ANOTHER_FOLDER --dtype float32"


def test_what_it_answered_and_which_step_was_the_best_is_shown(make_recipe, finished, tmp_path):
    training = {"max_steps": 3, "eval_steps": 1, "num_samples": 1, "load_best_model_at_end": True, "learning_rate": 0.5}
    run = train(make_recipe(training=training))
    lines = record.read(run)
    [end] = [line for line in lines if isinstance(line, record.Best)]
    found = report(run.path, tmp_path / "page.html")["runs"][0]
    page = Page(tmp_path / "page.html")
    assert (found["best"]["best_step"], found["best"]["loaded"]) == (end.best_step, True)
    assert (
        f"Best evaluation: step {end.best_step}, held-out loss {end.value:.4f}; the adapter is that of this"
        in page.text
    )
    assert page.classes.count("mark") == 1
    assert f"{end.eval_loss:.4f} at step {end.best_step}" in found["verdicts"][0]["words"]  # not the last evaluation's
    [question] = found["samples"]["questions"]
    said = [[line.step, line.samples[0]["answer"]] for line in lines if isinstance(line, record.Samples)]
    assert question["answers"] == said
    assert len(said) == 3
    assert question["expected"] in page.text
    report([run.path, finished], tmp_path / "page.html")
    assert f"{end.eval_loss:.4f} (step {end.best_step})" in Page(tmp_path / "page.html").text


def test_of_many_samples_the_first_last_best_and_some_between_are_shown():
    def sample(place, step):
        prompt = [{"role": "user", "content": f"question {place}"}]
        return {"prompt": prompt, "expected": "yes" * 1000, "answer": f"{place} at {step}"}

    steps = range(10, 2001, 10)
    lines = [record.Samples(step, 1.0, tuple(sample(place, step) for place in range(9)), 1.0) for step in steps]
    lines.append(record.Best(2000, 1.0, 130, "eval_loss", 1.0, False, 1.5, None, 1.0))
    found = samples(lines, 6, 8)
    assert (len(found["questions"]), found["left_out"]) == (6, 3)
    for place, one in enumerate(found["questions"]):
        shown = [step for step, _ in one["answers"]]
        assert {10, 130, 2000} <= set(shown)
        assert shown == sorted(shown)
        assert len(shown) == 9
        assert len(shown) + one["left_out"] == 200
        assert [text for _, text in one["answers"]] == [f"{place} at {step}" for step in shown]
        assert len(one["expected"]) < 700
    again = record.Samples(2000, 1.0, (sample(0, "the end"),), 2.0)  # the same step measured twice: the later one
    assert samples([*lines, again], 6, 8)["questions"][0]["answers"][-1] == [2000, "0 at the end"]


def test_a_best_step_that_was_loaded_does_not_overfit(run):
    lines = (run / "metrics.jsonl").read_text()
    worse = [
        {"step": 3, "epoch": 1.0, "eval_loss": 1.0, "time": 1.0},
        {"step": 4, "epoch": 2.0, "eval_loss": 3.0, "time": 1.0},
    ]
    end = {
        "step": 4,
        "epoch": 2.0,
        "best_step": 3,
        "metric": "eval_loss",
        "value": 1.0,
        "eval_loss": 1.0,
        "stopped_after": 1,
    }
    for loaded in (True, False):
        last = [*worse, {**end, "loaded": loaded, "time": 1.0}]
        (run / "metrics.jsonl").write_text(lines + "".join(json.dumps(one) + "\n" for one in last))
        [one] = report(run)["runs"]
        assert ("it overfits" in one["verdicts"][0]["words"]) is not loaded


def test_the_forms_it_was_served_in_are_a_table(run, tmp_path):
    assert report(run)["runs"][0]["served"] == {"missing": "not measured", "command": f"qlora compare {run} --served"}
    measured = compare_served(run, max_rows=2, forms=["float16", "nf4"])
    change(run / "served.json", lambda one: one["forms"][1].update(message="<not whole>"))
    found = report(run, tmp_path / "page.html")["runs"][0]["served"]
    page = Page(tmp_path / "page.html")
    assert [one["loss"] for one in found["forms"]] == [one["loss"] for one in measured["forms"]]
    for one in measured["forms"]:
        assert f"{one['what']}{size(one['bytes'])}" in page.text
        assert f"{one['loss']:.4f}{one['kl']:.1e}" in page.text
    assert "merged, NF4 again: <not whole>" in page.text
    assert found["command"] in page.text


def test_blind_votes_are_counted_for_the_weights_that_the_run_has(run, tmp_path):
    assert report(run)["runs"][0]["votes"] == {"missing": "no votes yet", "command": f"qlora chat {run} --web"}
    file, answers = run / "votes.jsonl", {"base": "<b>no</b>", "tuned": "yes"}
    votes = Votes(file, methods.weight_hashes(run / "adapter"))
    for left, better in (("tuned", "left"), ("base", "right"), ("base", "left"), ("base", "tie")):
        votes.add({"prompt": "Is it so?"}, left, answers, better)
    Votes(file, {"adapter_model.safetensors": "0"}).add({"prompt": "Before?"}, "base", answers, "left")
    found = report(run, tmp_path / "page.html")["runs"][0]["votes"]
    page = Page(tmp_path / "page.html")
    assert found["words"] == votes.in_words()
    assert (found["counts"], found["others"], found["left"]) == ({"base": 1, "tuned": 2, "tie": 1}, 1, [2, 3])
    assert [one["winner"] for one in found["shown"]] == ["tie", "base", "tuned", "tuned"]
    assert "the tuned model won 67% of 3 that were decided" in page.text
    assert "the answer on the left won 2 of 3" in page.text
    assert "Is it so?" in page.text
    assert "Before?" not in page.text
    for number in range(30):
        text = HOSTILE[number % len(HOSTILE)].replace("\ud800", "")  # which no browser sends
        votes.add({"prompt": text}, "base", {"base": text, "tuned": text}, "tie")
    found = report(run, tmp_path / "page.html")["runs"][0]["votes"]
    assert (len(found["shown"]), found["left_out"]) == (20, 14)
    page = Page(tmp_path / "page.html")  # refuses what it must not have
    assert "<script>alert(1)</script>" in page.text
    assert not re.search("[\x00\x1b\u202e]", page.source)


def test_lengths_are_drawn_as_the_data_page_draws_them(finished, tmp_path):
    found = report(finished, tmp_path / "page.html")["runs"][0]["data"]
    bars = found["length"]["histogram"]
    assert sum(count for *_, count in bars) == found["rows"]
    assert Page(tmp_path / "page.html").classes.count("bar") == sum(count > 0 for *_, count in bars)


def test_of_more_runs_than_settings_each_run_has_a_row(run, finished, tmp_path):
    third = Path(shutil.copytree(run, tmp_path / "third"))
    for folder, rate in ((run, "0.02"), (third, "0.03")):
        text = (folder / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(re.sub(r"learning_rate: .*", f"learning_rate: {rate}", text))
    found = report([finished, run, third] if finished.name != run.name else [run, third], tmp_path / "page.html")
    [(name, *values)] = found["differences"]["recipe"]
    assert name == "training.learning_rate"
    source = Page(tmp_path / "page.html").source
    for value in values:
        assert f'<td data-name="training.learning_rate">{value:g}' in source


def test_a_table_of_many_columns_is_cards_on_a_phone(finished, tmp_path):
    report(finished, tmp_path / "page.html")
    inspect_data(RunDir(finished).recipe(), html=tmp_path / "data.html")
    for file in ("page.html", "data.html"):
        source = Page(tmp_path / file).source
        assert "width=device-width" in source
        cards = re.findall(r'<table class="cards">(.*?)</table>', source, flags=re.DOTALL)
        assert cards
        for table in cards:
            names = [name.strip() for name in re.findall(r"<th>([^<]*)", table)]
            for line in table.split("<tr>")[2:]:
                assert re.findall(r'<td data-name="([^"]*)"', line)[-len(names) + 1 :] == names[1:]
        for table in re.findall(r"<table(?! class=\"cards)[^>]*>.*?</table>", source, flags=re.DOTALL):
            most = max(len(re.findall("<t[dh]", line)) for line in table.split("<tr")[1:])
            assert (
                most <= 4 or "layer" in table
            )  # what is wider than a phone scrolls by itself, with the page standing still


def test_a_classifier_has_its_best_accuracy_and_nothing_of_answers_in_words(classify_recipe, tmp_path):
    best = {"eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
    run = train(classify_recipe(training=best))
    found = report(run.path, tmp_path / "page.html")["runs"][0]
    page = Page(tmp_path / "page.html")
    assert f"Best evaluation: step {found['best']['best_step']}, accuracy {found['best']['value']:.1%}; " in page.text
    assert page.classes.count("mark") == 2  # in the chart of the losses, and in that of the accuracy
    for said in ("Answers while it trained", "Blind votes", "served in"):
        assert said not in page.text
