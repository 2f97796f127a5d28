"""What each family's template writes and which part of it is trained, by hand: no Jinja, and nothing of qlora.

For every family three functions of plain strings:
    prompt(messages, tools)    the string that the model is asked to go on from: messages and the generation prompt
    answer(message)            what it has to say then: its words and the token that ends the turn
    finished(messages, tools)  the template's rendering of a conversation that nobody goes on with
"""

import json
import re
from dataclasses import dataclass

from tests.data.families import BY_NAME


@dataclass(frozen=True)
class Row:
    """One training row: `pieces` are (text, trained), `tail` is what the template writes after the last of them.

    The tail comes after everything that is trained, so a row may have it or not.
    """

    pieces: tuple[tuple[str, bool], ...]
    tail: str = ""

    @property
    def text(self):
        return "".join(text for text, _ in self.pieces)

    @property
    def runs(self):
        """Return the pieces, those that touch and are trained alike being one, up to the last that is trained."""
        runs = []
        for text, trained in self.pieces:
            if runs and runs[-1][1] == trained:
                runs[-1] = (runs[-1][0] + text, trained)
            elif text:
                runs.append((text, trained))
        return runs

    @property
    def trained(self):
        return [text for text, trained in self.runs if trained]


def compact(value, **options):
    return json.dumps(value, ensure_ascii=False, **options)


def thought_and_words(content):
    """Return ("why", "so") for "<think>\nwhy\n</think>\n\nso"; no thought is ""."""
    thought, closed, words = content.rpartition("</think>")
    return (thought.split("<think>")[-1].strip("\n"), words.lstrip("\n")) if closed else ("", content)


def qwen_calls(message):
    return [
        "<tool_call>\n"
        f'{{"name": "{call["function"]["name"]}", "arguments": {compact(call["function"]["arguments"])}}}\n'
        "</tool_call>"
        for call in message.get("tool_calls", [])
    ]


def qwen_tools(tools):
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
        + "".join(f"\n{compact(tool)}" for tool in tools)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )


def chatml(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def system_of(messages):
    """Return (system text or None, the messages after it)."""
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)


class SmolLM2:
    DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

    def prompt(self, messages, tools):
        return self.finished(messages, tools) + "<|im_start|>assistant\n"

    def answer(self, message):
        return message["content"] + "<|im_end|>"

    def finished(self, messages, tools):
        system, rest = system_of(messages)
        text = chatml("system", self.DEFAULT if system is None else system)
        return text + "".join(chatml(message["role"], message["content"]) for message in rest)


class Qwen25:
    DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

    def prompt(self, messages, tools):
        return self.finished(messages, tools) + "<|im_start|>assistant\n"

    def answer(self, message):
        words = [message["content"]] if message["content"] else []
        return "\n".join([*words, *qwen_calls(message)]) + "<|im_end|>"

    def finished(self, messages, tools):
        system, rest = system_of(messages)
        system = self.DEFAULT if system is None else system
        text = chatml("system", f"{system}\n\n{qwen_tools(tools)}" if tools else system)
        for message in rest:
            if message["role"] == "assistant":
                text += f"<|im_start|>assistant\n{self.answer(message)}\n"
            elif message["role"] == "tool":  # one result in a row is enough here
                text += chatml("user", f"<tool_response>\n{message['content']}\n</tool_response>")
            else:
                text += chatml("user", message["content"])
        return text


class Qwen3:
    """The newest answer opens with a thought, be it empty; later on the thought is gone."""

    def prompt(self, messages, tools):
        return self._before(messages, tools) + "<|im_start|>assistant\n"

    def answer(self, message):
        thought, words = thought_and_words(message["content"] or "")
        said = "\n".join([*([words] if words else []), *qwen_calls(message)])
        return f"<think>\n{thought}\n</think>\n\n{said}<|im_end|>"

    def finished(self, messages, tools):
        if messages[-1]["role"] != "assistant":
            return self._before(messages, tools)
        return self.prompt(messages[:-1], tools) + self.answer(messages[-1]) + "\n"

    def _before(self, messages, tools):
        system, rest = system_of(messages)
        if tools:
            text = chatml("system", (f"{system}\n\n" if system is not None else "") + qwen_tools(tools))
        else:
            text = "" if system is None else chatml("system", system)
        last_user = max((i for i, message in enumerate(rest) if message["role"] == "user"), default=len(rest) - 1)
        for i, message in enumerate(rest):
            if message["role"] == "assistant":
                thought, words = thought_and_words(message["content"] or "")
                said = "\n".join([*([words] if words else []), *qwen_calls(message)])
                if i > last_user and thought:  # amid tool calls it still knows what it thought
                    said = f"<think>\n{thought}\n</think>\n\n{said}"
                text += chatml("assistant", said)
            elif message["role"] == "tool":
                text += chatml("user", f"<tool_response>\n{message['content']}\n</tool_response>")
            else:
                text += chatml("user", message["content"])
        return text


class Llama31:
    HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"

    def prompt(self, messages, tools):
        return self.finished(messages, tools) + self.HEADER

    def answer(self, message):
        if message.get("tool_calls"):
            (call,) = message["tool_calls"]
            name, arguments = call["function"]["name"], compact(call["function"]["arguments"])
            return f'{{"name": "{name}", "parameters": {arguments}}}<|eot_id|>'
        return message["content"].strip() + "<|eot_id|>"

    def finished(self, messages, tools):
        system, rest = system_of(messages)
        text = "<|begin_of_text|>" + self._header("system")
        text += "Environment: ipython\n" if tools else ""
        text += "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        text += (system or "").strip() + "<|eot_id|>"
        for i, message in enumerate(rest):
            if message["role"] == "assistant":
                text += self.HEADER + self.answer(message)
            elif message["role"] == "tool":  # a string is written as JSON, in quotes
                text += self._header("ipython") + compact(message["content"]) + "<|eot_id|>"
            else:
                before = self._offer(tools) if tools and i == 0 else ""
                text += self._header("user") + before + message["content"].strip() + "<|eot_id|>"
        return text

    def _header(self, role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    def _offer(self, tools):
        return (
            "Given the following functions, please respond with a JSON for a function call with its proper arguments "
            "that best answers the given prompt.\n\n"
            'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
            "Do not use variables.\n\n" + "".join(f"{compact(tool, indent=4)}\n\n" for tool in tools)
        )


class Gemma:
    """Gemma 2, and Gemma 3, which puts the system text into the first question."""

    def prompt(self, messages, tools):
        return self.finished(messages, tools) + "<start_of_turn>model\n"

    def answer(self, message):
        return message["content"].strip() + "<end_of_turn>"

    def finished(self, messages, tools):
        system, rest = system_of(messages)
        text = "<bos>"
        for i, message in enumerate(rest):
            role = "model" if message["role"] == "assistant" else "user"
            before = f"{system}\n\n" if i == 0 and system is not None else ""
            text += f"<start_of_turn>{role}\n{before}{message['content'].strip()}<end_of_turn>\n"
        return text


class Phi35:
    def prompt(self, messages, tools):
        return self._turns(messages) + "<|assistant|>\n"

    def answer(self, message):
        return message["content"] + "<|end|>"

    def finished(self, messages, tools):
        return self._turns(messages) + "<|endoftext|>"

    def _turns(self, messages):
        return "".join(f"<|{message['role']}|>\n{message['content']}<|end|>\n" for message in messages)


class DeepSeekDistill:
    """A prompt opens a thought, which a finished conversation does not show."""

    END = "<｜end▁of▁sentence｜>"

    def prompt(self, messages, tools):
        return self.finished(messages, tools) + "<｜Assistant｜><think>\n"

    def answer(self, message):
        thought, words = thought_and_words(message["content"])
        return f"{thought}\n</think>\n\n{words}{self.END}"

    def finished(self, messages, tools):
        system, rest = system_of(messages)
        text = "<｜begin▁of▁sentence｜>" + (system or "")
        for message in rest:
            if message["role"] == "assistant":
                text += "<｜Assistant｜>" + message["content"].rpartition("</think>")[2] + self.END
            else:
                text += "<｜User｜>" + message["content"]
        return text


class MistralStyle:
    """The system text stands in the newest question; the space before an answer is the model's to say."""

    def prompt(self, messages, tools):
        return self.finished(messages, tools)

    def answer(self, message):
        return f" {message['content'].strip()}</s>"

    def finished(self, messages, tools):
        system, rest = system_of(messages)
        text = "<s>"
        for i, message in enumerate(rest):
            if message["role"] == "assistant":
                text += self.answer(message)
            else:
                newest = i == len(rest) - 1 and system is not None
                text += "[INST] " + (f"{system}\n\n" if newest else "") + message["content"] + "[/INST]"
        return text


ORACLES = {
    "llama-3.1": Llama31(),
    "qwen2.5": Qwen25(),
    "qwen3": Qwen3(),
    "gemma-2": Gemma(),
    "gemma-3": Gemma(),
    "phi-3.5": Phi35(),
    "deepseek-r1-distill": DeepSeekDistill(),
    "smollm2": SmolLM2(),
    "mistral-style": MistralStyle(),
}


def rewrites(name, messages):
    """Return whether a later turn changes what the template shows of the earlier ones."""
    return name in ("qwen3", "deepseek-r1-distill") or (name == "mistral-style" and messages[0]["role"] == "system")


def answers_to_train(messages, train_on, num_prompt_messages=None):
    """Return the indices of the messages that are trained; `num_prompt_messages` of a prompt/completion row."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "completion":
        start = num_prompt_messages
        if start is None:
            start = max(i for i, message in enumerate(messages) if message["role"] == "user")
        chosen = {i for i in answers if i >= start}
    else:
        chosen = {"assistant": set(answers), "last_assistant": set(answers[-1:])}[train_on]
    for i in answers:
        flag = messages[i].get("train", messages[i].get("weight"))
        if flag is not None:
            chosen = chosen | {i} if flag else chosen - {i}
    return sorted(chosen)


def expected_rows(name, messages, train_on, tools=None, num_prompt_messages=None):
    """Return the list of Row that a conversation becomes.

    With train_on "all" a single row is one untrained piece, as which token is first is the tokenizer's affair; a
    conversation of several answers that the template rewrites is left undefined (None).
    """
    if train_on == "all":
        trained = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if rewrites(name, messages) and len(trained) > 1:
            return None
    else:
        trained = answers_to_train(messages, train_on, num_prompt_messages)
    oracle = ORACLES[name]
    if rewrites(name, messages):
        rows = [Row(((oracle.prompt(messages[:i], tools), False), (oracle.answer(messages[i]), True))) for i in trained]
        if len(rows) == 1 and trained[0] == len(messages) - 1:
            finished = oracle.finished(messages, tools)  # what follows the answer, where that answer is shown at all
            tail = finished[len(rows[0].text) :] if finished.startswith(rows[0].text) else ""
            rows = [Row(rows[0].pieces, tail)]
    else:
        pieces, done = [], ""
        for i in trained:
            prompt, answer = oracle.prompt(messages[:i], tools), oracle.answer(messages[i])
            assert prompt.startswith(done)
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        finished = oracle.finished(messages, tools)
        assert finished.startswith(done)
        rows = [Row(tuple(pieces), finished[len(done) :])]
    return [_as_decoded(row, BY_NAME[name]) for row in rows]


def _as_decoded(row, family):
    """Return the row without the whitespace that the family's special tokens swallow."""
    if not family.swallows:
        return row
    swallowing = "|".join(re.escape(token) for token in family.special)
    pieces, before = [], ""
    for text, trained in [*row.pieces, (row.tail, False)]:
        text = re.sub(rf"({swallowing})\s+", r"\1", text)
        if re.search(rf"({swallowing})$", before):
            text = text.lstrip()
        pieces.append((text, trained))
        before = text or before
    return Row(tuple(pieces[:-1]), pieces[-1][0])
