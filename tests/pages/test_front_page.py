"""README is short, and says of speed what the newest results say; so does the page of all rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    lost = [row for _, row in pages.rows(results()) if pages.lost(row)]
    assert lost and pages.README.read_text().count("| **") == len(lost)


def test_every_part_of_the_registry_was_measured_and_has_its_chart() -> None:
    found, page = results(), pages.BENCHMARKS.read_text()
    for family, title in pages.TITLES.items():
        assert f"\n## {title}\n" in page, family
        if family != "once":
            assert pages.drawn(found, family), family
            assert (ROOT / f"docs/images/benchmarks/{family}.svg").is_file(), family


def test_a_chart_has_each_peer_where_its_time_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = tmp_path / "chart.svg"
    rows = [
        {"case": "a case", "ratio": 0.5, "floor": "memory", "of_floor": 2.0},
        {"case": "another", "ratio": 1.2},
    ]
    pages.family_chart({"rbm": [*rows, {"case": "none", "missing": "no package"}]}, "rbm", drawn)
    text = drawn.read_text()
    assert "<!-- a case -->" in text and "<!-- another -->" in text and "<!-- none -->" not in text
    assert (
        text.count(f"fill: {pages.NEUTRAL['won']}") >= 1 and text.count(f"fill: {pages.NEUTRAL['lost']}") >= 1
    )


def test_pictures_of_both_themes_are_there() -> None:
    shown = re.findall(r'(?:srcset|src)="([^"]+)"', pages.README.read_text())
    assert len(shown) == 4 and all((ROOT / name).is_file() for name in shown)


def test_a_row_that_was_not_measured_is_an_error() -> None:
    without = {**results(), "vae": []}
    with pytest.raises(KeyError, match="vae/training.*measured"):
        pages.rows(without)


def test_a_page_without_its_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="once each"):
        pages.between("# A page\n", "speed", "rows")
