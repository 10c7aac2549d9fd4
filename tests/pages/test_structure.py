"""The picture of the structure is that of the sources."""

from __future__ import annotations

import ast

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
