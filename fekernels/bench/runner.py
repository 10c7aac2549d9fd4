"""Times the cases of the registry: one dict per row, with peer, ratio, aim and floor of the same run."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from fekernels.bench import floors
from fekernels.bench.case import Case, Cost, Row
from fekernels.bench.timing import HARMLESS, Contestant, Timing, interleave

__all__ = ["Made", "make", "measure", "result"]


@dataclass(frozen=True)
class Made:
    """A case at one size, with what its floors are timed by."""

    case: Case
    size: str
    contestants: Sequence[Contestant]
    missing: Mapping[str, str]
    costs: Mapping[str, Cost]  # of ours

    def why_missing(self, row: Row) -> str:
        return self.missing.get(row.ours) or self.missing.get(row.peer, "")


def make(case: Case, size: str) -> Made:
    """Allocate everything that the case times at this size."""
    shape = case.shape(size)
    group = case.build(shape)
    known = case.cost(shape)
    costs = {row.ours: known[row.ours] for row in case.rows if row.ours in known}
    bare = floors.contestants(costs.values(), 1024 if size == "tiny" else floors.CACHED)
    return Made(case, size, [*group.contestants, *bare], group.missing, costs)


def measure(cases: Iterable[Case], size: str = "full", progress: bool = False) -> list[dict[str, Any]]:
    """Time every case, one after another, as no two of them need memory at a time.

    Args:
        cases: of the registry.
        size: one of ``case.SIZES``.
        progress: show a bar.

    Returns:
        A dict per row: see ``result``.
    """
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=HARMLESS)
        for case in tqdm(list(cases), desc="bench", leave=False, disable=not progress):
            made = make(case, size)
            effort = case.effort(size)
            times = interleave(
                made.contestants,
                rounds=effort.rounds,
                seconds=effort.seconds,
                turn_seconds=effort.turn_seconds,
            )
            rows += [result(made, row, times) for row in case.rows]
            del made
            gc.collect()  # the next case may need the memory of this one
    return rows


def result(made: Made, row: Row, times: Mapping[str, Timing]) -> dict[str, Any]:
    """What one row says: names; milliseconds, ratio, aim ("reach") and whether it is met; the floor, and its kind.

    ``aim_below_floor``: the aim asks for less time than this run's floor, or than the ratio of ``Row.access``, so that
    missing it says nothing about ours.
    """
    case = made.case
    elements = case.elements(case.shape(made.size))
    found: dict[str, Any] = {
        "name": case.name,
        "case": case.row_label(row, made.size),
        "contestant": row.ours,
        "peer": row.peer,
        "reach": row.aim,
        "elements": elements,
    }
    if why := made.why_missing(row):
        return found | {"missing": why}
    ours, peer, cost = times[row.ours], times[row.peer], made.costs.get(row.ours)
    if row.peer == floors.COPY:  # of as many bytes, whatever was copied
        assert cost is not None
        peer = peer.scaled(cost.bytes / floors.moved_bytes(made.costs.values()))
    ratio = ours.median / peer.median
    found |= {
        "peer_ms": peer.median * 1e3,
        "ours_ms": ours.median * 1e3,
        "ratio": ratio,
        "met": None if row.aim is None else ratio <= row.aim,
        "peer_quartiles_ms": [t * 1e3 for t in peer.quartiles()],
        "ours_quartiles_ms": [t * 1e3 for t in ours.quartiles()],
        "rounds": len(ours.rounds),
    }
    if case.pairs:
        found["pairs_per_ns"] = elements / ours.median / 1e9
    elif cost is not None:
        found |= {
            "bytes_per_element": cost.bytes / elements,
            "gb_per_s": cost.bytes / ours.median / 1e9,
        }
    floor = None if cost is None else floors.floor(cost, made.costs.values(), times)
    if floor is not None:
        found |= {
            "floor": floor.kind,
            "floor_ms": floor.seconds * 1e3,
            "of_floor": ours.median / floor.seconds,
            # A floor that ours went below is none to excuse an aim with.
            "aim_below_floor": row.aim is not None and row.aim * peer.median < floor.seconds <= ours.median,
        }
    if row.access is not None and not any(made.missing.get(name) for name in row.access):
        access = times[row.access[0]].median / times[row.access[1]].median
        found["access_ratio"] = access
        if row.aim is not None and row.aim < access <= ratio:
            found["aim_below_floor"] = True
    return found
