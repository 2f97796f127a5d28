"""Plain values -> YAML that every reader understands alike: those of YAML 1.2, as ours is, and those of 1.1, as PyYAML.

1.1 takes `no` and `on` for truth values, 12:30:00 for a number, and 1e-05, without a dot, for a word.
"""

from __future__ import annotations

import io
import re

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.resolver import VersionedResolver

_LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # line ends in 1.1 but not in 1.2
_OLDER = VersionedResolver(version=(1, 1))


def as_yaml(values):
    """Return nested plain values as YAML text, a line a value."""
    return _written(values, flow=False)


def on_one_line(value):
    """Return a plain value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{on_one_line(key)}: {on_one_line(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(on_one_line, value)) + "]"
    return _written([value], flow=True).strip().removeprefix("[").removesuffix("]")


def _written(values, flow):
    stream = io.StringIO()
    yaml = YAML(pure=True)  # the C dumper writes YAML 1.1
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width = flow, 100_000 if flow else 1000
    yaml.dump(values, stream)
    return stream.getvalue()


class _Representer(RoundTripRepresenter):
    def text(self, value):
        if _LINE_ENDS.search(value):
            return self.represent_scalar("tag:yaml.org,2002:str", value, style='"')
        is_word = _OLDER.resolve(ScalarNode, value, (True, False)) == "tag:yaml.org,2002:str"
        return (
            self.represent_str(value) if is_word else self.represent_scalar("tag:yaml.org,2002:str", value, style="'")
        )

    def number(self, value):
        node = self.represent_float(value)
        if "e" in node.value and "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.number)
