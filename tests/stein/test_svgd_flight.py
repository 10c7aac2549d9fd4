"""fe.SVGD on a loss in place of a log-density: particles run away, which is said; right runs stay silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

import fekernels as fe
from tests.support.svgd import draws, normal

LogProb = Callable[[torch.Tensor], torch.Tensor]
STEPS = 257  # the third look is before step 257


def laplace(x: torch.Tensor) -> torch.Tensor:
    return -x.abs().sum(1)


def banana(x: torch.Tensor) -> torch.Tensor:
    return -((x[:, 0] / 1.4) ** 2 + ((x[:, 1] - x[:, 0] ** 2 / 2 + 1) / 0.5) ** 2) / 2


def student(x: torch.Tensor) -> torch.Tensor:
    return -(3 + x.shape[1]) / 2 * torch.log1p(x.square().sum(1) / 3)


def cauchys(x: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(x.square()).sum(1)


def modes(apart: float) -> LogProb:
    return lambda x: torch.logaddexp(normal(x - apart), normal(x + apart))


def ring(x: torch.Tensor) -> torch.Tensor:
    return -((x.square().sum(1) + 1e-12).sqrt() - 50).square() / 2


def well(x: torch.Tensor) -> torch.Tensor:
    return -((x[:, 0] ** 2 - 900) ** 2) / 3600 + normal(x[:, 1:])


def logistic(w: torch.Tensor) -> torch.Tensor:
    data = fe.random.normal((200, 3), seed=1)
    labels = (data[:, 0] + fe.random.normal((200,), seed=2) > 0).float()
    logits = w @ data.T
    return logits @ labels - torch.nn.functional.softplus(logits).sum(1) + normal(w)


def flight(log_prob: LogProb | None, x: torch.Tensor, steps: int = STEPS, **options: object) -> list[str]:
    """What is said of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fe.SVGD(log_prob, x, seed=0, **options).run(steps, progress=False, every=0)  # type: ignore[arg-type]
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("log_prob", [normal, laplace, banana, modes(3.0), logistic])
@pytest.mark.parametrize("share", [1.0, 1 / 200])
def test_a_loss_is_told(log_prob: LogProb, share: float) -> None:
    x = draws(50, 3 if log_prob is logistic else 2)
    (said,) = flight(lambda x: -share * log_prob(x), x, temperature=share)
    assert "SVGD: particles run away: from step 64 to 256" in said and "Is log_prob a loss?" in said
    assert "the mean log_prob went from" in said and f"at a target it is {-share * x.shape[1]:.3g}" in said


@pytest.mark.parametrize(
    "options", [{}, {"kernel_batch": 10}, {"kernel": "imq"}, {"optimizer": "sgd", "lr": 0.05}]
)
def test_scores_of_a_loss_are_told_once(options: dict[str, object]) -> None:
    (said,) = flight(None, draws(50, 2), 513, scores=lambda x: x, **options)
    assert "Is scores the gradient of a loss?" in said and "log_prob" not in said


def test_fewer_particles_than_dimensions_and_steps_by_hand() -> None:
    sampler = fe.SVGD(lambda x: -normal(x), draws(5, 50), seed=0)
    with pytest.warns(UserWarning, match="run away") as caught:
        for _ in range(STEPS):
            sampler.step()
    assert [each.filename for each in caught] == [__file__]


RIGHT = {
    "normal": (normal, draws(50, 2), {}),
    "from afar": (normal, draws(50, 2) + 50, {}),
    "from the mode": (normal, draws(50, 2) / 100, {}),
    "a narrow start": (lambda x: normal(x / 1000), draws(50, 2) / 100, {}),
    "few in many dimensions": (normal, draws(5, 100), {}),
    "a banana": (banana, draws(50, 2), {}),
    "Laplace from afar": (laplace, draws(50, 2) + 100, {}),
    "Student's t": (student, draws(50, 2), {}),
    "Student's t from afar": (student, draws(50, 2) + 100, {}),
    "Cauchy from one side": (cauchys, draws(50, 10) * 10 + 50, {}),
    "Cauchy from one side, narrow": (cauchys, draws(50, 1) + 100, {}),
    "two modes": (modes(10.0), draws(50, 2) / 100, {}),
    "modes far apart": (modes(30.0), draws(50, 2), {}),
    "modes not reached": (modes(100.0), draws(50, 2), {}),
    "a wide ring from inside": (ring, draws(50, 2), {}),
    "two wide wells": (well, draws(50, 2), {}),
    "logistic": (logistic, draws(50, 3) * 3, {}),
    "a mean": (lambda w: logistic(w) / 200, draws(50, 3), {}),
    "no temperature": (modes(10.0), draws(50, 2), {"temperature": 0.0}),
    "annealed": (modes(5.0), draws(50, 2), {"anneal": "cyclical", "anneal_steps": 500}),
    "noise": (modes(5.0), draws(20, 2), {"noise": "independent", "optimizer": "sgd", "lr": 0.05}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_density_is_not(name: str) -> None:
    log_prob, x, options = RIGHT[name]
    assert flight(log_prob, x, 2 * STEPS, **options) == []


def test_nor_are_particles_that_stay() -> None:
    assert flight(None, draws(50, 2) * 3, scores=lambda x: x, optimizer="sgd", lr=0.0) == []


def test_particles_put_elsewhere_begin_anew() -> None:
    sampler = fe.SVGD(lambda x: -normal(x), draws(50, 2), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.run(200, progress=False, every=0)
        sampler.load_state_dict(sampler.state_dict())
        sampler.run(200, progress=False, every=0)  # 256 alone is no row of three
    with pytest.warns(UserWarning, match="from step 256 to 1024"):
        sampler.run(700, progress=False, every=0)


def test_an_ensemble_turns_the_sign_itself() -> None:
    """Its loss may fall for ever without a prior, which is the user's choice."""
    ensemble = fe.SVGD.from_model(
        lambda: torch.nn.Linear(2, 1),
        lambda output: -output.square().mean(),
        size=5,
        temperature=1e-3,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ensemble.run(STEPS, batches=[(draws(20, 2),)], progress=False, every=0)
