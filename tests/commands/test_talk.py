"""A conversation in the terminal: it survives what cannot be answered, and Ctrl-C."""

import errno
import io
import itertools
import json
import os
import re
import signal
import sys

import pytest
import torch
import transformers

from qlora import base_model, data
from qlora.commands.talk import talk
from qlora.jobs.opening.routed import Routed
from qlora.recipe import Data, Model
from qlora.system import signals
from qlora.system.errors import Interrupted
from tests.conftest import CHATML, make_tokenizer

STRICT = (
    "{% for message in messages %}{% if 'secret' in message['content'] %}{{ raise_exception('not that') }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture
def folder(tiny_model, tokenizer_json, tmp_path):
    """Return a model whose template refuses one word."""
    import shutil

    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    make_tokenizer(tokenizer_json, STRICT + CHATML).save_pretrained(folder)
    return folder


def tokenizer_of(folder):
    return base_model.load_tokenizer(folder, Model(name_or_path=str(folder)))


def talked(monkeypatch, folder, lines, number=None, steps=(), tokens=8, **settings):
    """Return what was printed for the typed lines. number: the signal that comes before these steps of the model."""
    screen, calls = io.StringIO(), itertools.count(1)

    def at_step(module, args):
        if isinstance(module, transformers.LlamaForCausalLM) and next(calls) in steps:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr(sys, "stdout", screen)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(at_step)
    try:
        with signals.handled(leaves=True):
            talk(folder, None, tokens, **settings)
    finally:
        hook.remove()
    return screen.getvalue()


def test_a_refusal_of_the_template_is_printed_and_the_message_taken_back(monkeypatch, folder, capsys):
    alone = talked(monkeypatch, folder, ["What is 1 plus 2?"])
    assert alone.strip()
    assert talked(monkeypatch, folder, ["a secret", "What is 1 plus 2?"]) == alone
    assert "not that" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_taken_back(monkeypatch, folder, capsys):
    alone = talked(monkeypatch, folder, ["What is 1 plus 2?"])
    assert talked(monkeypatch, folder, ["x " * 600, "What is 1 plus 2?"]) == alone
    assert "the prompt is too long" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(monkeypatch, folder, capsys):
    first, second = "What is 1 plus 2?", "What is 3 plus 1?"
    whole = talked(monkeypatch, folder, [first], tokens=40).strip()
    after = talked(monkeypatch, folder, [second], tokens=40)
    lines = [first, "/reset", first, "/reset", second]
    found = talked(monkeypatch, folder, lines, signal.SIGINT, steps=(10, 20), tokens=40)
    one, two, rest = found.split("\n", 2)
    assert one == two  # the second Ctrl-C is as good as the first
    assert one
    assert whole.startswith(one.strip("\ufffd"))
    assert len(one) < len(whole)
    assert rest == after
    assert capsys.readouterr().err.count("[stopped]") == 2


def test_sigterm_ends_the_program(monkeypatch, folder):
    with pytest.raises(Interrupted):
        talked(monkeypatch, folder, ["What is 1 plus 2?"] * 2, signal.SIGTERM, steps=(3,))


def test_what_was_said_can_be_taken_back_and_saved_as_rows_to_train_on(monkeypatch, folder, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )  # no line end
    one, other = "What is 1 plus 2?", "What is 3 plus 1?"
    lines = [
        f"/save {file}",
        "/system Be brief.",
        one,
        other,
        "/undo",
        f"/save {file}",
        "/reset",
        other,
        f"/save {file}",
    ]
    answers = talked(monkeypatch, folder, lines).splitlines()
    rows = [
        [(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]]
        for line in file.read_text().splitlines()
    ]
    brief = ("system", "Be brief.")
    assert rows[1] == [brief, ("user", one), ("assistant", answers[0].strip())]
    assert rows[2] == [brief, ("user", other), ("assistant", answers[2].strip())]
    assert answers[1] != answers[2]  # the first was after another question
    section = Data(train=[{"path": str(file)}])
    assert len(data.Rows(data.load(section.train, tokenizer_of(folder), section, seed=0))) == 3
    said = capsys.readouterr().err
    assert "there is no answer yet, so there is nothing to save" in said
    assert f"taken back: {other}" in said
    assert re.search(r"\[8 tokens, [\d.]+ tokens/s; cut off there, /set max_new_tokens= allows more\]", said)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "/frobnicate",
            "no command /frobnicate; there are /help, /reset, /undo, /save, /system, /set, /base, /adapter",
        ),
        ("/save", "/save FILE.jsonl: the file that gets the conversation"),
        ("/save mine.txt", "mine.txt: a conversation becomes a line of JSON; name a file that ends in .jsonl"),
        ("/undo", "no question was asked yet"),
        ("/base", "is a model by itself, with no adapter that could be left out"),
        ("/set heat=3", "no setting 'heat'; there are max_new_tokens, temperature"),
        ("/set top_p=0.5", "top_p: without effect at temperature 0"),
        ("/help", "/system TEXT"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_and_the_conversation_goes_on(
    monkeypatch, folder, capsys, line, expected
):
    assert talked(monkeypatch, folder, [line, "What is 1 plus 2?"], tokens=4).strip()
    assert expected in capsys.readouterr().err


def test_a_message_may_begin_with_a_slash_after_a_space(monkeypatch, folder):
    asked = []
    monkeypatch.setattr(
        Routed, "answer", lambda self, messages, *_, **__: asked.append(messages[-1]["content"]) or "yes"
    )
    talked(monkeypatch, folder, [" /etc/passwd", "  indented", "/reset"])
    assert asked == ["/etc/passwd", "  indented"]


def test_a_failed_save_leaves_the_file_as_it_was(monkeypatch, folder, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    file.write_text("{}\n")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    talked(monkeypatch, folder, ["What is 1 plus 2?", f"/save {file}"])
    assert f"{file}: No space left on device; nothing was saved" in capsys.readouterr().err
    assert file.read_text() == "{}\n"


def test_settings_are_followed_from_flags_and_typed(monkeypatch, folder):
    prompt = "What is 1 plus 2?"
    greedy, drawn = talked(monkeypatch, folder, [prompt]), {"temperature": 2.0, "seed": 1}
    by_flags = talked(monkeypatch, folder, [prompt], **drawn)
    typed = talked(monkeypatch, folder, ["/set temperature=2 seed=1", prompt, "/reset", "/set temperature=0", prompt])
    assert typed == by_flags + greedy
    assert by_flags != greedy


def test_the_base_answers_the_last_question_and_the_conversation_stays(monkeypatch, trained_once):
    run, first, second = trained_once("llama").path, "What is 1 plus 2?", "What is 3 plus 1?"
    plain = talked(monkeypatch, run, [first, second]).splitlines()
    both = talked(monkeypatch, run, [first, "/base", second]).splitlines()
    alone = talked(monkeypatch, run, ["/adapter base", first, "/adapter", "/reset", first]).splitlines()
    assert both == [plain[0], alone[0], plain[1]]
    assert alone[1] == plain[0] != alone[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_at_the_prompt_quits(monkeypatch, folder, number):
    class Keyboard(io.StringIO):
        def readline(self, *args):
            os.kill(os.getpid(), number)
            return "hello\n"

    monkeypatch.setattr(sys, "stdin", Keyboard())
    with signals.handled(leaves=True):
        if number == signal.SIGINT:
            assert talk(folder) is None
        else:
            with pytest.raises(Interrupted):
                talk(folder)
