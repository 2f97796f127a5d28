"""The chat templates that trl ships, each with rows of many shapes: what is trained on shows all that the row says.

`python -m tests.data.test_matrix` prints the table of docs/data.md.
"""

import functools
import json
import re
from importlib import resources
from pathlib import Path

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer

from qlora.data import IGNORE_INDEX, chat
from qlora.data.conversation import Conversation
from qlora.data.masked_examples import encode
from tests.data.families import _byte_level_bpe

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
_MARKER = re.compile(r"<\|[\w/]+\|?>|<｜[^｜'\"]+｜>|<\|?/?[a-z_]+\|?>|</?s>|\[/?[A-Z_]+\]|<[A-Z_|]+>")
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
        },
    }
]
_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def _turn(role, content, **more):
    return {"role": role, "content": content, **more}


_ASKED = [_turn("user", "How warm is Paris?"), _turn("assistant", "", tool_calls=[_CALL])]
_TOLD = [*_ASKED, _turn("tool", '{"celsius": 31.5, "sky": "clear"}'), _turn("assistant", "It is 31.5 degrees.")]
SHAPES = {
    "plain": ([_turn("user", "Hello there."), _turn("assistant", "Good morning.")], None),
    "system": ([_turn("system", "Speak Latin."), _turn("user", "Hello."), _turn("assistant", "Salve.")], None),
    "two turns": (
        [_turn("user", "One?"), _turn("assistant", "Uno."), _turn("user", "Two?"), _turn("assistant", "Duo.")],
        None,
    ),
    "line break first": ([_turn("user", "A poem."), _turn("assistant", "\n\nRoses are red.")], None),
    "spaces first": ([_turn("user", "Code."), _turn("assistant", "    return 5")], None),
    "call": (_ASKED, _TOOLS),
    "text and call": ([_ASKED[0], _turn("assistant", "I ask.", tool_calls=[_CALL])], _TOOLS),
    "result": (_TOLD, _TOOLS),
    "result, no tools": (_TOLD, None),
    "inline thoughts": (
        [_turn("user", "Why?"), _turn("assistant", "<think>\nLet me see.\n</think>\n\nBecause.")],
        None,
    ),
    "thoughts": ([_turn("user", "Why?"), _turn("assistant", "Because.", reasoning_content="Let me see.")], None),
}


# what the models' generation_config.json names beside the token that ends an answer
GENERATION_ENDS = {
    "gptoss": ("<|return|>", "<|call|>"),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
}


@functools.cache
def templates():
    """Return {name: text} of trl's templates for a chat; those for training alone differ in marks that no text shows."""
    folder = resources.files("trl").joinpath("chat_templates")
    return {
        file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".jinja") and not file.name.endswith("_training.jinja")
    }


IN_CI = ("deepseekv3", "gemma3", "gptoss", "llama3_1", "qwen2_5", "qwen3_5_think")  # one of each kind


@functools.cache
def tokenizer_of(name):
    """Return a tokenizer that has the template's markers as tokens."""
    text = templates()[name]
    markers = sorted(set(_MARKER.findall(text)), key=len, reverse=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()),
        bos_token="<BOS>",
        eos_token="<EOS>",
        pad_token="<PAD>",
        clean_up_tokenization_spaces=False,
    )
    thought = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(m, normalized=False, special=m not in thought) for m in markers])
    tokenizer.chat_template = text
    ends = tokenizer.convert_tokens_to_ids(list(GENERATION_ENDS.get(name.partition("_")[0], ())))
    chat.know_stops(tokenizer, transformers.GenerationConfig(eos_token_id=ends or None))
    return tokenizer


def outcome(name, shape):
    """Return "right", "split" (a row an answer), or why the row is refused."""
    messages, tools = SHAPES[shape]
    tokenizer = tokenizer_of(name)
    try:
        examples = encode(tokenizer, Conversation(messages, tools), "assistant")
    except ValueError as error:
        return f"refused: {error}"
    _check_prompts(tokenizer, messages, tools, examples)
    text = re.sub(r"\s", "", " ".join(tokenizer.decode(example.input_ids) for example in examples))
    for piece in _pieces(messages, tools):
        assert re.sub(r"\s", "", piece) in text, (name, shape, piece)
    answers = [message for message in messages if message["role"] == "assistant"]
    trained = re.sub(r"\s", "", "".join(_trained(tokenizer, example) for example in examples))
    for message in answers:
        for piece in _said(message):
            assert trained.count(re.sub(r"\s", "", piece)) == 1, (name, shape, trained)
    for message in messages:
        if message["role"] in ("system", "user"):
            assert re.sub(r"\s", "", message["content"]) not in trained, (name, shape)
    return "split" if len(examples) > 1 else "right"


def _check_prompts(tokenizer, messages, tools, examples):
    """Assert that the tokens before each answer are those that chat makes of the messages before it, tokenized alone."""
    runs = [(example, start) for example in examples for start in _starts(example)]
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, (example, start) in zip(indices, runs, strict=True):
        prompt = chat.render(tokenizer, messages[:index], add_generation_prompt=True, tools=tools)
        assert example.input_ids[:start] == tokenizer(prompt, add_special_tokens=False).input_ids


def _starts(example):
    """Return where runs of trained tokens begin."""
    before = [IGNORE_INDEX, *example.labels]
    return [at for at, label in enumerate(example.labels) if label != IGNORE_INDEX and before[at] == IGNORE_INDEX]


def _said(message):
    """Return the pieces of an answer, each of which is to be trained once."""
    pieces = [piece for piece in re.split("</?think>", message["content"]) if piece.strip()]
    return [*pieces, *([message["reasoning_content"]] if "reasoning_content" in message else [])]


def _pieces(messages, tools):
    """Yield what must be found, written out here by hand and not by the code under test."""
    for message in messages:
        if message["role"] == "tool":
            yield from ("celsius", "31.5", "sky", "clear")
        else:
            yield from re.split("</?think>", message["content"])
        if "reasoning_content" in message:
            yield message["reasoning_content"]
        if "tool_calls" in message:
            yield from ("get_weather", "Paris")
    if tools:
        yield "get_weather"


def _trained(tokenizer, example):
    return tokenizer.decode([token for token in example.labels if token != IGNORE_INDEX])


def table():
    """Return the lines of the table in docs/data.md."""
    alike = {}
    for name in templates():
        alike.setdefault(tuple(outcome(name, shape).partition(":")[0] for shape in SHAPES), []).append(name)
    lines = [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in alike.items()]
    return [f"| template | {' | '.join(SHAPES)} |", f"|---|{'---|' * len(SHAPES)}", *lines]


@pytest.mark.parametrize("name", templates())
def test_what_is_trained_on_shows_all_that_the_row_says(name):
    found = {shape: outcome(name, shape) for shape in SHAPES}
    lines = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    [cells] = [cells for names, *cells in lines if len(cells) == len(SHAPES) and name in names.split(", ")]
    assert cells == [said.partition(":")[0] for said in found.values()], json.dumps(found, indent=2)


if __name__ == "__main__":
    print("\n".join(table()))
