"""Questions with choices: the prompts that lm-eval makes, likelihoods against one row at a time, and what is counted."""

import math

import pytest
import torch

from qlora.data.multiple_choice import Question
from qlora.evaluation import choices, likelihood
from qlora.system.errors import InputError

TWO = Question(1, " Two? ", ("1", "2", "33"), 1, "number_theory")
EXAMPLES = [
    Question(1, "One?", ("1", "2", "3"), 0, "number_theory"),
    Question(2, "Oui?", ("non", "oui", "si"), 1, "french"),
    TWO,
    Question(4, "Three?", ("3", "2", "1"), 0, "number_theory"),
]


def test_the_prompt_is_that_of_lm_evals_mmlu():
    asked = choices.ask(TWO, EXAMPLES, 1, by_text=False)
    assert asked.text == (
        "The following are multiple choice questions (with answers) about number theory.\n\n"
        "One?\nA. 1\nB. 2\nC. 3\nAnswer: A\n\nTwo?\nA. 1\nB. 2\nC. 33\nAnswer:"
    )
    assert [*asked.choices] == ["A", "B", "C"]


def test_by_text_the_prompt_is_that_of_its_mmlu_continuation():
    asked = choices.ask(TWO, EXAMPLES, 2, by_text=True)
    assert asked.text == (
        "The following are questions (with answers) about number theory.\n\n"
        "Question: One?\nAnswer: 1\n\nQuestion: Three?\nAnswer: 3\n\nQuestion: Two?\nAnswer:"
    )
    assert [*asked.choices] == ["1", "2", "33"]


def test_examples_are_of_the_subject_and_never_the_question_itself():
    assert choices.ask(TWO, EXAMPLES, 0, False).shown == []
    plain = Question(9, "Which?", ("a", "b"), 0)
    assert len(choices.ask(plain, EXAMPLES, 4, False).shown) == 4
    assert len(choices.ask(TWO, [plain], 1, False).shown) == 1  # which says of no subject
    with pytest.raises(
        InputError, match=r"--shots 3: there are 2 examples of the subject 'number_theory' for the .* line 1"
    ):
        choices.ask(TWO, EXAMPLES, 3, False)


def test_under_a_chat_template_examples_are_turns_and_a_choice_follows_the_prompt(tokenizer):
    asked = choices.ask(TWO, EXAMPLES, 1, by_text=False)
    assert [one["role"] for one in asked.messages] == ["user", "assistant", "user"]
    assert asked.messages[0]["content"].endswith("number theory.\n\nOne?\nA. 1\nB. 2\nC. 3\nAnswer:")
    for (prompt, choice), letter in zip(asked.tokens(tokenizer, chat=True), "ABC", strict=True):
        assert tokenizer.decode(prompt).endswith("C. 33\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(choice) == letter
    for (prompt, choice), letter in zip(asked.tokens(tokenizer, chat=False), "ABC", strict=True):
        assert tokenizer.decode(prompt) == asked.text
        assert tokenizer.decode(choice) == f" {letter}"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_likelihood_is_the_product_of_what_one_row_alone_gives_each_token(load_model, family):
    model = load_model(family, None).float()
    pairs = [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6], [7, 9]), ([11], [12, 13, 14, 15]), ([5] * 20, [300, 2])]
    expected = []
    for context, continuation in pairs:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected.append(sum(logits_TV[at, token].item() for at, token in zip(places, continuation, strict=True)))
    widths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert likelihood.log_likelihoods(model, pairs, 2) == pytest.approx(expected, abs=1e-4)  # float32, other shapes
    hook.remove()
    assert widths == [(2, 21), (1, 3)]  # the first three are given the same tokens, and are one row
    assert len({round(value, 2) for value in expected}) == len(expected)


def test_what_is_counted(monkeypatch, load_model, tokenizer):
    """The likeliest, and the likeliest a character; loss and bytes of the right one."""
    asked = [choices.ask(one, (), 0, by_text=True) for one in (TWO, Question(2, "So?", ("no", "yes, so"), 1))]
    monkeypatch.setattr(likelihood, "log_likelihoods", lambda *args: [-3.0, -1.0, -1.5, -2.0, -4.0])
    found = choices.score(load_model("llama", None), tokenizer, asked, chat=False, batch_size=2)
    assert found.answers == ["2", "no"]
    assert found.references == ["2", "yes, so"]
    assert found.parts["acc"].tolist() == [[1, 1], [0, 1]]
    assert found.parts["acc_norm"].tolist() == [[0, 1], [1, 1]]  # -1/1, -1.5/2: the third; -2/2, -4/7: the second
    as_json = found.to_json()
    assert as_json["metrics"]["acc"]["value"] == 0.5
    assert as_json["tokens"] == sum(len(one.tokens(tokenizer, False)[one.answer][1]) for one in asked)
    assert as_json["bits_per_byte"] == pytest.approx(5 / math.log(2) / 8)


def test_a_question_beyond_the_last_position_is_refused_and_not_cut(load_model, tokenizer):
    asked = choices.ask(Question(7, "x " * 600, ("a", "b"), 0), (), 0, False)
    with pytest.raises(InputError, match=r"in line 7 is too long: .* the model has 512 positions; take fewer --shots"):
        choices.score(load_model("llama", None), tokenizer, [asked], False, 2)
