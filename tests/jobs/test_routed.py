"""Several runs on one base in memory, by name: each answers as it does when it is opened alone."""

import builtins
import gc
import shutil
import threading
import weakref

import pytest
import torch
import transformers
from typer.testing import CliRunner

import qlora
from qlora import base_model, cli
from qlora.commands.chat import chat
from qlora.commands.talk import talk
from qlora.commands.train import train
from qlora.jobs.opening.routed import open_routed
from qlora.methods import several
from qlora.recipe import Recipe
from qlora.system.errors import InputError, Interrupted
from tests.conftest import CHATML, CONVERSATIONS, messages, write_jsonl

pytestmark = pytest.mark.usefixtures("unplanned")

QUESTION = "tell me more"
# another template, without a system role: what is asked with it is another prompt
SHOUTING = CHATML.replace(
    "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
)
SHOUTING = SHOUTING.replace("assistant\n{% endif %}", "assistant\n!{% endif %}")
FLOAT32 = ["quantization.compute_dtype=float32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model):
    """Return make(name, **sections) -> a finished run on the tiny Llama, made once for each name."""
    folder, made = tmp_path_factory.mktemp("routed"), {}
    rows = write_jsonl(folder / "train.jsonl", [{"messages": messages(turns)} for turns in CONVERSATIONS])

    def make(name, family="llama", data=None, **sections):
        if name not in made:
            values = {
                "model": {"name_or_path": str(tiny_model(family))},
                "data": {"train": str(rows), "max_length": 128} | (data or {}),
                "training": {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                             "learning_rate": 1e-2, "warmup_ratio": 0},
                "output_dir": str(folder / name),
            }  # fmt: skip
            made[name] = train(Recipe.from_dict(values | (sections or {"lora": {"r": 4}}))).path
        return made[name]

    return make


@pytest.fixture(scope="module")
def four(runs, tmp_path_factory):
    """Four runs by four methods; that of the third has its own chat template."""
    template = tmp_path_factory.mktemp("template") / "shouting.jinja"
    template.write_text(SHOUTING)
    return {
        "a": runs("a"),
        "b": runs("b", lora={"r": 4, "use_dora": True}),
        "c": runs("c", data={"chat_template": str(template), "system_as_user": True}, bottleneck={"size": 8}),
        "d": runs("d", prompt_tuning={"num_virtual_tokens": 4}),
    }


@pytest.fixture(scope="module")
def opened(four):
    """All four on one base; a test leaves it as it was."""
    with qlora.open(four["a"], {name: four[name] for name in "bcd"}) as model:
        yield model


@pytest.fixture(scope="module")
def alone(four):
    """{name: what its run answers when it is opened alone}."""
    found = {name: chat(run, QUESTION, "Count.", 12) for name, run in four.items()}
    assert len({*found.values()}) == 4
    return found


def test_each_name_answers_as_its_run_alone(opened, alone):
    assert opened.adapters == ["a", "b", "c", "d"]
    assert repr(opened).endswith("a: a, b, c, d, base>")
    asked = [*"abcd", "base", *"dcba"]
    found = [opened.answer(QUESTION, name, "Count.", 12) for name in asked]
    assert found[:4] == list(alone.values())
    assert found[5:] == list(alone.values())[::-1]
    assert len({*found}) == 5
    assert opened.answer(QUESTION, None, "Count.", 12) == alone["a"]


def test_its_answer_may_be_streamed_and_go_on_from_a_conversation(opened):
    pieces: list = []
    turns = [*messages([("user", "hello"), ("assistant", "hi")]), {"role": "user", "content": QUESTION}]
    answer = opened.answer(turns, "b", max_new_tokens=8, on_text=pieces.append)
    assert "".join(pieces).strip() == answer
    assert answer != opened.answer(QUESTION, "b", max_new_tokens=8)


def test_many_at_once_are_answered_each_by_its_own_adapter_in_order(four):
    model = open_routed(four["a"], {name: four[name] for name in "bcd"}, overrides=FLOAT32)
    asked = [("one", "c"), ("What is 2 plus 3?", "a"), ("two " * 30, "d"), ("", "base"), ("three", "a"), ("four", "c"),
             ("five", None), ("x", "d"), ("y " * 9, "b")]  # fmt: skip
    prompts, names = zip(*asked, strict=True)
    found = model.answers(prompts, list(names), max_new_tokens=8)
    assert found == [model.answer(prompt, name, max_new_tokens=8) for prompt, name in asked]
    assert len({*found}) > 5
    assert model.answers(prompts[:2], "b", max_new_tokens=8) == [
        model.answer(prompt, "b", max_new_tokens=8) for prompt in prompts[:2]
    ]
    assert model.answers([]) == []


def test_each_keeps_its_own_template_and_what_ends_an_answer(opened):
    for name, start in (("a", "<|im_start|>assistant\n"), ("c", "<|im_start|>assistant\n!"), ("base", "assistant\n")):
        voice = opened._voices[name]
        shown = voice.tokenizer.apply_chat_template(
            messages([("user", "x")]), tokenize=False, add_generation_prompt=True
        )
        assert shown.endswith(start)
        assert voice.tokenizer.eos_token_id in voice.stops
    asked = messages([("system", "Count."), ("user", "x")])
    assert "Count." in opened._voices["c"].tokenizer.apply_chat_template(asked, tokenize=False)  # its own refuses it


def test_threads_that_ask_at_once_each_get_their_own_answer(opened, alone):
    found: dict = {}

    def ask(name, turn):
        found[name, turn] = opened.answer(QUESTION, name, "Count.", 12)

    threads = [threading.Thread(target=ask, args=(name, turn)) for turn in range(3) for name in "abd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(name, turn): alone[name] for name in "abd" for turn in range(3)}


def test_what_is_called_with_a_piece_of_an_answer_cannot_change_who_answers(opened, alone):
    def interfere(piece):
        with pytest.raises(InputError, match="is answering; on_text cannot use it before that is done"):
            opened.answer(QUESTION, other)
        pieces.append(piece)

    pieces: list = []
    name = next(name for name in "bda" if alone[name])  # one that has an answer
    other = "b" if name == "a" else "a"
    assert opened.answer(QUESTION, name, "Count.", 12, interfere) == alone[name]
    assert pieces


def test_adapters_come_and_go_and_the_base_stays(four, alone, monkeypatch):
    model = open_routed(four["a"])
    monkeypatch.setattr(base_model, "load", lambda *args: pytest.fail("the base was loaded again"))
    base = {parameter.data_ptr() for parameter in model._several.choose(None).parameters()}
    plain = model.answer(QUESTION, "base", "Count.", 12)
    for name in "bd":
        model.load(name, four[name])
        assert model.answer(QUESTION, name, "Count.", 12) == alone[name]
        gone = [weakref.ref(p) for p in model._several.choose(name).parameters() if p.data_ptr() not in base]
        assert gone
        model.unload(name)
        assert not [one for one in gone if one() is not None]
        with pytest.raises(InputError, match=f"no adapter called '{name}' is loaded; there are a, base"):
            model.answer(QUESTION, name)
    model.load("a again", four["a"])
    model.unload("a")
    assert model.answer(QUESTION, "a again", "Count.", 12) == alone["a"]
    with pytest.raises(InputError, match="no adapter called 'a' is loaded; there are a again, base"):
        model.answer(QUESTION)
    assert model.answer(QUESTION, "base", "Count.", 12) == plain
    assert {parameter.data_ptr() for parameter in model._several.choose(None).parameters()} == base


def test_a_closed_one_frees_the_base_and_says_so(four):
    with open_routed(four["a"]) as model:
        weights = [weakref.ref(parameter) for parameter in model._several.base.parameters()]
    gc.collect()
    assert not [one for one in weights if one() is not None]
    for call in (lambda: model.answer("x"), lambda: model.answers(["x"]), lambda: model.load("b", four["b"])):
        with pytest.raises(InputError, match="a is closed; open it again"):
            call()
    model.close()
    assert model.adapters == []


def test_a_load_that_is_interrupted_changes_nothing(opened, four, alone, monkeypatch):
    def interrupted(*args):
        raise Interrupted(2)

    monkeypatch.setattr(several, "load", interrupted)
    with pytest.raises(Interrupted):
        opened.load("e", four["b"])
    monkeypatch.undo()
    assert opened.adapters == ["a", "b", "c", "d"]
    assert opened.answer(QUESTION, "b", "Count.", 12) == alone["b"]
    opened.load("e", four["b"])
    assert opened.answer(QUESTION, "e", "Count.", 12) == alone["b"]
    opened.unload("e")


@pytest.mark.slow
def test_runs_with_the_same_new_tokens_go_together(runs, tiny_model):
    model = {"name_or_path": str(tiny_model("llama")), "new_tokens": ["<sql>"]}
    one, other = (runs(name, model=model, lora={"r": rank}) for name, rank in (("sql", 4), ("sql2", 6)))
    alone = {str(run): chat(run, QUESTION, max_new_tokens=12) for run in (one, other)}
    routed = open_routed(one, {"other": other})
    assert [routed.answer(QUESTION, name, max_new_tokens=12) for name in ("other", "sql")] == [*alone.values()][::-1]


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_names_that_cannot_be_are_refused_before_a_weight_is_read(four, monkeypatch):
    monkeypatch.setattr(base_model, "load", lambda *args: pytest.fail("the base was loaded"))
    b = four["b"]
    for adapters, adapter, expected in (
        ({"base": b}, None, "'base' is the name of the base alone"),
        ({"a": b}, None, "an adapter called 'a' is loaded already; unload it, or give this one another name"),
        ({" ": b}, None, "an adapter needs a name, a text; not ' '"),
        ({3: b}, None, "an adapter needs a name, a text; not 3"),
        ([b], None, "adapters: takes names and run folders"),
        ({"b": "nowhere"}, None, "no run at nowhere"),
        ({"b": b}, "c", "no adapter called 'c' is loaded; there are a, b, base"),
    ):
        with pytest.raises(InputError, match=expected):
            open_routed(four["a"], adapters, adapter)


def test_the_adapter_of_a_folder_that_is_called_base_has_its_whole_path(four, tmp_path):
    run = shutil.copytree(four["a"], tmp_path / "base")
    assert open_routed(run).adapters == [str(run)]


def test_what_is_asked_wrongly_is_refused_and_nothing_is_computed(opened, monkeypatch):
    monkeypatch.setattr(transformers.GenerationMixin, "generate", lambda *args, **kwargs: pytest.fail("computed"))
    for call, expected in (
        (lambda: opened.answers("What?"), "answers takes a list of prompts"),
        (lambda: opened.answers(["What?"], batch_size=0), "batch_size 0: at least 1"),
        (lambda: opened.answers(["x", "y"], ["a"]), "2 prompts and 1 names of adapters"),
        (lambda: opened.answers(["x", "y"], ["a", "z"]), "no adapter called 'z'"),
        (lambda: opened.answers(["x", "y " * 600], ["a", "b"]), "the prompt is too long"),
        (lambda: opened.answer("x", max_new_tokens=0), "max_new_tokens is 0; give a number from 1"),
        (lambda: opened.answer([{"role": "user", "content": 3}]), "a prompt is a text, or a list of messages"),
        (lambda: opened.unload("base"), "the base cannot be unloaded"),
        (lambda: opened.unload("z"), "no adapter called 'z'"),
    ):
        with pytest.raises(InputError, match=expected):
            call()


def test_a_run_that_does_not_belong_on_the_base_changes_nothing(runs, opened, alone, four, tiny_model, tmp_path):
    grown = shutil.copytree(four["b"], tmp_path / "grown")
    (grown / "adapter" / "manifest.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(grown / "adapter")
    tokenizer.add_tokens(["<city>"])
    tokenizer.save_pretrained(grown / "adapter")
    sql = {"name_or_path": str(tiny_model("llama")), "new_tokens": ["<sql>"]}
    lora = {"r": 4}
    unfinished = shutil.copytree(four["b"], tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter"))
    for path, expected in (
        (grown, r"grown: its tokenizer has other tokens than that of .* \(1 differ, such as '<city>' with id"),
        (runs("sql", model=sql, lora=lora), r"other tokens .* such as '<sql>'"),
        (runs("mistral", "mistral"), r"trained on another base than .*config.json"),
        (runs("plain", lora=lora, quantization=None), "quantization is None, not nf4"),
        (runs("single", lora=lora, quantization={"use_double_quant": False}), "use_double_quant is False, not True"),
        (runs("full", full={}, quantization=None), "open it by itself: qlora chat"),
        (tmp_path / "nowhere", "no run at"),
        (unfinished, "did not finish training"),
    ):
        with pytest.raises(InputError, match=expected):
            opened.load("e", path)
        assert opened.adapters == ["a", "b", "c", "d"]
    assert opened.answer(QUESTION, "b", "Count.", 12) == alone["b"]


def test_full_fine_tuning_answers_alone(runs):
    plain, full = runs("plain", lora={"r": 4}, quantization=None), runs("full", full={}, quantization=None)
    with pytest.raises(
        InputError, match="has trained biases or weights, so it cannot be loaded beside another; open it by itself"
    ):
        open_routed(plain, {"full": full})
    model = open_routed(full)
    assert isinstance(model.answer(QUESTION, max_new_tokens=4), str)
    with pytest.raises(InputError, match=r"full has trained the base's own weights, so no adapter can lie beside it"):
        model.load("plain", plain)
    with pytest.raises(InputError, match="so the base alone cannot answer"):
        model.answer(QUESTION, "base")


def test_a_plain_model_has_no_adapters(four, tiny_model):
    with qlora.quiet(), qlora.open(tiny_model()) as model:
        assert model.adapters == []
        assert model.answer(QUESTION, max_new_tokens=4) == model.answer(QUESTION, "base", max_new_tokens=4)
        for call in (lambda: model.load("a", four["a"]), lambda: open_routed(tiny_model(), {"a": four["a"]})):
            with pytest.raises(
                InputError, match="a model by itself has no adapters; open a run, and the others beside it"
            ):
                call()


def test_adapters_on_the_command_line_are_named_runs(monkeypatch):
    passed: list = []
    monkeypatch.setattr(qlora, "chat", lambda *args, **routing: passed.append(routing) or "yes", raising=False)
    words = ["chat", "runs/a", "--prompt", "x", "--use", "b", "--adapter", "b=runs/b", "--adapter", "c=x=y"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert passed == [{"adapters": {"b": "runs/b", "c": "x=y"}, "adapter": "b"}]
    for pair, expected in (
        ("b", "write NAME=RUN"),
        ("=runs/b", "write NAME=RUN"),
        ("c=", "write NAME=RUN"),
        ("b=z", "twice"),
    ):
        found = CliRunner().invoke(cli.app, [*words, "--adapter", pair])
        assert isinstance(found.exception, InputError)
        assert expected in str(found.exception)


def test_importing_everything_leaves_pythons_open_alone():
    namespace: dict = {}
    exec("from qlora import *", namespace)
    assert "open" not in namespace
    assert qlora.open is not builtins.open


# ---- in the terminal -------------------------------------------------------------------------------------------------


def typed(monkeypatch, lines):
    left = iter(lines)

    def read(prompt):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_the_commands_of_a_conversation(four, monkeypatch, capsys):
    lines = [QUESTION, "/adapter b", QUESTION, f"/adapter {four['c']}", "/adapter", "/adapter nowhere", "/load d",
             f"/load d {four['d']}", f"/load d {four['d']}", "/adapter d", "/unload d", "/unload", "/adapter base", QUESTION,
             f"/adapter {four['a']}"]  # fmt: skip
    typed(monkeypatch, lines)
    talk(four["a"], max_new_tokens=4, adapters={"b": four["b"]})
    c = str(four["c"])
    said = capsys.readouterr()
    notes = [line for line in said.err.splitlines() if line.startswith(("answering", "qlora:"))]
    assert notes == [
        "answering with b; loaded: a, b, base",
        f"answering with {c}; loaded: a, b, {c}, base",
        f"answering with {c}; loaded: a, b, {c}, base",
        f"qlora: no adapter called 'nowhere' is loaded (a, b, {c}, base), and no run at nowhere",
        "qlora: /load NAME RUN: a name for the adapter, and the folder of its run",
        f"answering with {c}; loaded: a, b, {c}, d, base",
        "qlora: an adapter called 'd' is loaded already; unload it, or give this one another name",
        f"answering with d; loaded: a, b, {c}, d, base",
        f"answering with the base model alone; loaded: a, b, {c}, base",
        "qlora: /unload NAME: the name of the adapter",
        f"answering with the base model alone; loaded: a, b, {c}, base",
        f"answering with a; loaded: a, b, {c}, base",
    ]
    assert len(said.out.splitlines()) == 3


def test_one_prompt_is_answered_by_the_adapter_that_is_named(four, alone, tiny_model):
    adapters = {"b": four["b"]}
    assert chat(four["a"], QUESTION, "Count.", 12, adapters=adapters, adapter="b") == alone["b"]
    assert chat(four["b"], QUESTION, "Count.", 12) == alone["b"]
    plain = chat(four["a"], QUESTION, "Count.", 12, adapter="base")
    assert plain not in alone.values()


def test_torch_is_left_as_it_was(opened):
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    opened.answer(QUESTION, "b", max_new_tokens=2)
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before
