"""Trajectories of fe.VariationalAdam against the papers' formulas in float64, and against ivon-opt."""

import math

import pytest
import torch
from torch import Tensor

from tests.optimizers.test_variational_adam import (
    DELTA,
    ESS,
    ESTIMATORS,
    all_of,
    loss_of,
    make,
    parameters,
    train,
    xi,
)


def transcribed(
    params: list[Tensor], steps: int, samples: int, estimator: str, T: float, clip: float = math.inf
) -> list[Tensor]:
    """MATH section 3 line by line, in float64; h_hat and gradients are means over the draws."""
    means = [param.detach().double() for param in params]
    h = [torch.ones_like(m) for m in means]
    s = [torch.full_like(m, 1 / math.sqrt(ESS * (1 + DELTA))) for m in means]
    rho = [torch.log(torch.expm1(each)) for each in s]
    gm, v, rm, rv = ([torch.zeros_like(m) for m in means] for _ in range(4))
    draw, (b1, b2) = 0, (0.8, 0.9)

    def adam(x: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> Tensor:
        m.mul_(b1).add_((1 - b1) * g)
        v.mul_(b2).add_((1 - b2) * g * g)
        return x - 0.1 * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)

    for t in range(1, steps + 1):
        sums = [(torch.zeros_like(m), torch.zeros_like(m)) for m in means]
        if estimator == "natural":
            s = [(T / (ESS * (each + DELTA))).sqrt() for each in h]
        for _ in range(samples):
            draw += 1
            noise = [xi(param, i, draw).double() for i, param in enumerate(params)]
            leaves = [(m + d * x).requires_grad_() for m, d, x in zip(means, s, noise, strict=True)]
            loss = sum((torch.cosh(0.5 * leaf).sum() + leaf.sum() for leaf in leaves), torch.zeros(()))
            for (g, p), each, x in zip(sums, torch.autograd.grad(loss, leaves), noise, strict=True):
                g += each / samples
                p += each * x / samples
        for i, (g, p) in enumerate(sums):
            if estimator == "reparam":
                means[i] = adam(means[i], g + DELTA * means[i], gm[i], v[i], t)
                slope = p + DELTA * s[i] - T / (ESS * s[i])
                rho[i] = adam(rho[i], slope * torch.sigmoid(rho[i]), rm[i], rv[i], t)
                s[i] = torch.nn.functional.softplus(rho[i])
                continue
            gm[i] = b1 * gm[i] + (1 - b1) * g
            h_hat = p / s[i]
            h[i] = b2 * h[i] + (1 - b2) * h_hat + (1 - b2) ** 2 * (h[i] - h_hat) ** 2 / (h[i] + DELTA) / 2
            move = (gm[i] / (1 - b1**t) + DELTA * means[i]) / (h[i] + DELTA)
            means[i] = means[i] - 0.1 * (1 + DELTA) * move.clamp(-clip, clip)
    return means


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("T", [1.0, 0.25])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_trajectories_are_those_of_the_papers(estimator, T, samples):
    optimizer = make(estimator=estimator, temperature=T)
    expected = transcribed(parameters(), 12, samples, estimator, T)
    train(optimizer, 12, samples)
    for param, mean in zip(all_of(optimizer), expected, strict=True):
        torch.testing.assert_close(param.double(), mean, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("clip_radius", [math.inf, 0.05])
def test_trajectories_are_those_of_ivon_opt(clip_radius, samples, monkeypatch):
    ivon = pytest.importorskip("ivon", reason="ivon-opt is not installed")
    theirs_params = parameters()
    options = dict(hess_init=0.5, weight_decay=DELTA, mc_samples=samples, clip_radius=clip_radius)
    theirs = ivon.IVON(theirs_params, lr=0.3, ess=ESS, beta1=0.9, beta2=0.99, **options)
    ours = make(lr=0.3, betas=(0.9, 0.99), **options)
    draw = 0

    def noise(count: int, **_: object) -> Tensor:
        return torch.cat([xi(param, i, draw).flatten() for i, param in enumerate(theirs_params)])

    monkeypatch.setattr(torch, "randn", noise)
    for _ in range(20):
        for _ in range(samples):
            draw += 1
            for optimizer, params in ((theirs, theirs_params), (ours, all_of(ours))):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss_of(params).backward()
        theirs.step()
        ours.step()
        for p, q in zip(theirs_params, all_of(ours), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_each_step():
    optimizer, before = make(clip_radius=0.01), parameters()
    train(optimizer, 1)
    expected = transcribed(before, 1, 1, "natural", 1.0, clip=0.01)
    for param, mean, start in zip(all_of(optimizer), expected, before, strict=True):
        torch.testing.assert_close(param.double(), mean, rtol=1e-6, atol=1e-7)
        assert (param - start).abs().max() <= 0.1 * (1 + DELTA) * 0.01 * 1.001


def test_lr_is_rescaled_only_where_asked_for():
    plain, scaled = make(rescale_lr=False, hess_init=3.0), make(hess_init=3.0)
    scaled.param_groups[0]["lr"] /= 3.0 + DELTA
    for optimizer in (plain, scaled):
        train(optimizer, 3)
    for p, q in zip(all_of(plain), all_of(scaled), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
