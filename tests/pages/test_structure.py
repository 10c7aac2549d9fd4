"""The picture of the structure is that of the sources, and systems import of each other their public modules alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tools import draw_structure


def test_the_picture_is_current() -> None:
    assert draw_structure.PICTURE.read_text() == draw_structure.picture(), (
        "run python tools/draw_structure.py"
    )


def test_what_a_longer_way_leads_to_has_no_arrow() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert draw_structure.arrows(graph) == [("a", "b"), ("b", "c")]
    assert draw_structure.floors(graph) == [["c"], ["b"], ["a"]]


def test_of_rooms_that_import_each_other_the_fewer_imports_go_up() -> None:
    found = {("a", "b"): 3, ("b", "a"): 1, ("b", "c"): 1}
    graph, upwards = draw_structure.straightened({"a", "b", "c"}, found)
    assert graph == {"a": {"b"}, "b": {"c"}, "c": set()} and upwards == [("b", "a")]


def test_only_imports_at_load_count() -> None:
    code = "if TYPE_CHECKING:\n    import a\ntry:\n    from b import c\nexcept E:\n    import d\n"
    code += "def f():\n    import e\n"
    assert set(draw_structure.imports_at_load(ast.parse(code))) == {"b", "b.c", "d"}


def test_no_system_imports_another_ones_private_modules() -> None:
    found = [
        f"{path.relative_to(draw_structure.ROOT)}: {name}"
        for path in sorted((draw_structure.ROOT / "fekernels").rglob("*.py"))
        for name in private_imports(path.relative_to(draw_structure.ROOT / "fekernels"), path.read_text())
    ]
    assert not found, "what several systems need has a name without underscore: " + "; ".join(found)


def private_imports(path: Path, code: str) -> list[str]:
    """Names with an underscore that a module of fekernels imports of another system than its own, at load or later."""
    named = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["fekernels", *path.parts[:-1]]
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            named += [f"{module}.{alias.name}" for alias in node.names]
    own = path.parts[0].removesuffix(".py")
    parts = [name.split(".") for name in named]
    return [
        ".".join(part)
        for part in parts
        if part[0] == "fekernels"
        and part[1:2] != [own]
        and any(re.match("_(?!_)", name) for name in part[2:])
    ]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from fekernels.stein._noise import draws", ["fekernels.stein._noise.draws"]),
        ("from fekernels.stein import _noise", ["fekernels.stein._noise"]),
        ("from fekernels.stein.svgd import _start", ["fekernels.stein.svgd._start"]),
        ("def f():\n    import fekernels.stein._noise", ["fekernels.stein._noise"]),
        ("from ..stein import _noise", ["fekernels.stein._noise"]),
        ("from fekernels.optim._shards import whole\nfrom . import _zero", []),
        ("from fekernels._checks import number\nfrom fekernels import __version__", []),
    ],
)
def test_a_private_import_is_found(code: str, found: list[str]) -> None:
    assert private_imports(Path("optim/sgld.py"), code) == found
