"""Batches of any shape that a loader gives: their rows, parts of them, and several side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_batches",
    "concatenated",
    "endless",
    "layout",
    "map_tensors",
    "parts_of_a_row",
    "rows",
    "split",
    "stacked",
    "stacked_if_alike",
    "tensors",
]


def map_tensors(function: Callable[..., Any], batch: Any, *others: Any) -> Any:
    """``function`` of every tensor of nested tuples, lists and mappings, and of those at its path in ``others``."""
    if isinstance(batch, Tensor):
        return function(batch, *others)
    if isinstance(batch, (list, tuple)):
        return _like(
            batch, [map_tensors(function, *together) for together in zip(batch, *others, strict=True)]
        )
    if isinstance(batch, Mapping):
        return {
            key: map_tensors(function, value, *(other[key] for other in others))
            for key, value in batch.items()
        }
    return batch


def _like(batch: Any, parts: list[Any]) -> Any:
    """A list or tuple of the same kind."""
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def _leaves(batch: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What a batch holds, tensors or not, each with its path."""
    if isinstance(batch, (Mapping, list, tuple)):
        named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        for key, value in named:
            yield from _leaves(value, (*path, key))
    else:
        yield path, batch


def layout(batch: Any) -> Any:
    """What batches must share to be joined; None of one with an entry that is not one row for each data point."""
    found: list[tuple[Any, ...]] = []
    count = None
    for path, leaf in _leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            if count is None:
                count = len(leaf)
            elif len(leaf) != count:  # weights of classes
                return None
            found.append((path, leaf.shape[1:], leaf.dtype, leaf.device))
        elif leaf is None:
            found.append((path, None, None, None))
        else:  # a text or number of each batch
            return None
    return found


def rows(owner: str, batch: Any) -> int:
    """Data points of a batch: the length of its first tensor.

    Raises:
        TypeError: a batch without a tensor that has rows.
    """
    count = _rows(batch)
    if count is None:
        raise TypeError(
            f"{owner}: a batch of loader must hold a tensor with rows; got {type(batch).__name__}"
        )
    return count


def _rows(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    parts: Iterable[Any] = ()
    if isinstance(batch, (list, tuple)):
        parts = batch
    elif isinstance(batch, Mapping):
        parts = batch.values()
    for part in parts:
        count = _rows(part)
        if count is not None:
            return count
    return None


def parts_of_a_row(batch: Any) -> set[int]:
    """How many parts a row of each tensor may be said to have: [rows, 8, 5] holds 8 in a row, or 40.

    Of indices also one less: a sequence of 9 tokens has 8 that follow another.
    """
    found = {math.prod(t.shape[1:last]) for t in tensors(batch) for last in range(2, t.dim() + 1)}
    indices = [t for t in tensors(batch) if t.dim() == 2 and not t.is_floating_point()]
    return found | {t.shape[1] - 1 for t in indices}


def split(owner: str, batch: Any, size: int) -> list[Any]:
    """``size`` rows at a time of all that has as many as the first tensor; the rest goes with each part.

    Lists of texts or numbers have rows too.
    """
    count = rows(owner, batch)

    def part(of: Any, start: int) -> Any:
        if isinstance(of, Mapping):
            return {key: part(value, start) for key, value in of.items()}
        if isinstance(of, (list, tuple)):
            if len(of) == count and not any(isinstance(x, (Tensor, Mapping, list, tuple)) for x in of):
                return of[start : start + size]
            return _like(of, [part(value, start) for value in of])
        has_rows = isinstance(of, Tensor) and of.dim() and len(of) == count
        return of[start : start + size] if has_rows else of

    return [part(batch, start) for start in range(0, count, size)]


def stacked(batches: Sequence[Any]) -> Any:
    """One batch whose tensors are those of ``batches`` along a new first dimension."""
    return map_tensors(lambda *tensors: torch.stack(tensors), batches[0], *batches[1:])


def stacked_if_alike(batches: Sequence[Any]) -> Any:
    """The same of batches of one form that hold tensors alone, of the same shapes; None of others. Of every step."""
    first = batches[0]
    if isinstance(first, Tensor):
        shape = first.shape
        for other in batches:
            if not isinstance(other, Tensor) or other.shape != shape:
                return None
        return torch.stack(tuple(batches))
    if isinstance(first, (list, tuple)):
        if any(not isinstance(other, (list, tuple)) or len(other) != len(first) for other in batches):
            return None
        parts = []
        for together in zip(*batches, strict=True):
            parts.append(stacked_if_alike(together))
            if parts[-1] is None:
                return None
        return _like(first, parts)
    if isinstance(first, Mapping):
        if any(not isinstance(other, Mapping) or other.keys() != first.keys() for other in batches):
            return None
        named = {key: stacked_if_alike([other[key] for other in batches]) for key in first}
        return None if any(part is None for part in named.values()) else named
    return None


def concatenated(batches: Iterable[Any]) -> Any:
    """One batch with the rows of all, which have one `layout`; a single one as it is."""
    first, *others = batches
    return map_tensors(lambda *parts: torch.cat(parts), first, *others) if others else first


def check_batches(owner: str, loader: Any, name: str = "loader") -> None:
    """TypeError where ``loader``, the argument ``name``, does not start anew each time, as an iterator does not."""
    if not isinstance(loader, Iterable) or iter(loader) is loader:
        raise TypeError(
            f"{owner}: {name} must be an iterable of batches that starts anew every time, such as a DataLoader or a "
            f"list; got {type(loader).__name__}"
        )


def endless(owner: str, loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of ``loader``, begun again whenever they end.

    Raises:
        ValueError: it holds no batch.
    """
    for _ in itertools.count():
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"{owner}: loader must hold a batch; got none")
