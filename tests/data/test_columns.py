"""data.columns gives columns of other names, and templates of them, the keys of a known format."""

import pytest

from qlora.data import formats
from qlora.data.columns import read, refuse_bad, renamed
from qlora.system.errors import InputError
from tests.data.turns import to_messages

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_columns_may_be_jinja_templates_of_the_rows_columns():
    columns = {
        "prompt": "{{ question }}\n{% for c in choices %}{{ loop.index }}. {{ c }}\n{% endfor %}",
        "completion": "{{ choices[answer] }}",
    }
    row = renamed({"question": "Which?", "choices": ["a", "b"], "answer": 1}, columns)
    assert row == {"prompt": "Which?\n1. a\n2. b\n", "completion": "b"}
    with pytest.raises(ValueError, match=r"data.columns fails: .*Undefined"):
        renamed({"question": "Which?", "choices": ["a", "b"]}, columns)
    with pytest.raises(ValueError, match=r"data.columns fails: .*NoneType"):
        renamed({"x": None}, {"prompt": "{{ x | dictsort }}"})
    with pytest.raises(ValueError, match=r"fails: .*(unsafe|access)"):
        renamed({"x": "a"}, {"prompt": "{{ x.__class__.__mro__ }}"})
    with pytest.raises(InputError, match=r"data.columns.prompt: .* is not a Jinja template"):
        refuse_bad({"prompt": "{{ x"})


def test_a_label_that_is_a_number_is_an_answer():
    assert renamed({"q": "Q", "label": 1}, {"prompt": "q", "completion": "label"}) == {"prompt": "Q", "completion": "1"}


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_null_or_a_missing_number_writes_nothing(nothing):
    columns = {"prompt": "{{ question }}\n{{ context }}{% if context is none %}?{% endif %}", "completion": "label"}
    row = renamed({"question": "Q", "context": nothing, "label": 1}, columns)
    assert row == {"prompt": "Q\n" + "?" * (nothing is None), "completion": "1"}
    for completion in ("label", "{{ label }}"):
        empty = renamed({"question": "Q", "context": "", "label": nothing}, columns | {"completion": completion})
        with pytest.raises(ValueError, match=r"content is empty|completion are strings"):
            formats.read(empty)


def test_columns_of_other_names_are_taken_by_name():
    columns = {"prompt": "question", "completion": "answer"}
    assert to_messages(renamed({"question": "Q", "answer": "A", "id": 1}, columns)) == ("completion", [USER, ANSWER])
    with pytest.raises(ValueError, match="has no column 'answer'; it has question"):
        renamed({"question": "Q"}, columns)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"prompt": "q", "completion": "a", "text": "t"},
            "data.columns.text: rows of format completion do not use text",
        ),
        ({"messages": "m", "history": "h"}, "rows of format messages do not use history"),
        ({"prompt": "q"}, "data.columns maps prompt: not enough for a row"),
    ],
)
def test_a_mapped_column_that_the_shape_cannot_use_is_an_error(columns, expected):
    with pytest.raises(InputError, match=expected):
        refuse_bad(columns)


def test_a_mapped_column_that_some_rows_lack_is_optional_where_the_shape_says_so():
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    assert [m["role"] for m in read({"q": "Q", "a": "A"}, columns)[1].messages] == ["user", "assistant"]
    assert read({"q": "Q", "a": "A", "s": "S"}, columns)[1].messages[0] == {"role": "system", "content": "S"}
