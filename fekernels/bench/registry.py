"""The one registry of cases: the bench command, benchmarks/bench_*.py under pytest-benchmark and the tests read it.

A new case is one ``Case`` in the ``CASES`` of its family's file; tables, JSON, pages and tests follow.
"""

from __future__ import annotations

from fekernels.bench import (
    distributed_optimizers,
    distributed_stein,
    free_energy,
    graph,
    optimizers,
    posterior,
    random,
    rbm,
    stein,
    vae,
    variational,
)
from fekernels.bench.case import Case

__all__ = ["CASES", "FAMILIES", "find"]

FAMILIES: dict[str, tuple[Case, ...]] = {
    "random": random.CASES,
    "optimizers": (*optimizers.CASES, *variational.CASES),
    "free_energy": free_energy.CASES,
    "stein": stein.CASES,
    "posterior": posterior.CASES,
    "rbm": rbm.CASES,
    "graph": graph.CASES,
    "vae": vae.CASES,
    "distributed": (*distributed_optimizers.CASES, *distributed_stein.CASES),
}
CASES: dict[str, Case] = {case.name: case for cases in FAMILIES.values() for case in cases}


def find(name: str) -> Case:
    """The case of this name. KeyError, with the names that there are, where there is none."""
    if name not in CASES:
        raise KeyError(f"find: name must be one of {', '.join(CASES)}; got {name!r}")
    return CASES[name]
