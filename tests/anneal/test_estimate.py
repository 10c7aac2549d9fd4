"""Jarzynski's and Bennett's estimators beside works whose distribution is known."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels.anneal import AnnealedEstimate, bennett_acceptance_ratio, jarzynski
from fekernels.anneal.estimate import of_work

BETAS = torch.tensor([0.0, 1.0], dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:jarzynski. the works are worth")
def test_jarzynski_by_hand() -> None:
    w = torch.tensor([1.0, 2.0, 4.0, 1.0], dtype=torch.float64)
    found = jarzynski(-w.log())
    assert found.log_ratio == pytest.approx(math.log(2))
    assert found.effective_sample_size == pytest.approx(64 / 22)
    assert found.standard_error == pytest.approx(float(w.std()) / 2 / 2)  # of the mean, over the mean
    equal = jarzynski(torch.full((7,), 1000.0))  # exp(-1000) is 0
    assert equal.log_ratio == pytest.approx(-1000) and equal.standard_error < 1e-6
    assert equal.effective_sample_size == pytest.approx(7)
    assert jarzynski([0.5])[:2] == (-0.5, math.inf)
    dead = jarzynski(torch.tensor([math.inf, 0.0]))
    assert dead.log_ratio == pytest.approx(-math.log(2)) and dead.effective_sample_size == pytest.approx(1)
    assert jarzynski([math.inf, math.inf]) == (-math.inf, math.inf, 0.0)


def test_jarzynski_warns_of_few_effective_runs() -> None:
    few = gaussian_work(1000, 0.0, 5.0, 3, False)
    with pytest.warns(
        UserWarning, match=r"works are worth \d\.\d of 1000 runs: log_ratio is too low"
    ) as warned:
        jarzynski(few)
    assert len(warned) == 1 and warned[0].filename == __file__
    with pytest.warns(UserWarning, match=r"worth 0\.0 of 2 runs"):
        jarzynski([math.inf, math.inf])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(5):
            jarzynski(gaussian_work(1000, 0.0, 1.0, seed, False))
        jarzynski(torch.zeros(10))
        # Of particles that were warned of when they were weighed, nothing more is said.
        there, back = (estimate(gaussian_work(1000, 1.0, 2.0, k, bool(k)), bool(k)) for k in (0, 1))
        bennett_acceptance_ratio(there, back)
        assert estimate(few, False).dissipated_work > 0


def gaussian_work(n: int, difference: float, spread: float, seed: int, backwards: bool) -> Tensor:
    """Works that Crooks' theorem allows: N(dF + s^2/2, s^2) forward, N(-dF + s^2/2, s^2) in reverse."""
    sign = -1 if backwards else 1
    return sign * difference + spread**2 / 2 + spread * fe.random.normal((n,), seed=seed).double()


def estimate(work: Tensor, backwards: bool) -> AnnealedEstimate:
    ratio, error, effective = of_work("test", work)
    log_z = -ratio if backwards else ratio
    return AnnealedEstimate(log_z, error, effective, -work, torch.zeros(len(work), 1), BETAS, backwards)


@pytest.mark.filterwarnings("ignore:jarzynski. the works are worth .* of 4 runs")
def test_gaussian_work() -> None:
    """The second cumulant is exact for it; Jarzynski's mean is unbiased, and low in the logarithm where few are."""
    work = gaussian_work(400_000, 3.0, 1.0, 1, False)
    found = jarzynski(work)
    assert abs(found.log_ratio + 3.0) < 5 * found.standard_error < 0.02
    assert found.effective_sample_size / len(work) == pytest.approx(math.exp(-1), rel=0.05)
    assert estimate(work, False).dissipated_work == pytest.approx(0.5, abs=0.02)
    few = [jarzynski(part).log_ratio for part in work[:4000].split(4)]
    assert sum(few) / len(few) < -3.1


@pytest.mark.parametrize("sizes", [(2000, 2000), (500, 5000)])
def test_bennett_is_right_where_both_ways_are_far_off(sizes: tuple[int, int]) -> None:
    errors, scores = [], []
    for seed in range(20):
        forward, reverse = (
            estimate(gaussian_work(n, 7.0, 3.0, 2 * seed + back, bool(back)), bool(back))
            for back, n in enumerate(sizes)
        )
        log_z, error = bennett_acceptance_ratio(forward, reverse)
        errors.append(error)
        scores.append((log_z + 7.0) / error)
    assert max(errors) < 0.2
    assert abs(sum(scores)) / math.sqrt(20) < 4
    assert (
        8 < sum(each * each for each in scores) < 40
    )  # the standard errors are what they say: chi-squared of 20


def test_bennett_refuses_what_says_nothing() -> None:
    there, back = (estimate(gaussian_work(50, 1.0, 1.0, k, bool(k)), bool(k)) for k in (0, 1))
    with pytest.raises(ValueError, match="reverse must have reverse=True; got reverse=False"):
        bennett_acceptance_ratio(there, there)
    with pytest.raises(TypeError, match="forward must be an AnnealedEstimate; got float"):
        bennett_acceptance_ratio(1.0, back)  # type: ignore[arg-type]
    other = AnnealedEstimate(
        0.0, 0.0, 1.0, back.log_weights, back.samples, torch.tensor([0.0, 0.5, 1.0]), True
    )
    with pytest.raises(ValueError, match="reverse must have the betas of forward"):
        bennett_acceptance_ratio(there, other)
    dead = AnnealedEstimate(0.0, 0.0, 1.0, torch.full((3,), -math.inf), back.samples, BETAS)
    with pytest.raises(ValueError, match="must overlap in their works"):
        bennett_acceptance_ratio(dead, back)


@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (torch.tensor([1, 2]), TypeError, "work must be floating point; got int64"),
        (torch.zeros(2, 2), ValueError, r"work must have shape \(n,\) with n >= 1; got \(2, 2\)"),
        (torch.zeros(0), ValueError, r"got \(0,\)"),
        (torch.tensor([math.nan]), ValueError, "must not be NaN or -inf"),
        (torch.tensor([-math.inf]), ValueError, "must not be NaN or -inf"),
    ],
)
def test_works_that_are_none(work: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"jarzynski: .*{message}"):
        jarzynski(work)
