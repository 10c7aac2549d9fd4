"""What a case of the benchmark is: what is timed in the same rounds, who is compared with whom, the aim, the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fekernels.bench.timing import Contestant

__all__ = ["SIZES", "Case", "Cost", "Effort", "Group", "Row", "Shape", "product", "short"]

# The sets of sizes: those of the tables, those of --quick, and those on which the tests run everything once.
SIZES = ("full", "quick", "tiny")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """What no implementation avoids: bytes read and written once, and operations by their name in ``floors.UNITS``.

    Attributes:
        passes: where user code stands between several passes over the data, each has a floor of its own, and none can
            move its bytes during the arithmetic of another.
    """

    bytes: float = 0.0
    operations: Mapping[str, float] = field(default_factory=dict)
    passes: tuple[Cost, ...] = ()

    @staticmethod
    def of_passes(*passes: Cost) -> Cost:
        """All of these, one after another."""
        units = {unit for each in passes for unit in each.operations}
        operations = {unit: sum(each.operations.get(unit, 0.0) for each in passes) for unit in units}
        return Cost(sum(each.bytes for each in passes), operations, passes)

    def __mul__(self, count: float) -> Cost:
        return Cost(
            count * self.bytes,
            {unit: count * each for unit, each in self.operations.items()},
            tuple(each * count for each in self.passes),
        )


@dataclass(frozen=True)
class Row:
    """One line of the table: ``ours`` over ``peer``, both names of contestants of its case.

    Attributes:
        aim: the ratio to reach; None where no goal names the row.
        label: what follows the label of the case.
        access: two contestants of the case that read and write what these two do, made by somebody else: the ratio of
            their times is this machine's.
    """

    ours: str
    peer: str
    aim: float | None = None
    label: str = ""
    access: tuple[str, str] | None = None


@dataclass(frozen=True)
class Group:
    """A case at one size: its tensors exist from here on. ``missing``: why a contestant cannot be timed here."""

    contestants: Sequence[Contestant]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How long the contestants of a case take their turns; see ``timing.interleave``."""

    rounds: int
    seconds: float
    turn_seconds: float


@dataclass(frozen=True)
class Case:
    """One record of the registry.

    Attributes:
        name: of the family and what is timed, "optimizers/in_cache"; stable, whatever the sizes are.
        label: how the tables call it at a shape.
        shapes: at each of ``SIZES``, in that order.
        build: makes the operands and contestants at a shape.
        rows: who is compared with whom.
        elements: parameters, data or pairs of particles at a shape.
        cost: of one step of a contestant of ours at a shape, by its name; {} where the floors say nothing.
        cached: the data fits into the cache, so that a turn is many short steps.
        pairs: the elements are pairs of particles, of which the rate is told; else it is that of bytes.
        rounds, seconds: the fewest rounds, and how long they go on, at full size.
    """

    name: str
    label: Callable[[Shape], str]
    shapes: tuple[Shape, Shape, Shape]
    build: Callable[[Shape], Group]
    rows: tuple[Row, ...]
    elements: Callable[[Shape], int]
    cost: Callable[[Shape], Mapping[str, Cost]] = lambda shape: {}
    cached: bool = False
    pairs: bool = False
    rounds: int = 15
    seconds: float = 5.0

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    def shape(self, size: str) -> Shape:
        return self.shapes[SIZES.index(size)]

    def row_label(self, row: Row, size: str) -> str:
        label = self.label(self.shape(size))
        return f"{label}, {row.label}" if row.label else label

    def effort(self, size: str) -> Effort:
        if size == "full":
            return Effort(self.rounds, self.seconds, 0.01 if self.cached else 0.0)
        if size == "quick":
            return Effort(min(self.rounds, 5), min(self.seconds, 0.3), 0.003 if self.cached else 0.0)
        return Effort(min(self.rounds, 2), 0.0, 1e-4 if self.cached else 0.0)


def short(count: int) -> str:
    """25600000 as 25.6M."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return str(count)


def product(shape: Shape) -> int:
    """Elements of a shape all of whose sizes count."""
    return math.prod(shape)
