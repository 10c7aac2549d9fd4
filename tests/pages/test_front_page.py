"""README is short, and says of speed what the newest results say; so does the page of all rows."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import pages
from tests.support import ROOT

NEWEST = max((ROOT / "benchmarks/results").glob("cpu_*.json"))


def results():
    return json.loads(NEWEST.read_text())


def test_a_page_and_a_half() -> None:
    assert len(pages.README.read_text().splitlines()) <= 130


def test_pages_hold_the_newest_results() -> None:
    for path, text in pages.pages(results()).items():
        assert path.read_text() == text, (
            f"{path.name}: run python -m benchmarks.pages {NEWEST.relative_to(ROOT)}"
        )


def test_the_rows_that_are_lost_are_told() -> None:
    lost = [row["ratio"] for _, row in pages.rows(results()) if row["ratio"] > 1]
    assert lost and pages.README.read_text().count("| **") == len(lost)


def test_pictures_of_both_themes_are_there() -> None:
    shown = re.findall(r'(?:srcset|src)="([^"]+)"', pages.README.read_text())
    assert len(shown) == 4 and all((ROOT / name).is_file() for name in shown)


def test_a_row_that_was_not_measured_is_an_error() -> None:
    without = {**results(), "vae": []}
    with pytest.raises(KeyError, match="VAE training step.*measured"):
        pages.rows(without)


def test_a_page_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="once each"):
        pages.between("# A page\n", "speed", "rows")
