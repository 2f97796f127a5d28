"""Two messages, a call of a tool, and what a row becomes: for the tests of rows."""

from qlora.data import formats

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def to_messages(row):
    name, conversation = formats.read(row)
    return name, conversation.messages


def call(arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}
