"""sample_posterior where weights differ in their noise: some have none, some most of it; and where none moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.posterior import PosteriorRun, plan, verdict

POINTS = 9000  # more than are joined to one batch


def half_square(model: Callable[[Tensor], Tensor], batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean() / 2


def sampled(x: Tensor, **options: Any) -> tuple[PosteriorRun, Tensor]:
    """The run, and the standard deviations of its weights over the exact ones of independent inputs."""
    torch.manual_seed(1)
    y = x.sum(1, keepdim=True) + torch.randn(len(x), 1)
    loader = list(zip(x.split(50), y.split(50), strict=True))
    model = nn.Linear(x.shape[1], 1, bias=False)
    options = {
        "data_size": len(x),
        "prior_precision": 1.0,
        "samples": 60,
        "seed": 0,
        "progress": False,
    } | options
    found = fe.sample_posterior(model, half_square, loader, **options)
    drawn = torch.stack([sample["weight"].flatten() for sample in found.samples]).double()
    return found, drawn.std(0) * (x.square().sum(0) + 1).sqrt()


def test_the_noise_of_most_weights_that_have_none_does_not_hide_that_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(POINTS, 4), torch.zeros(POINTS, 8)], 1)
    # The noise of plain minibatches allows only so small a step that a short run is not worth enough draws; what is
    # looked at is how wide it is.
    monkeypatch.setattr(verdict, "WORST_NOISE", 0.01)
    found, wide = sampled(x, control_variates=False, thinning=8, burn_in=512)
    assert float(wide[:4].square().mean()) < 1.5, wide
    assert 0.01 < found.report.noise_ratio <= 0.1
    assert not found.report.converged
    assert any("of some weights is r =" in warning for warning in found.report.warnings), str(found.report)


def test_noise_counts_by_what_the_data_say_of_a_weight() -> None:
    ratios, shares = torch.tensor([0.1, 0.3, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    assert plan._over_weights(ratios, shares) == pytest.approx((0.2, 0.3))
    assert plan._over_weights(ratios, torch.zeros(5)) == (0.0, 0.0)
    many = torch.full((1000,), 0.1)
    many[:20] = 5.0
    assert plan._over_weights(many, torch.ones(1000)) == pytest.approx((0.198, 5.0))
    many[5:20] = 0.1  # half of a hundredth
    assert plan._over_weights(many, torch.ones(1000))[1] == pytest.approx(0.1)


class Level(nn.Module):
    """A constant that is so large beside its posterior's width that a float32 step is lost in it."""

    def __init__(self, level: Tensor) -> None:
        super().__init__()
        self.level = nn.Parameter(level.clone())

    def forward(self, y: Tensor) -> Tensor:
        return self.level.expand(len(y), 1)


@pytest.mark.parametrize(("dtype", "moves"), [(torch.float32, False), (torch.float64, True)])
def test_chains_that_stand_still_are_not_believed(dtype: torch.dtype, moves: bool) -> None:
    torch.manual_seed(0)
    y = (3e6 + torch.randn(2000, 1, dtype=torch.float64)).to(dtype)
    model = Level(y.double().mean().to(dtype)[None])
    found = fe.sample_posterior(
        model, half_square, [(y, y)], data_size=2000, prior_precision=0.0, seed=0, progress=False
    )
    assert found.report.converged == moves, str(found.report)
    assert any("1 of the 1 weights looked at never moved" in each for each in found.report.warnings) != moves


def test_losses_that_differ_by_rounding_alone_are_no_learning_coefficient() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = x.sum(1, keepdim=True) + torch.randn(200, 1)
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T.contiguous()
    options = {"data_size": 200, "localization": 1.0, "draws": 100, "chains": 2, "seed": 0, "progress": False}
    for lr, told in ((1e-12, True), (1e-2, False)):
        with pytest.warns(UserWarning) if told else torch.no_grad():  # type: ignore[attr-defined]
            found = fe.local_learning_coefficient(model, half_square, [(x, y)], lr=lr, **options)
        assert any("rounding alone" in each for each in found.diagnostics.warnings) == told, found
