"""What judges the Stein operations, in float64: whole matrices of direct differences, and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.stein import (
    APART,
    BETA,
    NO_BANDWIDTH,
    ROOTS,
    ROWS,
    SMOOTH,
    TEMPERATURE,
    WEIGHTS,
    C,
    Problem,
    Row,
)

# phi(u) of each radial kernel.
PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "rbf": lambda u: torch.exp(-u),
    "imq": lambda u: (C**2 + u) ** BETA,
    "laplace": lambda u: torch.exp(-u.sqrt()),
    "matern32": lambda u: (1 + (3 * u).sqrt()) * torch.exp(-(3 * u).sqrt()),
}
# -phi'(0) of the kernels of the root, whose derivative there autograd does not find; `test_catalogue` compares it with
# differences of the profile.
SLOPES = {name: ROWS[name].at_zero(BETA, C)[1] / 2 for name in ROOTS}


def profile(name: str, u: Tensor) -> Tensor:
    """phi(u)."""
    if name not in PROFILES:
        raise KeyError(f"{name!r} has no profile in tests/support/stein_exact.py")
    return PROFILES[name](u)


def at_zero(name: str) -> float:
    """phi(0)."""
    return float(profile(name, torch.zeros((), dtype=torch.float64)))


def derivatives(name: str, u: Tensor, order: int) -> list[Tensor]:
    """[phi, phi', phi'', ...] by autograd."""
    with torch.enable_grad():
        u = u if u.requires_grad else u.detach().requires_grad_()
        values = [profile(name, u)]
        for _ in range(order):
            values += torch.autograd.grad(values[-1].sum(), u, create_graph=True)
    return values


def pairs(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Differences x_i - x_j [..., n, n, d], where they are 0, and which pairs have no repulsion: the diagonal, for
    the kernels of the root all that coincide."""
    differences = x.unsqueeze(-2) - x.unsqueeze(-3)
    coincide = (differences == 0).all(-1)
    still = coincide if name in ROOTS else torch.eye(x.shape[-2], dtype=torch.bool).expand_as(coincide)
    return differences, coincide, still


def exact_direction(problem: Problem, name: str, temperature: float = TEMPERATURE) -> Tensor:
    """phi, from its definition in float64: (1/n) sum_j [k(x_j, x_i) s_j + T grad_{x_j} k(x_j, x_i)]."""
    return _direction(problem, name, temperature)[0]


def direction_scale(problem: Problem, name: str) -> Tensor:
    """The largest sum of absolute values that an element of phi is made of: what rounding is measured against."""
    return _direction(problem, name, TEMPERATURE)[1]


def _direction(problem: Problem, name: str, temperature: float) -> tuple[Tensor, Tensor]:
    x, s, h = problem.x.double(), problem.s.double(), problem.h.double()[..., None, None]
    n = x.shape[-2]
    if not x.numel():
        return torch.zeros_like(x), x.new_zeros(())
    if name == "linear":
        phi = ((x @ x.mT + 1) @ s) / n + temperature * x
        return phi, (((x.abs() @ x.abs().mT + 1) @ s.abs()) / n + temperature * x.abs()).detach().max()
    difference, coincide, still = pairs(x, name)
    u = torch.where(still, 1.0, difference.square().sum(-1) / torch.where(h == 0, 1.0, h))
    value, slope = derivatives(name, u, 1)
    k = torch.where(h == 0, at_zero(name) * coincide, torch.where(still, at_zero(name), value))
    # grad_{x_j} k(x_j, x_i) = phi'(u) (2/h) (x_j - x_i)
    g = torch.where(still, SLOPES.get(name, 0.0), -slope) * 2 / torch.where(h == 0, 1.0, h)
    g = torch.where(h == 0, 0.0, g)
    phi = (k @ s + temperature * (g.unsqueeze(-2) @ difference).squeeze(-2)) / n
    with torch.no_grad():
        strong = torch.where(still, 0.0, g).abs()
        repulsion = (strong.unsqueeze(-2) @ difference.abs()).squeeze(-2).max()
        return phi, ((k @ s.abs()).max() + repulsion) / n


def exact_terms(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """kp(i, j) [..., n, n] by autograd through k(x, y) itself, and the sums of its parts' absolute values."""
    x, s, h = problem.x.double(), problem.s.double(), problem.h.double()
    n, d = x.shape[-2:]
    one = x.unsqueeze(-2).expand(*x.shape[:-2], n, n, d)
    other = x.unsqueeze(-3).expand(*x.shape[:-2], n, n, d)
    with torch.enable_grad():
        # k_p = s.s' k + s.grad_y k + s'.grad_x k + tr grad_x grad_y k
        a, b = (
            t.clone().detach().requires_grad_() if not t.requires_grad else t.clone() for t in (one, other)
        )
        if name == "linear":
            k = (a * b).sum(-1) + 1
        else:
            # The root has no derivative at 0: what is found there at 1 is replaced below.
            t = (a - b).square().sum(-1)
            at_once = (t == 0) & (name in ROOTS)
            k = profile(name, torch.where(at_once, 1.0, t) / h[..., None, None])
        by_a, by_b = torch.autograd.grad(k.sum(), (a, b), create_graph=True)
        trace = torch.zeros_like(k)
        for i in range(d):
            (second,) = torch.autograd.grad(
                by_a[..., i].sum(), b, create_graph=True, allow_unused=True, materialize_grads=True
            )
            trace = trace + second[..., i]
    si, sj = s.unsqueeze(-2), s.unsqueeze(-3)
    if name in ROOTS:
        strength = 2 * SLOPES[name] / h[..., None, None]
        push = strength.unsqueeze(-1) * (a - b)
        k, trace = torch.where(at_once, at_zero(name), k), torch.where(at_once, d * strength, trace)
        by_a, by_b = (torch.where(at_once.unsqueeze(-1), *two) for two in ((-push, by_a), (push, by_b)))
    parts = [(si * sj).sum(-1) * k, (si * by_b).sum(-1), (sj * by_a).sum(-1), trace]
    return sum(parts), sum(part.detach().abs() for part in parts)  # type: ignore[return-value]


def exact_discrepancy(problem: Problem, name: str, statistic: str = "u") -> tuple[Tensor, Tensor]:
    """The squared discrepancy and the mean of the absolute values of its terms."""
    kp, size = exact_terms(problem, name)
    n = problem.x.shape[-2]
    if statistic == "u":
        off = 1 - torch.eye(n, dtype=torch.float64)
        return (kp * off).sum((-1, -2)) / (n * (n - 1)), (size * off).sum((-1, -2)) / (n * (n - 1))
    return kp.mean((-1, -2)), size.mean((-1, -2))


def weighted_sums(problem: Problem, name: str, weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_{i != j} w_i w_j kp(i, j) of each column of weights [1 or B, n, m], and the sizes of its terms: [B, m]."""
    n = problem.x.shape[-2]
    off = 1 - torch.eye(n, dtype=torch.float64)
    w = weights.double()
    value, size = (terms.detach() * off for terms in exact_terms(problem, name))
    return (w * (value @ w)).sum(-2), (w.abs() * (size @ w.abs())).sum(-2)


def assert_close(
    got: Tensor, exact: Tensor, scale: Tensor, what: str = "", bound: float = 1e-5, roundings: float = 0.5
) -> None:
    """Within ``bound`` of the scale, and a rounding to the dtype of the result: half a unit in the last place."""
    assert got.shape == exact.shape, (what, got.shape, exact.shape)
    if not got.numel():
        return
    unit = roundings * torch.finfo(got.dtype).eps
    exact, scale = exact.detach(), scale.detach()
    if got.dtype == torch.float64:
        bound = 1e-12
    error = (got.detach().cpu().double() - exact).abs()
    allowed = bound * scale + unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
    worst = (error - allowed).max()
    assert bool((error <= allowed).all()), (
        f"{what}: off by {error.max():.3g}, {error.max() / scale.max():.3g} of the scale {scale.max():.3g}, "
        f"{worst:.3g} too much"
    )


def gaussian_scores(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return -torch.linalg.solve(covariance, (x - mean).mT).mT


def gradient_scales(problem: Problem, upstream: Tensor, name: str) -> list[Tensor]:
    """The largest sums of absolute values that the gradients of <upstream, phi> are made of."""
    x, s, g = (t.double() for t in (problem.x, problem.s, upstream))
    h = problem.h.double()[..., None, None]
    n = x.shape[-2]
    if name == "linear":
        a, b, e = x.abs(), s.abs(), g.abs()
        by_x = ((e @ (b.mT @ a) + b @ (e.mT @ a)) / n + TEMPERATURE * e).max()
        return [by_x, ((a @ (a.mT @ e) + e.sum(-2, keepdim=True)) / n).max(), torch.zeros(())]
    difference, coincide, still = pairs(x, name)
    distance = difference.norm(dim=-1)
    safe = torch.where(h == 0, 1.0, h)
    u = torch.where(still, 1.0, distance.square() / safe)
    k, first, second = (value.detach().abs() for value in derivatives(name, u, 2))
    k = torch.where(h == 0, at_zero(name) * coincide, torch.where(still, at_zero(name), k))
    first, second = torch.where(still, SLOPES.get(name, 0.0), first), torch.where(still, 0.0, second)
    r1, r2 = (torch.where(h == 0, 0.0, v) for v in (2 * first / safe, 4 * second / safe / safe))
    strengths, pulls = g.norm(dim=-1), s.norm(dim=-1)
    a = strengths.unsqueeze(-1) * pulls.unsqueeze(-2) + pulls.unsqueeze(-1) * strengths.unsqueeze(-2)
    unlike = (g.unsqueeze(-2) - g.unsqueeze(-3)).norm(dim=-1)
    m = (r1 * a + TEMPERATURE * r2 * unlike * distance) / (2 * n)
    # (sum_j M_ij) x_i - sum_j M_ij x_j is a difference of these, each rounded to 6e-8: 1e-2 of them, of 1e-5 allowed.
    folded = 1e-2 * m * (x - x.mean(-2, keepdim=True)).norm(dim=-1).amax(-1)[..., None, None]
    by_x = (TEMPERATURE * r1 * unlike / n + 2 * m * distance + folded).sum(-1)
    u = u.clamp_min(1e-6)  # what is less is rounding of distances by inner products
    by_h = u * r1 * a / 2 + TEMPERATURE * (r1 + u * r2 * safe / 2) / safe * unlike * distance
    return [by_x.max(), (k @ g.abs()).max() / n, by_h.sum((-1, -2)).max() / (2 * n)]


class Judged(NamedTuple):
    """A row's operands, what must come out of them, and what each error is measured against."""

    problem: Problem
    other: Tensor  # the gradient of phi, or weights
    exact: list[Tensor]
    scales: list[Tensor]


@functools.cache
def direction_of(row: Row) -> Judged:
    problem = row.case.make()
    exact, scale = (value.detach() for value in _direction(problem, row.kernel, TEMPERATURE))
    if row.regime == APART:
        scale = 0.2 * exact.abs().max()
    return Judged(problem, exact, [exact], [scale])


@functools.cache
def gradients_of(row: Row) -> Judged:
    """By particles, scores and bandwidth, whose derivative at 0 is one-sided, and 0 by convention."""
    problem = row.case.make()
    upstream = torch.randn_like(problem.x)
    wide = problem.double().requiring()
    phi = exact_direction(wide, row.kernel)
    exact = list(
        torch.autograd.grad(phi, wide.leaves(), upstream.double(), allow_unused=True, materialize_grads=True)
    )
    if row.regime == NO_BANDWIDTH:
        exact[2] = torch.zeros_like(exact[2])
    if row.regime == APART:
        # dphi/dh is a sum of n^2 terms of either sign, and those of a kink, laplace's, in one dimension far larger.
        factors = (0.5 if row.kernel in SMOOTH else 2.0, 0.5, 10.0)
        scales = [factor * gradient.abs().max() for factor, gradient in zip(factors, exact, strict=True)]
    else:
        scales = gradient_scales(problem, upstream, row.kernel)
    return Judged(problem, upstream, exact, scales)


@functools.cache
def discrepancies_of(row: Row) -> Judged:
    """Of weights of their own for each problem, few columns or many."""
    problem = row.case.make()
    if row.regime == APART:
        # Scores that are large and alike: of (s - s').(x - x') the products are 1e9 times as large as the differences.
        problem = Problem(problem.x, problem.s + 10.0, problem.h)
    batch, n, _ = row.size
    weights = torch.randn(batch, n, WEIGHTS[(n + row.size.d) % len(WEIGHTS)])
    exact, scale = weighted_sums(problem, row.kernel, weights)
    if row.regime == APART:
        scale = (0.2 if n > 99 else 0.5) * scale  # few particles average no roundings
    return Judged(problem, weights, [exact], [scale])
