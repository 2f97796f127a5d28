"""Answers do not depend on who shares the batch, and end where the model stops."""

import pytest
import torch

from qlora.evaluation import generate
from qlora.evaluation.sampling import Sampling
from qlora.system import events


@pytest.fixture
def prompts(tokenizer):
    texts = ["What is 1 plus 2?", "Hi", "Say something long, please, about 3 and 4 and 5.", "?"]
    return [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_answers_as_one_prompt_alone(load_model, tokenizer, prompts, family):
    model = load_model(family, None).float()  # float32: in bf16 near-ties depend on the batch shape
    alone = [generate.answers(model, tokenizer, [prompt], {2}, 12)[0] for prompt in prompts]
    heard = []
    with events.heard_by(heard.append):
        together = generate.answers(model, tokenizer, prompts, {2}, 12, batch_size=3)
    assert together == alone
    assert [event.done for event in heard] == [0, 3, 4, 4]
    assert len(set(alone)) > 1


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(load_model, tokenizer, prompts):
    model = load_model("llama", None).float()
    full = model.generate(torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = full[0, len(prompts[0]) :].tolist()
    stop = ids[3]
    expected = tokenizer.decode(ids[: ids.index(stop)], skip_special_tokens=True)
    assert generate.answers(model, tokenizer, [prompts[0]], {stop}, 6) == [expected]


def test_streaming_gives_the_same_text_in_pieces(load_model, tokenizer, prompts):
    model = load_model("llama", None).float()
    pieces = []
    text = generate.stream(model, tokenizer, prompts[2], {2}, Sampling(12), pieces.append)
    assert text == generate.answers(model, tokenizer, [prompts[2]], {2}, 12)[0]
    assert "".join(pieces).strip() == text.strip()


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 3.0, "suppress_tokens": [*range(5, 300)]},
        {"num_beams": 2},  # which cannot stream
        {"stop_strings": ["T"]},
        {"max_time": 1e-4},
        {"do_sample": True, "min_p": 0.9, "typical_p": 0.1},
    ],
    ids=lambda said: next(iter(said)),
)
def test_nothing_of_the_models_generation_config_changes_an_answer(load_model, tokenizer, prompts, said):
    model = load_model("llama", None).float()

    def answered():
        whole = generate.answers(model, tokenizer, prompts, {2}, 12)
        greedy = generate.stream(model, tokenizer, prompts[0], {2}, Sampling(12), str)
        drawn = generate.stream(model, tokenizer, prompts[0], {2}, Sampling(12, temperature=0.7, seed=1), str)
        return whole, greedy, drawn

    expected, ends = answered(), model.generation_config.eos_token_id
    model.generation_config.update(**said)
    own = model.generation_config
    assert answered() == expected
    assert model.generation_config is own
    assert own.eos_token_id == ends


def test_a_stop_token_that_is_no_special_one_is_not_streamed(load_model, tokenizer, prompts):
    model = load_model("llama", None).float()
    full = model.generate(torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    stop = full[0, len(prompts[0]) + 3].item()
    assert stop not in tokenizer.all_special_ids
    pieces = []
    text = generate.stream(model, tokenizer, prompts[0], {stop}, Sampling(6), pieces.append)
    assert "".join(pieces) == text
    assert tokenizer.decode([stop]) not in text
