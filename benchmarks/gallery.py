"""``python -m benchmarks.gallery``: docs/gallery.md, from the examples, their pictures and docs/examples/gallery.json.

The JSON says where each example stands: its section, its page, its picture or how many of its last lines are shown in
place of one. ``--measure [NAME ...]`` first runs those (none named: all), each in full and alone, and keeps in the JSON
how long they took; ``--pictures`` also keeps what they drew. A busy machine does not count: the time kept is the lesser
of the wall's and the processors'.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS, EXAMPLES, PAGE = ROOT / "docs", ROOT / "docs/examples", ROOT / "docs/gallery.md"
ROWS = EXAMPLES / "gallery.json"
HEAD = """# Gallery

<!-- made by python -m benchmarks.gallery -->
Each is a file of at most 150 lines, to be run as it stands and to be copied: `python docs/examples/vae.py`, say;
with `--quick` in seconds. Times are those of the whole run on {machine}. Its page explains what an example prints
and draws.
"""

Row = dict[str, Any]
Sections = dict[str, dict[str, Row]]


def programs() -> list[Path]:
    """The examples. What is in folders beside them are parts of them."""
    return sorted(EXAMPLES.glob("*.py"))


def parts(example: Path) -> list[Path]:
    """The example's own file, and those beside it that it imports."""
    folders = re.findall(r"^from (\w+)\.(\w+) import", example.read_text(encoding="utf-8"), re.MULTILINE)
    beside = [EXAMPLES / folder / f"{module}.py" for folder, module in folders]
    return [example, *(path for path in beside if path.is_file())]


def title(example: Path) -> str:
    """The first line of its docstring, without the command at the end."""
    doc = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    if not doc:
        raise ValueError(f"gallery: {example.name} must have a docstring; got none")
    return doc.partition("\n")[0].partition(": ``python")[0].rstrip(":.")


def seconds(value: float) -> str:
    """As a reader plans with it."""
    if value < 95:
        return f"{max(value, 1):.0f} s" if value < 20 else f"{5 * round(value / 5)} s"
    return f"{value / 60:.1f} min" if value < 270 else f"{value / 60:.0f} min"


def load() -> tuple[str, Sections]:
    """The machine's name and the rows. ValueError where a row or an example has no counterpart."""
    found = json.loads(ROWS.read_text(encoding="utf-8"))
    sections: Sections = found["sections"]
    listed = sorted(name for rows in sections.values() for name in rows)
    names = [path.stem for path in programs()]
    if listed != names:
        odd = sorted(set(listed) ^ set(names)) or sorted({name for name in listed if listed.count(name) > 1})
        raise ValueError(f"gallery: {ROWS.name} must have one row for each example; look at {', '.join(odd)}")
    return found["machine"], sections


def card(example: Path, row: Row) -> str:
    """One example, as an item of a list of cards."""
    if "seconds" not in row:
        raise ValueError(
            f"gallery: {example.stem} must have a time: python -m benchmarks.gallery --measure {example.stem}"
        )
    name = title(example)
    lines = [f"**{name}**", ""]
    if picture := row.get("picture"):
        shown = [f"[![{name}]({picture})]({picture})"]
        if (DOCS / (dark := picture.replace("-light.", "-dark."))).is_file() and dark != picture:
            shown = [
                f"[![{name}]({file}#only-{kind})]({file})"
                for kind, file in (("light", picture), ("dark", dark))
            ]
        lines = [*shown, "", *lines]
    else:
        lines += ["```text", *row["printed"], "```", ""]
    files = ", ".join(f"[{path.name}]({path.relative_to(DOCS)})" for path in parts(example))
    lines.append(f"{seconds(row['seconds'])} · {files} · [{heading(row['page'])}]({row['page']})")
    return "-   " + "\n".join(f"    {line}" if line else "" for line in lines).lstrip()


def heading(page: str) -> str:
    """The title of a page, or of the section that a link names."""
    name, _, anchor = page.partition("#")
    for line in (DOCS / name).read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if line.startswith("#") and (not anchor or re.sub(r"[^\w]+", "-", text.lower()).strip("-") == anchor):
            return text
    raise ValueError(f"gallery: the page of an example must have its heading; got {page}")


def page(machine: str, sections: Sections) -> str:
    """docs/gallery.md as it is to be. On GitHub the grids are plain lists."""
    blocks = [HEAD.format(machine=machine)]
    for name, rows in sections.items():
        cards = "\n\n".join(card(EXAMPLES / f"{stem}.py", row) for stem, row in rows.items())
        blocks.append(f'## {name}\n\n<div class="grid cards" markdown>\n\n{cards}\n\n</div>\n')
    return "\n".join(blocks)


def measure(example: Path, shows: int, pictures: bool) -> Row:
    """Runs it in full: its time, and the last lines that it printed. Keeps what it drew, if ``pictures``."""
    with tempfile.TemporaryDirectory() as folder:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(example)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{done.stdout}\n{example.name}: {wall:.1f} s, {used:.1f} s of processors", flush=True)
        for drawn in Path(folder).iterdir() if pictures else ():
            if drawn.suffix in (".png", ".svg"):
                (DOCS / "images" / drawn.name).write_bytes(drawn.read_bytes())
    found: Row = {"seconds": round(min(wall, used), 1)}
    if shows:
        found["printed"] = done.stdout.strip().splitlines()[-shows:]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gallery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--measure", nargs="*", metavar="NAME", help="run these in full first; none named: all"
    )
    parser.add_argument("--pictures", action="store_true", help="keep what --measure draws")
    options = parser.parse_args(argv)
    machine, sections = load()
    rows = {name: row for section in sections.values() for name, row in section.items()}
    if unknown := set(options.measure or ()) - rows.keys():
        parser.error(
            f"no example is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(rows))}"
        )
    for name in () if options.measure is None else options.measure or rows:
        found = measure(EXAMPLES / f"{name}.py", rows[name].get("shows", 0), options.pictures)
        machine, sections = load()  # which may have been edited meanwhile
        for section in sections.values():
            section.get(name, {}).update(found)
        text = json.dumps({"machine": machine, "sections": sections}, indent=2, ensure_ascii=False)
        ROWS.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(machine, sections), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
