"""Files that pages, docstrings and comments name exist."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDERS = ("csrc", "fekernels", "tests", "benchmarks", "tools", "docs", ".")
FILES = {
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*" if folder == "." else "**/*")
}
# A file goes by any last part of its path.
NAMES = {"/".join(file.split("/")[i:]) for file in FILES for i in range(file.count("/") + 1)}
NAMED = re.compile(r"(?<![\w./<>*-])[\w./-]*\w\.(?:py|h|cpp|cu|def|md)\b")
OF_TORCH = {"python_variable.h"}


def prose(path: Path) -> Iterator[str]:
    text = path.read_text()
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from (token.string for token in tokens if token.type == tokenize.COMMENT)
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        yield from (
            ast.get_docstring(node) or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, documented)
        )
    elif path.suffix == ".md":
        yield re.sub(r"\(https?://[^)]*\)", "", text)
    else:
        yield from re.findall(r"//.*", text)


def unknown(text: str) -> list[str]:
    """The files that it names and that are not there."""
    return [
        name for name in NAMED.findall(text) if name not in OF_TORCH and name.removeprefix("../") not in NAMES
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_named_files_exist(folder: str) -> None:
    kinds = {".py", ".md", ".h", ".cpp", ".cu", ".def"}
    paths = (ROOT / name for name in FILES if (name.split("/")[0] if "/" in name else ".") == folder)
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        if path.suffix in kinds and path.name != "CHANGELOG.md"
        if unknown(path.read_text())  # else its prose, which takes a parser to find, has none either
        for text in prose(path)
        for name in unknown(text)
    ]
    assert missing == []
