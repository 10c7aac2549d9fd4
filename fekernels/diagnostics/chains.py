"""Whether chains have converged and how many draws they are worth: rank-normalised split R-hat, effective sample size.

Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, "Rank-normalization, folding, and localization", arXiv:1903.08008.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fekernels._checks import one_of
from fekernels.ops.diagnostics.chain_statistics import BULK, RHAT, TAIL, statistics_of_chains

__all__ = ["ChainStatistics", "chain_statistics", "effective_sample_size", "split_rhat"]


def split_rhat(draws: Any) -> Tensor:
    """Rank-normalised split R-hat: the larger one of the draws' own and of the folded draws' (the paper, section 4).

    Draws above 1.01 are not to be believed yet. It compares chains with each other: those that all miss a mode agree,
    so start them apart.

    Args:
        draws: [chains, draws, ...], at least 4 draws of each chain, a tensor or an array. A single chain is compared
            with itself, first half and second. Of an odd number of draws the one in the middle is left out.

    Returns:
        [...], float64 on the draws' device. NaN where a draw is not finite, or where all are the same.

    Raises:
        TypeError: draws that are not numbers. ValueError: fewer than two dimensions, or than 4 draws of each chain.
    """
    return _statistics("split_rhat", draws, RHAT)[0]


def effective_sample_size(draws: Any, kind: Literal["bulk", "tail"] = "bulk") -> Tensor:
    """How many independent draws know as much, from the autocorrelation of all chains together.

    Of the bulk: of the mean of the rank-normalised draws. Of the tail: the smaller one of the 5% and the 95% quantile.
    Fewer than 100 in all for each chain make no interval and no R-hat to rely on (section 4 of the paper). Chains that
    disagree have few.

    Args:
        draws: as in :func:`split_rhat`.
        kind: "bulk" or "tail".

    Returns:
        [...], float64 on the draws' device, more than the number of draws where they alternate. NaN where a draw is not
        finite; the number of draws where all are the same.

    Raises:
        TypeError, ValueError: as :func:`split_rhat`, and for another kind.
    """
    one_of("effective_sample_size", "kind", kind, ("bulk", "tail"))
    bulk, tail = _statistics("effective_sample_size", draws, BULK if kind == "bulk" else TAIL)[1:]
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


def chain_statistics(draws: Any) -> ChainStatistics:
    """:func:`split_rhat` and both kinds of :func:`effective_sample_size`, from one sort of each weight's draws.

    Args, errors: as :func:`split_rhat`.
    """
    return ChainStatistics(*_statistics("chain_statistics", draws, RHAT | BULK | TAIL))


def _statistics(owner: str, draws: Any, wanted: int) -> list[Tensor]:
    values = torch.as_tensor(draws).detach()
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{owner}: draws must be real numbers; got {values.dtype}")
    if values.ndim < 2 or values.shape[0] < 1 or values.shape[1] < 4:
        raise ValueError(
            f"{owner}: draws must have shape (chains, draws, ...) with at least 4 draws; got {tuple(values.shape)}"
        )
    chains, count = values.shape[:2]
    flat = values.reshape(chains, count, values.shape[2:].numel())
    return [row.reshape(values.shape[2:]) for row in statistics_of_chains(flat, wanted)]
