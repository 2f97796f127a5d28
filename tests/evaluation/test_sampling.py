"""Answers are drawn as the settings say, the same ones by the same seed, and settings that mean nothing are refused."""

import pytest
import torch

from qlora.evaluation import generate
from qlora.evaluation.sampling import Sampling
from qlora.system.errors import InputError


@pytest.fixture
def answer(load_model, tokenizer):
    """Return answer(**settings) -> the text to one prompt, 16 tokens at most."""
    model, prompt = load_model("llama", None).float(), tokenizer("What is 1 plus 2?").input_ids
    paces = []

    def answered(**settings):
        chosen = Sampling(16, **settings)
        text = generate.stream(model, tokenizer, prompt, {2}, chosen, lambda piece: None, on_done=paces.append)
        assert (paces[-1].num_tokens, paces[-1].cut_off) == (16, True)
        assert paces[-1].tokens_per_second == 16 / paces[-1].seconds
        return text

    return answered


def test_a_seed_gives_the_same_answer_and_leaves_the_random_numbers_of_others(answer):
    greedy = answer()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = [answer(temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1]
    assert len({greedy, *drawn}) == 3


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.01}])
def test_what_leaves_one_token_is_greedy(answer, narrow):
    assert answer(**{"temperature": 1.0, "seed": 1} | narrow) == answer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature=hot", "temperature is 'hot'; give 0, or 0.01 to 10"),
        ("temperature=nan", "temperature is nan; give 0"),
        ("temperature=-1", "temperature is -1; give 0"),
        ("top_p=0", "top_p is 0; give a number above 0, up to 1"),
        ("top_k=0.5", r"top_k is 0.5; give a number from 0 \(all\)"),
        (
            "seed=-1 max_new_tokens=0",
            "max_new_tokens is 0; give a number from 1\n  seed is -1; give a number from 0, or none",
        ),
        ("temprature=1", "no setting 'temprature'; there are max_new_tokens, temperature, top_p, top_k, seed"),
        ("temperature", "temperature: write NAME=VALUE, such as temperature=0.7"),
    ],
)
def test_what_means_nothing_is_refused(text, expected):
    with pytest.raises(InputError, match=expected):
        Sampling().typed(text)


def test_what_has_no_effect_is_refused_where_all_is_given_at_once():
    with pytest.raises(InputError, match=r"top_p, seed: without effect at temperature 0.*give temperature too"):
        Sampling.of(top_p=0.5, seed=1)
    assert Sampling.of(temperature=0.7, top_p=0.5).in_effect()["top_p"] == 0.5
    typed = Sampling().typed("top_p=0.5 seed=7").typed("seed=none")
    assert (typed.seed, typed.without_effect.partition(":")[0]) == (None, "top_p")
    assert typed.in_effect() == {"max_new_tokens": 512}
