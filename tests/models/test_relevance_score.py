"""Relevance as a free energy: its bound by integration, its variances, its temperature, its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fekernels as fe
from fekernels.models import Relevance, relevance_of
from fekernels.models.relevance_calibration import fitted
from fekernels.models.relevance_score import Calibration, combine, free_energy_of, gaussian_nodes

SLOPE, BIAS = torch.tensor([1.5, -2.0], dtype=torch.float64), 0.4


def toy(z: Tensor) -> Tensor:
    """A logit that no quadrature of the library's knows: not linear in z."""
    return (z * SLOPE.to(z.dtype)).sum(-1) - z[..., 0].square() + BIAS


def grid(nodes: int = 120) -> tuple[Tensor, Tensor]:
    """Points [N, 2] and log-weights [N] of N(0, I) by Gauss-Hermite's rule."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    x, log_w = torch.tensor(x), torch.tensor(np.log(w / w.sum()))
    return torch.cartesian_prod(x, x), torch.cartesian_prod(log_w, log_w).sum(-1)


def log_evidence(temperature: float) -> Tensor:
    """T log E_p[sigmoid(l)^(1/T)]."""
    z, log_w = grid()
    return temperature * torch.logsumexp(log_w + logsigmoid(toy(z)) / temperature, 0)


def pairs(count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    mean = fe.random.normal((count, 2), seed=1).to(dtype)
    return mean, 0.5 * fe.random.normal((count, 2), seed=2).to(dtype) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("calibration", [None, Calibration(0.3, 2.0)])
def test_total_variance_is_epistemic_plus_aleatoric(dtype: torch.dtype, calibration: Calibration) -> None:
    found = relevance_of(toy, *pairs(500, dtype), seed=3, samples=5, calibration=calibration)
    assert torch.finfo(dtype).eps * 4 > (
        found.epistemic + found.aleatoric - found.total_variance
    ).abs().max() and torch.equal(found.total_variance, found.probability * (1 - found.probability))
    plain = relevance_of(toy, *pairs(500, dtype), seed=3, samples=5)
    assert torch.equal(found.score, plain.score) and torch.equal(found.kl, plain.kl)
    assert bool((found.epistemic > 1e-4).any()) and bool((found.aleatoric > 0).all())


def test_each_quantity_is_its_mean_over_the_samples() -> None:
    mean, logvar = pairs()
    found = relevance_of(toy, mean, logvar, seed=3, samples=7, step=2, stream=5, temperature=0.3)
    z = fe.reparameterize(mean, logvar, seed=3, step=2, stream=5, samples=7)
    p = torch.sigmoid(toy(z))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
    expected = Relevance(
        logsigmoid(toy(z)).mean(0) - 0.3 * kl,
        p.mean(0),
        p.var(0, correction=0),
        (p * (1 - p)).mean(0),
        kl,
        toy(z).mean(0),
    )
    for name in ("score", "probability", "epistemic", "aleatoric", "kl", "logit"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_score_is_below_the_log_evidence(temperature: float) -> None:
    """By integration over the prior, with q integrated as well, so that no sample's luck helps."""
    points, log_w = grid()
    mean, logvar = pairs(40)
    z = mean + torch.exp(logvar / 2) * points[:, None]
    kl = fe.gaussian_kl(mean, logvar)
    found = combine(toy(z), log_w.exp(), kl, None, temperature, None)
    gap = log_evidence(temperature) - found.score
    assert gap.min() > 0 and gap.min() < 1.0 * temperature + 0.2
    many = [t[:1].expand(20_000, 2).contiguous() for t in (mean, logvar)]
    sampled = relevance_of(toy, *many, seed=1, samples=1, temperature=temperature).score
    assert abs(sampled.mean() - found.score[0]) < 5 * sampled.std() / math.sqrt(len(sampled))


def test_the_best_q_attains_the_log_evidence_of_a_constant_logit() -> None:
    """There the posterior is the prior: the bound is equal, at any temperature."""
    zero = torch.zeros(3, 2, dtype=torch.float64)
    for temperature in (0.0, 0.5, 2.0):
        found = relevance_of(lambda z: z[..., 0] * 0 + 0.7, zero, zero, seed=0, temperature=temperature)
        torch.testing.assert_close(found.score, logsigmoid(zero[:, 0] + 0.7))
        assert found.epistemic.max() < 1e-30


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_importance_weighted_bound_tightens_towards_the_log_evidence(temperature: float) -> None:
    exact = log_evidence(temperature)
    rows = 4000
    mean = torch.tensor([[0.3, -0.4]], dtype=torch.float64).expand(rows, 2).contiguous()
    logvar = torch.zeros_like(mean)

    def bound(samples: int) -> Tensor:
        return relevance_of(
            toy, mean, logvar, seed=4, samples=samples, temperature=temperature, importance_weighted=True
        ).score

    bounds = [bound(k) for k in (1, 4, 16, 64)]
    means = [float(b.mean()) for b in bounds]
    errors = [float(b.std()) / math.sqrt(rows) for b in bounds]
    assert means == sorted(means) and means[0] < exact - 5 * errors[0]
    assert abs(means[-1] - exact) < 5 * errors[-1] + 0.02 * abs(means[0] - exact)
    # One weight is the free energy of one sample, so the means agree.
    one = relevance_of(toy, mean, logvar, seed=4, samples=1, temperature=temperature).score
    assert abs(float(one.mean()) - means[0]) < 5 * errors[0]


def test_free_energies_of_both_answers() -> None:
    mean, logvar = pairs()
    z = fe.reparameterize(mean, logvar, seed=3, samples=4)
    kl, yes = fe.gaussian_kl(mean, logvar), torch.tensor([True, False] * 3)
    found = free_energy_of(toy(z), yes, kl, None, 0.5)
    p = torch.sigmoid(toy(z))
    torch.testing.assert_close(found, -torch.where(yes, p, 1 - p).log().mean(0) + 0.5 * kl)
    score = relevance_of(toy, mean, logvar, seed=3, samples=4, temperature=0.5).score
    torch.testing.assert_close(found[yes], -score[yes])


@pytest.mark.parametrize("importance_weighted", [False, True])
def test_gradients_are_those_of_plain_autograd(importance_weighted: bool) -> None:
    mean, logvar = (t.requires_grad_() for t in pairs())
    slope = SLOPE.clone().requires_grad_()

    def plain() -> Tensor:
        eps = torch.stack(
            [fe.random.normal((6, 2), seed=9, stream=2 + k, purpose=3) for k in range(3)]
        ).double()
        z = mean + torch.exp(logvar / 2) * eps
        log_p = torch.nn.functional.logsigmoid((z * slope).sum(-1))
        if importance_weighted:
            log_q = -((eps.square() + logvar) / 2).sum(-1)
            return 0.7 * ((log_p / 0.7 - z.square().sum(-1) / 2 - log_q).logsumexp(0) - math.log(3))
        return log_p.mean(0) - 0.7 * (mean.square() + logvar.exp() - 1 - logvar).sum(1) / 2

    found = relevance_of(
        lambda z: (z * slope).sum(-1),
        mean,
        logvar,
        seed=9,
        stream=2,
        samples=3,
        temperature=0.7,
        importance_weighted=importance_weighted,
    ).score
    expected = plain()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    leaves = (mean, logvar, slope)
    for ours, theirs in zip(
        torch.autograd.grad((weights * found).sum(), leaves),
        torch.autograd.grad((weights * expected).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_shared_noise_makes_a_score_a_function_of_its_pair() -> None:
    mean, logvar = pairs(8, torch.float32)
    every = relevance_of(toy, mean, logvar, seed=1, shared_noise=True)
    for row in (0, 5):
        alone = relevance_of(toy, mean[row : row + 1], logvar[row : row + 1], seed=1, shared_noise=True)
        assert torch.equal(alone.score[0], every.score[row])
    own = relevance_of(toy, mean[:1].expand(8, 2), logvar[:1].expand(8, 2), seed=1)
    assert len(set(own.score.tolist())) == 8


@pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0, 3.0, 6.0])
def test_quadrature_of_a_gaussian_logit(deviation: float) -> None:
    at = torch.linspace(-8, 8, 33, dtype=torch.float64)
    logits, weights = gaussian_nodes(at, torch.full_like(at, deviation**2))
    p = torch.sigmoid(logits)
    fine = torch.linspace(-9, 9, 20_001, dtype=torch.float64)  # the trapezoidal rule: exact to 1e-15 here
    density = torch.exp(-fine.square() / 2)
    density /= density.sum()
    exact = torch.sigmoid(at + deviation * fine[:, None])
    limit = {0.0: 1e-14, 0.5: 5e-14, 2.0: 2e-7, 3.0: 3e-5, 6.0: 3e-3}[deviation]
    assert (torch.tensordot(weights, p, 1) - torch.tensordot(density, exact, 1)).abs().max() < limit
    second = torch.tensordot(weights, p.square(), 1) - torch.tensordot(density, exact.square(), 1)
    assert second.abs().max() < 4 * limit


def test_choice_among_contexts_of_which_one_is_relevant() -> None:
    p = torch.tensor([[0.2, 0.5, 0.9], [0.01, 0.02, 0.03]], dtype=torch.float64)
    found = Relevance(*[p] * 5, torch.logit(p)).choice
    alone = [
        [row[i] * math.prod(1 - q for j, q in enumerate(row) if j != i) for i in range(3)]
        for row in p.tolist()
    ]
    expected = torch.tensor(alone, dtype=torch.float64)
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))
    with pytest.raises(ValueError, match=r"Relevance.choice: tensors must have shape .* got \(3,\)"):
        Relevance(*[p[0]] * 6).choice  # noqa: B018


def test_the_logit_is_the_difference_of_both_answers_free_energies() -> None:
    mean, logvar = pairs()
    found = relevance_of(toy, mean, logvar, seed=3, samples=4, temperature=0.5)
    z = fe.reparameterize(mean, logvar, seed=3, samples=4)
    no = free_energy_of(toy(z), torch.zeros(6, dtype=torch.bool), fe.gaussian_kl(mean, logvar), None, 0.5)
    torch.testing.assert_close(found.logit, no + found.score)


def test_platts_scale_and_shift() -> None:
    """They are found again from answers that follow them; the latent noise widens no logit twice."""
    mean = 3 * fe.random.normal(40_000, seed=1).double()
    logits, weights = gaussian_nodes(mean, torch.full_like(mean, 0.5))
    p = torch.tensordot(weights, torch.sigmoid(0.4 * logits - 1.5), 1)
    relevant = fe.random.uniform(40_000, seed=2).double() < p
    found = fitted("f", logits[:, None], weights, relevant[None])
    assert abs(found.scale - 0.4) < 0.02 and abs(found.shift + 1.5) < 0.08 and found.sharpness == 1
    apart = torch.tensor([[[-1.0, -2.0], [1.0, 2.0]]])
    separable = fitted("f", apart, torch.ones(1), apart[0] > 0)
    assert math.isfinite(separable.scale) and separable.scale < 5
    with pytest.raises(ValueError, match="f: relevant must hold pairs of both kinds; got 4 relevant and 0"):
        fitted("f", torch.zeros(1, 2, 2), torch.ones(1), torch.ones(2, 2, dtype=torch.bool))


def test_the_sharpness_of_a_choice() -> None:
    """Whatever raises all logits of a query flattens its pairs' probabilities, and leaves the choice as it is."""
    logits = 2 * fe.random.normal((4000, 5), seed=1).double()
    gumbel = -(-fe.random.uniform((4000, 5), seed=2).double().clamp_max(1 - 1e-9).log()).log()
    relevant = torch.nn.functional.one_hot((0.7 * logits + gumbel).argmax(1), 5).bool()
    raised = logits + 4 * fe.random.normal((4000, 1), seed=3).double()
    found = fitted("f", raised[None], torch.ones(1), relevant)
    assert found.scale < 0.5 and abs(found.scale * found.sharpness - 0.7) < 0.05
    none = torch.zeros_like(raised)
    choice = Relevance(none, none, none, none, none, found.scale * raised, found.sharpness).choice
    certain, right = choice.max(1)
    hit = relevant.gather(1, right[:, None]).double().mean()
    assert abs(certain.mean() - hit) < 0.03 and hit > 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logit": lambda z: z}, ValueError, r"logit\(z\) must have shape \(16, 6\) .* got \(16, 6, 2\)"),
        ({"logit": lambda z: z[..., :1]}, ValueError, r"must have shape \(16, 6\) .* got \(16, 6, 1\)"),
        ({"logit": lambda z: 1.0}, TypeError, "logit\\(z\\) must be a tensor; got float"),
        ({"mean": torch.zeros(6)}, ValueError, r"mean must have shape \(pairs, latents\); got \(6,\)"),
        (
            {"logvar": torch.zeros(6, 1)},
            ValueError,
            r"logvar must have shape \(6, 2\) like mean; got \(6, 1\)",
        ),
        ({"logvar": torch.zeros(6, 2, dtype=torch.int64)}, TypeError, "logvar must be float32"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0; got -1.0"),
        (
            {"temperature": 0.0, "importance_weighted": True},
            ValueError,
            "temperature must be > 0 for the importance-weighted bound",
        ),
        ({"samples": 0}, ValueError, "samples must be"),
        ({"importance_weighted": 1}, TypeError, "importance_weighted must be a bool; got int"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    mean, logvar = pairs(dtype=torch.float32)
    arguments: dict[str, object] = {"logit": toy, "mean": mean, "logvar": logvar, "seed": 0, **change}
    with pytest.raises(error, match=message):
        relevance_of(**arguments)  # type: ignore[arg-type]
