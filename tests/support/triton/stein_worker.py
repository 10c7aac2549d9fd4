"""What `worker` runs in its interpreting process for the Stein kernels."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Memory comes as NaN, and NumPy does not warn of what IEEE arithmetic defines (both sides of a selection run)."""
    torch.use_deterministic_algorithms(True)  # with which torch.empty is NaN, or the largest integer
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def svgd_direction(*arguments: Any) -> Tensor:
    from fekernels.triton.stein import svgd_direction as backend

    with quiet():
        return backend.svgd_direction(*arguments)


def svgd_direction_rows(small: bool, ranges: list[tuple[int, int]], *arguments: Any) -> list[Tensor]:
    """The whole of a direction, and after it the rows of each range alone."""
    from fekernels.triton.stein import svgd_direction as backend

    with small_strips(small):
        rows = [backend.svgd_direction_rows(*arguments, *part) for part in ranges]
        return [backend.svgd_direction(*arguments), *rows]


@contextmanager
def small_strips(small: bool) -> Iterator[None]:
    """Strips of 64 rows and sums over parts of the dimensions, for which there must else be more particles."""
    from fekernels.triton.stein import strips

    changes = dict(LEAST=1, LONGEST=32) if small else {}
    with mock.patch.multiple(strips, **changes) if small else quiet(), quiet():
        yield


def svgd_direction_backward(small: bool, *arguments: Any) -> list[Tensor]:
    from fekernels.triton.stein import svgd_direction as backend

    with small_strips(small):
        return backend.svgd_direction_backward(*arguments)


def kernel_stein_discrepancy(small: bool, *arguments: Any) -> Tensor:
    from fekernels.triton.stein import kernel_stein_discrepancy as backend

    with small_strips(small):
        return backend.kernel_stein_discrepancy(*arguments)


def sq_dist_rank(sample: int | None, *arguments: Any) -> Tensor:
    """sample: pairs of the sample, 0 for none; None for a sort of all, as for so few particles by itself."""
    from fekernels.triton.stein import sq_dist_rank as backend

    changes = {} if sample is None else dict(SORTED=0, MOST_SORTED=0)
    changes |= dict(SAMPLE=sample, SAMPLED_FROM=2) if sample else {}
    with mock.patch.multiple(backend, **changes) if changes else quiet(), quiet():
        return backend.sq_dist_rank(*arguments)


def patched(module: str, changes: dict[str, Any], name: str, *arguments: Any) -> Any:
    """The function of this name while a module of fekernels.triton has other constants."""
    with mock.patch.multiple(f"fekernels.triton.{module}", **changes):
        return globals()[name](*arguments)
