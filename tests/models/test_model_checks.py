"""What a model asks of its data and weights at each step, natively and in Python: the same answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels._runtime import host
from fekernels.models import noise_counter
from fekernels.ops.free_energy import domains

INF, NAN = math.inf, math.nan
SMALLEST = torch.finfo(torch.float32).smallest_normal


@pytest.fixture(params=["native", "python"])
def checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "python":
        for module in (noise_counter, domains):
            monkeypatch.setattr(module, "model_checks", lambda: None)
    elif host.model_checks() is None:
        pytest.skip(f"no native module: {host.unavailable_reason()}")
    yield request.param


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
@pytest.mark.parametrize(
    ("likelihood", "good", "bad"),
    [
        ("bernoulli", (0.0, 1.0, 0.5, -0.0), (-1e-30, 1.0000001, NAN, INF, -INF)),
        ("gamma", (SMALLEST, 1e-45, 3e38), (0.0, -0.0, -1.0, NAN, INF)),
    ],
)
def test_one_number_outside_is_found_wherever_it_is(checks, size: int, likelihood: str, good, bad) -> None:
    x = torch.tensor(good).repeat(size)[:size].clone()
    domains.validate_data("f", likelihood, x)
    for place in {0, size // 2, size - 1}:
        for number in bad:
            wrong = x.clone()
            wrong[place] = number
            with pytest.raises(ValueError, match="target must hold"):
                domains.validate_data("f", likelihood, wrong)


@pytest.mark.parametrize(
    "as_it_is",
    [
        lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.t(), lambda x: x[:, ::2], lambda x: x.expand(2, 4, 6),
        lambda x: x.requires_grad_(), lambda x: x[:0],
    ],
)  # fmt: skip
def test_any_layout_and_precision(checks, as_it_is: Callable[[Tensor], Tensor]) -> None:
    domains.validate_data("f", "bernoulli", as_it_is(torch.full((4, 6), 0.5)))
    x = as_it_is(torch.full((4, 6), 2.0))
    if x.numel():
        with pytest.raises(ValueError, match="got 2"):
            domains.validate_data("f", "bernoulli", x)


def model() -> nn.Module:
    """With weights of its own: one that is looked at without its children has some."""
    inner = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, bias=False))
    m = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), inner)
    for module in (m, inner):
        module.register_parameter("shift", nn.Parameter(torch.ones(2)))
    return m


def write_data(m: nn.Module) -> None:
    next(reversed(list(m.parameters()))).data.add_(1.0)  # counts no version


def write_first(m: nn.Module) -> None:
    with torch.no_grad():
        next(m.parameters()).add_(1.0)


def replace(m: nn.Module) -> None:
    m[2][1].weight = nn.Parameter(m[2][1].weight.detach() + 1)


def add_child(m: nn.Module) -> None:
    m.append(nn.Linear(2, 1))


@pytest.mark.parametrize("change", [write_data, write_first, replace, add_child])
def test_a_change_of_the_weights_is_noticed(checks, change: Callable[[nn.Module], None]) -> None:
    m = model()
    before = noise_counter._state_of(m)
    assert noise_counter._state_of(m) == before
    change(m)
    assert noise_counter._state_of(m) != before


def test_other_weights_than_float32s_of_a_cpu(checks) -> None:
    for m in (model().double(), nn.Sequential(), nn.Linear(300, 300), nn.Sequential(nn.ReLU(), None)):  # type: ignore[arg-type]
        state = noise_counter._state_of(m)
        assert noise_counter._state_of(m) == state
    with torch.inference_mode():
        made = model()
    assert noise_counter._state_of(made) == noise_counter._state_of(made)


def test_the_noise_is_one(checks) -> None:
    """Whoever asks: the same steps, fresh after each change of the weights."""
    vae = fe.models.VAE(6, 2, (5,), seed=4)
    x, y = torch.rand(3, 6), torch.rand(3, 6)
    steps = []
    for batch in (x, x, y, x):
        steps.append(vae.noise(batch)["step"])
    with torch.no_grad():
        vae.fc_mean.bias.add_(1)
    steps.append(vae.noise(x)["step"])
    assert steps == [1, 1, 2, 1, 3]
