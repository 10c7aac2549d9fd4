"""``python tools/draw_structure.py``: docs/images/structure.svg, folders as rooms and imports as arrows.

A room stands above all that it imports at the head of a file; what another arrow's way already leads to has no arrow of
its own. Where rooms import each other the fewest imports that do it are dashed, and go up.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs/images/structure.svg"
Graph = dict[str, set[str]]

WIDTH, BOX, HIGH, GAP, STEP, MARGIN = 760, 108, 32, 40, 68, 24
INK, PAPER, FILL, LINE, AGAINST = "#1f2328", "#ffffff", "#e8eff8", "#1f4e8c", "#c2571a"


def imports_at_load(tree: ast.Module) -> Iterator[str]:
    """Modules named by imports outside of functions and of ``if TYPE_CHECKING``."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            todo += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            todo += [*node.body, *node.orelse, *(part for handler in node.handlers for part in handler.body)]


def python_rooms() -> tuple[set[str], Counter[tuple[str, str]]]:
    """The rooms, and how many imports lead from one to another."""
    package = ROOT / "fekernels"
    rooms = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    rooms = {room for room in rooms if not room.startswith("__")}
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        names = imports_at_load(ast.parse(path.read_text(encoding="utf-8")))
        others = {name.split(".")[1] for name in names if name.startswith("fekernels.")} & rooms - {room}
        found.update((room, other) for other in others if room in rooms)
    return rooms, found


def native_rooms() -> tuple[set[str], Counter[tuple[str, str]]]:
    sources = ROOT / "csrc"
    rooms = {path.name for path in sources.iterdir() if path.is_dir()}
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(sources.rglob("*.*")):
        room = path.relative_to(sources).parts[0]
        for name in re.findall(r'^#include "([\w./]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            other = name.split("/")[0]
            if (sources / name).is_file() and other != room and {room, other} <= rooms:
                found[room, other] += 1
    return rooms, found


def reaches(graph: Graph) -> Graph:
    """Of each room all that it leads to."""
    found: Graph = {}
    for room in graph:
        seen: set[str] = set()
        todo = list(graph[room])
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += graph[other]
        found[room] = seen
    return found


def straightened(
    rooms: set[str], found: Mapping[tuple[str, str], int]
) -> tuple[Graph, list[tuple[str, str]]]:
    """The graph without circles, and what was taken out of it: of each circle the pair with the fewest imports."""
    graph: Graph = {room: {b for a, b in found if a == room} for room in sorted(rooms)}
    taken: list[tuple[str, str]] = []
    while circles := [(found[a, b], a, b) for a in graph for b in graph[a] if a in reaches(graph)[b]]:
        _, a, b = min(circles)
        graph[a].remove(b)
        taken.append((a, b))
    upwards = []
    for a, b in taken:  # what closes no circle any more goes back
        if a in reaches(graph)[b]:
            upwards.append((a, b))
        else:
            graph[a].add(b)
    return graph, sorted(upwards)


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """Imports that no longer way through other rooms replaces."""
    all_of = reaches(graph)
    return sorted(
        (room, other)
        for room in graph
        for other in graph[room]
        if not any(other in all_of[between] for between in graph[room] if between != other)
    )


def floors(graph: Graph) -> list[list[str]]:
    """Rooms by floor, the ground first: each above all that it imports, in an order that keeps arrows short."""
    level: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in level:
            level[room] = 1 + max((height(other) for other in graph[room]), default=-1)
        return level[room]

    for room in sorted(graph):
        height(room)
    rows = [sorted(r for r in graph if level[r] == i) for i in range(max(level.values()) + 1)]
    pairs = arrows(graph)
    for turn in range(12):
        place = {room: (i + 0.5) / len(row) for row in rows for i, room in enumerate(row)}
        for row in rows[:: 1 if turn % 2 else -1]:
            beside = {
                room: [place[b] for a, b in pairs if a == room] + [place[a] for a, b in pairs if b == room]
                for room in row
            }
            row.sort(key=lambda room: (sum(beside[room]) / max(1, len(beside[room])), room))
            place.update({room: (i + 0.5) / len(row) for i, room in enumerate(row)})
    return rows


def drawn(
    title: str, found: tuple[set[str], Counter[tuple[str, str]]], top: float
) -> tuple[list[str], float]:
    """The SVG of one graph below ``top``, and where it ends."""
    graph, upwards = straightened(*found)
    rows = floors(graph)[::-1]
    spot: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(rows):
        step = min(BOX + GAP, (WIDTH - 2 * MARGIN - BOX) / max(1, len(row) - 1))
        for j, room in enumerate(row):
            spot[room] = (WIDTH / 2 + (j - (len(row) - 1) / 2) * step, top + 34 + HIGH / 2 + i * STEP)
    parts = [f'<text x="{MARGIN}" y="{top + 12:g}" class="title">{escape(title)}</text>']
    for a, b in arrows(graph):
        (x1, y1), (x2, y2) = spot[a], spot[b]
        y1, y2 = y1 + HIGH / 2, y2 - HIGH / 2 - 5
        bend = max(26.0, (y2 - y1) / 2)
        parts.append(
            f'<path d="M{x1:.1f} {y1:.1f} C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"'
            ' class="arrow" marker-end="url(#head)"/>'
        )
    for a, b in upwards:  # around the side
        (x1, y1), (x2, y2) = spot[a], spot[b]
        side = max(x1, x2) + BOX / 2 + 28
        x1, x2 = x1 + BOX / 2, x2 + BOX / 2 + 5
        parts.append(
            f'<path d="M{x1:.1f} {y1:.1f} C{side:.1f} {y1:.1f} {side:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"'
            ' class="arrow up" marker-end="url(#head)"/>'
        )
    for room, (x, y) in sorted(spot.items()):
        parts.append(
            f'<rect x="{x - BOX / 2:.1f}" y="{y - HIGH / 2:.1f}" width="{BOX}" height="{HIGH}" rx="6" class="room"/>'
            f'<text x="{x:.1f}" y="{y + 4.5:.1f}" class="name">{escape(room)}</text>'
        )
    return parts, top + 34 + len(rows) * STEP - (STEP - HIGH)


def picture() -> str:
    python, below = drawn("fekernels/: what imports what", python_rooms(), 20)
    native, end = drawn("csrc/: what includes what", native_rooms(), below + 40)
    head = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end + MARGIN:g}" role="img">
<title>Folders as rooms, imports as arrows</title>
<style>
text {{ font-family: -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: {INK}; }}
.title {{ font-size: 14px; font-weight: 600; }}
.name {{ font-size: 13px; font-weight: 600; text-anchor: middle; }}
.room {{ fill: {FILL}; stroke: {LINE}; }}
.arrow {{ fill: none; stroke: {LINE}; stroke-opacity: 0.55; }}
.up {{ stroke: {AGAINST}; stroke-opacity: 1; stroke-dasharray: 4 3; }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="6" markerHeight="6" orient="auto">
<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>
<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>"""
    return "\n".join([head, *python, *native, "</svg>\n"])


def main() -> int:
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"written: {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
