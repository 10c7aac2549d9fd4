"""The ends of the ranges of parameters, where float32 over- and underflows, and what lies beyond: one table for all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._catalogue.free_energy import CATEGORICAL, LIKELIHOODS, NONE
from tests.support import oracle
from tests.support.free_energy import Call
from tests.support.free_energy_extremes import EXTREMES, NAN, Row
from tests.support.free_energy_kernels import Kernels

TOLERANCE = 2e-6  # free_energy/test_numerics.py has 1e-6 on ordinary values
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
TERMS = [row.term for row in LIKELIHOODS]
KLS = ("normal_kl", "normal_prior_kl")


def rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def wanted(name: str, row: Row) -> tuple[tuple[float | None, ...], tuple[float, ...]]:
    """What is right, and the scale of an error."""
    target, params, known = row
    if known is not None:
        return known, tuple(1.0 if k is None or not math.isfinite(k) else abs(k) for k in known)
    exact = oracle.exact(name.removesuffix("_learned"), rounded(target), *map(rounded, params))
    return (
        tuple(float(v) for v in (exact.value, *exact.gradients)),
        tuple(float(v) for v in (exact.scale, *exact.scales)),
    )


def wrong(got: float, right: float | None, scale: float) -> bool:
    if right is None:
        return False
    if math.isnan(right):
        return not math.isnan(got)
    if (
        abs(right) > 0.999 * LARGEST
    ):  # float32 may have it as its largest number, where the true value is finite
        least = LARGEST if math.isinf(right) else 0.99 * LARGEST
        return not (abs(got) >= least and (got > 0) == (right > 0)) or (
            math.isinf(right) and math.isfinite(got)
        )
    # Subnormal results, and their differences, may be flushed to 0.
    return not abs(got - right) <= TOLERANCE * scale + 4 * SMALLEST


def evaluate(kernels: Kernels, name: str, target: Tensor, params: list[Tensor]) -> list[Tensor]:
    """[value, *gradients] of each row [N]; all [N, 1]."""
    ones = [torch.ones(len(target))] * 2
    if name in KLS:
        results = Call([], None, None, params, None, ones, 0, NONE).run(kernels)
        return [results[2].cpu(), *(g.squeeze(1).cpu() for g in results[3:])]
    results = Call(params, target, None, [], None, ones, TERMS.index(name), NONE).run(kernels)
    return [results[1].cpu(), *(g.squeeze(1).cpu() for g in results[3:])]


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(free_energy_kernel: Kernels, name: str) -> None:
    rows = EXTREMES[name]
    target = torch.tensor([[row[0]] for row in rows])
    params = [torch.tensor([[row[1][i]] for row in rows]) for i in range(len(rows[0][1]))]
    results = [r.tolist() for r in evaluate(free_energy_kernel, name, target, params)]
    failures = []
    for at, row in enumerate(rows):
        right, scales = wanted(name, row)
        got = [result[at] for result in results]
        if any(map(wrong, got, right, scales)):
            failures.append(f"{row[:2]}: {got} for {right}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", [name for name in EXTREMES if name not in KLS])
def test_a_neighbour_does_not_matter(free_energy_kernel: Kernels, name: str) -> None:
    """A row of ordinary elements has the same bits alone as among extremes: forms are chosen element by element."""
    rows, count = EXTREMES[name], len(EXTREMES[name][0][1])
    ordinary = torch.rand(count, 40, 1) + 0.5
    x = torch.poisson(torch.full((40, 1), 0.7))
    among = [torch.cat([p, torch.tensor([[row[1][i]] for row in rows]), p]) for i, p in enumerate(ordinary)]
    mixed = torch.cat([x, torch.tensor([[row[0]] for row in rows]), x])
    alone = evaluate(free_energy_kernel, name, x, list(ordinary))
    for got, other in zip(evaluate(free_energy_kernel, name, mixed, among), alone, strict=True):
        assert torch.equal(got[:40], other) and torch.equal(got[-40:], other)


@pytest.mark.parametrize("name", [*(term for term in TERMS if term != "categorical"), *KLS])
def test_nan_is_never_lost(free_energy_kernel: Kernels, name: str) -> None:
    """A kernel of selects could turn a NaN into a number. Both signs: 0/0 is negative on x86."""
    count = {"normal_kl": 2, "normal_prior_kl": 4}.get(name) or len(LIKELIHOODS[TERMS.index(name)].parameters)
    for target in (0.0, 2.0):
        inputs = 0.7 * torch.ones(count + 1, 2 * (count + 1), 1)
        inputs[0] = target
        for i in range(len(inputs)):
            inputs[i, 2 * i], inputs[i, 2 * i + 1] = NAN, -NAN
        if name in KLS:
            inputs = inputs[:, 2:]
        values = evaluate(free_energy_kernel, name, inputs[0].clone(), [p.clone() for p in inputs[1:]])[0]
        assert values.isnan().all(), values


@pytest.mark.parametrize("classes", [2, 17, 129])
def test_a_nan_logit_makes_the_position_nan(free_energy_kernel: Kernels, classes: int) -> None:
    places = sorted({0, 1, classes // 2, classes - 1})
    logits = torch.randn(2 * len(places) + 1, 1, classes)
    target = torch.randint(classes, (len(logits), 1))
    for i, place in enumerate(places):
        logits[2 * i, 0, place], logits[2 * i + 1, 0, place] = NAN, -NAN
    ones = [torch.ones(len(logits))] * 2
    call = Call([logits], target, None, [], None, ones, CATEGORICAL, NONE)
    results = [r.cpu() for r in call.run(free_energy_kernel)]
    assert results[1][:-1].isnan().all() and results[1][-1].isfinite()
    assert results[3][:-1].isnan().all() and results[3][-1].isfinite().all()


def test_infinite_logits(free_energy_kernel: Kernels) -> None:
    inf = math.inf
    logits = torch.tensor([[[0.0, -inf, 1.0]], [[0.0, -inf, 1.0]], [[0.0, inf, 1.0]], [[-inf, -inf, -inf]]])
    target = torch.tensor([[0], [1], [1], [0]])
    ones = [torch.ones(4)] * 2
    results = Call([logits], target, None, [], None, ones, CATEGORICAL, NONE).run(free_energy_kernel)
    energy, gradient = results[1].cpu(), results[3].cpu()
    torch.testing.assert_close(
        energy,
        torch.nn.functional.cross_entropy(logits[:, 0], target[:, 0], reduction="none"),
        equal_nan=True,
    )
    softmax = logits.softmax(-1) - torch.nn.functional.one_hot(target, 3)
    torch.testing.assert_close(gradient, softmax, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "logit", [1e-3, 20.0, 88.0, 89.0, -100.0, 500.0, 800.0, -1e4, 1e30, math.inf, -math.inf]
)
def test_gradient_of_the_continuous_bernoulli_mean(logit: float, dtype: torch.dtype) -> None:
    x = torch.tensor(logit, dtype=dtype, requires_grad=True)
    mean = fe.likelihoods.mean("continuous_bernoulli", x)
    (slope,) = torch.autograd.grad(mean, x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, x)
    with oracle.mp.workdps(50):
        y = oracle.mpf(x.item())
        if math.isinf(logit):
            right, bend = 0.0, 0.0
        else:
            right = float(1 / y**2 - 1 / (4 * oracle.mp.sinh(y / 2) ** 2))
            bend = float(oracle.mp.cosh(y / 2) / (4 * oracle.mp.sinh(y / 2) ** 3) - 2 / y**3)
    error = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(slope.item(), right, rtol=error, atol=1e-44)
    torch.testing.assert_close(
        curvature.item(), bend, rtol=1e-3 if abs(logit) < 1 else 1e2 * error, atol=1e-44
    )


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("where", ["mean", "target"])
def test_no_gradient_of_laplace_hides_a_nan(where, backend):
    """The sign of NaN is 0 in PyTorch."""
    values = {"mean": torch.zeros(1, 1), "target": torch.ones(1, 1)}
    values[where].fill_(torch.nan)
    mean, scale = (t.requires_grad_() for t in (values["mean"], torch.zeros(1, 1)))
    with fe.use_backend(backend):
        fe.energy((mean, scale), values["target"], likelihood="laplace").sum().backward()
    assert mean.grad.isnan().all() and scale.grad.isnan().all()
