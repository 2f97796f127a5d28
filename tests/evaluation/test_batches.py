"""Where memory runs out, fewer rows go together, to the same answers."""

import pytest
import torch

from qlora.evaluation import generate
from qlora.evaluation.batches import in_batches
from qlora.system import events, memory
from qlora.system.errors import DoesNotFit


def with_room_for(most, seen):
    def compute(some):
        if len(some) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen.append(list(some))

    return compute


def test_a_batch_that_does_not_fit_goes_again_in_halves_and_so_do_all_later_ones():
    seen, said = [], []
    with events.heard_by(said.append):
        assert in_batches(with_room_for(3, seen), range(20), 9) == 2
    assert [one for some in seen for one in some] == list(range(20))
    assert {len(some) for some in seen} == {2}
    assert [one.text for one in said] == [
        "out of memory with 9 rows together (2.00 GiB requested): 4 from here on, as with --batch-size 4",
        "out of memory with 4 rows together (2.00 GiB requested): 2 from here on, as with --batch-size 2",
    ]


def test_one_row_that_does_not_fit_is_refused_and_other_errors_are_not_hidden():
    with pytest.raises(DoesNotFit, match=r"out of memory with one row at a time: 2\.00 GiB requested"):
        in_batches(with_room_for(0, []), range(5), 4)
    with pytest.raises(ZeroDivisionError):
        in_batches(lambda some: 1 / 0, range(5), 4)


def test_on_a_cpu_no_more_answers_are_begun_than_there_is_memory_for(load_model, tokenizer, monkeypatch):
    """The system would end the process, where a GPU refuses."""
    model = load_model("llama", None).float()
    prompts = [tokenizer(text).input_ids for text in ("Hi", "What is 1 plus 2?", "And 3 plus 4?", "?")]
    expected = generate.answers(model, tokenizer, prompts, {2}, 8)
    real, sizes, said = generate._generate, [], []
    monkeypatch.setattr(generate, "_generate", lambda *args: sizes.append(len(args[2])) or real(*args))
    of_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes
    num_tokens = max(map(len, prompts)) + 8
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * (3 * num_tokens * of_token))
    with events.heard_by(said.append):
        assert generate.answers(model, tokenizer, prompts, {2}, 8) == expected
    assert sizes == [3, 1]
    assert said[0].text.startswith("3 answers at a time, as with --batch-size 3: there is no memory for 25 of ")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    assert generate.answers(model, tokenizer, prompts[:2], {2}, 8) == expected[:2]
    assert sizes == [3, 1, 1, 1]


def test_answers_are_the_same_where_memory_was_short(load_model, tokenizer, monkeypatch):
    model = load_model("llama", None).float()
    prompts = [tokenizer(f"What is {n} plus {'1' * n}?").input_ids for n in range(7)]
    expected = generate.answers(model, tokenizer, prompts, {2}, 8, batch_size=1)
    real, sizes = generate._generate, []

    def short(model, tokenizer, ids, *rest):
        if len(ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(ids))
        return real(model, tokenizer, ids, *rest)

    monkeypatch.setattr(generate, "_generate", short)
    heard = []
    with events.heard_by(heard.append):
        assert generate.answers(model, tokenizer, prompts, {2}, 8, batch_size=5) == expected
    assert sizes == [2, 2, 2, 1]
    assert [one.done for one in heard if isinstance(one, events.Progress)] == [0, 2, 4, 6, 7, 7]
