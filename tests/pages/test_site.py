"""The site is built without a warning, shows every public name, and a browser has nothing to complain of."""

from __future__ import annotations

import functools
import http.server
import importlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fekernels as fe
from tests.support import ROOT

API = sorted((ROOT / "docs/api").glob("*.md"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Silent, directory=site)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


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


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("page", ["", "langevin_adam/", "vae/", "api/optimizers/", "api/machines/"])
def test_a_browser_shows_it(page: str, address: str, tmp_path: Path) -> None:
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom", address + page,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'class="md-nav' in done.stdout and "<h1" in done.stdout
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not told, told
