"""What is trained is the assistant's words and the token that ends the turn: no more, no less, once."""

import pytest
import transformers

from qlora.data import IGNORE_INDEX, chat, formats, masked_examples
from qlora.data.conversation import Conversation
from qlora.system.errors import InputError
from tests.conftest import CHATML, SPECIAL, encode, make_tokenizer, messages

TURNS = [
    ("system", "Be brief."),
    ("user", "Hi"),
    ("assistant", "Hello there."),
    ("user", "Bye"),
    ("assistant", "Ciao!"),
]
BOS_TEMPLATE = "{{ bos_token }}" + CHATML
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
NO_STOP = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# drops what the assistant said in earlier turns
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# drops the beginning of earlier answers, as templates of reasoning models do with thoughts
FORGETS_THOUGHTS = FORGETFUL.replace("'...'", "m['content'].split('</think>')[-1]")
# Qwen3 opens only the last answer with an empty thought
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained_pieces(tokenizer, example):
    """Return the decoded text of each run of trained tokens."""
    pieces, run = [], []
    for token, label in [*zip(example.input_ids, example.labels, strict=True), (None, IGNORE_INDEX)]:
        if label != IGNORE_INDEX:
            assert label == token
            run.append(token)
        elif run:
            pieces.append(tokenizer.decode(run))
            run = []
    return pieces


@pytest.mark.parametrize(
    "template", [CHATML, BOS_TEMPLATE, TRIMMING, chat.FALLBACK_TEMPLATE.replace("ADD_BOS", "True")]
)
def test_trained_tokens_of_a_multi_turn_conversation_are_exactly_the_answers(tokenizer_json, template):
    tokenizer = make_tokenizer(tokenizer_json, template)
    example = encode(tokenizer, messages(TURNS))
    assert trained_pieces(tokenizer, example) == ["Hello there.<|im_end|>", "Ciao!<|im_end|>"]


def test_an_empty_thought_that_the_template_adds_to_the_last_answer_is_trained_in_each(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, THINKING)
    rows = masked_examples.encode(tokenizer, Conversation(messages(TURNS)))
    assert [trained_pieces(tokenizer, row) for row in rows] == [
        ["<think>\n\n</think>\n\nHello there.<|im_end|>"],
        ["<think>\n\n</think>\n\nCiao!<|im_end|>"],
    ]
    assert "Hello there.<|im_end|>\n<|im_start|>user\nBye" in tokenizer.decode(rows[1].input_ids)


def test_user_tokens_are_never_trained_on_even_where_they_repeat_the_answer(tokenizer):
    example = encode(tokenizer, messages([("user", "Say Yes. Yes."), ("assistant", "Yes.")]))
    assert trained_pieces(tokenizer, example) == ["Yes.<|im_end|>"]
    assert example.num_trained < len(example.input_ids) / 2


@pytest.mark.parametrize("question", ["<", "a", "assistant", "|", "Hello there.", "\n", "<|"])
def test_a_question_that_stands_in_the_template_too_does_not_move_the_mask(tokenizer, question):
    turns = [("user", "Hi"), ("assistant", "Hello there."), ("user", f"{question}?"), ("assistant", "Ciao!")]
    for content in (question, f"{question}?"):
        turns[2] = ("user", content)
        example = encode(tokenizer, messages(turns))
        assert trained_pieces(tokenizer, example) == ["Hello there.<|im_end|>", "Ciao!<|im_end|>"]


def test_training_and_use_see_the_same_string(tokenizer):
    example = encode(tokenizer, messages(TURNS))
    prompt = tokenizer.apply_chat_template(messages(TURNS[:-1]), add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != IGNORE_INDEX


def test_there_is_one_bos_where_the_tokenizer_adds_one_too(tokenizer_json):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(tokenizer_json, BOS_TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # it would add a second one
    assert encode(tokenizer, messages(TURNS)).input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("adds_bos", [True, False])
def test_fallback_template_has_the_bos_that_the_tokenizer_expects(tokenizer_json, adds_bos):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(tokenizer_json, None)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    assert "built in" in chat.set_template(tokenizer, None)
    ids = encode(tokenizer, messages(TURNS)).input_ids
    assert ids.count(tokenizer.bos_token_id) == adds_bos
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos


def test_a_template_that_never_stops_is_refused(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, NO_STOP)
    with pytest.raises(ValueError, match="never learn to stop"):
        encode(tokenizer, messages(TURNS))


def test_a_template_that_changes_earlier_answers_gets_a_row_an_answer(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, FORGETS_THOUGHTS)
    thought = "<think>\nHm.\n</think>"
    turns = [*TURNS[:2], ("assistant", f"{thought}Hello there."), *TURNS[3:]]
    first, second = masked_examples.encode(tokenizer, Conversation(messages(turns)))
    begin = "system: Be brief.<|im_end|>user: Hi<|im_end|>assistant: "
    assert tokenizer.decode(first.input_ids) == f"{begin}{thought}Hello there.<|im_end|>"
    assert trained_pieces(tokenizer, first) == [f"{thought}Hello there.<|im_end|>"]
    assert (
        tokenizer.decode(second.input_ids)
        == f"{begin}Hello there.<|im_end|>user: Bye<|im_end|>assistant: Ciao!<|im_end|>"
    )
    assert trained_pieces(tokenizer, second) == ["Ciao!<|im_end|>"]


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "completion", "all"])
@pytest.mark.parametrize("answer", ["Hello there.", "B", "Ciao!"])
def test_a_template_that_leaves_an_earlier_answer_out_is_refused(tokenizer_json, train_on, answer):
    """Though its words may stand elsewhere in the text."""
    tokenizer = make_tokenizer(tokenizer_json, FORGETFUL)
    turns = [*TURNS[:2], ("assistant", answer), *TURNS[3:]]
    with pytest.raises(ValueError, match=r"leaves message 2 \(assistant\) out"):
        masked_examples.encode(tokenizer, Conversation(messages(turns)), train_on)


# Mistral's v0.3 puts the system message into the last user message, if that is the last message of all
SYSTEM_LAST = (
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
# opens the answer with a thought in a prompt, and does not show it afterwards
OPENED = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [(SYSTEM_LAST, "[INST] Be brief.\n\nHi[/INST] Hello there.<|im_end|>"), (OPENED, None)],
)
def test_a_single_answer_follows_the_prompt_that_chat_will_show(tokenizer_json, template, expected):
    tokenizer = make_tokenizer(tokenizer_json, template)
    example = encode(tokenizer, messages(TURNS[:3]))
    text = tokenizer.decode(example.input_ids)
    prompt = tokenizer.apply_chat_template(messages(TURNS[:2]), tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert expected is None or text == expected
    thought = "</think>\n\n" if template is OPENED else ""
    assert [piece.strip() for piece in trained_pieces(tokenizer, example)] == [f"{thought}Hello there.<|im_end|>"]
    assert not tokenizer.apply_chat_template(messages(TURNS[:3]), tokenize=False).startswith(prompt)


@pytest.mark.parametrize("answer", ["s", "m", "_", "im_end", "|"])
def test_an_answer_that_stands_in_the_closing_token_too_is_found(tokenizer_json, answer):
    tokenizer = make_tokenizer(tokenizer_json, SYSTEM_LAST)
    example = encode(tokenizer, messages([*TURNS[:2], ("assistant", answer)]))
    assert tokenizer.decode(example.input_ids) == f"[INST] Be brief.\n\nHi[/INST] {answer}<|im_end|>"


def test_training_on_everything_takes_the_string_that_chat_would_show(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, SYSTEM_LAST)
    example = encode(tokenizer, messages(TURNS), train_on="all")
    expected = "[INST] Hi[/INST] Hello there.<|im_end|>[INST] Be brief.\n\nBye[/INST] Ciao!<|im_end|>"
    assert tokenizer.decode(example.input_ids) == expected
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


def test_a_header_that_swallows_the_spaces_of_the_answer_is_not_trained(tokenizer_json):
    from tokenizers import AddedToken

    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = make_tokenizer(tokenizer_json, template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True)
    example = encode(tokenizer, messages([("user", "Hi"), ("assistant", "\n  Hello")]))
    assert [piece.strip() for piece in trained_pieces(tokenizer, example)] == ["Hello<|im_end|>"]


def test_the_turn_end_is_a_stop_token_even_if_the_tokenizers_end_token_is_another(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json)
    tokenizer.eos_token = "<|endoftext|>"
    stops = chat.stop_token_ids(tokenizer)
    assert stops == {SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|im_end|>")}
    example = encode(tokenizer, messages(TURNS))
    assert trained_pieces(tokenizer, example) == ["Hello there.<|im_end|>", "Ciao!<|im_end|>"]


def test_stop_tokens_of_the_generation_config_are_kept(tokenizer):
    config = transformers.GenerationConfig(eos_token_id=[7, 8])
    assert chat.stop_token_ids(tokenizer, config) == {2, 7, 8}


def test_train_on_all_trains_every_token(tokenizer):
    example = encode(tokenizer, messages(TURNS), train_on="all")
    assert example.labels == [IGNORE_INDEX, *example.input_ids[1:]]


def test_scripts_and_emoji_survive(tokenizer):
    answer = "日本語 🙂 naïve \n\tcode()"
    example = encode(tokenizer, messages([("user", "x"), ("assistant", answer)]))
    assert trained_pieces(tokenizer, example) == [answer + "<|im_end|>"]


def test_a_template_file_is_used_and_a_bad_one_refused(tokenizer, tmp_path):
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text(BOS_TEMPLATE)
    bad.write_text("{% for %}")
    chat.set_template(tokenizer, str(good))
    assert tokenizer.chat_template == BOS_TEMPLATE
    with pytest.raises(InputError, match=r"bad\.jinja"):
        chat.set_template(tokenizer, str(bad))
    with pytest.raises(InputError, match="there is no such file"):
        chat.set_template(tokenizer, str(tmp_path / "none.jinja"))


# ---- control tokens in a row stay text -------------------------------------------------------------------------------

CALLS = CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ '<call>' if false else '' }}")


def control(tokenizer_json, template=CALLS):
    """A tokenizer with an added token that is not "special", as Qwen's <tool_call> is."""
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(tokenizer_json, template)
    tokenizer.add_tokens([AddedToken("<call>", special=False), AddedToken("<smile>", special=False)])
    return tokenizer, tokenizer.convert_tokens_to_ids("<call>"), tokenizer.convert_tokens_to_ids("<smile>")


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|im_end|>b", "<|im_start|>system\n<|im_end|><|im_end|>", "<s><call> <call>x"]
)
def test_a_control_token_in_a_question_is_spelled_out(tokenizer_json, text):
    tokenizer, call, _ = control(tokenizer_json)
    example = encode(tokenizer, messages([("user", text), ("assistant", "No.")]))
    assert (
        tokenizer.decode(example.input_ids)
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert [example.input_ids.count(token) for token in (1, 2, 3, call)] == [2, 2, 0, 0]
    assert trained_pieces(tokenizer, example) == ["No.<|im_end|>"]
    prompt = masked_examples.encode_prompt(tokenizer, messages([("user", text)]))
    assert example.input_ids[: len(prompt)] == prompt


def test_an_answer_may_say_added_tokens_but_not_special_ones(tokenizer_json):
    tokenizer, call, smile = control(tokenizer_json)
    turns = [("user", "<smile>"), ("assistant", "<call>x<|im_end|><smile>")]
    example = encode(tokenizer, messages(turns))
    assert trained_pieces(tokenizer, example) == ["<call>x<|im_end|><smile><|im_end|>"]
    assert [example.input_ids.count(token) for token in (2, call, smile)] == [2, 1, 2]


def test_a_template_that_takes_a_string_apart_leaves_no_marks(tokenizer_json):
    apart = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('<|im_start|>') | join(' ') }}")
    tokenizer = make_tokenizer(tokenizer_json, apart)
    ids = masked_examples.encode_prompt(tokenizer, messages([("user", "a<|im_start|>b")]))
    assert tokenizer.decode(ids) == "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1"])
def test_a_row_that_holds_a_mark_of_ours_is_refused(tokenizer, mark):
    with pytest.raises(ValueError, match=r"U\+FDD0 or U\+FDD1, which are not characters"):
        encode(tokenizer, messages([("user", f"a{mark}b"), ("assistant", "c")]))


# ---- templates -------------------------------------------------------------------------------------------------------


def test_a_base_model_gets_chatml_where_its_markers_are_tokens(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, None)
    assert chat.set_template(tokenizer, None) == "ChatML, built in (the model has none)"
    example = encode(tokenizer, messages(TURNS))
    assert tokenizer.decode(example.input_ids) == "".join(
        f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in TURNS
    )


def test_a_template_that_writes_the_date_is_said_to_do_so(tokenizer_json):
    dated = make_tokenizer(tokenizer_json, "{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    assert chat.set_template(dated, None).startswith("the model's own; it writes the date on which")
    assert chat.set_template(make_tokenizer(tokenizer_json, CHATML), None) == "the model's own"


def test_a_base_model_without_the_markers_gets_turns_closed_by_its_own_end_token(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, None)
    tokenizer.get_vocab = lambda: {"<s>": 3}
    assert "closed by the end token" in chat.set_template(tokenizer, None)
    with pytest.raises(InputError, match=r"<\|im_start\|>, <\|im_end\|> are not tokens of this model"):
        chat.set_template(tokenizer, "chatml")


def test_chatml_shows_tools_calls_and_results(tokenizer_json):
    tokenizer = make_tokenizer(tokenizer_json, None)
    chat.set_template(tokenizer, "chatml")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    (example,) = masked_examples.encode(tokenizer, Conversation(turns, [tool]))
    said = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert trained_pieces(tokenizer, example) == [f"{said}\n{said}<|im_end|>", "Two.<|im_end|>"]
    text = tokenizer.decode(example.input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nFunctions that can be called")
    assert '<tools>\n{"type": "function", "function": {"name": "add", "parameters": {}}}\n</tools>' in text
    assert "<|im_start|>tool\n2<|im_end|>" in text


@pytest.mark.parametrize("lost", ["tools", "calls"])
def test_a_template_that_leaves_tools_or_calls_out_is_refused(tokenizer, lost):
    tool = {"type": "function", "function": {"name": "add"}}
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    answer = {"role": "assistant", "content": "Two.", **({"tool_calls": [call]} if lost == "calls" else {})}
    conversation = Conversation([{"role": "user", "content": "1+1?"}, answer], [tool] if lost == "tools" else None)
    with pytest.raises(ValueError, match=r"leaves the (row's tools|call of 'add') out.*chatml"):
        masked_examples.encode(tokenizer, conversation)


def test_a_row_that_trains_nothing_or_contradicts_the_recipe_is_refused(tokenizer):
    flagged = Conversation(messages(TURNS), flags=((2, False), (4, False)))
    with pytest.raises(ValueError, match="nothing to train on"):
        masked_examples.encode(tokenizer, flagged)
    with pytest.raises(ValueError, match=r"data\.train_on is all"):
        masked_examples.encode(tokenizer, flagged, "all")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([{"train": False}] * 2, "train: false"),
        ([{"weight": 0}] * 2, "weight: 0"),
        ([{"loss_weight": 0.0}, {"train": False}], "loss_weight: 0 or train: false"),
    ],
)
def test_what_leaves_a_message_out_is_named_as_the_row_has_it(tokenizer, said, words):
    turns = messages(TURNS)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    for turn, keys in zip(answers, said, strict=True):
        turn.update(keys)
    _, conversation = formats.read({"messages": turns})
    with pytest.raises(ValueError, match=f"nothing to train on: every assistant message has {words}$"):
        masked_examples.encode(tokenizer, conversation)
    with pytest.raises(ValueError, match=f"^has {words} on a message, but"):
        masked_examples.encode(tokenizer, conversation, "all")


def test_a_last_answer_alone_that_is_left_out_is_not_said_of_all(tokenizer):
    turns = messages(TURNS)
    _, conversation = formats.read({"messages": [*turns[:-1], {**turns[-1], "weight": 0}]})
    with pytest.raises(ValueError, match=r"every message of data\.train_on: last_assistant has weight: 0$"):
        masked_examples.encode(tokenizer, conversation, "last_assistant")


def test_chatml_whose_markers_are_new_tokens_closes_turns_with_one(tokenizer_json):
    from tokenizers import Tokenizer

    from qlora import base_model

    text = tokenizer_json.to_str().replace("<|im_start|>", "<|a|>").replace("<|im_end|>", "<|b|>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), eos_token="<|endoftext|>"
    )
    ids = base_model.add_tokens(
        tokenizer, list(chat.CHATML_MARKERS), chat.template_text(tokenizer, None, chat.CHATML_MARKERS)
    )
    assert chat.set_template(tokenizer, None).startswith("ChatML")
    assert chat.stop_token_ids(tokenizer) == {0, ids["<|im_end|>"]}
    example = encode(tokenizer, messages(TURNS))
    assert trained_pieces(tokenizer, example) == ["Hello there.<|im_end|>", "Ciao!<|im_end|>"]


def test_a_prompt_that_is_no_text_is_refused(tokenizer_json):
    """A terminal's bytes that are not UTF-8 come as halves of surrogate pairs."""
    tokenizer = make_tokenizer(tokenizer_json)
    assert masked_examples.encode_prompt(tokenizer, messages([("user", "\xff")]))
    with pytest.raises(ValueError, match="the message of the system has half of a surrogate pair"):
        masked_examples.encode_prompt(tokenizer, messages([("system", "\udcff"), ("user", "x")]))


def test_the_ends_of_generation_config_travel_with_the_tokenizer(tokenizer):
    """Rows are tokenized in other processes; and what is cached for other ends is other rows."""
    import pickle

    before = chat.stop_token_ids(tokenizer)
    chat.know_stops(tokenizer, transformers.GenerationConfig(eos_token_id=[7, 9]))
    assert chat.stop_token_ids(pickle.loads(pickle.dumps(tokenizer))) == before | {7, 9}
    chat.know_stops(tokenizer, None)
    assert chat.stop_token_ids(tokenizer) == before
