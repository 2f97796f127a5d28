"""Pages of HTML that need nothing else: no network, no script; text from data is shown, never obeyed."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

from ..system.units import duration, size

# what could reorder or hide text around it, or is no character of HTML; shown by name
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def visible(text) -> str:
    """Return `text` with control characters, and those that change the direction of text, as pictures or by their number."""

    def shown(match):
        number = ord(match[0])
        return chr(0x2400 + number) if number < 0x20 else f"<U+{number:04X}>"

    return _HIDDEN.sub(shown, str(text).replace("\r\n", "\n"))


def render(template, /, **values) -> str:
    """Return the HTML of a template of this folder; every value is escaped, and so visible."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"size": size, "duration": duration, "visible": visible, "style": _style}
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=_style(style), **values)


def _shown(value):
    if value is None:
        return ""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _style(text):
    from markupsafe import Markup

    return Markup(text)
