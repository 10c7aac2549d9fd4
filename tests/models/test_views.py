"""The four views are one value with one gradient, for any model and likelihood; a view that is broken is caught."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fekernels as fe
from fekernels import views
from tests.models.test_vae import data, small

FOUR = (views.physics, views.machine_learning, views.inference, views.message_passing)


class Plain(nn.Module):
    """The document's model: encode and decode, and nothing else."""

    def __init__(self, inputs=6, latents=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 5), nn.ReLU())
        self.fc_mean, self.fc_logvar = nn.Linear(5, latents), nn.Linear(5, latents)
        self.decoder = nn.Linear(latents, inputs)

    def encode(self, x):
        h = self.body(x)
        return self.fc_mean(h), self.fc_logvar(h)

    def decode(self, z):
        return self.decoder(z)


def wide(model):
    """With an encoder that is far from the prior."""
    with torch.no_grad():
        for layer in (model.fc_mean, model.fc_logvar):
            layer.weight.mul_(4)
    return model


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("likelihood", [*fe.likelihoods.NAMES, "document"])
def test_one_value_and_one_gradient(likelihood, reduction):
    if likelihood == "document":
        model, x = Plain(), torch.randn(6, 6)
    else:
        model, x = small(likelihood), data(likelihood)
    model = wide(model.double())
    x = x.double() if x.is_floating_point() else x
    # Of a view: its value and the gradient of every weight, all the way through decoder, sample and encoder.
    found = []
    for view in FOUR:
        value, parts = view(model, x, seed=3, reduction=reduction)
        gradients = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        assert all(part.shape == () for part in parts.values())
        found.append((value, gradients))
    first, of_first = found[0]
    for value, gradients in found[1:]:
        assert abs(value - first) <= 1e-12 * abs(first)
        for one, other in zip(gradients, of_first, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one - other).abs().max() <= 1e-12 * other.abs().max()
    result = views.verify_equivalence(model, x, seed=3, reduction=reduction)
    assert list(result) == ["physics", "machine_learning", "inference", "message_passing"]
    assert all(abs(value - first.item()) <= 1e-12 * abs(first.item()) for value in result.values())
    if likelihood != "document":
        own = model.free_energy(x, seed=3, reduction=reduction).free_energy
        assert abs(own - first) <= 1e-12 * abs(first)


def test_the_parts_are_what_they_are_called():
    model, x = wide(Plain().double()), torch.randn(6, 6, dtype=torch.float64)
    mean, logvar = model.encode(x)
    z = mean + (logvar / 2).exp() * fe.random.normal((6, 2), seed=1, purpose=3)
    error = ((model.decode(z) - x) ** 2).sum()
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    kl, entropy = torch.distributions.kl_divergence(q, p).sum(), q.entropy().sum()
    expected = {
        views.physics: {"energy": error + kl + entropy, "entropy": entropy},
        views.machine_learning: {"reconstruction": error, "regulariser": kl},
        views.inference: {"negative_log_joint": error + kl + entropy, "log_q": -entropy},
        views.message_passing: {"forward_error": error, "backward_error": kl},
    }
    for view, wanted in expected.items():
        value, parts = view(model, x, seed=1, reduction="sum")
        torch.testing.assert_close(value, error + kl, rtol=1e-12, atol=0)
        for name, part in wanted.items():
            torch.testing.assert_close(parts[name], part, rtol=1e-12, atol=0)
    cold, parts = views.physics(model, x, seed=1, temperature=0.25)
    torch.testing.assert_close(cold, parts["energy"] - 0.25 * parts["entropy"])


def test_the_inference_view_is_the_expectation_under_q():
    """Its average over samples that it does not draw itself."""
    model, x = wide(Plain().double()), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        mean, logvar = model.encode(x)
        q, p = torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
        z = q.sample((400_000,))
        drawn = (q.log_prob(z) - p.log_prob(z)).sum((1, 2))
        _, parts = views.inference(model, x, seed=0, reduction="sum")
        likelihood = views.machine_learning(model, x, seed=0, reduction="sum")[1]["reconstruction"]
    of_latents = parts["negative_log_joint"] - likelihood + parts["log_q"]
    assert abs(drawn.mean() - of_latents) < 5 * drawn.std() / math.sqrt(len(drawn))
    assert drawn.std() > 0.1  # one sample would not have been equal


def test_noise_nobody_asked_for_is_the_models_own():
    model, x = small().double(), data("bernoulli").double()
    values = [view(model, x)[0].item() for view in FOUR]
    assert max(values) - min(values) <= 1e-12 * values[0]
    with torch.no_grad():
        model.decoder[-1].bias += 0
    assert views.physics(model, x)[0].item() != values[0]  # a step later
    assert views.physics(Plain(), torch.ones(6, 6))[0].shape == ()  # which has no noise of its own


def physics_of_the_document(shared):
    """With the KL subtracted in place of the entropy."""
    energy = shared.energy()
    kl = shared.reduced((shared.mean**2 + shared.logvar.exp() - 1 - shared.logvar) / 2)
    return energy - kl, {"energy": energy, "entropy": kl}


def without_the_prior(shared):
    entropy = shared.reduced((1 + math.log(2 * math.pi) + shared.logvar) / 2)
    return shared.energy() - entropy, {"energy": shared.energy(), "entropy": entropy}


def another_likelihood(shared):
    terms = fe.free_energy(shared.params, shared.x, shared.mean, shared.logvar, likelihood="gaussian")
    return terms.free_energy, {"reconstruction": terms.energy, "regulariser": terms.kl}


def half_the_reconstruction(shared):
    value, parts = original["machine_learning"](shared)
    return value - parts["reconstruction"] / 2, parts


def one_sample(shared):
    z = shared.mean + (shared.logvar / 2).exp() * torch.randn_like(shared.mean)
    log_p = -(math.log(2 * math.pi) + z * z) / 2
    joint = shared.energy() - shared.reduced(log_p)
    log_q = -shared.reduced((1 + math.log(2 * math.pi) + shared.logvar) / 2)
    return joint + log_q, {"negative_log_joint": joint, "log_q": log_q}


def a_half_is_missing(shared):
    latents = shared.reduced(shared.mean**2 + shared.logvar.exp() - 1 - shared.logvar)
    return shared.energy() + latents, {"forward_error": shared.energy(), "backward_error": latents}


def no_gradient_in(name):
    """The value is right, its gradient is not."""

    def broken(shared):
        return original["message_passing"](shared._replace(**{name: getattr(shared, name).detach()}))

    return broken


def no_gradient_in_params(shared):
    return original["message_passing"](shared._replace(known_energy=shared.energy().detach()))


def no_gradient_in_params_of_the_fused(shared):
    return original["machine_learning"](shared._replace(params=tuple(p.detach() for p in shared.params)))


def nan_for_a_gradient(name):
    def broken(shared):
        value, parts = original["machine_learning"](shared)
        tensor = shared.params[0] if name == "params" else getattr(shared, name)
        return value + 0 * (0 * tensor).sqrt().sum(), parts  # the root's slope at 0 is infinite

    return broken


original = dict(views.VIEWS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("physics", physics_of_the_document),
        ("physics", without_the_prior),
        ("machine_learning", another_likelihood),
        ("machine_learning", half_the_reconstruction),
        ("machine_learning", no_gradient_in_params_of_the_fused),
        ("inference", one_sample),
        ("machine_learning", nan_for_a_gradient("params")),
        ("machine_learning", nan_for_a_gradient("logvar")),
        ("message_passing", a_half_is_missing),
        ("message_passing", no_gradient_in("mean")),
        ("message_passing", no_gradient_in("logvar")),
        ("message_passing", no_gradient_in_params),
    ],
)
def test_a_broken_view_is_caught(monkeypatch, name, broken, dtype):
    model, x = small().to(dtype), data("bernoulli").to(dtype)
    views.verify_equivalence(model, x)
    monkeypatch.setitem(views.VIEWS, name, broken)
    with pytest.raises(AssertionError, match=r"views differ by more than 1e-(12|05)\nview +value") as raised:
        views.verify_equivalence(model, x)
    assert name in str(raised.value)


def test_it_encodes_and_decodes_once_and_leaves_nothing_behind(monkeypatch):
    model, x = small(), data("bernoulli")
    counts = {"encode": 0, "decode": 0}
    for name in counts:
        method = getattr(model, name)

        def counted(*arguments, name=name, method=method):
            counts[name] += 1
            return method(*arguments)

        monkeypatch.setattr(model, name, counted)
    table = str(views.verify_equivalence(model, x))
    assert counts == {"encode": 1, "decode": 1}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert table.count("\n") == 4 and "regulariser" in table and "d params[0]" in table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_sixteen_bits_are_equal(dtype, seed):
    torch.manual_seed(seed)
    model, x = fe.models.VAE(20, 3, (16,), seed=seed).to(dtype), torch.rand(50, 20).to(dtype)
    for scale in (1, 4):
        with torch.no_grad():
            model.fc_logvar.weight.mul_(scale)
        result = views.verify_equivalence(model, x, seed=seed)
        assert max(result.differences.values()) < 1e-6  # values are computed in float32


def not_a_number(name):
    model, x = Plain(), torch.ones(6, 6)
    if name == "x":
        x[0] = math.nan
    else:
        layer = {"mean": model.fc_mean, "logvar": model.fc_logvar, "params[0]": model.decoder}[name]
        with torch.no_grad():
            layer.bias[0] = math.inf
    return model, x


@pytest.mark.parametrize("name", ["x", "mean", "logvar", "params[0]"])
def test_nan_is_no_equivalence(name):
    match = rf"^verify_equivalence: not finite, .*: the value of physics, .*; NaN or infinity is in .*{re.escape(name)}"
    with pytest.raises(AssertionError, match=match) as raised:
        views.verify_equivalence(*not_a_number(name))
    assert "differ by more" not in str(raised.value)
    views.verify_equivalence(Plain(), torch.ones(6, 6))


def encoding(result):
    return SimpleNamespace(encode=lambda x: result, decode=lambda z: z)


@pytest.mark.parametrize(
    ("result", "error", "came"),
    [
        (torch.ones(6, 2), TypeError, r"a tensor of shape \(6, 2\)"),
        (torch.ones(2, 2), TypeError, r"a tensor of shape \(2, 2\)"),
        (None, TypeError, "NoneType"),
        ((torch.ones(6, 2),) * 3, TypeError, r"\(a tensor .*, a tensor .*, a tensor of shape \(6, 2\)\)"),
        ((torch.ones(6, 2), 1.0), TypeError, r"\(a tensor of shape \(6, 2\), float\)"),
        ((torch.ones(6, 2), torch.ones(6, 3)), ValueError, r"\(a tensor of .*, a tensor of shape \(6, 3\)\)"),
        ((torch.ones(5, 2), torch.ones(5, 2)), ValueError, r"\(a tensor of shape \(5, 2\)"),
    ],
)
def test_what_encode_gives_is_checked(result, error, came):
    with pytest.raises(error, match=rf"^views: model.encode must give \(mean, logvar\).*; got {came}"):
        views.verify_equivalence(encoding(result), torch.ones(6, 2))


def test_what_decode_gives_is_checked():
    model = Plain()
    for result, error, came in (
        (torch.ones(6, 5), ValueError, r"the first of shape \(6, 6\) like x; got a tensor of shape \(6, 5\)"),
        ((), TypeError, r"tensors; got \(\)"),
        ((1.0,), TypeError, r"tensors; got \(float\)"),
    ):
        model.decode = lambda z, result=result: result
        with pytest.raises(error, match=f"^views: model.decode must give the parameters of 'mse', {came}"):
            views.physics(model, torch.ones(6, 6), seed=0)
    model.likelihood = "categorical"
    model.decode = lambda z: torch.ones(6, 5, 4)
    with pytest.raises(ValueError, match=r"the first of shape \(6, 6, classes\) like x; got .* \(6, 5, 4\)"):
        views.physics(
            SimpleNamespace(encode=lambda x: (torch.ones(6, 2),) * 2, decode=model.decode, likelihood="categorical"),
            torch.zeros(6, 6, dtype=torch.int64), seed=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("likelihood", "bad"), [("bernoulli", 5.0), ("poisson", 0.5), ("gamma", 0.0), ("categorical", 4)]
)
def test_data_outside_of_the_domain_raise(likelihood, bad):
    model, x = small(likelihood), data(likelihood)
    x[2, 1, 1] = bad
    for call in (*(getattr(views, name) for name in views.VIEWS), views.share, views.verify_equivalence):
        with pytest.raises(ValueError, match=f"views: x must hold .*; got {bad}"):
            call(model, x)
    assert model.noise_counter.read() == (5, 0)  # nothing was drawn
    # A model of another make, whose classes are those of what it decodes.
    other = SimpleNamespace(
        encode=lambda x: model.encode(data(likelihood)), decode=model.decode, likelihood=likelihood
    )
    with pytest.raises(ValueError, match=f"views: x must hold .*; got {bad}"):
        views.physics(other, x, seed=0)


def test_views_of_nothing():
    with pytest.raises(
        ValueError, match=r"verify_equivalence: x must hold a data point; got shape \(0, 3, 2\)"
    ):
        views.verify_equivalence(small(), data("bernoulli")[:0])


def test_bad_arguments():
    with pytest.raises(TypeError, match="views: x must be a Tensor; got list"):
        views.physics(small(), [1.0], seed=0)
    with pytest.raises(TypeError, match="model must have encode and decode; got Linear"):
        views.physics(nn.Linear(2, 2), torch.ones(1, 2), seed=0)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum; got 'none'"):
        views.physics(Plain(), torch.ones(6, 6), seed=0, reduction="none")
    model = Plain()
    model.likelihood = "cauchy"
    with pytest.raises(ValueError, match="model.likelihood must be one of"):
        views.physics(model, torch.ones(6, 6), seed=0)
