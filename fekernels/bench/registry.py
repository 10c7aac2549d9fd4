"""The one registry of cases: the bench command, benchmarks/bench_*.py under pytest-benchmark, pages and tests read it.

A new case is one ``Case`` in the ``CASES`` of its family's file; tables, JSON, pages and tests follow.
"""

from __future__ import annotations

from dataclasses import dataclass

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

__all__ = ["CASES", "FAMILIES", "Family", "find", "peaks_of"]


@dataclass(frozen=True)
class Family:
    """A part of the tables; in the JSON its rows stand under its name in ``FAMILIES``.

    Attributes:
        title: of its part of docs/benchmarks.md.
        note: what stands below its table where it was measured.
        peaks: the peak memory of its passes is measured too (``memory.PASSES``), and stands under ``peaks_of``.
    """

    title: str
    note: str
    cases: tuple[Case, ...]
    peaks: bool = False


FAMILIES: dict[str, Family] = {
    "optimizers": Family(
        "Optimizers",
        "Medians of interleaved rounds. GB/s: the bytes that a step cannot avoid, over its time.\n"
        "Floor: the larger of moving those bytes and of the noise, roots and divisions alone, in the same rounds.",
        (*optimizers.CASES, *variational.CASES),
    ),
    "free_energy": Family(
        "Free energy",
        "Forward + backward, float32. GB/s: operands read once and gradients written once, over the time.",
        free_energy.CASES,
        peaks=True,
    ),
    "stein": Family(
        "Stein direction",
        "float32, the bandwidth given. Pairs: n^2 per problem, over the time of ours.",
        stein.CASES,
        peaks=True,
    ),
    "random": Family(
        "Noise",
        "Fills of float32 and int32. Floor: the larger of moving as many bytes and of the noise in cache.",
        random.CASES,
    ),
    "posterior": Family(
        "Posterior runs",
        "float32. Chains: the whole step of all of them, and what is not forward and backward.",
        posterior.CASES,
    ),
    "vae": Family(
        "VAE and its four views",
        "float32. Training: forward, backward, the optimizer's step. Views: values, gradients where they part.",
        vae.CASES,
    ),
    "rbm": Family(
        "RBM",
        "float32. Free energy: the mean over the rows with all gradients; the products: v W and v^T x.",
        rbm.CASES,
    ),
    "graph": Family(
        "Belief propagation",
        "float32. A sweep: both messages of every edge, of a call of 100 with all that it sets up.",
        graph.CASES,
    ),
    "distributed": Family(
        "Several processes",
        "Processes of one thread each, over gloo. A time is that of the slowest rank.",
        # Checkpoints last: the system goes on writing their files while others are timed.
        (*distributed_stein.CASES, *distributed_optimizers.CASES),
    ),
}
CASES: dict[str, Case] = {case.name: case for family in FAMILIES.values() for case in family.cases}


def peaks_of(family: str) -> str:
    """Where the JSON has the peak memory of a family."""
    return f"{family}_memory"


def find(name: str) -> Case:
    """The case of this name. KeyError, with the names that there are, where there is none."""
    if name not in CASES:
        raise KeyError(f"find: name must be one of {', '.join(CASES)}; got {name!r}")
    return CASES[name]
