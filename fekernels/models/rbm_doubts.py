"""What a restricted Boltzmann machine's estimates do not see by themselves, looked at from elsewhere and warned of."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels.anneal import AnnealedEstimate, along_path
from fekernels.models.noise_counter import OTHER_SEED
from fekernels.models.rbm_partition import TemperedRBM, draw_units, enumerated_log_z, exact_draws
from fekernels.ops.noise_key import signed_seed

if TYPE_CHECKING:
    from fekernels.models.rbm import BernoulliRBM

__all__ = ["Kept", "doubt_base", "doubt_fit", "doubt_log_z", "log_odds"]

ERRORS = 4  # standard errors that two estimates may lie apart
SLACK = 0.1  # nats, that they may lie apart besides
MOST_KEPT = 4000  # rows of the data that a trained machine is held against
CHEAP = 1 << 24  # states of the smaller layer times units of the larger: some tenths of a second
PARTICLES = BETAS = 200  # of the annealing after a fit that cannot be enumerated
DRAWS = 4000
LOST, LOST_SHARE = 0.5, 0.01  # nats below independent units, and share of theirs, that are no fault yet
RATES = 0.1  # root mean square that the machine's rates may be off the data's, beside 3 errors of theirs


def log_odds(rates: Tensor, count: int) -> Tensor:
    """Of means, kept off 0 and 1 as if half of one datum more said so."""
    return torch.logit((rates * count + 0.5) / (count + 1))


def doubt_base(
    path: TemperedRBM, first: AnnealedEstimate, base: str, seed: int, progress: bool
) -> str | None:
    """What to warn of where particles that begin as fair coins find a log Z above that of ``first``.

    Both are lower bounds: one that is lower tells nothing. Weights of particles that all missed a mode agree.
    """
    n = len(first.log_weights)
    coins = TemperedRBM(path.weight, path.visible, path.hidden, torch.zeros_like(path.base), path.stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights are worth little is told of the estimate itself
        other = along_path(
            coins,
            particles=min(n, max(100, n // 4)),
            betas=first.betas,
            seed=signed_seed("log_partition", (seed ^ OTHER_SEED) & ((1 << 64) - 1)),
            progress=progress,
        )
    error = math.hypot(first.standard_error, other.standard_error)
    if not other.log_z - first.log_z > ERRORS * error + SLACK:
        return None
    return (
        f"log_partition: annealed from {base}, log Z is {first.log_z:.2f} +- {first.standard_error:.2f}; from fair "
        f"coins it is {other.log_z:.2f} +- {other.standard_error:.2f}, and both are lower bounds: no particle of the "
        f"first found a mode that holds most of Z. Give base_rates, the means of the data or "
        f"torch.full(({len(path.base)},), 0.5), and more betas"
    )


def doubt_log_z(free_energy: Tensor, log_z: Any) -> str | None:
    """What to warn of where -F(v) - log Z is above 0 by more than the estimate's errors and rounding."""
    if not len(free_energy):
        return None
    error = log_z.standard_error if isinstance(log_z, AnnealedEstimate) else 0.0
    value = float(log_z.detach() if isinstance(log_z, Tensor) else log_z)
    # Each F is a sum in the machine's dtype, of terms that may be larger than itself.
    rounding = (
        100 * torch.finfo(free_energy.dtype).eps * (float(free_energy.detach().abs().max()) + abs(value))
    )
    excess = float((-free_energy.detach()).max()) - value
    if not excess > ERRORS * error + SLACK + rounding:
        return None
    return (
        f"log_prob: log p(v) of a row is {excess:.2f}, a probability above 1: log_z, {value:.2f}, is too low by at "
        "least that. An annealing that misses a mode gives such a one: give base_rates to log_partition, or more betas"
    )


class Kept:
    """Batches of an epoch, evenly spread over it, of some thousand rows in all."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._rows, self._seen, self._every = 0, 0, 1

    def add(self, v: Tensor) -> None:
        if self._seen % self._every == 0:
            self._batches.append(v[:MOST_KEPT])
            self._rows += len(self._batches[-1])
        self._seen += 1
        while self._rows > 2 * MOST_KEPT and len(self._batches) > 1:
            self._batches, self._every = self._batches[::2], 2 * self._every
            self._rows = sum(map(len, self._batches))

    def rows(self) -> Tensor:
        return torch.cat(self._batches)


@torch.no_grad()
def doubt_fit(rbm: BernoulliRBM, v: Tensor, stream: int) -> str | None:
    """What to warn of after a fit: data less likely than under independent units, or rates that are not the data's.

    The latter where the machine can be enumerated: annealed particles may miss what the machine itself has.
    """
    weights = rbm.weight.detach(), rbm.visible_bias.detach(), rbm.hidden_bias.detach()
    if not all(bool(each.isfinite().all()) for each in weights):
        return None
    seed = signed_seed("fit", (rbm.seed ^ OTHER_SEED) & ((1 << 64) - 1))
    if bool(((v != 0) & (v != 1)).any()):  # grey levels as probabilities; they themselves have none
        v = draw_units(v, seed, 1 << 31, stream)
    rates = v.double().mean(0)
    odds = log_odds(rates, len(v))
    independent = float((v.double() @ odds).mean() - torch.nn.functional.softplus(odds).sum())
    small, large = sorted(weights[0].shape)
    off = 0.0
    if small <= 24 and large << small <= CHEAP:
        log_z, error, how = float(enumerated_log_z(*weights)), 0.0, ""
        units, visible = exact_draws(*weights, DRAWS, seed, stream)
        means = units if visible else rbm.visible_probabilities(units)
        off = float((means.double().mean(0) - rates).square().mean().sqrt())
    else:
        path = TemperedRBM(*weights, odds.to(v.dtype), stream)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too low a log Z makes this doubt less, no more
            found = along_path(path, particles=PARTICLES, betas=BETAS, seed=seed)
        log_z, error, how = found.log_z, found.standard_error, "at most "
    log_p = -float(rbm.free_energy(v, validate=False).double().mean()) - log_z
    advice = (
        "The chains of training did not go where the machine has its mass, and `sample` may not either. Take more "
        "sweeps (k), a lower lr, or persistent the other way (docs/rbm.md, 'What goes wrong')"
    )
    if independent - log_p > LOST + LOST_SHARE * abs(independent) + ERRORS * error:
        return (
            f"BernoulliRBM.fit: log p of the data is {how}{log_p:.2f} nats a row, less than the {independent:.2f} of "
            f"independent units with the data's rates. {advice}"
        )
    chance = float((rates * (1 - rates)).mean() / len(v)) ** 0.5
    if off > RATES + 3 * chance:
        return (
            f"BernoulliRBM.fit: the machine's units are on at rates that are {off:.2f} off the data's (root mean "
            f"square), though log p of the data is {log_p:.2f} nats a row: modes have the wrong shares. {advice}"
        )
    return None
