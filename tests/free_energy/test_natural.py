"""Natural gradients and steps of Gaussians: exact posteriors in one step, and the directions of their definition."""

import pytest
import torch

import fekernels as fe
from fekernels.losses import natural_gradient, natural_step

F64 = torch.float64


def conjugate(count: int = 7):
    """Energies precision_i (x - a_i)^2 / 2 + a Gaussian prior's: their gradients in q, and the posterior."""
    generator = torch.Generator().manual_seed(0)
    center, weight, prior = (torch.rand(count, generator=generator, dtype=F64) * 3 + 0.1 for _ in range(3))

    def gradients(mean, logvar):
        mean, logvar = mean.clone().requires_grad_(), logvar.clone().requires_grad_()
        energy = weight / 2 * ((mean - center).square() + logvar.exp())
        prior_q = torch.distributions.Normal(torch.zeros(count, dtype=F64), prior.rsqrt())
        q = torch.distributions.Normal(mean, (logvar / 2).exp())
        free_energy = energy.sum() + torch.distributions.kl_divergence(q, prior_q).sum()
        return torch.autograd.grad(free_energy, (mean, logvar))

    precision = weight + prior
    return gradients, weight * center / precision, -precision.log()


@pytest.mark.parametrize("start", [-4.0, 0.0, 3.0])
def test_one_whole_step_lands_on_a_conjugate_posterior(start):
    gradients, mean, logvar = conjugate()
    q = torch.full_like(mean, 5.0), torch.full_like(mean, start)
    after = natural_step(*q, *gradients(*q))
    torch.testing.assert_close(after.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.logvar, logvar, rtol=1e-12, atol=1e-12)
    # A step along the natural gradient in (mean, logvar) does not.
    direction = natural_gradient(q[1], *gradients(*q))
    assert (q[1] - direction.logvar - logvar).abs().max() > 0.01


def test_smaller_steps_interpolate_the_precision_and_stay_at_the_posterior():
    gradients, mean, logvar = conjugate()
    q = torch.zeros_like(mean), torch.zeros_like(mean)
    after = natural_step(*q, *gradients(*q), rho=0.25)
    torch.testing.assert_close((-after.logvar).exp(), 0.75 + 0.25 * (-logvar).exp(), rtol=1e-12, atol=0)
    there = natural_step(mean, logvar, *gradients(mean, logvar), rho=0.7)
    torch.testing.assert_close(there.mean, mean, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_the_fisher_information():
    """Measured: KL(q || q + d) is d' F d / 2 to second order, and F times the natural gradient is the gradient."""
    logvar, grad_mean, grad_logvar = (torch.tensor([x], dtype=F64) for x in (0.7, -1.3, 0.4))
    nat = natural_gradient(logvar, grad_mean, grad_logvar)
    for index, (step, grad) in enumerate(((nat.mean, grad_mean), (nat.logvar, grad_logvar))):
        d = [torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)]
        d[index] += 1e-4
        kl = fe.gaussian_kl(torch.zeros(1, dtype=F64), logvar, d[0], logvar + d[1], reduction="sum")
        fisher = 2 * kl / 1e-8
        torch.testing.assert_close(fisher * step, grad, rtol=1e-3, atol=0)


def test_bad_input_names_itself():
    ones = torch.ones(3)
    for changes, error, message in (
        (dict(mean=torch.ones(2)), ValueError, r"mean must have shape \(3,\) like logvar; got \(2,\)"),
        (dict(rho=0.0), ValueError, "rho must be finite and > 0; got 0.0"),
        (dict(rho=1.5), ValueError, r"rho must be in \(0, 1\]; got 1.5"),
        (dict(rho="1"), TypeError, "rho must be a number; got str"),
        (dict(grad_logvar=-ones), ValueError, "grad_logvar must be > -0.5 with rho=1, .*; got -1"),
        (dict(logvar=torch.ones(3, dtype=torch.int64)), TypeError, "logvar must be"),
    ):
        arguments = dict(mean=ones, logvar=ones, grad_mean=ones, grad_logvar=ones, rho=1.0) | changes
        with pytest.raises(error, match=f"natural_step: {message}"):
            natural_step(**arguments)
