"""The fenced blocks of a Markdown page."""

from __future__ import annotations

import ast
import re
import textwrap
from dataclasses import dataclass

LANGUAGES = ("python", "text", "")  # runs, is shown, is shown too: what has no language must not be Python
FENCE = re.compile(r"[\s>*+-]*(`{3,}|~{3,})(.*)")
NEEDS = re.compile(r"<!-- needs: (\w+) -->")


class PageError(Exception):
    """A fence that nobody would run and nobody has marked as text."""


@dataclass(frozen=True)
class Block:
    """``line`` of the page, from 1, is the first of ``code``; ``needs`` the package that it runs with, if not ours."""

    line: int
    language: str
    code: str
    needs: str | None = None


def blocks(text: str) -> list[Block]:
    """Every fenced block, also one within a list or a comment. Raises PageError for a fence that is not understood.

    A Python block below the line ``<!-- needs: PACKAGE -->`` runs where that package is installed.
    """
    found: list[Block] = []
    opening: tuple[str, str, int] | None = None
    lines: list[str] = []
    needs: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opening is None:
            if fence:
                opening = fence[1], fence[2].strip(), number
                lines = []
            if needs is not None and (opening is None or opening[1] != "python"):
                raise PageError(f"line {number}: no python block below the package that it needs, {needs}")
            if not fence:
                told = NEEDS.fullmatch(line.strip())
                needs = told[1] if told else None
        elif fence and fence[1].startswith(opening[0]) and not fence[2].strip():
            code = textwrap.dedent("\n".join(lines)) + "\n"
            found.append(_block(opening[2], opening[1], code, needs))
            opening = needs = None
        else:
            lines.append(line)
    if opening is not None:
        raise PageError(f"line {opening[2]}: a fence that does not end")
    if needs is not None:
        raise PageError(f"the last line: no python block below the package that it needs, {needs}")
    return found


def _block(line: int, language: str, code: str, needs: str | None) -> Block:
    if language not in LANGUAGES:
        raise PageError(
            f"line {line}: a block must be one of {', '.join(LANGUAGES[:-1])} or nothing; got {language!r}"
        )
    if not language and _is_python(code):
        raise PageError(f"line {line}: a block without a language that is Python; mark it python, or text")
    return Block(line + 1, language, code, needs)


def _is_python(code: str) -> bool:
    """Whether it would run; a single word or path is no code."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    return any(
        not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call | ast.Await) for node in tree.body
    )


def execute(block: Block, page: str, names: dict[str, object]) -> None:
    """Run the code of a page in this namespace."""
    # Behind as many empty lines as there are above it, so that errors name the page's line.
    exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
