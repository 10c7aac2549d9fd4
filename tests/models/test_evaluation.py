"""What is no training runs without dropout, whatever mode the model is in, and leaves the modes as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe


class Dropped(nn.Module):
    """The linear logit, with dropout."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.dropout = linear, nn.Dropout(0.5)

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        return self.linear(self.dropout(z), context)


def relevance() -> fe.models.RelevanceModel:
    torch.manual_seed(0)
    encoders = [nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 5)) for _ in range(2)]
    model = fe.models.RelevanceModel(*encoders, 3, query_dim=5, context_dim=5, scoring_samples=4, seed=1)
    model.logit = Dropped(model.logit)
    return model


def vae() -> fe.models.VAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 4))
    decoder = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 6))
    return fe.models.VAE(6, 2, encoder=encoder, decoder=decoder, seed=1)


def rows(count: int, seed: int) -> Tensor:
    return fe.random.uniform((count, 6), seed=seed)


QUERIES, CONTEXTS = rows(4, 1), rows(7, 2)


def of_index(model: Any) -> Tensor:
    return model.encode_contexts(CONTEXTS).score(QUERIES).score


def of_grown_index(model: Any) -> Tensor:
    index = model.encode_contexts(CONTEXTS[:2])
    index.append(CONTEXTS[2:])
    return index.top(QUERIES, 3)[1].probability


def of_calibration(model: Any) -> Tensor:
    found = model.calibrate(QUERIES, CONTEXTS)
    model.calibration = fe.models.Calibration()
    return torch.tensor([found.scale, found.shift, found.sharpness])


def of_reconstruction(model: Any) -> Tensor:
    return model.reconstruct(QUERIES)


def of_samples(model: Any) -> Tensor:
    return model.sample(5, seed=3, mean=True)


USES = [
    (relevance, of_index),
    (relevance, of_grown_index),
    (relevance, of_calibration),
    (vae, of_reconstruction),
    (vae, of_samples),
]


@pytest.mark.parametrize(("made", "use"), USES)
def test_a_model_in_training_answers_as_in_evaluation(
    made: Callable[[], Any], use: Callable[[Any], Tensor]
) -> None:
    model = made()
    wanted = use(model.eval())
    model.train()
    still = next(module for module in model.modules() if isinstance(module, nn.Dropout)).eval()
    modes, state = [module.training for module in model.modules()], model.state_dict()
    statistics = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    for _ in range(2):
        assert torch.equal(use(model), wanted)
    assert [module.training for module in model.modules()] == modes and not still.training
    assert all(torch.equal(state[name], value) for name, value in statistics.items())


@pytest.mark.parametrize(("made", "use"), USES)
def test_the_mode_comes_back_after_an_error(made: Callable[[], Any], use: Callable[[Any], Tensor]) -> None:
    model = made().train()

    def fail(*_: Any) -> None:
        raise RuntimeError("no such luck")

    (model.context_encoder if made is relevance else model.decoder).register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        use(model)
    assert all(module.training for module in model.modules())


def test_what_trains_keeps_its_dropout() -> None:
    model = relevance().train()
    pair = QUERIES, CONTEXTS[:4]
    assert not torch.equal(model.score(*pair).score, model.score(*pair).score)
    model.steps, first = 0, model.loss(*pair)
    model.steps = 0
    assert model.loss(*pair) != first  # of the same noise
    x = rows(5, 3)
    auto = vae().train()
    auto.reconstruct(x).sum().backward()
    assert all(bool(weight.grad.abs().sum() > 0) for weight in auto.decoder.parameters())


@pytest.mark.parametrize("kind", ["exact", "sampled"])
@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("query", r"got (nan|-?inf) for query 2 and context 0, and 7 such pairs of 28, every pair of query 2 among"),
        ("context", r"got (nan|-?inf) for query 0 and context 5, and 4 such pairs of 28, every pair of context 5 am"),
    ],
)  # fmt: skip
def test_a_calibration_is_of_finite_logits(kind: str, side: str, message: str) -> None:
    model = relevance().eval()
    if kind == "exact":
        model.logit = model.logit.linear
    before = model.calibrate(QUERIES, CONTEXTS)
    for bad in (math.nan, math.inf):
        query, context = QUERIES.clone(), CONTEXTS.clone()
        (query[2] if side == "query" else context[5])[1] = bad
        with pytest.raises(
            ValueError, match=rf"RelevanceModel\.calibrate: the logits of all pairs .*{message}"
        ):
            model.calibrate(query, context)
        assert model.calibration == before and model.get_extra_state()["calibration"][0] == before.scale
    assert bool(model.encode_contexts(CONTEXTS).score(QUERIES).probability.isfinite().all())


def test_a_model_tells_whether_it_is_calibrated() -> None:
    model = relevance()
    assert "uncalibrated" in repr(model).splitlines()[1]
    found = model.calibrate(QUERIES, CONTEXTS)
    assert repr(found) in repr(model) and "uncalibrated" not in repr(model)
