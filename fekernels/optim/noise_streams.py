"""The noise streams of an optimizer's parameters: by their positions, or by their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

__all__ = ["Names", "assign_streams", "keep_names", "stream_of_name"]

# What torch puts between the names of a module and of its parts: torch.compile, checkpoint_wrapper, FSDP1.
WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
WHOLE = "module"  # in front of all names: DistributedDataParallel and DataParallel


def stream_of_name(name: str) -> int:
    """A parameter's Philox stream by its name: 31 bits (the top bit belongs to the rounding noise)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


class Names:
    """How the names that an optimizer is given become those of its noise: without the names of wrappers.

    So that a model makes the same noise whether or not it is wrapped or compiled.

    Attributes:
        fronts: how many components ``module`` are in front of all names, each put there by a wrapper of the whole.
        distinct: whether they still differ then; otherwise they stay as they are.
    """

    def __init__(self, entries: Iterable[Any]) -> None:
        """Of (name, tensor) pairs, of tensors, or of dicts of lists of them; what is none of these has no names."""
        names = []
        for entry in entries:
            listed = entry.get("params") if isinstance(entry, dict) else [entry]
            pairs = [each for each in listed if isinstance(each, tuple)] if isinstance(listed, list) else []
            names += [str(pair[0]) for pair in pairs if pair]
        self.fronts, self.distinct = _fronts(names), True
        self.distinct = len({self._own(name, self.fronts) for name in names}) == len(set(names))

    def streams(self, names: Sequence[str]) -> list[int]:
        """Of a group's parameters."""
        fronts = min(self.fronts, _fronts(names))
        return [stream_of_name(self._own(name, fronts)) for name in names]

    def _own(self, name: str, fronts: int) -> str:
        return ".".join(_parts(name)[fronts:]) if self.distinct else name


def _parts(name: str) -> list[str]:
    """The components of a name that are no wrapper's; all of one that has no others."""
    parts = name.split(".")
    return [part for part in parts if part not in WRAPPERS] or parts


def _fronts(names: Sequence[str]) -> int:
    """With how many components ``module`` all names begin; the last one of a name is the parameter's own."""
    counts = []
    for name in names:
        front = takewhile(lambda part: part == WHOLE, _parts(name)[:-1])
        counts.append(len(list(front)))
    return min(counts, default=0)


def keep_names(group: dict[str, Any], before: dict[str, Any], given: Names) -> None:
    """Streams of names stay with them where a loaded group has the same names in another order.

    ``torch.distributed.checkpoint`` matches states by name, and lists in a group not at all. Other names are a rename,
    where position tells whose noise it was. Earlier releases hashed names with those of wrappers.
    """
    names = before.get("param_names")
    if names is None:
        return
    for streams in (given.streams(names), [stream_of_name(name) for name in names]):
        if sorted(streams) == sorted(group["streams"]):
            group["streams"], group["param_names"] = streams, names
            return


def assign_streams(owner: str, groups: list[dict[str, Any]], group: dict[str, Any], given: Names) -> None:
    """To ``group``, the last: positions over all groups, or hashes of names where its parameters came with names."""
    others = groups[:-1]
    taken = {stream: name for other in others for stream, name in _named(other)}
    if "param_names" in group:
        group["streams"] = given.streams(group["param_names"])
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
