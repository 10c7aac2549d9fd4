"""The code on the pages in docs/ runs and its assertions hold; the examples run in their quick form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

DOCS = ROOT / "docs"
# page: how many assertions its code makes
PAGES = {"free_energy.md": 12, "likelihoods.md": 5, "reparameterize.md": 4, "svgd.md": 6}


@pytest.mark.parametrize("page", PAGES)
def test_code_on_pages(page: str) -> None:
    """The blocks of a page in order, in one namespace."""
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assertions = 0
    names: dict[str, object] = {}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = compile(
            "\n" * line + block[1], str(DOCS / page), "exec"
        )  # so that errors name the page's line
        exec(code, names)
        assertions += len(re.findall(r"^ *(?:assert|torch\.testing\.assert_close)\b", block[1], re.MULTILINE))
    assert assertions == PAGES[page]


@pytest.mark.slow
def test_vae_on_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    path = tmp_path / "digits.png"
    where = os.pathsep.join(filter(None, (str(DOCS.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(DOCS / "examples" / "vae_digits.py"), "--quick", "--out", str(path)],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"free energy ([\d.]+) .* energy ([\d.]+) \+ KL ([\d.]+)", done.stdout)
    other = re.search(r"untrained ([\d.]+); .* samples: ([\d.]+)", done.stdout)
    assert found and other, done.stdout
    free_energy, energy, kl = map(float, found.groups())
    untrained, evidence = map(float, other.groups())
    assert abs(free_energy - energy - kl) < 0.02
    assert kl > 0.5 and free_energy < 0.75 * untrained  # it learned, and uses its latents
    assert free_energy - 4 < evidence < free_energy  # the tighter bound of the two
    assert "300/300" in done.stderr  # the progress bar
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
