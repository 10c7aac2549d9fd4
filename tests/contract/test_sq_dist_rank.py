"""Order statistics of squared distances: to the bit those of the implementation's own distances, and near float64."""

import pytest
import torch

from tests.support.stein_kernels import on_each
from tests.support.stein_ranks import EXACT, HINTS, INTERPRETED, ROWS, some_ranks, sq_dist_in_float64
from tests.support.tensors import bits_equal


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits but for those of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and bits_equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize(("stein_kernels", "row"), on_each(ROWS, INTERPRETED), indirect=["stein_kernels"])
def test_ranks(stein_kernels, row, poisoned):
    x = row.make()
    everything = stein_kernels.distances(x)
    ranks = some_ranks(everything.shape[1])
    wanted = everything[:, ranks]
    hint = HINTS[row.hint](wanted)
    there = (x.to(stein_kernels.device), ranks, None if hint is None else hint.to(stein_kernels.device))
    got = stein_kernels.sq_dist_rank(*there).cpu()
    assert got.dtype == torch.float32 and same(got, wanted)
    if row.kind in EXACT:
        exact = sq_dist_in_float64(x)
        assert ((got - exact[:, ranks]).abs() <= 1e-5 * exact.max()).all()
