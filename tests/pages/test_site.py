"""The site is built without a warning, shows every public name, and a browser has nothing to complain of."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

import fekernels as fe
from tests.support import ROOT
from tests.support.browser import CHROMIUM, DESKTOP, PHONE, Walk, walk

API = sorted((ROOT / "docs/api").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    named = [name for page in API for name in re.findall(r"^::: (fekernels[\w.]*)$", page.read_text(), re.M)]
    modules = [importlib.import_module(name) for name in named]
    shown = {id(getattr(module, name)) for module in modules for name in module.__all__} | set(
        map(id, modules)
    )
    public = {name: getattr(fe, name) for name in fe.__all__}
    assert not [name for name, value in public.items() if id(value) not in shown]
    assert set(named) >= {value.__name__ for value in public.values() if isinstance(value, ModuleType)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install 'fekernels[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'fekernels[docs]'")
    pytest.importorskip("latex2mathml", reason="pip install 'fekernels[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_and_picture_leads_somewhere(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 30
    for page in pages:
        for target in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            path = target.partition("#")[0]
            if not path or "://" in path or path.startswith(("mailto:", "data:")):
                continue
            there = (page.parent / path).resolve()
            assert there.is_file() or (there / "index.html").is_file(), f"{page.relative_to(site)}: {target}"


def test_every_method_is_in_the_reference(site: Path) -> None:
    """Those of bases too, which are no public names of their own."""
    shown = {
        name
        for page in site.glob("api/*/index.html")
        for name in re.findall(r'id="([^"]+)"', page.read_text())
    }
    methods = {
        f"{module.__name__}.{name}.{method}"
        for page in API
        for module in map(
            importlib.import_module, re.findall(r"^::: (fekernels[\w.]*)$", page.read_text(), re.M)
        )
        for name in module.__all__
        if isinstance(getattr(module, name), type)
        for method, value in inspect.getmembers(getattr(module, name), inspect.isfunction)
        if value.__module__.startswith("fekernels") and value.__doc__
        if value.__name__ == method and not method.startswith("_")  # no other name of one that has its place
    }
    assert "fekernels.VariationalAdam.sampled_params" in methods and len(methods) > 150
    assert sorted(methods - shown) == []


def test_every_parameter_has_a_row_and_a_type(site: Path) -> None:
    rows = {
        (page.parent.name, *(html.unescape(re.sub(r"<[^>]*>", "", cell)).strip() for cell in cells[:2]))
        for page in site.glob("api/*/index.html")
        for row in re.findall(r'<tr class="doc-section-item">(.*?)</tr>', page.read_text(), re.DOTALL)
        if len(cells := re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)) > 2
    }
    assert len(rows) > 300
    assert not [row for row in rows if not row[2] or "," in row[1]]


def test_shared_lines_of_a_docstring_are_written_out() -> None:
    pytest.importorskip("griffe", reason="pip install 'fekernels[docs]'")
    from tools.site_docstrings import one_line_each

    left, shared = "Of a, b: left.\n\nArgs:\n", "    a, b: of one\n        shape.\n"
    right = "    c: alone.\n\nReturns:\n    a, b: left.\n"
    written = shared.replace("a, b", "a") + shared.replace("a, b", "b")
    assert one_line_each(left + shared + right) == left + written + right


@pytest.fixture(scope="module")
def walked(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    if CHROMIUM is None:
        pytest.skip("no chromium")
    pages = sorted(
        f"{page.parent.relative_to(site)}/" for page in site.rglob("index.html") if page.parent != site
    )
    visits = [(page, size) for size in (PHONE, DESKTOP) for page in ("", *pages)]
    return walk(site, visits, tmp_path_factory.mktemp("browser"), query="bandwidth")


def test_a_browser_shows_every_page_and_has_nothing_to_complain_of(walked: Walk) -> None:
    assert len(walked.pages) > 30
    assert all(page["title"] == 1 and page["navigation"] for page in walked.pages)
    assert not walked.console, walked.console
    assert not [page for page in walked.pages if page["elsewhere"]]
    assert not [(page["path"], page["broken"]) for page in walked.pages if page["broken"]]
    assert sum(page["pictures"] for page in walked.pages) > 25


def test_equations_are_drawn(walked: Walk) -> None:
    assert sum(len(page["equations"]) for page in walked.pages) > 20
    assert not [page["path"] for page in walked.pages if min(page["equations"], default=5) < 5]
    assert not [(page["path"], page["raw"]) for page in walked.pages if page["raw"]]


def test_nothing_is_wider_than_a_phone(walked: Walk) -> None:
    assert {page["width"] for page in walked.pages} == {PHONE[0], DESKTOP[0]}
    assert not [(page["path"], page["overflow"]) for page in walked.pages if page["overflow"] > 0]


def test_no_code_and_no_table_is_cut_off_on_a_desk(walked: Walk) -> None:
    desk = [page for page in walked.pages if page["width"] == DESKTOP[0]]
    assert len(desk) > 30
    assert not [(page["path"], page["cut"]) for page in desk if page["cut"]]


def test_search_finds_code_can_be_copied_and_there_are_two_themes(walked: Walk) -> None:
    assert walked.themes == ["default", "slate"]
    assert any("svgd" in link for link in walked.found)
    assert all(page["copied"] >= page["blocks"] for page in walked.pages)
    assert sum(page["blocks"] for page in walked.pages) > 50
