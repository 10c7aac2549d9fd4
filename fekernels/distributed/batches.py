"""A batch, or samples, split over ranks: which part is whose, and the mean over all of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._checks import integer
from fekernels._runtime.ranks import group_of, has_ranks, offset_of_rank, sum_over_ranks

__all__ = ["batch_mean", "batch_offset", "share"]


def share(count: int, process_group: Any = None) -> range:
    """Which of ``count`` things (samples, chains, rows) are this rank's: in order, as even as can be.

        mine = fe.distributed.share(50)                                  # of K = 50 samples of z
        z = fe.reparameterize(mean, logvar, samples=len(mine), stream=mine.start, seed=0)

    Nothing is sent. The first ranks have one more where ``count`` does not divide, as ``torch.tensor_split`` has it;
    with fewer things than ranks the last have none.

    Args:
        count: at least 0, the same on every rank.
        process_group: a ``ProcessGroup`` or a DeviceMesh of one dimension. None: the default group, or this process.
    """
    function = "share"
    count = integer(function, "count", count, 0)
    group = group_of(function, process_group)
    if group is None and not has_ranks():
        return range(count)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    each, more = divmod(count, ranks)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def batch_offset(rows: int, process_group: Any = None) -> int:
    """How many rows of the batch lie on the ranks before this one: the ``offset`` of ``fe.reparameterize``.

    A collective of one number a rank, which waits for all of them. Ask once where the rows stay the same.

    Args:
        rows: of the batch, on this rank: any number.
        process_group: as in ``share``.
    """
    function = "batch_offset"
    rows = integer(function, "rows", rows, 0)
    group = group_of(function, process_group)
    return 0 if group is None and not has_ranks() else offset_of_rank(function, rows, group)


def batch_mean(values: Tensor, process_group: Any = None) -> Tensor:
    """The mean over the rows of all ranks, of a loss or bound by row: what ``values.mean(0)`` is on one process.

        bound = fe.importance_weighted_bound(log_w)              # [this rank's rows]
        (-fe.distributed.batch_mean(bound)).backward()

    The mean of the ranks' own means, which DDP's average of gradients amounts to, weighs the rows of a rank that has
    few of them more than others. One all-reduce. Gradients are this rank's part times the number of ranks, so that
    their average over ranks, which DDP and FSDP take, is that of one process; backward sends nothing.

    Args:
        values: [rows, ...], floating; any number of rows, none even. The sum is taken in float64.
        process_group: as in ``share``.

    Returns:
        [...], the same on every rank, of the dtype of ``values``. NaN where no rank has a row.
    """
    function = "batch_mean"
    if not isinstance(values, Tensor) or not values.is_floating_point():
        came = str(values.dtype) if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{function}: values must be a floating-point tensor; got {came}")
    if not values.dim():
        raise ValueError(f"{function}: values must have shape (rows, ...); got ()")
    group = group_of(function, process_group)
    if group is None and not has_ranks():
        return values.mean(0)
    own = values.double().sum(0)
    whole = sum_over_ranks(function, torch.cat([own.flatten(), own.new_full((1,), len(values))]), group)
    return (whole[:-1] / whole[-1]).view(own.shape).to(values.dtype)
