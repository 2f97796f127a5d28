"""Small charts in SVG: lines with axes, ticks and a title for each point under the pointer. Colours are the page's (style.css).

Made here and not by matplotlib: a page needs no extra then, follows light and dark, and its text stays text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

from .html import visible

# narrow enough that text is readable on a phone, where a chart is as wide as the page
_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 28
_COLOURS = 8  # --c0 to --c7 of style.css; then the same with dashes
_TITLES = 150  # points of a chart that say their numbers


@dataclass(frozen=True)
class Line:
    """points: [(x, y), ...]; number: which colour it has. dots: only the points are drawn."""

    name: str
    points: list
    number: int = 0
    dots: bool = False


def number(value) -> str:
    """Return a number as few characters as say it: 0.0015, 1.5e-5, 12.3, 12,000."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if abs(value) < 1e7 and abs(value) >= 1e4:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def ticks(low, high, most=5) -> list[float]:
    """Return round numbers between `low` and `high`, about `most` at most."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999999)
    first = math.ceil(low / step - 1e-9)
    return [
        round(index * step, 12 - math.floor(math.log10(step)))
        for index in range(first, math.floor(high / step + 1e-9) + 1)
    ]


class _Axis:
    """A range of numbers on a range of pixels."""

    def __init__(self, values, start, end, zero=False, log=False, pad=0.0):
        self.log = log and min(values) > 0
        self.whole = all(isinstance(value, int) for value in values)
        low, high = min(values), max(values)
        if zero:
            low, high = min(0, low), max(0, high)
        elif pad and not self.log:
            low, high = low - pad * (high - low), high + pad * (high - low)
        if low == high:
            low, high = (low / 2, high * 2) if self.log else (low - abs(low) / 2 or -1, high + abs(high) / 2 or 1)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value):
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most):
        if not self.log:
            found = ticks(self.low, self.high, most)
            return [value for value in found if value == int(value)] if self.whole else found
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001][:most]


def chart(title, lines, x="step", form=number, zero=False, log_x=False, has_legend=False, mark=None) -> Markup:
    """Return a figure of these Lines; of none of them with a point, nothing.

    x: what the x axis is of. form: a value of y as text. zero: the y axis begins at 0. has_legend: it says which line is which.
    mark: (x, word) of a place on the x axis, between its ends, or None.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    across = _Axis(
        [point[0] for line in lines for point in line.points],
        _LEFT,
        _WIDTH - _RIGHT,
        log=log_x,
        pad=0.08 * any(line.dots for line in lines),
    )
    up = _Axis([point[1] for line in lines for point in line.points], _HEIGHT - _BOTTOM, _TOP, zero, pad=0.04)
    ends = ", ".join(
        f"{line.name}: {form(line.points[-1][1])} at {x} {number(line.points[-1][0])}" for line in lines[:8]
    )
    parts = [
        f'<figure class="chart"><figcaption>{escape(visible(title))}</figcaption>',
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(visible(f"{title}; {ends}"))}">',
        *_axes(across, up, x, form),
    ]
    if mark is not None and across.low <= mark[0] <= across.high:
        parts.append(_marked(across(mark[0]), f"{mark[1]}: {x} {number(mark[0])}", mark[1]))
    parts += [_drawn(line, across, up) for line in lines]
    every = max(1, math.ceil(sum(len(line.points) for line in lines) / _TITLES))
    for line in lines:
        prefix = f"{line.name}, " if len(lines) > 1 else ""
        chosen = [*line.points[::-1][::every][::-1]] if every > 1 else line.points
        for a, b in chosen:
            said = escape(visible(f"{prefix}{x} {number(a)}: {form(b)}"))
            parts.append(f'<circle class="hit k{line.number % _COLOURS}" cx="{across(a):.1f}" cy="{up(b):.1f}" r="5"><title>{said}</title></circle>')  # noqa: E501  # fmt: skip
    names = [(line.name, line.number) for line in lines] if has_legend else []
    return Markup("".join([*parts, "</svg>", legend(names), "</figure>"]))


def _axes(across, up, x, form):
    bottom = _HEIGHT - _BOTTOM
    for value in up.ticks(5):
        y = up(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{escape(form(value))}</text>'
    for value in across.ticks(5):
        place = across(value)
        anchor = "end" if place > _WIDTH - 25 else "middle"
        yield f'<text x="{place:.1f}" y="{bottom + 14}" text-anchor="{anchor}">{escape(number(value))}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 2}" text-anchor="middle">{escape(visible(x))}</text>'


def _marked(place, said, word):
    on_the_left = place > _WIDTH / 2
    anchor, beside = ("end", place - 4) if on_the_left else ("start", place + 4)
    return (
        f'<g class="mark"><title>{escape(visible(said))}</title>'
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        f'<text x="{beside:.1f}" y="{_TOP + 10}" text-anchor="{anchor}">{escape(visible(word))}</text></g>'
    )


def _drawn(line, across, up):
    colour = f"k{line.number % _COLOURS}{' dash' if line.number >= _COLOURS else ''}"
    places = [f"{across(a):.1f} {up(b):.1f}" for a, b in line.points]
    if line.dots or len(places) == 1:
        return "".join(
            f'<circle class="dot {colour}" cx="{place.split()[0]}" cy="{place.split()[1]}" r="3.5"/>'
            for place in places
        )
    return f'<path class="{colour}" d="M{" L".join(places)}"/>'


def legend(names) -> Markup:
    """Return which colour is which line; of one line, nothing. names: [(name, number), ...]."""
    if len(names) < 2:
        return Markup("")
    one = '<li><svg viewBox="0 0 20 8" aria-hidden="true"><path class="k{}{}" d="M0 4 L20 4"/></svg>{}</li>'
    rows = [one.format(n % _COLOURS, " dash" if n >= _COLOURS else "", escape(visible(name))) for name, n in names]
    return Markup(f'<ul class="legend">{"".join(rows)}</ul>')
