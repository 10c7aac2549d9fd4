"""Which temperature makes the posterior of a loss, as the loss itself tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fekernels.diagnostics import posterior_temperature

X = torch.randn(37, 3, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(37) % 4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))


def entropy(reduction: str, times: float = 1.0) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: (
        times * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=reduction)
    )


@pytest.mark.parametrize("rows", [2, 3, 9, 37])
def test_a_mean_and_a_sum(rows: int) -> None:
    network, batch = model(), (X[:rows], LABELS[:rows])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert posterior_temperature(network, entropy("mean"), batch, 1000) == 1 / 1000
    assert posterior_temperature(network, entropy("sum"), batch, 1000) == rows / 1000
    assert posterior_temperature(network, entropy("sum"), batch, rows) == 1
    assert network.training
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


def test_at_that_temperature_the_density_is_the_posterior() -> None:
    """exp(-loss / T) has the curvature of the whole data's likelihood, whatever the batch and the reduction."""
    line, y = nn.Linear(3, 1, bias=False), X.sum(1, keepdim=True)
    exact = X.T @ X * (1000 / 37)  # the batch stands for 1000 such points
    for mean in (True, False):

        def loss(model: Any, batch: Any, mean: bool = mean) -> Tensor:
            each = (model(batch[0]) - batch[1]).square().sum(1) / 2
            return each.mean() if mean else each.sum()

        def of(weight: Tensor, loss: Any = loss) -> Tensor:
            return loss(lambda x: x @ weight, (X, y))

        temperature = posterior_temperature(line, loss, (X, y), 1000)
        curvature = torch.func.hessian(of)(torch.zeros(3, 1)).view(3, 3)
        torch.testing.assert_close(curvature / temperature, exact)


@pytest.mark.parametrize(
    ("loss_fn", "batch", "size", "error", "told"),
    [
        (
            lambda m, b: entropy("sum")(m, b) / len(b[0]) ** 0.5,
            (X, LABELS),
            100,
            ValueError,
            "mean or the sum",
        ),
        (lambda m, b: entropy("mean")(m, b) * torch.rand(()), (X, LABELS), 100, ValueError, "the same twice"),
        (entropy("none"), (X, LABELS), 100, ValueError, "must give a scalar"),
        (entropy("mean"), (X[:1], LABELS[:1]), 100, ValueError, "two or more rows"),
        (entropy("mean"), (X, LABELS), 36, ValueError, "data_size must be .*37"),
        (entropy("mean"), (X, LABELS), 1.5, TypeError, "data_size"),
        (3, (X, LABELS), 100, TypeError, "loss_fn must be callable; got int"),
    ],
)
def test_what_is_refused(loss_fn: Any, batch: Any, size: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"^posterior_temperature: .*{told}"):
        posterior_temperature(model(), loss_fn, batch, size)


def test_a_model_is_needed() -> None:
    with pytest.raises(TypeError, match=r"^posterior_temperature: model must be a torch.nn.Module; got str"):
        posterior_temperature("m", entropy("mean"), (X, LABELS), 100)  # type: ignore[arg-type]
