"""Where an operator can run on this machine: backends, devices, instruction sets, threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fekernels._runtime import backends
from tests.support.pairwise import pairwise

ISAS = ("avx512", "avx2", "baseline")


@dataclass(frozen=True)
class Place:
    """A backend and the device its tensors are on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    def obstacle(self) -> str | None:
        return backends._obstacle(self.backend, self.device)


CPU_PLACES = (Place("reference", "cpu"), Place("cpp", "cpu"))
GPU_PLACES = (Place("reference", "cuda"), Place("triton", "cuda"), Place("cuda", "cuda"))
ON_GPU = [
    pytest.param(place, id=str(place), marks=pytest.mark.gpu)
    for place in GPU_PLACES
    if torch.cuda.is_available()
]
PLACES = [*(pytest.param(place, id=str(place)) for place in CPU_PLACES), *ON_GPU]
# Every implementation of an operator, for the fixtures of the contract tests.
CPU_IMPLEMENTATIONS = tuple(
    name
    for place in CPU_PLACES
    for name in ([f"cpp-{isa}" for isa in ISAS] if place.backend == "cpp" else [str(place)])
)
GPU_IMPLEMENTATIONS = tuple(map(str, GPU_PLACES)) if torch.cuda.is_available() else ()
IMPLEMENTATIONS = (*CPU_IMPLEMENTATIONS, "cuda_on_cpu", "triton_interpreted", *GPU_IMPLEMENTATIONS)


def at_places(**factors: Sequence[Any]) -> dict[str, Any]:
    """Arguments of ``pytest.mark.parametrize``: pairwise rows of the factors and the fixture ``place``."""
    rows = pairwise(**factors, place=PLACES)
    values = [pytest.param(*row[:-1], *row.place.values, marks=row.place.marks) for row in rows]
    names = {Place, torch.dtype}
    return dict(
        argnames=rows[0]._fields,
        argvalues=values,
        indirect=["place"],
        ids=lambda value: str(value) if type(value) in names else None,
    )


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the C++ kernels in this build of them; skips where the processor lacks it."""
    current = backends.native_op("isa")()
    try:
        backends.native_op("set_isa")(name)
    except (RuntimeError, ValueError) as error:  # which of the two depends on the torch
        pytest.skip(str(error).splitlines()[0])
    try:
        yield
    finally:
        backends.native_op("set_isa")(current)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many of torch's threads."""
    current = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(current)
