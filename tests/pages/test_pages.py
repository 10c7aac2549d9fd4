"""Every Python block of every page runs, those of a page in order and in one namespace, and its assertions hold.

Blocks that need another library run in test_migration.py, where it is installed.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.pages import PageError, blocks, execute

PAGES = sorted(path for where in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for path in ROOT.glob(where))


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.needs is None:
            execute(block, str(page), names)


def test_every_page_of_the_repository_is_one_of_them() -> None:
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository")
    assert {ROOT / name for name in listed.stdout.split("\0") if name} <= set(PAGES)


OPERATORS = (
    "langevin_adam", "sgld", "variational_adam", "free_energy", "likelihoods", "reparameterize", "svgd", "random",
    "belief_propagation", "diagnostics",
)  # fmt: skip


@pytest.mark.parametrize("page", OPERATORS)
def test_an_operators_page_says_first_what_it_computes_and_what_that_costs(page: str) -> None:
    top = (
        (ROOT / f"docs/{page}.md").read_text(encoding="utf-8").partition("```python")[0].partition("\n## ")[0]
    )
    equation, _, table = top.partition("\n| |")
    assert "**Equation**" in equation and re.search(r"^\$\$\n.+?\n\$\$$", equation, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| *(\S.*) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == ["Source", "Error bound", "Bytes", "Cost"]


PYTHON = "x = 1\nassert x"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{PYTHON}\n```",
        "* in a list\n\n  ```python\n  x = 1\n  assert x\n  ```\n",
        f"<!--\n```python\n{PYTHON}\n```\n-->",
        f"````text\n```python\nx = 2\n```\n````\n\n~~~ python\n{PYTHON}\n~~~",
    ],
)
def test_a_block_is_found_however_it_is_fenced(text: str) -> None:
    (block,) = (block for block in blocks(text) if block.language == "python")
    assert block.code == PYTHON + "\n" and text.splitlines()[block.line - 1].strip() == "x = 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"```\n{PYTHON}\n```", "line 1: a block without a language that is Python"),
        ("one\n```\nsamples.update()\n```", "line 2: a block without a language that is Python"),
        (f"```py\n{PYTHON}\n```", "line 1: a block must be one of python, text or nothing; got 'py'"),
        (f'```python title="x"\n{PYTHON}\n```', "got 'python title=\"x\"'"),
        (f"```{{python}}\n{PYTHON}\n```", "got '{python}'"),
        (f"```python\n{PYTHON}\n", "line 1: a fence that does not end"),
        (f"````python\n{PYTHON}\n```", "line 1: a fence that does not end"),
    ],
)
def test_a_block_that_would_not_run_is_an_error(text: str, message: str) -> None:
    with pytest.raises(PageError, match=message.replace("{", r"\{")):
        blocks(text)


@pytest.mark.parametrize("above", ["", "Text.\n"])
def test_a_block_may_need_a_package(above: str) -> None:
    ours, theirs = f"```python\n{PYTHON}\n```\n", "<!-- needs: peer -->\n```python\nimport peer\n```\n"
    assert [block.needs for block in blocks(above + ours + theirs + ours)] == [None, "peer", None]


@pytest.mark.parametrize(
    "below", ["", "\n```python\nimport peer\n```", "```text\npeer\n```", "<!-- needs: other -->"]
)
def test_a_package_that_no_block_needs_is_an_error(below: str) -> None:
    with pytest.raises(PageError, match="no python block below the package that it needs, peer"):
        blocks(f"<!-- needs: peer -->\n{below}")


@pytest.mark.parametrize(
    "text", ["```\npip install .\n```", "```\nF = energy + beta KL\n```", "```\n/tmp\n```"]
)
def test_formulas_and_commands_need_no_language(text: str) -> None:
    assert [block.language for block in blocks(text)] == [""]
