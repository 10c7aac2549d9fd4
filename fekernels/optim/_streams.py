"""The noise streams of an optimizer's parameters: by their positions, or by their names."""

from __future__ import annotations

import hashlib
from typing import Any

__all__ = ["assign_streams", "keep_names", "stream_of_name"]


def stream_of_name(name: str) -> int:
    """A parameter's Philox stream by its name: 31 bits (the top bit belongs to the rounding noise)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def keep_names(group: dict[str, Any], before: dict[str, Any]) -> None:
    """Streams of names stay with them where a loaded group has the same names in another order.

    ``torch.distributed.checkpoint`` matches states by name, and lists in a group not at all. Other names are a rename,
    where position tells whose noise it was.
    """
    names = before.get("param_names")
    if names is None:
        return
    streams = [stream_of_name(name) for name in names]
    if sorted(streams) == sorted(group["streams"]):
        group["streams"], group["param_names"] = streams, names


def assign_streams(owner: str, groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
    """To ``group``, the last: positions over all groups, or hashes of names where its parameters came with names."""
    others = groups[:-1]
    taken = {stream: name for other in others for stream, name in _named(other)}
    if "param_names" in group:
        group["streams"] = [stream_of_name(name) for name in group["param_names"]]
    else:
        first = sum(len(other["params"]) for other in others)
        group["streams"] = list(range(first, first + len(group["params"])))
    for stream, name in _named(group):
        if stream in taken:
            raise ValueError(
                f"{owner}: parameters {taken[stream]!r} and {name!r} hash to the same noise stream; rename one"
            )
        taken[stream] = name


def _named(group: dict[str, Any]) -> list[tuple[int, str]]:
    names = group.get("param_names") or [f"parameter {stream}" for stream in group["streams"]]
    return list(zip(group["streams"], names, strict=True))
