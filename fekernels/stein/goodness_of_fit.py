"""Do the particles come from the target? A bootstrap test on the kernelised Stein discrepancy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels import random
from fekernels._catalogue.stein import KERNELS
from fekernels._checks import integer, number
from fekernels.ops.noise_key import signed_seed
from fekernels.ops.stein.bandwidths import is_median, positive_bandwidth
from fekernels.ops.stein.kernel_stein_discrepancy import gather, off_diagonal_sums, stein_kernel

__all__ = ["GoodnessOfFit", "goodness_of_fit"]


@dataclass(frozen=True, eq=False)
class GoodnessOfFit:
    """What ``goodness_of_fit`` found; shapes without the batch dimensions of the particles are as given here.

    Attributes:
        statistic: the squared discrepancy, its U-statistic; a scalar.
        p_value: the chance of so large a statistic were the particles draws from the target; a scalar. NaN where the
            statistic or a draw of the null is not finite, as where particles or scores are not: nothing is known then.
        null: [draws], the bootstrap's draws of the statistic under that hypothesis.
    """

    statistic: Tensor
    p_value: Tensor
    null: Tensor


def _signs(n: int, draws: int, change: float, seed: int, device: torch.device) -> Tensor:
    """[n, draws] of -1 and 1: each column a Markov chain that changes its sign with probability ``change``."""
    u = random.uniform((n, draws), seed=seed, device=device)
    flips = u <= change
    flips[:1] = u[:1] <= 0.5
    return 1 - 2 * (flips.cumsum(0) % 2).to(torch.float32)


def goodness_of_fit(
    particles: Tensor,
    scores: Tensor,
    *,
    kernel: object = "imq",
    bandwidth: Tensor | float | str = "median",
    draws: int = 1000,
    change_probability: float = 0.5,
    seed: int = 0,
) -> GoodnessOfFit:
    """Wild bootstrap test of the hypothesis that the particles are draws from the target with these scores.

    Under it the discrepancy is a degenerate U-statistic: its law is that of (1/n(n - 1)) sum_{i != j} w_i w_j kp(i, j)
    with random signs w. All draws of w are columns of one pass over the pairs.

    Args:
        particles: [..., n, d], n >= 2; leading dimensions are problems of their own, under the same signs. They must
            be draws, independent or successive states of a Markov chain: the points SVGD settles on are more even than
            any, so for them the test says little.
        scores: grad log p at the particles, of their shape.
        kernel: as ``kernel_stein_discrepancy``. The discrepancy of the default also sees samples that drift away.
        bandwidth: h, as in ``kernel_stein_discrepancy``: > 0.
        draws: of the bootstrap; the p-value is no less than 1/(draws + 1).
        change_probability: in (0, 0.5]: of a sign to differ from its predecessor's. 0.5, independent signs, is right
            for independent particles. For a chain, in its order, choose it so small that signs stay as long as the
            chain remembers.
        seed: of the signs (``fe.random``), so that a p-value can be had again, on any device.

    Returns:
        ``GoodnessOfFit(statistic, p_value, null)``, float32 (float64 for float64 operands).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; fewer than two particles; a median bandwidth of 0, as of a chain
            that stays where it is most of the time.

    Source: Chwialkowski, Strathmann & Gretton 2016, arXiv:1602.02964, section 3; Liu, Lee & Jordan 2016.
    """
    function = "goodness_of_fit"
    found = stein_kernel(function, kernel)
    draws = integer(function, "draws", draws, 1, 1 << 31)
    key = signed_seed(function, seed)
    change = number(function, "change_probability", change_probability)
    if not 0 < change <= 0.5:
        raise ValueError(f"{function}: change_probability must be in (0, 0.5]; got {change_probability}")
    with torch.no_grad():
        x, s, h = gather(function, particles, scores, found, bandwidth, positive=False)
        n, batch = x.shape[1], particles.shape[:-2]
        if n < 2:
            raise ValueError(f"{function}: particles must be at least 2 (n, for a pair); got {n}")
        if KERNELS[found.code].default_bandwidth is not None:
            positive_bandwidth(function, h, is_median(function, bandwidth), wait=True)
        signs = _signs(n, draws, change, key, x.device)
        weights = torch.cat([signs.new_ones(n, 1), signs], 1).unsqueeze(0)
        values = off_diagonal_sums(x, s, h, weights, found) / (n * (n - 1))
        statistic, null = values[:, 0], values[:, 1:]
        p_value = (1 + (null >= statistic.unsqueeze(1)).sum(1)).to(h.dtype) / (draws + 1)
        # No draw is >= NaN, which would look like the strongest evidence there can be.
        p_value = p_value.masked_fill(~values.isfinite().all(1), torch.nan)
    return GoodnessOfFit(
        statistic.to(h.dtype).reshape(batch),
        p_value.reshape(batch),
        null.to(h.dtype).reshape(*batch, draws),
    )
