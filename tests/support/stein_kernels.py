"""Every implementation of the Stein operations, behind one fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fekernels._runtime import backends
from fekernels.reference.stein.kernels import centred, square_distances
from tests.support.implementations import CPU_IMPLEMENTATIONS, ON_GPU, instruction_set

OPERATIONS = ("svgd_direction", "svgd_direction_backward", "kernel_stein_discrepancy", "sq_dist_rank")
INTERPRETED = "interpreted"
IMPLEMENTATIONS = [
    *CPU_IMPLEMENTATIONS,
    INTERPRETED,
    # Without CUDA C++, which Stein's operations do not have.
    *(place for place in ON_GPU if place.values[0].backend != "cuda"),
]


class SteinKernels(NamedTuple):
    """Functions as those of the same names in fekernels/reference/stein; operands are on ``device``."""

    name: str
    device: str
    svgd_direction: Callable[..., Tensor]
    svgd_direction_backward: Callable[..., list[Tensor]]
    kernel_stein_discrepancy: Callable[..., Tensor]
    sq_dist_rank: Callable[..., Tensor]
    sq_dist: Callable[[Tensor], Tensor]  # [B, n, n], as this implementation computes them

    def distances(self, x: Tensor) -> Tensor:
        """Those of pairs i < j, sorted, NaN last."""
        above = torch.triu_indices(x.shape[1], x.shape[1], 1)
        return self.sq_dist(x)[:, above[0], above[1]].sort(1).values


def on_each(rows: Iterable[Any], interpreted: Iterable[Any] | None = None) -> list[Any]:
    """(implementation, row) for `parametrize`; of interpreted ones only these rows."""
    few = None if interpreted is None else set(interpreted)
    cases = []
    for implementation in IMPLEMENTATIONS:
        place = not isinstance(implementation, str)
        name = str(implementation.values[0]) if place else implementation
        for row in rows:
            if name != INTERPRETED or few is None or row in few:
                marks = implementation.marks if place else ()
                cases.append(pytest.param(name, row, id=f"{name}-{row}", marks=marks))
    return cases


def by_fma(x: Tensor) -> Tensor:
    """A chain of fma in float32 over the coordinates, as Triton computes it, by way of float64."""
    t = torch.zeros(x.shape[0], x.shape[1], x.shape[1])
    for column in x.float().unbind(2):
        difference = (column.unsqueeze(2) - column.unsqueeze(1)).double()
        t = (difference * difference + t.double()).float()
    return t


def of_reference(x: Tensor) -> Tensor:
    moved = centred(x)
    return square_distances(moved, moved).float()


@pytest.fixture
def stein_kernels(request: pytest.FixtureRequest) -> Iterator[SteinKernels]:
    """The implementation that the test's parameter names, of `on_each`."""
    name: str = request.param
    if name == INTERPRETED:
        run = request.getfixturevalue("interpret")
        yield SteinKernels(
            name,
            "cpu",
            lambda *call: run("svgd_direction", *call),
            lambda *call: run("svgd_direction_backward", False, *call),
            lambda *call: run("kernel_stein_discrepancy", False, *call),
            lambda *call: run("sq_dist_rank", 0, *call),
            by_fma,
        )
    elif name.startswith("cpp-"):
        native = request.getfixturevalue("native")
        with instruction_set(name.removeprefix("cpp-")):
            yield SteinKernels(name, "cpu", *(getattr(native, each) for each in OPERATIONS), native.sq_dist)
    else:
        backend, _, device = name.partition("-")
        if (obstacle := backends._obstacle(backend, device or "cpu")) is not None:
            pytest.skip(obstacle)
        functions = (backends.implementation(each, backend) for each in OPERATIONS)
        yield SteinKernels(
            name, device or "cpu", *functions, of_reference if backend == "reference" else by_fma
        )
