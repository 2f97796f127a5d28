"""Base and tuned on one question: each answer is its own, the order is drawn, and a vote counts for whom it was given."""

import json

import pytest

from qlora.evaluation.sampling import Sampling
from qlora.jobs.opening.routed import open_routed
from qlora.jobs.talking import side_by_side
from qlora.jobs.talking.side_by_side import SideBySide
from qlora.jobs.talking.votes import Votes
from qlora.system.errors import InputError
from qlora.system.storage import add_line

PROMPT = "What is 1 plus 2?"


@pytest.fixture
def model(trained_once):
    with open_routed(trained_once("llama").path) as opened:
        yield opened


@pytest.fixture
def compared(model, tmp_path):
    return SideBySide(model, tmp_path / "votes.jsonl")


def ask(compared, blind=True):
    question = compared.ask(PROMPT, None, Sampling(8), blind)
    said = {}
    for side, text in compared.answers(question):
        assert text.startswith(said.get(side, "").rstrip("\ufffd ")), "it grows"
        said[side] = text
    return question, said


def test_each_side_is_the_answer_of_whose_it_is(compared, model):
    expected = {name: model.answer(PROMPT, adapter, max_new_tokens=8) for name, adapter in BOTH.items()}
    assert expected["base"] != expected["tuned"]
    orders = set()
    for _ in range(20):
        question, said = ask(compared)
        assert said == dict(zip(("left", "right"), [expected[who] for who in question.order], strict=True))
        assert question.answers == expected
        orders.add(question.order)
        if len(orders) == 2:
            break
    assert len(orders) == 2
    assert {ask(compared, blind=False)[0].left for _ in range(2)} == {"base"}


BOTH = {"base": "base", "tuned": None}


def test_a_vote_counts_for_whom_it_was_given(compared, model, tmp_path, monkeypatch):
    lefts = iter(["tuned", "base", "base"])
    monkeypatch.setattr(side_by_side.random, "choice", lambda both: next(lefts))
    for better in ("left", "left", "tie"):
        question, _ = ask(compared)
        compared.vote(question, better)
    assert compared.votes.counts == {"base": 1, "tuned": 1, "tie": 1}
    with pytest.raises(InputError, match="this question was voted on"):
        compared.vote(question, "right")
    first = json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[0])
    assert (first["left"], first["better"], first["winner"]) == ("tuned", "left", "tuned")
    assert (first["prompt"], first["max_new_tokens"], set(first["answers"])) == (PROMPT, 8, {"base", "tuned"})
    # another process reads them; votes on another training of the run are in the file, and do not count
    assert SideBySide(model, tmp_path / "votes.jsonl").votes.counts == compared.votes.counts
    other = Votes(tmp_path / "votes.jsonl", {"adapter_model.safetensors": "0"})
    assert (other.in_words(), other.others) == ("no votes yet", 3)
    assert compared.votes.in_words() == (
        "3 votes: tuned 1, base 1, tie 1; the tuned model won 50% of 2 that were decided (9% to 91%)"
    )


def test_what_unicode_calls_a_line_end_ends_no_vote(tmp_path):
    file = tmp_path / "votes.jsonl"
    vote = {"weights": {}, "winner": "tie", "prompt": "a\u2028b\u0085c"}
    add_line(file, vote)
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 1  # to a reader that ends lines there
    file.write_text(text + json.dumps(vote, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "\u2028" in file.read_text(encoding="utf-8")  # else nothing is tested
    assert Votes(file, {}).given == [vote, vote]


def test_no_vote_without_two_answers_and_none_is_lost(compared, tmp_path):
    question = compared.ask(PROMPT, None, Sampling(8))
    with pytest.raises(InputError, match="there are not two answers yet"):
        compared.vote(question, "left")
    with pytest.raises(InputError, match="type a question first"):
        compared.ask("  ", None, Sampling(8))
    with pytest.raises(InputError, match="only blind answers are voted on"):
        compared.vote(ask(compared, blind=False)[0], "left")
    question, _ = ask(compared)
    compared.votes.file = tmp_path / "none" / "votes.jsonl"
    with pytest.raises(InputError, match="No such file or directory; the vote was not kept"):
        compared.vote(question, "left")
    assert compared.votes.counts == {"base": 0, "tuned": 0, "tie": 0}
    assert not question.voted


@pytest.mark.parametrize("how", ["stopped", "closed"])
def test_stopped_or_closed_in_between_the_model_stops_and_is_free(compared, model, how):
    question = compared.ask(PROMPT, None, Sampling(400), blind=False)
    answers = compared.answers(question)
    _, so_far = next(answers)
    if how == "closed":
        answers.close()
    else:
        question.stopped.set()
        *_, (_, so_far) = [(None, so_far), *answers]
    assert len(so_far) < 200
    assert not question.answers
    assert isinstance(model.answer(PROMPT, max_new_tokens=2), str)  # nobody has it any more


def test_what_has_no_base_beside_it_is_refused(tiny_model, model, tmp_path):
    with (
        open_routed(tiny_model("llama")) as plain,
        pytest.raises(InputError, match="is a model by itself, with no base"),
    ):
        SideBySide(plain, tmp_path / "votes.jsonl")
    model.choose("base")
    with pytest.raises(InputError, match="answers as its base; --web compares a run with its base"):
        SideBySide(model, tmp_path / "votes.jsonl")


def test_a_file_of_something_else_is_not_written_to(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl line 1: not a vote; give another file with --votes"):
        SideBySide(model, tmp_path / "rows.jsonl")
