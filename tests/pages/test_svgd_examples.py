"""The examples of fe.SVGD run in their quick form, and say what docs/svgd.md says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

EXAMPLES = ROOT / "docs" / "examples"

pytestmark = pytest.mark.slow


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = os.pathsep.join(filter(None, (str(EXAMPLES.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", *arguments],
        env={**os.environ, "PYTHONPATH": where},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_variance_table() -> None:
    done = run("svgd_collapse")
    rows = re.findall(r"^\| ([^|(]+) \| ([\d.]+) \| ([\d.]+) \|$", done.stdout, re.MULTILINE)
    table = {name: (float(one), float(ten)) for name, one, ten in rows}
    assert len(table) == 13 and "26/26" in done.stderr
    assert table["median bandwidth"][0] > 0.9 and table["median bandwidth"][1] < 0.4
    assert table["16 times the median"][1] > 0.9
    assert 0.8 < table["kernel noise"][1] < 1.2


def test_posteriors(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "posteriors.png"
    done = run("svgd_posteriors", "--out", str(path))
    for line in re.findall(r"^banana.*", done.stdout, re.MULTILINE):
        found = [(float(a), float(b)) for a, b in re.findall(r"(-?[\d.]+) \( *(-?[\d.]+)\)", line)]
        assert len(found) == 4 and all(abs(a - b) < 0.2 for a, b in found), line
    shares = [
        [float(share) for share in re.findall(r"([\d.]+) \(", line)]
        for line in re.findall(r"^shares.*: (.*)$", done.stdout, re.MULTILINE)
    ]
    assert shares[0] == [1.0, 0.0, 0.0] and min(shares[1]) > 0.1
    assert done.stderr.count("300/300") == 4  # the progress bars
    assert is_picture(path)


def test_ensemble(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    path = tmp_path / "ensemble.png"
    done = run("svgd_ensemble", "--out", str(path))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in done.stdout.splitlines()
        if re.match(r"\| (one|plain|SVGD)", line)
    ]
    assert [row[0] for row in rows] == ["one network", "plain ensemble", "SVGD, T = 1/N", "SVGD, T = 30/N"]
    assert all(float(row[1]) > 0.85 and float(row[2]) < 0.4 for row in rows)
    assert float(rows[3][7]) > float(rows[1][7])  # disagreement tells more where members repel each other
    assert "360/360" in done.stderr
    assert is_picture(path)
