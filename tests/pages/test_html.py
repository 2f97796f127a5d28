"""Text from data is shown on a page, never obeyed."""

import pytest

from qlora.pages.html import visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x00b\x1b[31m", "a␀b␛[31m"),
        ("abc\u202egnp.exe", "abc<U+202E>gnp.exe"),
        ("\ud800", "<U+D800>"),
        ("one\r\ntwo\tthree", "one\ntwo\tthree"),
        ("שלום 你好 👩‍👩‍👧", "שלום 你好 👩‍👩‍👧"),
    ],
)
def test_control_characters_are_shown(text, expected):
    assert visible(text) == expected
    visible(text).encode("utf-8")
