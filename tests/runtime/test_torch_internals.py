"""Names that torch may change at any release stand in one file."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.support import ROOT

ALLOWED = "fekernels/_runtime/torch_internals.py"
PYTHONS = {"_fields", "_getframe", "_replace"}
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in ROOT.glob("fekernels/**/*.py")
}


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def own_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def foreign_private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Imported from torch, or an attribute, or a getattr, of a name that nothing of fekernels assigns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and name.value not in own:
                yield name.value


def test_private_names_of_torch_stand_in_one_file() -> None:
    own = PYTHONS | {name for tree in TREES.values() for name in own_names(tree)}
    found = {path: set(filter(is_private, foreign_private_names(tree, own))) for path, tree in TREES.items()}
    assert {"torch._compile._disable_dynamo", "_C", "_base", "_orig_mod"} <= found.pop(ALLOWED)
    assert {path: names for path, names in found.items() if names} == {}
