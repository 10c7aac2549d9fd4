"""A loss that is no mean over the points of its batch is refused or said, whatever holds the points."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.diagnostics.mean_check import few_rows, judge, measure
from fekernels.posterior import PosteriorRun
from fekernels.posterior.verdict import INFLATION, NEEDED, RHAT
from tests.support.posteriors import Problem, linear_regression

SMALL: dict[str, Any] = {"samples": 4, "thinning": 1, "burn_in": 2, "progress": False, "seed": 0}


def summed(model: Any, rows: Any) -> Tensor:
    return (model(rows[0])[:, 0] - rows[1]).square().sum() / 2


def broadcast(model: Any, rows: Any) -> Tensor:
    return (model(rows[0]) - rows[1]).square().mean() / 2


def run(problem: Problem, loss_fn: Any, **options: Any) -> PosteriorRun:
    args, sizes = problem.arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fe.sample_posterior(args[0], loss_fn, args[2], **sizes, **options)


def test_a_summed_loss_is_refused() -> None:
    problem = linear_regression(n=600, d=3, batch=100)
    told = r"loss_fn must be the mean .*; got [\d.e+]+ for a batch of 8 and [\d.]+, [\d.]+ for its halves, as a sum"
    with pytest.raises(ValueError, match=f"^sample_posterior: {told}"):
        run(problem, summed, **SMALL)
    with pytest.raises(ValueError, match=f"^local_learning_coefficient: {told}"):
        fe.local_learning_coefficient(problem.model, summed, problem.loader, data_size=600, progress=False)


def test_shapes_that_broadcast_are_said_and_not_believed() -> None:
    problem = linear_regression(n=200, d=2, batch=100)
    before = [p.clone() for p in problem.model.parameters()]
    wrong = run(problem, broadcast, progress=False, seed=0, chains=2).report
    assert len(wrong.warnings) == 1  # nothing else that is measured sees it
    assert wrong.rhat_max < RHAT and wrong.ess_min >= 2 * NEEDED and wrong.variance_inflation <= INFLATION
    said = r"of 8 rows it is [\d.]+, and the mean of its halves [\d.]+\. Shapes that broadcast"
    assert re.search(said, wrong.warnings[0])
    assert not wrong.converged
    assert all(map(torch.equal, before, problem.model.parameters()))
    with pytest.warns(UserWarning, match=said):
        fe.local_learning_coefficient(
            problem.model, broadcast, problem.loader, data_size=200, lr=1e-4, draws=4, progress=False
        )


X = torch.randn(37, 3, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True)
PERFECT = nn.Linear(3, 1)
with torch.no_grad():
    PERFECT.weight.fill_(1.0)
    PERFECT.bias.zero_()


class Dropped(nn.Module):
    """In training mode neither mean nor the same twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def of_tuple(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def of_dict(model: Any, batch: Any) -> Tensor:
    return of_tuple(model, (batch["x"], batch["y"])) * batch["scale"]


def regularised(model: Any, batch: Any) -> Tensor:
    return of_tuple(model, batch) + sum(p.square().sum() for p in model.parameters())


def judged(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any) -> str | None:
    found = measure(model, loss_fn, few_rows(batch))
    assert found
    return judge("f", found)


@pytest.mark.parametrize("rows", [2, 3, 7, 37])
def test_means_pass_and_what_is_none_does_not(rows: int) -> None:
    batch = (X[:rows], Y[:rows])
    as_dict = {"x": X[:rows], "y": Y[:rows], "scale": torch.tensor(2.0)}
    dropped = Dropped()
    assert judged(PERFECT, of_tuple, batch) is None
    assert judged(PERFECT, regularised, batch) is None
    assert judged(PERFECT, of_dict, as_dict) is None
    assert judged(dropped, of_tuple, batch) is None
    assert all(each.training for each in dropped.modules())
    assert judged(PERFECT.to(torch.bfloat16), of_tuple, tuple(t.bfloat16() for t in batch)) is None
    PERFECT.float()
    with pytest.raises(ValueError, match="as a sum gives"):  # of a model whose losses are all 0
        judged(PERFECT, lambda model, batch: of_tuple(model, batch) * len(batch[0]), batch)
    told = judged(PERFECT, lambda model, batch: of_tuple(model, (batch[0], batch[1][:, 0])), batch)
    assert told is not None and "Shapes that broadcast" in told
    # A summed loss with something besides is no mean either.
    told = judged(PERFECT, lambda model, batch: of_tuple(model, batch) * len(batch[0]) + 0.1, batch)
    assert told is not None


def test_what_cannot_be_split_or_repeated_is_left_alone() -> None:
    state = torch.get_rng_state()
    assert few_rows((X[:1], Y[:1])) is None
    assert few_rows((X, torch.ones(3, 3))) is None
    assert measure(PERFECT, of_tuple, None) == []

    def random(model: Any, batch: Any) -> Tensor:
        return of_tuple(model, batch) * torch.rand(())

    def one_size(model: Any, batch: Any) -> Tensor:
        return of_tuple(model, (batch[0].view(8, 3), batch[1])) * len(batch[0])

    def not_finite(model: Any, batch: Any) -> Tensor:
        return of_tuple(model, batch) / 0

    for loss_fn in (random, one_size, not_finite):
        assert measure(PERFECT, loss_fn, few_rows((X, Y))) == []
    assert torch.equal(state, torch.get_rng_state())


def test_weights_near_which_a_loss_is_not_finite_are_judged_where_they_are() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-9)

    def loss_fn(model: Any, batch: Any) -> Tensor:
        small = model.weight.abs().max() < 1e-3
        return (batch[1] - model(batch[0])).square().sum() / small

    with pytest.raises(ValueError, match="as a sum gives"):
        judged(model, loss_fn, (X, Y))
