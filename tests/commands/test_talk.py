"""A conversation in the terminal: it survives what cannot be answered, and Ctrl-C."""

import io
import itertools
import os
import signal
import sys

import pytest
import torch
import transformers

from qlora.commands.talk import talk
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


def talked(monkeypatch, folder, lines, number=None, steps=(), tokens=8):
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
            talk(folder, None, tokens)
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
