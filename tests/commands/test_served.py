"""qlora compare RUN --served: each form is a row of right numbers, or of why not; nothing is left of it but the table."""

import csv
import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch

from qlora import cli
from qlora.commands.export import export
from qlora.commands.served import compare_served
from qlora.commands.train import train
from qlora.data import Example
from qlora.evaluation import latency, metrics
from qlora.exporter.served import Reference, of_llama, of_model, trained_at
from qlora.jobs.exporting import served_forms
from qlora.jobs.opening.opened_model import open_subject
from qlora.system.errors import InputError, Interrupted
from tests.conftest import AUTO, CONVERSATIONS, encode, messages

pytestmark = pytest.mark.usefixtures("unplanned")


@pytest.fixture(scope="module")
def served(trained_once, tmp_path_factory):
    """Return (run folder, what was found) of all forms of the tiny Llama; made once, do not write to it."""
    folder = shutil.copytree(trained_once("llama").path, tmp_path_factory.mktemp("served") / "run")
    before = {path.name for path in folder.iterdir()}
    found = compare_served(folder, max_rows=3)
    assert {path.name for path in folder.iterdir()} - before - {"lock"} == {"served.json", "served.md", "served.csv"}
    return folder, found


def by_name(found):
    return {one["name"]: one for one in found["forms"]}


def test_every_form_has_a_row_and_what_is_near_is_said_to_be_near(served):
    _, found = served
    rows = by_name(found)
    assert list(rows) == list(served_forms.FORMS)
    assert (found["rows"], found["tokens"] > 20) == (3, True)
    assert abs(rows["float16"]["loss"] - found["loss"]) < 5e-3
    assert rows["float16"]["kl"] < 1e-5 < rows["bfloat16"]["kl"] < 1e-3  # each computes in its own dtype
    assert min(rows[name]["kl"] for name in ("nf4", "original-nf4", "original-float16")) > 1e-3
    assert rows["adapter"]["kl"] == pytest.approx(
        rows["original-float16"]["kl"], rel=0.2
    )  # the same weights, by other ways
    for name in ("trained", "adapter", "float16", "nf4", "bfloat16", "original-float16", "original-nf4"):
        assert rows[name]["message"] is None, name
        assert rows[name]["tokens_per_second"] > 0, name
    assert rows["float16"]["bytes"] == rows["original-float16"]["bytes"] < rows["adapter"]["bytes"]
    # without bfloat16 what is not quantized is in float32, which is most of a tiny model
    assert rows["nf4"]["bytes"] < rows["float16" if AUTO == "bfloat16" else "adapter"]["bytes"]


def test_what_a_form_needs_and_is_not_there_is_said_in_its_row(served):
    rows = by_name(served[1])
    for name, package in (("int8", "torchao"), ("q8_0", "gguf"), ("q4_k_m", "llama_cpp")):
        if importlib.util.find_spec(package) is None:
            assert rows[name]["loss"] is None
            assert package.split("_")[0] in rows[name]["message"]
        else:
            assert 0 < rows[name]["kl"] < 0.3, name
            assert rows[name]["bytes"] > 0, name


def test_the_files_say_what_was_returned(served):
    folder, found = served
    assert json.loads((folder / "served.json").read_text()) == found
    text = (folder / "served.md").read_text()
    assert found["command"] in text
    assert all(one["what"] in text for one in found["forms"])
    rows = list(csv.DictReader((folder / "served.csv").read_text().splitlines()))
    assert {row["name"]: row["kl"] for row in rows if row["kl"]} == {
        name: str(row["kl"]) for name, row in by_name(found).items() if row["kl"] is not None
    }


def test_a_second_time_gives_the_same_numbers_and_json_is_all_that_is_printed(served, tmp_path, capsys):
    folder = shutil.copytree(served[0], tmp_path / "run")
    capsys.readouterr()
    words = ["compare", str(folder), "--served", "--max-rows", "3", "--form", "float16", "--form", "adapter", "--json"]
    cli.app(words, standalone_mode=False)
    again = json.loads(capsys.readouterr().out)
    assert list(by_name(again)) == ["adapter", "float16"]
    for name, row in by_name(again).items():
        then = by_name(served[1])[name]
        assert {key: row[key] for key in ("loss", "kl", "bytes")} == {key: then[key] for key in ("loss", "kl", "bytes")}


def test_loss_and_kl_are_those_of_the_definitions(trained_once, tmp_path):
    subject = open_subject(trained_once("llama").path)
    rows = [encode(subject.tokenizer, messages(turns)) for turns in CONVERSATIONS[:3]]
    model = subject.model.float()
    reference = Reference(of_model(model), rows, tmp_path / "reference")
    nats, count = (sum(column) for column in zip(*metrics.losses(model, rows), strict=True))
    assert (reference.loss, reference.num_tokens) == (pytest.approx(nats / count, rel=1e-5), count)
    same = reference.scores(of_model(model), "itself")
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    with model.disable_adapter(), torch.no_grad():
        found = reference.scores(of_model(model), "the base")
        expected = 0.0
        for row in rows:
            at = [position - 1 for position in trained_at(row)]
            other = model(torch.tensor([row.input_ids])).logits[0, at].double().log_softmax(-1)
            model.enable_adapter_layers()
            live = model(torch.tensor([row.input_ids])).logits[0, at].double().log_softmax(-1)
            model.disable_adapter_layers()
            expected += torch.nn.functional.kl_div(other, live, reduction="sum", log_target=True).item()
    assert found["kl"] == pytest.approx(expected / count, rel=1e-4)


def test_logits_that_are_not_finite_are_a_message(trained_once, tmp_path):
    tokenizer = open_subject(trained_once("llama").path).tokenizer
    rows = [encode(tokenizer, messages(CONVERSATIONS[0]))]
    even = torch.full((len(trained_at(rows[0])), 8), -math.log(8))
    rows[0] = type(rows[0])(rows[0].input_ids, [label if label == -100 else label % 8 for label in rows[0].labels])
    reference = Reference(lambda row: even, rows, tmp_path / "reference")
    assert reference.loss == pytest.approx(math.log(8))
    found = reference.scores(lambda row: even * math.nan, "broken")
    assert found == {"loss": None, "kl": None, "message": "its logits are not finite"}


def test_a_form_that_fails_says_so_and_the_others_are_measured(trained_once, tmp_path, monkeypatch):
    folder = shutil.copytree(trained_once("llama").path, tmp_path / "run")

    def broken(job, merged, folder):
        raise ValueError("something in a library\nand more")

    form = served_forms.FORMS["nf4"]
    monkeypatch.setitem(served_forms.FORMS, "nf4", type(form)(form.what, form.merge, broken))
    rows = by_name(compare_served(folder, max_rows=1, forms=["nf4", "bfloat16"]))
    assert (rows["nf4"]["message"], rows["nf4"]["loss"]) == ("ValueError: something in a library", None)
    assert rows["bfloat16"]["loss"] > 0

    def stopped(job, merged, folder):
        raise Interrupted(2)

    monkeypatch.setitem(served_forms.FORMS, "nf4", type(form)(form.what, form.merge, stopped))
    with pytest.raises(Interrupted, match="nothing was left"):
        compare_served(folder, max_rows=1, forms=["nf4"])
    assert not list(folder.glob("*scratch*"))


def test_a_method_that_is_not_merged_is_measured_live_and_says_why_there_is_no_more(make_recipe, tmp_path):
    run = train(make_recipe(prompt_tuning={"num_virtual_tokens": 4}))
    rows = by_name(compare_served(run.path, max_rows=2, forms=["trained", "float16", "int8"]))
    assert rows["trained"]["kl"] < 1e-2
    assert "rompt" in rows["float16"]["message"]
    assert rows["int8"]["message"] == rows["float16"]["message"]
    with pytest.raises(InputError, match=r"The adapter is exported as it is, so leave --int8 out"):
        export(run.path, tmp_path / "out", overrides=["export.int8=true"])


def test_without_quantization_there_is_one_base(make_recipe):
    run = train(make_recipe(quantization=None))
    rows = by_name(compare_served(run.path, max_rows=2, forms=["trained", "adapter", "float16", "original-float16"]))
    assert rows["float16"]["kl"] < 1e-4
    assert (
        rows["adapter"]["message"]
        == rows["original-float16"]["message"]
        == "the base was not quantized: there is only one"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--served", "--form", "fp16"], "--form fp16: is not one of trained, adapter, float16"),
        (["RUN", "RUN", "--served"], "--served takes one finished run"),
        (["RUN", "--served", "--resume"], "--served takes one finished run"),
        (["RUN", "--max-rows", "3"], "--form and --max-rows go with --served"),
        (["nothing", "--served"], "no run at nothing"),
        (["RUN", "--served", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_before_a_weight_is_read(trained_once, words, said, monkeypatch):
    monkeypatch.setattr(served_forms, "measure", None)
    run = str(trained_once("llama").path)
    with pytest.raises(InputError, match=said):
        cli.app(["compare", *(run if word == "RUN" else word for word in words)], standalone_mode=False)


def test_a_disk_that_is_too_small_is_said_before_a_weight_is_read(trained_once, tmp_path, monkeypatch):
    folder = shutil.copytree(trained_once("llama").path, tmp_path / "run")
    monkeypatch.setattr("qlora.jobs.exporting.export_folder.free_disk_bytes", lambda path: 1000)
    with pytest.raises(InputError, match=r"the model needs .* are free on that disk"):
        compare_served(folder, max_rows=1)
    assert not (folder / "served.json").exists()


class InLlamaCpp:
    """What is used of llama_cpp.Llama(logits_all=True): after each token, that token is what comes next."""

    def __init__(self):
        self.scores, self.n_tokens, self.seen = np.zeros((64, 8), np.float32), 0, 0

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        for token in tokens:
            self.scores[self.n_tokens] = np.eye(8)[token] * 5
            self.n_tokens, self.seen = self.n_tokens + 1, self.seen + 1


def test_llama_cpp_is_read_where_the_trained_tokens_are_said():
    row = Example([3, 4, 5, 6], [-100, -100, 5, 6])
    answers = of_llama(InLlamaCpp())(row)
    assert answers.argmax(-1).tolist() == [4, 5]  # after the token before each
    torch.testing.assert_close(answers.exp().sum(-1), torch.ones(2))
    model = InLlamaCpp()
    assert served_forms._seconds_in_llama(model, [1, 2, 3])["token"] > 0
    assert model.seen == (1 + latency.REPEATS) * (3 + latency.NUM_TOKENS)  # one time does not count
