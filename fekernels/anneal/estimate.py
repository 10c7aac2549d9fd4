"""What weights of annealed particles say: Jarzynski's equality as an estimator, and Bennett's of both directions."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AnnealedEstimate",
    "Jarzynski",
    "bennett_acceptance_ratio",
    "jarzynski",
    "of_work",
    "warn_caller",
    "warn_of_few",
]

FEW, SHARE = 10, 0.1  # effective particles, and their share, below which an estimate is warned of


class Jarzynski(NamedTuple):
    """``log_ratio`` is log Z1/Z0 = -(F1 - F0); all are floats."""

    log_ratio: float
    standard_error: float
    effective_sample_size: float


@dataclass(frozen=True)
class AnnealedEstimate:
    """What annealed importance sampling gives; ``float()`` of it is ``log_z``.

    Attributes:
        log_z: log Z1, or log Z1/Z0 where the base's own normaliser is not known (`Path.log_z_base`).
        standard_error: of log_z, by the delta method: right where the effective sample size is large.
        effective_sample_size: (sum w)^2 / sum w^2, of as many as there are particles (Kong 1992).
        log_weights: [n], float64, the negative work: forward log w, with E[w] = Z1/Z0; reverse of Z0/Z1.
        samples: [n, d], where the particles came to be: forward, draws of the target once they are weighted.
        betas: [K + 1], float64, the inverse temperatures from 0 to 1.
        reverse: whether the particles went from the target to the base.
        acceptance: share of the proposals that Metropolis' rule took, of transitions that have one.

    Forward, log_z is too low on average (log of a mean, Jensen), so a stochastic lower bound; reverse, too high,
    provided that the particles began as exact draws of the target. More betas close the gap.
    """

    log_z: float
    standard_error: float
    effective_sample_size: float
    log_weights: Tensor
    samples: Tensor
    betas: Tensor
    reverse: bool = False
    acceptance: float | None = None

    def __float__(self) -> float:
        return self.log_z

    def __repr__(self) -> str:
        n, bound = len(self.log_weights), "upper" if self.reverse else "lower"
        taken = "" if self.acceptance is None else f", {self.acceptance:.2g} of the proposals taken"
        return (
            f"AnnealedEstimate(log_z = {self.log_z:.4f} +- {self.standard_error:.4f}, stochastic {bound} bound, "
            f"{self.effective_sample_size:.0f} effective of {n} particles, {len(self.betas) - 1} steps{taken})"
        )

    @property
    def work(self) -> Tensor:
        """[n], float64, in units of the temperature: what it took to carry each particle; minus ``log_weights``."""
        return -self.log_weights

    @property
    def dissipated_work(self) -> float:
        """Mean work beyond the free-energy difference, >= 0 on average: 0 for an infinitely slow path."""
        return float(self.work.mean()) + of_work("jarzynski", self.work).log_ratio


def jarzynski(work: Any) -> Jarzynski:
    """log Z1/Z0 of the work that each of n runs took: E[exp(-W)] = Z1/Z0, however fast they went.

    The mean of exp(-W) is unbiased; its logarithm is too low on average, by about (1/ESS - 1/n)/2.

    Args:
        work: [n], floating point, in units of the temperature. +inf is a run that weighs nothing.

    Warns:
        Where the works are worth fewer than a tenth of the runs, or than 10: log_ratio is then too low, by an amount
        that the standard error does not show.

    Raises:
        TypeError: not floating point. ValueError: not [n] with n >= 1, NaN or -inf.

    Source: Jarzynski 1997, Phys. Rev. Lett. 78, 2690, equation 2; as importance weights Neal 2001,
    arXiv:physics/9803008.
    """
    found = of_work("jarzynski", work)
    n = torch.as_tensor(work).numel()
    warn_of_few(
        f"jarzynski: the works are worth {found.effective_sample_size:.1f} of {n} runs: log_ratio is too low",
        found.effective_sample_size,
        n,
        "take more runs, or slower ones, whose works spread less",
    )
    return found


def of_work(function: str, work: Any) -> Jarzynski:
    """What `jarzynski` gives, without its warning."""
    w = torch.as_tensor(work).detach()
    if not w.is_floating_point():
        raise TypeError(f"{function}: work must be floating point; got {str(w.dtype)[6:]}")
    if w.dim() != 1 or not len(w):
        raise ValueError(f"{function}: work must have shape (n,) with n >= 1; got {tuple(w.shape)}")
    logs = -w.double()
    if bool(logs.isnan().any()) or bool((logs == math.inf).any()):
        raise ValueError(f"{function}: work must not be NaN or -inf; some of it is")
    n = len(logs)
    total = torch.logsumexp(logs, 0)
    if total == -math.inf:  # every weight is 0
        return Jarzynski(-math.inf, math.inf, 0.0)
    effective = float((2 * total - torch.logsumexp(2 * logs, 0)).exp())
    variance = max(1 / effective - 1 / n, 0.0) * n / (n - 1) if n > 1 else math.inf
    return Jarzynski(float(total) - math.log(n), math.sqrt(variance), effective)


def warn_of_few(told: str, effective: float, n: int, advice: str) -> None:
    """The one rule of how many effective particles an estimate needs: below it the mean hangs on a few of them."""
    if not effective >= max(FEW, SHARE * n):
        warn_caller(f"{told}, by more than its standard error says; {advice}")


def warn_caller(message: str) -> None:
    """A warning at the line that called this package, through however many of its functions."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("fekernels.", "torch.")
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def bennett_acceptance_ratio(forward: AnnealedEstimate, reverse: AnnealedEstimate) -> tuple[float, float]:
    """(log_z, standard error) of particles that went both ways: the best estimate there is from both works.

    Args:
        forward, reverse: of the same path, the same betas and the same moves; the reverse particles began as exact
            draws of the target.

    Raises:
        TypeError: another type. ValueError: not one of each direction, different betas, or works that do not overlap
            (then nothing is known about the ratio).

    Source: Bennett 1976, J. Comput. Phys. 22, 245, equations 8 and 10; as maximum likelihood Shirts et al. 2003.
    """
    function = "bennett_acceptance_ratio"
    for name, given, backwards in (("forward", forward, False), ("reverse", reverse, True)):
        if not isinstance(given, AnnealedEstimate):
            raise TypeError(f"{function}: {name} must be an AnnealedEstimate; got {type(given).__name__}")
        if given.reverse is not backwards:
            raise ValueError(f"{function}: {name} must have reverse={backwards}; got reverse={given.reverse}")
    if not torch.equal(forward.betas, reverse.betas):
        raise ValueError(f"{function}: reverse must have the betas of forward; got others")
    forward_work, reverse_work = forward.work.cpu(), reverse.work.cpu()
    shift = math.log(len(forward_work) / len(reverse_work))

    def shares(difference: float) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(difference - forward_work - shift), torch.sigmoid(
            shift - reverse_work - difference
        )

    # The difference of both sums rises with the free-energy difference; it is 0 at the estimate.
    ends = torch.cat([forward_work[forward_work.isfinite()], -reverse_work[reverse_work.isfinite()]])
    if not len(ends):
        raise ValueError(f"{function}: forward and reverse must hold finite works; none is")
    low, high = float(ends.min()) - abs(shift) - 40, float(ends.max()) + abs(shift) + 40
    for _ in range(200):
        middle = (low + high) / 2
        ahead, behind = shares(middle)
        low, high = (middle, high) if float(ahead.sum()) < float(behind.sum()) else (low, middle)
    ahead, behind = shares((low + high) / 2)
    variance = 0.0
    for each in (ahead, behind):
        mean = float(each.mean())
        if not mean > 0:
            raise ValueError(f"{function}: forward and reverse must overlap in their works; they do not")
        variance += (float(each.square().mean()) / mean**2 - 1) / len(each)
    base = forward.log_z - of_work(function, forward.work).log_ratio
    return base - (low + high) / 2, math.sqrt(variance)
