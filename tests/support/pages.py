"""The fenced blocks of a Markdown page."""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass

LANGUAGES = ("python", "text", "")  # runs, is shown, is shown too: what has no language must not be Python
FENCE = re.compile(r"[\s>*+-]*(`{3,}|~{3,})(.*)")


class PageError(Exception):
    """A fence that nobody would run and nobody has marked as text."""


@dataclass(frozen=True)
class Block:
    """``line`` of the page, from 1, is the first of ``code``."""

    line: int
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """Every fenced block, also one within a list or a comment. Raises PageError for a fence that is not understood."""
    found: list[Block] = []
    opening: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening = fence[1], fence[2].strip(), number
                lines = []
        elif fence and fence[1].startswith(opening[0]) and not fence[2].strip():
            found.append(_block(opening[2], opening[1], textwrap.dedent("\n".join(lines)) + "\n"))
            opening = None
        else:
            lines.append(line)
    if opening is not None:
        raise PageError(f"line {opening[2]}: a fence that does not end")
    return found


def _block(line: int, language: str, code: str) -> Block:
    if language not in LANGUAGES:
        raise PageError(
            f"line {line}: a block must be one of {', '.join(LANGUAGES[:-1])} or nothing; got {language!r}"
        )
    if not language and _is_python(code):
        raise PageError(f"line {line}: a block without a language that is Python; mark it python, or text")
    return Block(line + 1, language, code)


def _is_python(code: str) -> bool:
    """Whether it would run; a single word or path is no code."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    return any(
        not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call | ast.Await) for node in tree.body
    )
