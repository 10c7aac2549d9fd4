"""Seven ways to an answer that knows how sure it is: from a problem to ``fe.PosteriorSamples``, a function each.

Adam and an ensemble of five; ``fe.sample_posterior`` (LangevinAdam), ``fe.SGLD``, ``fe.VariationalAdam`` with both
estimators, and ``fe.SVGD``. All take the same prior and the usual step sizes of their kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from uncertainty_parts.problems import Problem

import fekernels as fe

PRIOR = 1.0  # precision of every weight


@dataclass(frozen=True)
class Settings:
    splits: int = 3
    epochs: int = 150
    batch: int = 50
    members: int = 5
    particles: int = 10
    chains: int = 4
    draws: int = 25
    burn_in: int = 600
    thinning: int = 20


QUICK = Settings(splits=1, epochs=8, members=2, particles=3, chains=2, draws=4, burn_in=20, thinning=2)


def adam(problem: Problem, settings: Settings, seed: int) -> nn.Module:
    """One network, as usual."""
    model = problem.made(seed)
    steps = settings.epochs * math.ceil(problem.size / settings.batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=PRIOR / problem.size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in problem.batches(settings.batch, settings.epochs, seed):
        optimizer.zero_grad()
        problem.loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


def by_adam(problem: Problem, settings: Settings, seed: int) -> fe.PosteriorSamples:
    samples = fe.PosteriorSamples(problem.network())
    samples.collect(adam(problem, settings, seed).state_dict())
    return samples


def by_ensemble(problem: Problem, settings: Settings, seed: int) -> fe.PosteriorSamples:
    samples = fe.PosteriorSamples(problem.network())
    for member in range(settings.members):
        samples.collect(adam(problem, settings, 100 * seed + member).state_dict())
    return samples


def by_langevin_adam(problem: Problem, settings: Settings, seed: int) -> fe.PosteriorSamples:
    x, y = problem.train
    run = fe.sample_posterior(
        adam(problem, settings, seed),
        lambda model, rows: problem.loss(model(rows[0]), rows[1]),
        list(zip(x.split(settings.batch), y.split(settings.batch), strict=True)),
        data_size=problem.size,
        prior_precision=PRIOR,
        chains=settings.chains,
        samples=settings.draws,
        burn_in=settings.burn_in,
        thinning=settings.thinning,
        seed=seed,
        progress=False,
    )
    problem.looked += int(run.report.settings["batches"] * settings.batch)
    return run.samples


def by_sgld(problem: Problem, settings: Settings, seed: int) -> fe.PosteriorSamples:
    """From Adam's weights, at a step size at which the largest curvature is stable."""
    model, n = adam(problem, settings, seed), problem.size
    lr = 0.02 if problem.variance is None else 5e-3
    optimizer = fe.SGLD(model.parameters(), lr, temperature=1 / n, prior_precision=PRIOR / n, seed=seed)
    burn_in = settings.epochs // 2 * math.ceil(n / settings.batch)
    samples = fe.PosteriorSamples(model, burn_in=burn_in, thinning=max(1, burn_in // settings.draws))
    for x, y in problem.batches(settings.batch, settings.epochs, seed + 1):
        optimizer.zero_grad()
        problem.loss(model(x), y).backward()
        optimizer.step()
        samples.update()
    return samples


def variational(estimator: str, lr: float, beta2: float) -> Callable[..., fe.PosteriorSamples]:
    def fit(problem: Problem, settings: Settings, seed: int) -> fe.PosteriorSamples:
        model = problem.made(seed)
        optimizer = fe.VariationalAdam(
            model.parameters(), lr, problem.size, weight_decay=PRIOR / problem.size, betas=(0.9, beta2),
            hess_init=0.5, estimator=estimator, seed=seed,
        )  # fmt: skip
        steps = settings.epochs * math.ceil(problem.size / settings.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for x, y in problem.batches(settings.batch, settings.epochs, seed):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                problem.loss(model(x), y).backward()
            optimizer.step()
            schedule.step()
        samples = fe.PosteriorSamples(model)
        for _ in range(2 * settings.draws):
            with optimizer.sampled_params():
                samples.collect()
        return samples

    return fit


def by_svgd(problem: Problem, settings: Settings, seed: int) -> fe.PosteriorSamples:
    ensemble = fe.SVGD.from_model(
        problem.network, problem.loss, size=settings.particles, prior_precision=PRIOR / problem.size,
        temperature=1 / problem.size, lr=1e-2, seed=seed,
    )  # fmt: skip
    for x, y in problem.batches(settings.batch, settings.epochs, seed):
        ensemble.step(x, y)
    problem.looked *= settings.particles
    samples = fe.PosteriorSamples(problem.network())
    for member in range(settings.particles):
        samples.collect(ensemble.parameters_of(member))
    return samples


METHODS: dict[str, Callable[[Problem, Settings, int], fe.PosteriorSamples]] = {
    "Adam": by_adam,
    "ensemble": by_ensemble,
    "LangevinAdam": by_langevin_adam,
    "SGLD": by_sgld,
    "VariationalAdam, natural": variational("natural", 0.1, 0.9999),
    "VariationalAdam, reparam": variational("reparam", 1e-2, 0.999),
    "SVGD": by_svgd,
}
