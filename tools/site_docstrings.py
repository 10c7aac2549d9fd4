"""Parameters that share a line of a docstring get a row each in the reference: ``mean, logvar: of q(z | x)`` is two.

A reader of the source has them on one line; a row of a table has the type and the default of one parameter.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE
)
SECTION = re.compile(r"^(?P<indent> *)(?:Args|Attributes):\n(?:(?P=indent) +\S.*(?:\n|\Z))+", re.MULTILINE)


def one_line_each(docstring: str) -> str:
    """The docstring with its shared lines written out, the same text behind each name."""

    def each(line: re.Match[str]) -> str:
        return "\n".join(f"{line['indent']}{name}: {line['text']}" for name in line["names"].split(", "))

    return SECTION.sub(lambda section: SHARED.sub(each, section[0]), docstring)


class OneLineEach(griffe.Extension):
    """Read by griffe, which mkdocstrings takes the docstrings from."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = one_line_each(obj.docstring.value)
