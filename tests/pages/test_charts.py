"""Charts: what is drawn is where the numbers are, and says them."""

import re
import xml.etree.ElementTree

import pytest

from qlora.pages import charts, marked


def parsed(figure):
    return xml.etree.ElementTree.fromstring(str(figure))  # well-formed, or this fails


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.1, 0.32, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("high", [1e-12, 1.5e-5, 0.3, 7, 123456.0, 1e15])
def test_ticks_of_any_size_are_few_and_within(high):
    found = charts.ticks(0, high)
    assert 3 <= len(found) <= 7
    assert all(0 <= value <= high * 1.001 for value in found)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.0015, "0.0015"),
        (1.5e-5, "1.5e-5"),
        (12.3456, "12.35"),
        (123456, "123,456"),
        (2e9, "2e9"),
        (-0.25, "-0.25"),
    ],
)
def test_a_number_is_said_shortly(value, expected):
    assert charts.number(value) == expected


def test_a_line_goes_through_its_points_and_each_says_its_numbers():
    figure = parsed(charts.chart("loss", [charts.Line("a", [[1, 2.0], [2, 1.0], [3, 0.0]])], zero=True))
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", figure.find(".//path").get("d"))]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2)
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)
    assert y1 < y3  # up is more
    assert [one.text for one in figure.iter("title")] == ["step 1: 2", "step 2: 1", "step 3: 0"]
    assert figure.find(".//svg").get("role") == "img"


def test_names_are_escaped_and_many_lines_are_told_apart():
    lines = [charts.Line(f"<b>{n}", [[1, n], [2, n + 1]], n) for n in range(10)]
    figure = parsed(charts.chart("a < b", lines, has_legend=True))
    assert figure.find("figcaption").text == "a < b"
    styles = [one.get("class") for one in figure.findall("./svg/path")]
    assert len(set(styles)) == 10
    assert [one.find("svg").tail for one in figure.iter("li")] == [f"<b>{n}" for n in range(10)]


def test_nothing_is_drawn_of_nothing_and_one_point_is_a_dot():
    assert charts.chart("loss", [charts.Line("a", [])]) == ""
    figure = parsed(charts.chart("loss", [charts.Line("a", [[5, 1.0]])]))
    dot, hit = figure.findall(".//circle")
    assert [dot.get("class"), hit.get("class")] == ["dot k0", "hit k0"]
    assert (dot.get("cx"), dot.get("cy")) == (hit.get("cx"), hit.get("cy"))
    assert hit.find("title").text == "step 5: 1"
    assert figure.find(".//path") is None


def test_a_hundred_thousand_points_do_not_make_a_large_page():
    from qlora.jobs.reporting.reported_run import thinned

    points = [[step, 1 / step + (50 if step == 54321 else 0)] for step in range(1, 100_001)]
    found = thinned(points, 400)
    assert len(found) <= 400
    assert [found[0], found[-1]] == [points[0], points[-1]]
    assert [54321, 50 + 1 / 54321] in found  # a spike stays
    assert found == sorted(found)
    assert len(charts.chart("loss", [charts.Line("a", found)])) < 40_000
    assert thinned([[1, 1.0], [2, float("nan")]], 400) == [[1, 1.0]]


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("at 3 pm", "at 4 pm", [("at ", True), ("3", False), (" pm", True)]),
        ("same ", " same", [("same ", True)]),
        ("", "x", []),
        ("a b", "", [("a b", False)]),
    ],
)
def test_differences_are_marked_word_by_word(text, other, expected):
    assert marked.pieces(text, other) == expected


def test_long_answers_are_compared_as_a_whole():
    text = "word " * 2000
    assert marked.pieces(text, "another") == [(text, False)]


def test_a_mark_is_at_its_place_and_none_outside():
    points = [(step, 1.0 / step) for step in range(10, 101, 10)]

    def marks(x):
        figure = parsed(charts.chart("loss", [charts.Line("loss", points)], mark=(x, "best")))
        return [one for one in figure.iter("g") if one.get("class") == "mark"], figure

    [mark], figure = marks(40)
    [hit] = [one for one in figure.iter("circle") if one.find("title").text.startswith("step 40:")]
    assert float(mark.find("line").get("x1")) == float(hit.get("cx"))
    assert mark.find("title").text == "best: step 40"
    assert mark.find("text").text == "best"
    assert marks(101)[0] == []
