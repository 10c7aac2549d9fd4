"""Every example stands in the gallery, with a picture or with what it prints, and with a time; none is long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gallery

MACHINE, SECTIONS = gallery.load()
ROWS = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
FILES = sorted(gallery.EXAMPLES.rglob("*.py"))


def test_the_page_is_made_from_the_examples() -> None:
    assert gallery.PAGE.read_text() == gallery.page(MACHINE, SECTIONS), "run python -m benchmarks.gallery"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(gallery.EXAMPLES)) for path in FILES])
def test_an_example_is_short_and_says_what_it_is(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 150
    assert len(gallery.title(path)) > 20


def test_every_file_beside_the_examples_is_a_part_of_one() -> None:
    assert set(FILES) == {part for program in gallery.programs() for part in gallery.parts(program)}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_a_picture_or_lines_and_a_time(name: str) -> None:
    row = ROWS[name]
    assert row["seconds"] > 0 and (gallery.DOCS / row["page"].partition("#")[0]).is_file()
    if "picture" not in row:
        assert len(row["printed"]) == row["shows"] > 1
        assert "--out" not in (gallery.EXAMPLES / f"{name}.py").read_text()  # it draws nothing
        return
    data = (gallery.DOCS / row["picture"]).read_bytes()
    assert data.startswith((b"\x89PNG", b"<?xml")) and len(data) <= 150_000


def test_an_example_without_a_row_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = json.loads(gallery.ROWS.read_text())
    del shorter["sections"]["Particles"]["svgd_collapse"]
    monkeypatch.setattr(gallery, "ROWS", tmp_path / "gallery.json")
    gallery.ROWS.write_text(json.dumps(shorter))
    with pytest.raises(ValueError, match="one row for each example; look at svgd_collapse"):
        gallery.load()


def test_a_time_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have a time: .*--measure views"):
        gallery.card(gallery.EXAMPLES / "views.py", {"picture": "images/views.png", "page": "views.md"})


@pytest.mark.parametrize(
    ("value", "text"), [(0.2, "1 s"), (8.4, "8 s"), (41, "40 s"), (130, "2.2 min"), (402, "7 min")]
)
def test_times_are_as_one_plans_with_them(value: float, text: str) -> None:
    assert gallery.seconds(value) == text


def test_measuring_keeps_the_time_and_the_last_lines(tmp_path: Path) -> None:
    program = tmp_path / "short.py"
    program.write_text(
        '"""A short one."""\nsum(range(20_000_000))\nprint("one")\nprint("two")\nprint("three")\n'
    )
    row = gallery.measure(program, shows=2, pictures=False)
    assert row["printed"] == ["two", "three"] and 0 < row["seconds"] < 60
