"""How far kept draws can be believed: R-hat and effective sample size of their weights, chains apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels.diagnostics.chain_statistics import unjudged_statistics
from fekernels.diagnostics.common_noise import Together, moving_together
from fekernels.diagnostics.gradient_noise import is_measurable, noise_ratio_here

__all__ = ["LEAST", "ParameterDiagnostics", "SampleDiagnostics", "diagnose", "doubts", "smaller_size"]

LEAST = 4  # draws of a chain: two in each half
SEEN = 256  # weights whose effective sizes stand for all
ENOUGH = 50  # effective samples: a standard deviation is then known to 10%
MOST_NOISE = 0.1  # r, by which the variance is too large


class ParameterDiagnostics(NamedTuple):
    """Of one parameter's weights: the largest R-hat and the smallest effective sample size, bulk or tail."""

    rhat_max: float
    ess_min: float


@dataclass(frozen=True)
class SampleDiagnostics:
    """Whether chains agree, and how many independent draws the kept ones are worth, weight by weight.

    Weights that never differ (a frozen layer) count nowhere.

    Attributes:
        rhat_max, rhat_median: of `fe.diagnostics.split_rhat` over the weights; believe draws below 1.01.
        ess_min, ess_median: over the weights, of the smaller one of the bulk's and the tail's effective sample size.
        chains, draws: how many chains, and kept draws of each.
        by_parameter: the worst of each parameter, by its name.
        together: two chains whose changes are the same, by far more than those of independent ones could be, with
            their correlation: they got the same noise, and no other number here says anything. None: there are none.
    """

    rhat_max: float
    rhat_median: float
    ess_min: float
    ess_median: float
    chains: int
    draws: int
    by_parameter: dict[str, ParameterDiagnostics] = field(repr=False)
    together: Together | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.chains} chains of {self.draws} draws: R-hat up to {self.rhat_max:.3f} (median "
            f"{self.rhat_median:.3f}), effective sample size from {self.ess_min:.0f} (median {self.ess_median:.0f})"
        ]
        if self.together is not None:
            lines.append(str(self.together))
        lines += [
            f"  {name}: {each.rhat_max:.3f}, {each.ess_min:.0f}" for name, each in self.by_parameter.items()
        ]
        return "\n".join(lines)


def differing(samples: Sequence[dict[str, Tensor]], names: Sequence[str]) -> list[str]:
    """Those of the names whose floating weights are not the same in all samples.

    What was trained is not asked: a model may be frozen or thawed once it is sampled.
    """
    return [name for name in names if _another(samples, name) is not None]


def _another(samples: Sequence[dict[str, Tensor]], name: str) -> Tensor | None:
    """The first sample's weights that are not those of sample 0."""
    if not samples or not (samples[0][name].is_floating_point() or samples[0][name].is_complex()):
        return None
    first = samples[0][name]
    return next((s[name] for s in samples[1:] if bool((s[name] != first).any())), None)


def _spread(count: int, most: int) -> Tensor:
    """Places from the first to the last of ``count``; in float64, as float32 rounds large ones beyond the last."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def smaller_size(draws: Tensor) -> Tensor:
    """The smaller one of the bulk's and the tail's effective sample size."""
    return unjudged_statistics(draws).size


def diagnose(samples: Sequence[dict[str, Tensor]], names: Sequence[str], chains: int) -> SampleDiagnostics:
    """Of samples in the order in which they were drawn, a draw of every chain after the other."""
    draws = len(samples) // chains
    rhats, sizes = [], []
    worst: dict[str, ParameterDiagnostics] = {}
    for name in differing(samples, names):
        weights = torch.stack([sample[name].flatten().double() for sample in samples[: draws * chains]])
        by_chain = weights.view(draws, chains, -1).transpose(0, 1)
        moves = (weights != weights[0]).any(0)
        if not bool(moves.any()):
            continue
        found = unjudged_statistics(by_chain)
        rhat, size = found.rhat[moves], found.size[moves]
        rhats.append(rhat)
        sizes.append(size)
        worst[name] = ParameterDiagnostics(float(rhat.max()), float(size.min()))
    if not rhats:
        return SampleDiagnostics(math.nan, math.nan, 0.0, 0.0, chains, draws, {})
    rhat, size = torch.cat(rhats), torch.cat(sizes)
    some = some_weights(samples, names, chains)
    return SampleDiagnostics(
        float(rhat.max()), float(rhat.median()), float(size.min()), float(size.median()), chains, draws, worst,
        None if some is None else moving_together(some),
    )  # fmt: skip


def effective_draws(samples: Sequence[dict[str, Tensor]], names: Sequence[str], chains: int) -> float:
    """About how many independent draws all are worth: the median over some weights of every parameter that moves."""
    draws = len(samples) // chains
    if not differing(samples[: draws * chains] if draws >= LEAST else samples, names):
        return 1.0  # the same weights over and over
    values = some_weights(samples, names, chains)
    if values is None:
        return float(len(samples))
    size = smaller_size(values)
    size = size[size.isfinite()]
    return float(size.median()) if len(size) else float(draws * chains)


def some_weights(samples: Sequence[dict[str, Tensor]], names: Sequence[str], chains: int) -> Tensor | None:
    """[chains, draws, weights] of some of every parameter that moves; None of too few draws, or where none moves."""
    draws = len(samples) // chains
    if draws < LEAST:
        return None
    samples = samples[: draws * chains]
    names = differing(samples, names)
    if not names:
        return None
    each = max(1, SEEN // len(names))
    columns = []
    for name in names:
        at = _spread(samples[0][name].numel(), each)
        values = torch.stack([s[name].flatten()[at].double() for s in samples])
        if not bool((values != values[0]).any()):  # few of its weights move, and none of those looked at
            other = _another(samples, name)
            assert other is not None
            moves = (other != samples[0][name]).flatten().nonzero()[:, 0]
            at = moves[_spread(len(moves), each)]
            values = torch.stack([s[name].flatten()[at].double() for s in samples])
        columns.append(values)
    values = torch.cat(columns, 1)
    return values[:, (values != values[0]).any(0)].view(draws, chains, -1).transpose(0, 1)


def doubts(
    samples: Sequence[dict[str, Tensor]], names: Sequence[str], chains: int, optimizer: Optimizer | None
) -> list[str]:
    """Why averages over these samples are not the posterior's, with the numbers."""
    lost = sum(not all(bool(sample[name].isfinite().all()) for name in names) for sample in samples)
    if lost:
        return [
            f"{lost} of {len(samples)} samples have weights that are not finite: the chain has diverged, and averages "
            "over it are nobody's posterior. Sample again with a smaller lr"
        ]
    found = []
    values = some_weights(samples, names, chains) if samples else None
    if values is not None and (together := moving_together(values)) is not None:
        found.append(str(together))
    size = effective_draws(samples, names, chains) if samples else 0.0
    if size < ENOUGH:
        found.append(
            f"{len(samples)} samples are worth about {min(round(size), ENOUGH - 1)} independent ones, fewer than "
            f"{ENOUGH}: averages over them are not yet the posterior's. Sample longer, or with a larger lr and "
            "thinning; fe.sample_posterior chooses both"
        )
    if optimizer is not None and is_measurable(optimizer):
        ratio = noise_ratio_here(optimizer).median
        if not ratio <= MOST_NOISE:  # of gradients that were not finite it is NaN
            found.append(
                f"the gradients' noise is r = {ratio:.2f} of what the temperature asks for, more than {MOST_NOISE}: "
                f"the variance that was sampled is up to {1 + ratio:.2f} times the posterior's. Take a smaller lr, "
                "larger batches or fe.ControlVariate"
            )
    return found
