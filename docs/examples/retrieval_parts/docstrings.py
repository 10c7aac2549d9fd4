"""Queries and contexts that every machine with Python has: the standard library's docstrings.

The first line of each is a query, the rest of it the context that belongs to it. Modules are split whole, so that
nothing of a module that is tested was seen in training.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

LEFT_OUT = {"tests", "test", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip"}


class Pair(NamedTuple):
    module: str
    query: str
    context: str


def docstrings(most: int | None = None) -> list[Pair]:
    """First lines and bodies, of the first ``most`` files or of all. What would tell one from the other, or has two
    answers, is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    found: dict[str, Pair] = {}
    queries: set[str] = set()
    for path in tqdm(files[:most], desc="parse"):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        for first, body in split_docstrings(path):
            known = body in found or first in queries or first.rstrip(".").lower() in body.lower()
            if not known and len(first.split()) >= 3 and len(body.split()) >= 8:
                found[body] = Pair(module, first, body)
                queries.add(first)
    return list(found.values())


def split_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # some are there to be wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            yield " ".join(first.split()), " ".join(body.split())


def by_module(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """To train on, to calibrate with, to test on: whole modules each, half, a tenth and the rest of them."""
    modules = sorted({pair.module for pair in pairs})
    random.Random(seed).shuffle(modules)
    cuts = len(modules) // 2, len(modules) * 6 // 10
    parts = set(modules[: cuts[0]]), set(modules[cuts[0] : cuts[1]]), set(modules[cuts[1] :])
    train, held, test = ([pair for pair in pairs if pair.module in part] for part in parts)
    return train, held, test


def columns(pairs: list[Pair]) -> tuple[list[str], list[str]]:
    return [pair.query for pair in pairs], [pair.context for pair in pairs]


def batches(pairs: list[Pair], size: int, epochs: int, seed: int) -> list[list[tuple[list[str], list[str]]]]:
    """Those of every epoch, shuffled; the last few pairs of an epoch wait for the next."""
    order, every = random.Random(seed), []
    for _ in range(epochs):
        shuffled = order.sample(pairs, len(pairs))
        every.append([columns(shuffled[i : i + size]) for i in range(0, len(pairs) - size + 1, size)])
    return every
