"""Whether chains have converged and how many draws they are worth: rank-normalised split R-hat, effective sample size.

Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, "Rank-normalization, folding, and localization", arXiv:1903.08008.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fekernels._checks import FLOATS, INTEGERS, one_of
from fekernels._runtime.ranks import exchange, gathered_numbers, group_of
from fekernels.diagnostics.common_noise import Together, moving_together
from fekernels.ops.diagnostics.chain_statistics import BULK, RHAT, TAIL, statistics_of_chains

__all__ = [
    "ChainStatistics",
    "chain_statistics",
    "effective_sample_size",
    "split_rhat",
    "unjudged_statistics",
]

DTYPES = (*FLOATS, *INTEGERS)


def split_rhat(draws: Any, *, process_group: Any = None) -> Tensor:
    """Rank-normalised split R-hat: the larger one of the draws' own and of the folded draws' (the paper, section 4).

    Draws above 1.01 are not to be believed yet. It compares chains with each other: those that all miss a mode agree,
    so start them apart.

    Args:
        draws: [chains, draws, ...], at least 4 draws of each chain, a tensor or an array. A single chain is compared
            with itself, first half and second. Of an odd number of draws the one in the middle is left out.
        process_group: ``draws`` are those of this rank's chains, none or several, and compared are those of all ranks,
            in their order: a ``ProcessGroup``, such as ``torch.distributed.group.WORLD``, or a ``DeviceMesh`` of one
            dimension. Every rank calls it, with as many draws of each chain, and gets the same, the bits of one process
            with all chains; the work is split by weights.

    Returns:
        [...], float64 on the draws' device. NaN where a draw is not finite, or where all are the same.

    Raises:
        TypeError: draws that are not numbers. ValueError: fewer than two dimensions, or than 4 draws of each chain.

    Warns:
        UserWarning: two chains, named, whose changes are correlated by 0.75 or more, and by more than independent ones
            are once in a million calls: they got the same noise, agree wherever they are, and R-hat does not see it. So
            do runs of one a rank with one seed for all, or none.
    """
    return _judged("split_rhat", draws, RHAT, process_group)[0]


def effective_sample_size(
    draws: Any, kind: Literal["bulk", "tail"] = "bulk", *, process_group: Any = None
) -> Tensor:
    """How many independent draws know as much, from the autocorrelation of all chains together.

    Of the bulk: of the mean of the rank-normalised draws. Of the tail: the smaller one of the 5% and the 95% quantile.
    Fewer than 100 in all for each chain make no interval and no R-hat to rely on (section 4 of the paper). Chains that
    disagree have few.

    Args:
        draws, process_group: as in :func:`split_rhat`.
        kind: "bulk" or "tail".

    Returns:
        [...], float64 on the draws' device, more than the number of draws where they alternate. NaN where a draw is not
        finite; the number of draws where all are the same.

    Raises, warns:
        As :func:`split_rhat`; ValueError for another kind.
    """
    one_of("effective_sample_size", "kind", kind, ("bulk", "tail"))
    wanted = BULK if kind == "bulk" else TAIL
    bulk, tail = _judged("effective_sample_size", draws, wanted, process_group)[1:]
    return bulk if kind == "bulk" else tail


class ChainStatistics(NamedTuple):
    """Of every weight, [...] each, float64: split R-hat, and the effective sample sizes of bulk and tail."""

    rhat: Tensor
    bulk: Tensor
    tail: Tensor

    @property
    def size(self) -> Tensor:
        """The smaller one of the bulk's and the tail's effective sample size."""
        return torch.minimum(self.bulk, self.tail)


def chain_statistics(draws: Any, *, process_group: Any = None) -> ChainStatistics:
    """:func:`split_rhat` and both kinds of :func:`effective_sample_size`, from one sort of each weight's draws.

    Args, errors, warnings: as :func:`split_rhat`.
    """
    return ChainStatistics(*_judged("chain_statistics", draws, RHAT | BULK | TAIL, process_group))


def unjudged_statistics(draws: Tensor) -> ChainStatistics:
    """The same, for who says himself what is wrong with the chains."""
    return ChainStatistics(*_statistics("chain_statistics", draws, RHAT | BULK | TAIL, None, False)[0])


def _judged(owner: str, draws: Any, wanted: int, process_group: Any) -> list[Tensor]:
    found, together = _statistics(owner, draws, wanted, process_group, True)
    if together is not None:
        warnings.warn(f"{owner}: {together}", stacklevel=3)
    return found


def _statistics(
    owner: str, draws: Any, wanted: int, process_group: Any, judge: bool
) -> tuple[list[Tensor], Together | None]:
    values = torch.as_tensor(draws).detach()
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{owner}: draws must be real numbers; got {values.dtype}")
    group = group_of(owner, process_group)
    if values.ndim < 2 or values.shape[0] < (group is None) or values.shape[1] < 4:
        raise ValueError(
            f"{owner}: draws must have shape (chains, draws, ...) with at least 4 draws; got {tuple(values.shape)}"
        )
    chains, count = values.shape[:2]
    flat = values.reshape(chains, count, values.shape[2:].numel())
    if group is None:
        rows, together = statistics_of_chains(flat, wanted), moving_together(flat) if judge else None
    else:
        rows, together = _over_ranks(owner, flat, wanted, group)
    return [row.reshape(values.shape[2:]) for row in rows], together


def _over_ranks(owner: str, draws: Tensor, wanted: int, group: Any) -> tuple[Tensor, Together | None]:
    """``statistics_of_chains`` of the chains of all ranks: each has [chains, draws, weights] of its own.

    Each rank gets the draws of all chains of its share of the weights, by one exchange of as much as it holds, and then
    tells the others what they come to.
    """
    import torch.distributed as dist

    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    given = [*draws.shape, DTYPES.index(draws.dtype) if draws.dtype in DTYPES else -1]
    every = gathered_numbers(owner, given, group)
    if (
        len({tuple(shape[1:]) for shape in every}) > 1
        or not any(shape[0] for shape in every)
        or given[-1] < 0
    ):
        raise ValueError(
            f"{owner}: draws must have one dtype, one number of draws and of weights on all ranks, and a chain on one; "
            f"got (chains, draws, weights) {', '.join(str(tuple(shape[:3])) for shape in every)} by rank"
        )
    chains, count, weights = draws.shape
    most, width = max(shape[0] for shape in every), max(1, -(-weights // ranks))
    # Equal parts for all, filled up: gloo of torch 2.10 ends a process that sends or gets nothing.
    padded = draws.new_zeros((most, count, ranks * width))
    padded[:chains, :, :weights] = draws
    parts = padded.view(most, count, ranks, width).permute(2, 0, 1, 3).contiguous()
    received = torch.empty_like(parts)
    exchange(owner, dist.all_to_all_single, received, parts, group=group)
    mine = torch.cat([part[: shape[0]] for part, shape in zip(received, every, strict=True)])
    # The last column: which chains move together, by this share.
    found = draws.new_zeros((3, width + 1), dtype=torch.float64)
    share = min(max(weights - rank * width, 0), width)
    if share:
        found[:, :share] = statistics_of_chains(mine[:, :, :share], wanted)
        if (together := moving_together(mine[:, :, :share])) is not None:
            found[:, -1] = found.new_tensor(together)
    results = [torch.empty_like(found) for _ in range(ranks)]
    exchange(owner, dist.all_gather, results, found, group=group)
    first, second, correlation = max((each[:, -1].tolist() for each in results), key=lambda told: told[2])
    pair = Together(int(first), int(second), correlation) if correlation else None
    return torch.cat([each[:, :-1] for each in results], 1)[:, :weights], pair
