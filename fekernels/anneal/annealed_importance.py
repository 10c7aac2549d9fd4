"""Annealed importance sampling, forward and in reverse.

Source: Neal 2001, "Annealed importance sampling", arXiv:physics/9803008; the reverse run as an upper bound: Grosse,
Ghahramani & Adams 2015, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", arXiv:1511.02543.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._checks import boolean, floating, integer, number, one_of
from fekernels._runtime.ranks import draw_seed
from fekernels.anneal.estimate import AnnealedEstimate, of_work, warn_caller, warn_of_few
from fekernels.anneal.paths import LONGEST, GeometricPath, Path, Transition
from fekernels.anneal.schedules import make_betas
from fekernels.ops.noise_key import signed_seed

__all__ = ["along_path", "importance_sampling", "reverse_importance_sampling"]

KERNELS = ("hmc", "mala")
# Of the pilot that finds step sizes: particles, betas, and proposals at each.
PILOT, PILOT_BETAS, PILOT_MOVES = 200, 20, 4
TARGETS = {"hmc": 0.75, "mala": 0.57}  # acceptance, the best in many dimensions: .65 to .8; .574
LEAST_TAKEN = 0.01  # share of the proposals below which the particles are as good as not moved
TO_STAY = "give a transition that stays in the base's support, which is discrete or a simplex"
PILOT_SEED, REVERSE_SEED = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # xor-ed in, so that runs share no noise


def importance_sampling(
    log_prob: Callable[[Tensor], Tensor],
    base: Any,
    *,
    particles: int = 1000,
    betas: int | Sequence[float] | Tensor = 500,
    transition: str | Transition = "hmc",
    step_size: float | None = None,
    leapfrog_steps: int = 5,
    moves: int = 1,
    seed: int | None = None,
    progress: bool = False,
) -> AnnealedEstimate:
    """log Z of exp(log_prob), by particles that are cooled from ``base`` to it: E[exp(-W)] = Z1/Z0, unbiased.

    Each particle begins as a draw of the base, and for every beta adds log p_high(x) - log p_low(x) to its log-weight
    and is moved by a kernel that leaves p_high as it is, log p_b = (1 - b) log base + b log_prob. The mean of the
    weights is unbiased for any number of betas and any such kernel; their spread is what more betas bring down.

    Args:
        log_prob: unnormalised log-density of the target, [n, d] -> [n]; differentiable for "hmc" and "mala".
        base: where the particles come from: a `torch.distributions.Distribution` over vectors [d], say
            Normal(zeros(d), 1), wider than the target; or an object with ``sample(n, seed=...)`` -> [n, d] and
            ``log_prob``, normalised unless its attribute ``log_z`` says otherwise. Its dtype and device are those of
            the particles.
        particles: n; the standard error falls with its root.
        betas: a number of steps, placed by `sigmoid_betas`; or the inverse temperatures themselves, rising from 0 to
            1, as `betas_from_temperature` makes them of a temperature schedule.
        transition: "hmc", Hamiltonian Monte Carlo with Metropolis' correction; "mala", the same with a single
            leapfrog step; or a function (x, log_density, *, beta, seed, step) -> x [n, d] that leaves
            exp(log_density) as it is (a plain Langevin step does not).
        step_size: of the leapfrog, in units of 1; None finds it, and a scale for each coordinate, by a pilot run of a
            few particles of their own, so that the weights stay unbiased.
        leapfrog_steps: of each trajectory of "hmc".
        moves: trajectories at each beta.
        seed: of all noise; None draws one from torch's default generator. Gaussian bases and all moves use
            `fe.random`, the same bits on every device; other distributions of torch are drawn by torch, seeded.
        progress: a tqdm bar.

    Returns:
        `AnnealedEstimate`: log_z, standard_error, effective_sample_size, log_weights, samples, ...

    Warns:
        Where the weights are worth fewer than a tenth of the particles, or than 10: log_z is then too low, by an
            amount that the standard error does not show. Where the last move, which follows the target alone, leads
            particles out of the base's support, by more of their weight than the standard error hides: the target has
            mass there that log_z lacks. Where fewer than a hundredth of the proposals were taken.

    Raises:
        TypeError, ValueError: naming the argument; a weight that is NaN or +inf.

    Source: Neal 2001, arXiv:physics/9803008, equations 3 to 10; Jarzynski 1997.
    """
    function = "importance_sampling"
    n = integer(function, "particles", particles, 1, 1 << 40)
    path, schedule, key = _prepared(
        function, log_prob, base, betas, transition, step_size, leapfrog_steps, moves, seed
    )
    return _walk(function, path, schedule, n, None, key, boolean(function, "progress", progress))


def reverse_importance_sampling(
    log_prob: Callable[[Tensor], Tensor],
    base: Any,
    samples: Tensor,
    *,
    betas: int | Sequence[float] | Tensor = 500,
    transition: str | Transition = "hmc",
    step_size: float | None = None,
    leapfrog_steps: int = 5,
    moves: int = 1,
    seed: int | None = None,
    progress: bool = False,
) -> AnnealedEstimate:
    """The same path walked from the target to the base: its log_z is a stochastic upper bound of log Z.

    On condition that ``samples`` are exact draws of the target. Draws of a chain that has not mixed void the bound:
    particles that miss a mode make the estimate too low, as a forward run does.

    Args:
        samples: [n, d], draws of exp(log_prob), of the base's dtype. The others as `importance_sampling`; with its
            ``seed`` and settings, step sizes are the same, as `bennett_acceptance_ratio` wants them.
    """
    function = "reverse_importance_sampling"
    samples = _checked_samples(function, samples)
    path, schedule, key = _prepared(
        function, log_prob, base, betas, transition, step_size, leapfrog_steps, moves, seed
    )
    return _walk(
        function, path, schedule, len(samples), samples, key, boolean(function, "progress", progress)
    )


def along_path(
    path: Path,
    *,
    particles: int = 1000,
    samples: Tensor | None = None,
    betas: int | Sequence[float] | Tensor = 500,
    seed: int | None = None,
    progress: bool = False,
) -> AnnealedEstimate:
    """Annealed importance sampling along a path of your own, with its own moves (a restricted Boltzmann machine's).

    Args:
        path: a `Path`. samples: exact draws of its target: it is then walked from there to the base, as in
            `reverse_importance_sampling`, and ``particles`` is their number. The others as `importance_sampling`.
    """
    function = "along_path"
    if not isinstance(path, Path):
        raise TypeError(f"{function}: path must be a fe.anneal.Path; got {type(path).__name__}")
    if isinstance(path, GeometricPath) and path.transition is None and path.scales is None:
        raise ValueError(f"{function}: path must have scales for its moves; got None")
    n = integer(function, "particles", particles, 1, 1 << 40)
    samples = None if samples is None else _checked_samples(function, samples)
    key = draw_seed() if seed is None else signed_seed(function, seed)
    return _walk(
        function,
        path,
        make_betas(function, betas),
        n if samples is None else len(samples),
        samples,
        key,
        boolean(function, "progress", progress),
    )


def _checked_samples(function: str, samples: Tensor) -> Tensor:
    samples = floating(function, "samples", samples).detach()
    if samples.dim() != 2 or not len(samples):
        raise ValueError(
            f"{function}: samples must have shape (n, d) with n >= 1; got {tuple(samples.shape)}"
        )
    return samples


def _prepared(
    function: str,
    log_prob: Callable[[Tensor], Tensor],
    base: Any,
    betas: int | Sequence[float] | Tensor,
    transition: str | Transition,
    step_size: float | None,
    leapfrog_steps: int,
    moves: int,
    seed: int | None,
) -> tuple[GeometricPath, Tensor, int]:
    if not callable(log_prob):
        raise TypeError(f"{function}: log_prob must be callable; got {type(log_prob).__name__}")
    schedule = make_betas(function, betas)
    kernel = None if callable(transition) else one_of(function, "transition", transition, KERNELS)
    steps = integer(function, "leapfrog_steps", leapfrog_steps, 1, 1 << 20)
    moves = integer(function, "moves", moves, 1, 1 << 20)
    if step_size is not None:
        step_size = number(function, "step_size", step_size, above=0.0)
    key = draw_seed() if seed is None else signed_seed(function, seed)
    path = GeometricPath(
        log_prob,
        base,
        transition=transition if callable(transition) else None,
        leapfrog_steps=1 if kernel == "mala" else steps,
        moves=moves,
    )
    if kernel is not None:
        path.scales = _tuned(path, schedule, step_size, TARGETS[kernel], key)
    return path, schedule, key


@torch.no_grad()
def _tuned(
    path: GeometricPath, betas: Tensor, step_size: float | None, target: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes and scales over beta, found by particles that are thrown away.

    Scales of the particles that are weighed would depend on these, and the weights be unbiased no longer.
    """
    seed = _other(seed, PILOT_SEED)
    x = path.start(PILOT, seed=seed)
    if step_size is not None:
        ones = torch.ones(1, x.shape[1], dtype=x.dtype, device=x.device)
        return betas[-1:], torch.tensor([step_size], dtype=torch.float64), ones
    picked = betas[torch.linspace(0, len(betas) - 1, min(len(betas), PILOT_BETAS)).round().long()]
    found: list[tuple[float, Tensor]] = []
    size = 1.0 / path.leapfrog_steps**0.5
    for step, beta in enumerate(picked.tolist(), 1):
        std = _spread(x)
        for k in range(PILOT_MOVES):
            x, taken = path.trajectory(x, beta, size, std, seed, step, k)
            size = min(size * math.exp(taken - target), LONGEST / path.leapfrog_steps)
        found.append((size, _spread(x)))
    sizes, spreads = zip(*found, strict=True)
    return picked, torch.tensor(sizes, dtype=torch.float64), torch.stack(spreads)


def _other(seed: int, words: int) -> int:
    return signed_seed("importance_sampling", (seed ^ words) & ((1 << 64) - 1))


def _spread(x: Tensor) -> Tensor:
    """[d], standard deviations of the particles, none of them 0."""
    std = x.std(0)
    largest = float(std.max())
    return std.clamp_min(1e-3 * largest if largest > 0 else 1.0)


@torch.no_grad()
def _walk(
    function: str, path: Path, betas: Tensor, n: int, samples: Tensor | None, seed: int, progress: bool
) -> AnnealedEstimate:
    reverse = samples is not None
    x = path.start(1 if reverse else n, seed=seed)
    if samples is not None:
        seed = _other(seed, REVERSE_SEED)
        if samples.shape[1:] != x.shape[1:] or samples.dtype != x.dtype or samples.device != x.device:
            raise ValueError(
                f"{function}: samples must be {str(x.dtype)[6:]} of shape (n, {x.shape[1]}) on {x.device} like the "
                f"base's; got {str(samples.dtype)[6:]} {tuple(samples.shape)} on {samples.device}"
            )
        x = samples
    log_weights = torch.zeros(n, dtype=torch.float64, device=x.device)
    grid = betas.tolist()
    pairs = list(zip(grid[:-1], grid[1:], strict=True))
    from tqdm import tqdm  # a tenth of this package's import time

    for k in tqdm(range(len(pairs)), desc=function, disable=not progress, leave=False):
        if reverse:  # the forward walk's moves and weights in the opposite order
            low, high = pairs[-1 - k]
            x = path.move(x, high, seed=seed, step=len(pairs) - k)
            log_weights -= path.log_ratio(x, low, high)
        else:
            low, high = pairs[k]
            log_weights += path.log_ratio(x, low, high)
            x = path.move(x, high, seed=seed, step=k + 1)
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"{function}: log_prob and base must be finite, or -inf, at every particle; the weight of particle "
            f"{int(bad.nonzero()[0])} is {float(log_weights[bad][0])}"
        )
    found = of_work(function, -log_weights)
    side = "high" if reverse else "low"
    warn_of_few(
        f"{function}: the weights are worth {found.effective_sample_size:.1f} of {n} particles: log_z is too {side}",
        found.effective_sample_size,
        n,
        "take more betas, more particles or a closer base",
    )
    stuck = path.acceptance is not None and path.acceptance < LEAST_TAKEN
    thin = isinstance(path, GeometricPath) and path.support_is_thin
    if stuck:
        advice = TO_STAY if thin else "take a smaller step_size, or None, which finds one"
        warn_caller(
            f"{function}: of the proposals {path.acceptance:.2g} were taken, so that the particles stayed about where "
            f"they began and annealing does nothing; {advice}"
        )
    if not reverse and isinstance(path, GeometricPath) and not (stuck and thin):
        _warn_of_uncovered(function, path, x, log_weights, found.standard_error)
    log_z = path.log_z_base + (-found.log_ratio if reverse else found.log_ratio)
    return AnnealedEstimate(
        log_z,
        found.standard_error,
        found.effective_sample_size,
        log_weights,
        x,
        betas,
        reverse,
        path.acceptance,
    )


def _warn_of_uncovered(
    function: str, path: GeometricPath, x: Tensor, log_weights: Tensor, standard_error: float
) -> None:
    """Only the last move follows the target alone: who it led out of the base's support shows that there is more.

    All weights are of places inside. In reverse particles outside weigh 0, and nothing is missed.
    """
    outside = path.outside(x)
    share = float(log_weights.softmax(0)[outside].sum())
    # As much of the target goes out in a move as comes in, so that outside is this share of what is inside, or more.
    missed = math.log1p(share)
    if not missed > standard_error:  # less does not matter
        return
    told = f"{function}: {int(outside.sum())} of {len(x)} samples, {share:.2g} of their weight, lie outside of the "
    if path.support_is_thin:
        warn_caller(f"{told}base's support, which no move by gradients stays in; {TO_STAY}")
    else:
        warn_caller(
            f"{told}base's support: log_z is of the target inside alone, too low by {missed:.2g} or more; take a base "
            "that covers the target"
        )
