"""Models of 16 bits: the samples are as wide as the posterior, or the report says that rounding decides."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe


def regression(dtype: torch.dtype, n: int, **options: Any) -> tuple[Any, Tensor]:
    """A run of three weights near 1 and a bias near 0, and its standard deviations over the exact ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(n, 1, generator=generator)

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return (model(rows[0].to(dtype)).float() - rows[1]).square().mean() / 2

    torch.manual_seed(0)
    model = nn.Linear(3, 1).to(dtype)
    batches = list(zip(x.split(1000), y.split(1000), strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LangevinAdam: temperature > 0 with float16")
        report = fe.sample_posterior(
            model, loss_fn, batches, data_size=n, prior_precision=1.0, progress=False, seed=0, **options
        ).report
    rows = torch.cat([x, torch.ones(n, 1)], 1).double()
    exact = torch.linalg.inv(rows.T @ rows + torch.eye(4, dtype=torch.float64)).diagonal().sqrt()
    return report, report.trace.double().flatten(0, 1).std(0) / exact


@pytest.mark.parametrize(("dtype", "n"), [(torch.bfloat16, 20_000), (torch.float16, 500_000)])
def test_weights_further_apart_than_the_chains_step_are_not_believed(dtype: torch.dtype, n: int) -> None:
    """A weight of 1 is held to 2^-7 or 2^-10; its posterior is 1 / sqrt(n) wide, a step a sixth of that."""
    report, _ = regression(dtype, n, samples=20, burn_in=64, thinning=4)
    (said,) = [warning for warning in report.warnings if "float32" in warning]
    assert str(dtype).removeprefix("torch.") in said and "steps of the chains apart" in said
    assert not report.converged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_posterior_is_sampled_in_16_bits_and_believed(dtype: torch.dtype) -> None:
    report, ratio = regression(dtype, 200)
    assert report.converged and not report.warnings, str(report)
    assert 0.92 < float(ratio.min()) and float(ratio.max()) < 1.1, ratio


def test_bfloat16_rounds_at_random_so_that_small_steps_are_not_lost() -> None:
    """Steps a fifth of the weights' distance: rounded to the nearest, most of them would be none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, ratio = regression(torch.bfloat16, 2000, lr=0.01)
    assert 0.9 < float(ratio.min()) and float(ratio.max()) < 1.15, ratio
    assert math.isfinite(report.ess_min)
