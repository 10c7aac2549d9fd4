"""R-hat and effective sample sizes of many weights at once: one sort of each weight's draws for all that is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._runtime import backends
from fekernels.ops.plain_memory import in_plain_memory

__all__ = ["BULK", "RHAT", "TAIL", "statistics_of_chains"]

RHAT, BULK, TAIL = 1, 2, 4

# Of each chain. The kernel sums autocovariances lag by lag, which of longer chains that mix badly takes longer than the
# reference's Fourier transforms.
LONGEST = 4096


def statistics_of_chains(draws: Tensor, wanted: int) -> Tensor:
    """[3, weights], float64: R-hat, bulk and tail effective sample size of real draws [chains, draws >= 4, weights].

    Args:
        wanted: the sum of RHAT, BULK and TAIL; what it leaves out is NaN.
    """
    chains, count, _ = draws.shape
    kept = 2 * chains * (count // 2)
    # There are as many different scores as half ranks: quantiles of a table instead of every draw's.
    half_ranks = torch.arange(2 * kept - 1, device=draws.device, dtype=torch.float64) / 2 + 1
    scores = torch.special.ndtri((half_ranks - 0.375) / (kept + 0.25))
    native = draws.device.type == "cpu" and count <= LONGEST and backends.choose("cpu") == backends.HOST
    draws = in_plain_memory(draws)
    if draws.dtype is not torch.float32:
        draws = draws.double() if draws.dtype is not torch.bfloat16 else draws.float()
    kernel = backends.implementation("chain_statistics", backends.HOST if native else "reference")
    return kernel(draws.contiguous(), scores, wanted)
