"""fe.UnifiedOptimizer: one call for the backward pass and the step."""

import math
import warnings

import pytest
import torch

import fekernels as fe
from tests.support.tensors import UNIT, Frozen, bits_equal


def network(place=None):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return net.to(place.device if place else "cpu")


def loss_of(net, i=0):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i)).to(next(net.parameters()).device)
    return (net(x) - x[:, :1]).square().mean()


def test_one_call_is_backward_step_and_zero_grad(place):
    net, other = network(place), network(place)
    unified = fe.UnifiedOptimizer(
        net, lr=0.02, beta=0.8, temperature=0.1, eps=0.1, seed=5, backend=place.backend
    )
    plain = fe.LangevinAdam(
        other.named_parameters(), 0.02, (0.8, 0.999), temperature=0.1, eps=0.1, seed=5, backend=place.backend
    )
    for i in range(3):
        loss = loss_of(net, i)
        assert unified.step(loss) is loss
        assert all(p.grad is None for p in net.parameters())
        loss_of(other, i).backward()
        plain.step()
        plain.zero_grad()
    assert all(bits_equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_it_trains_as_it_comes():
    # The document's lr and beta, and no noise: its temperature of 1 is N times too hot for a mean loss.
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = fe.UnifiedOptimizer(net)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["temperature"]) == (0.01, (0.9, 0.999), 0.0)
    assert isinstance(optimizer, fe.LangevinAdam)
    first = optimizer.step(loss_of(net)).item()
    for _ in range(150):
        last = optimizer.step(loss_of(net)).item()
    assert last < 0.05 * first


def test_gradients_may_have_been_made_before(place):
    net, other = network(place), network(place)
    a, b = (
        fe.UnifiedOptimizer(n, temperature=0.1, eps=0.1, seed=5, backend=place.backend) for n in (net, other)
    )
    a.step(loss_of(net))
    loss_of(other).backward()
    assert b.step() is None
    assert all(bits_equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_the_documents_own_rule_stays_reachable(place):
    # velocity / (sqrt(uncertainty) + eps), and noise that no preconditioner scales
    net = torch.nn.Linear(3, 2, bias=False).to(place.device)
    start = net.weight.detach().cpu().double()
    optimizer = fe.UnifiedOptimizer(
        net, lr=0.02, beta=0.9, temperature=0.5, noise="isotropic", bias_correction=False, eps=1e-3, seed=8,
        backend=place.backend,
    )  # fmt: skip
    optimizer.step((net.weight * 2.0).sum())
    velocity, uncertainty = 0.1 * 2.0, 0.001 * 4.0
    stream = optimizer.param_groups[0]["streams"][0]
    xi = fe.random.normal((2, 3), seed=8, stream=stream, step=1, purpose=0).double()
    want = start - 0.02 * velocity / (math.sqrt(uncertainty) + 1e-3) + math.sqrt(2 * 0.5 * 0.02) * xi
    # Eight roundings of numbers below 1.
    torch.testing.assert_close(net.weight.detach().cpu().double(), want, rtol=0, atol=8 * UNIT)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (1.5, TypeError, "loss must be a tensor; got float"),
        (lambda: None, TypeError, "loss must be a tensor; got function"),
        (torch.ones(2), ValueError, r"loss must have one element; got shape \(2,\)"),
        (torch.ones(()), ValueError, "loss must require grad"),
    ],
)
def test_bad_losses_change_nothing(loss, error, message):
    net = network()
    optimizer = fe.UnifiedOptimizer(net, temperature=0.0)
    loss_of(net).backward()
    frozen = Frozen([*net.parameters(), *(p.grad for p in net.parameters())])
    with pytest.raises(error, match=f"UnifiedOptimizer.step: {message}"):
        optimizer.step(loss)
    assert frozen.unchanged() and not optimizer.state


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": list(network().parameters())}, TypeError, "model must be a torch.nn.Module; got list"),
        (
            {"model": torch.nn.Tanh()},
            ValueError,
            "params must hold at least one parameter; got an empty parameter list",
        ),
        ({"beta": 1.0}, ValueError, r"beta must be in \[0, 1\); got 1.0"),
        ({"beta": None}, TypeError, "beta must be a number; got NoneType"),
        ({"betas": (0.9, 0.99)}, TypeError, "beta must be given in place of betas"),
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0; got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number; got str"),
    ],
)
def test_bad_arguments_name_the_optimizer(settings, error, message):
    with pytest.raises(error, match=f"UnifiedOptimizer: {message}"):
        fe.UnifiedOptimizer(**{"model": network(), **settings})
