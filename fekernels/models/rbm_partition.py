"""The partition function of a restricted Boltzmann machine: added up over its smaller layer, or annealed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fekernels import random
from fekernels._catalogue.random import LATENT_SAMPLE
from fekernels.anneal import Path
from fekernels.ops.free_energy.free_energy import energy

__all__ = ["MOST_UNITS", "TemperedRBM", "draw_units", "enumerated_log_z", "exact_draws", "softplus_sum"]

# Of the layer that is added up: 33 million states, some minutes with 784 units on the other side.
MOST_UNITS = 25
# float64 elements of states times units of the larger layer at a time: 16 MB, and what softplus makes.
BLOCK = 1 << 21


def draw_units(p: Tensor, seed: int, step: int, stream: int) -> Tensor:
    """0 and 1 with probabilities p [n, units]: 1 where a uniform number in (0, 1] is no larger."""
    u = random.uniform(p.shape, seed=seed, step=step, stream=stream, purpose=LATENT_SAMPLE, device=p.device)
    return (u <= p).to(p.dtype)


def softplus_sum(x: Tensor, reduction: str = "none", weight: Tensor | None = None) -> Tensor:
    """[n] of x [n, units], or the sum or mean of these: -log p(0) of Bernoulli variables with the logits x, fused.

    Args:
        weight: [n], a factor of each row.
    """
    # A row of zeros, not one: the kernel reads vectors of it.
    zero = torch.zeros(x.shape[1], device=x.device, dtype=x.dtype)
    return energy(x, zero.expand(x.shape), "bernoulli", reduction=reduction, weight=weight)


def _smaller_first(weight: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [small, large], biases of both), float64, with the layer in front that is added up."""
    small, large = weight.shape
    if small > large:
        weight, visible, hidden = weight.t(), hidden, visible
    units = weight.shape[0]
    if units > MOST_UNITS:
        raise ValueError(
            f"log_partition: the smaller layer must have at most {MOST_UNITS} units to be added up exactly, "
            f"2^{MOST_UNITS} states; got {small} visible and {large} hidden: use log_partition('ais')"
        )
    return weight.double(), visible.double(), hidden.double()


def _states(first: int, count: int, units: int, device: torch.device) -> Tensor:
    """[count, units], 0 and 1: the binary digits of first, first + 1, ..."""
    numbers = torch.arange(first, first + count, device=device)
    return (numbers[:, None] >> torch.arange(units, device=device) & 1).double()


def _log_weights(weight: Tensor, small: Tensor, large: Tensor, first: int, count: int) -> Tensor:
    """[count], log of the sum over the larger layer of exp(-E), for states of the smaller one."""
    states = _states(first, count, len(small), weight.device)
    return states @ small + torch.nn.functional.softplus(torch.addmm(large, states, weight)).sum(1)


def _blocks(units: int, others: int) -> list[tuple[int, int]]:
    """(first state, how many) of each block."""
    total = 1 << units
    step = min(total, max(1, BLOCK // others))
    return [(first, min(step, total - first)) for first in range(0, total, step)]


def enumerated_log_z(weight: Tensor, visible: Tensor, hidden: Tensor, progress: bool = False) -> Tensor:
    """log Z, float64 and differentiable; gradients make every block a second time instead of keeping all of them."""
    w, small, large = _smaller_first(weight, visible, hidden)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, visible, hidden))
    from tqdm import tqdm  # a tenth of this package's import time

    parts = []
    for first, count in tqdm(_blocks(*w.shape), desc="log_partition", disable=not progress, leave=False):

        def block(w: Tensor, small: Tensor, large: Tensor, first: int = first, count: int = count) -> Tensor:
            return torch.logsumexp(_log_weights(w, small, large, first, count), 0)

        parts.append(
            checkpoint(block, w, small, large, use_reentrant=False) if wanted else block(w, small, large)
        )
    return torch.logsumexp(torch.stack(parts), 0)


@torch.no_grad()
def exact_draws(
    weight: Tensor, visible: Tensor, hidden: Tensor, n: int, seed: int, stream: int
) -> tuple[Tensor, bool]:
    """n independent draws of the smaller layer [n, units], and whether that is the visible one.

    By inverting the cumulative distribution over all states, block by block: a first pass finds the blocks' shares.
    """
    w, small, large = _smaller_first(weight, visible, hidden)
    blocks = _blocks(*w.shape)
    totals = torch.stack([torch.logsumexp(_log_weights(w, small, large, *block), 0) for block in blocks])
    ends = (totals - torch.logsumexp(totals, 0)).exp().cumsum(0)
    # Two words make 53 bits of a uniform number: 32 would leave most of 2^25 states out.
    coarse, fine = (
        random.uniform(
            (n,), seed=seed, step=part, stream=stream, purpose=LATENT_SAMPLE, device=w.device
        ).double()
        for part in (0, 1)
    )
    u = (coarse - fine * 2.0**-24).clamp(0, 1) * ends[-1]
    which = torch.searchsorted(ends, u).clamp_max(len(blocks) - 1)
    found = torch.zeros(n, dtype=torch.long, device=w.device)
    for at in which.unique().tolist():
        first, count = blocks[at]
        logs = _log_weights(w, small, large, first, count)
        below = ends[at - 1] if at else ends.new_zeros(())
        inside = (logs - totals[at]).exp().cumsum(0)
        rows = which == at
        share = (u[rows] - below) / (ends[at] - below)
        found[rows] = first + torch.searchsorted(inside, share * inside[-1]).clamp_max(count - 1)
    digits = found[:, None] >> torch.arange(len(small), device=w.device) & 1
    return digits.to(weight.dtype), weight.shape[0] <= weight.shape[1]


class TemperedRBM(Path):
    """p_b(v) = exp((1 - b) base v + b a v + sum softplus(b (c + v W))): the machine at inverse temperature b.

    At b = 0 the hidden units are fair coins and the visible ones independent, with the log odds ``base``. Each p_b is
    a machine of its own, moved by one Gibbs sweep, exactly.

    Source: Salakhutdinov & Murray 2008, equations 15 to 19.
    """

    def __init__(self, weight: Tensor, visible: Tensor, hidden: Tensor, base: Tensor, stream: int) -> None:
        self.weight, self.visible, self.hidden = weight.detach(), visible.detach(), hidden.detach()
        self.base, self.stream = base, stream
        log_z = torch.nn.functional.softplus(base.double()).sum() + len(hidden) * math.log(2)
        self.log_z_base = float(log_z)
        self._inputs: tuple[Tensor, Tensor] | None = None

    def start(self, n: int, *, seed: int) -> Tensor:
        return draw_units(torch.sigmoid(self.base).expand(n, -1), seed, 0, self.stream)

    def log_ratio(self, x: Tensor, low: float, high: float) -> Tensor:
        inputs = self._hidden_inputs(x)
        linear = (high - low) * (x @ (self.visible - self.base)).double()
        return linear + softplus_sum(high * inputs).double() - softplus_sum(low * inputs).double()

    def move(self, x: Tensor, beta: float, *, seed: int, step: int) -> Tensor:
        h = draw_units(torch.sigmoid(beta * self._hidden_inputs(x)), seed, step, self.stream)
        bias = torch.lerp(self.base, self.visible, beta)
        inputs = torch.addmm(bias, h, self.weight.t(), alpha=beta)
        return draw_units(torch.sigmoid(inputs), seed, step, self.stream + 1)

    def _hidden_inputs(self, x: Tensor) -> Tensor:
        """c + x W, made once for the weight and the move."""
        if self._inputs is None or self._inputs[0] is not x:
            self._inputs = x, torch.addmm(self.hidden, x, self.weight)
        return self._inputs[1]
