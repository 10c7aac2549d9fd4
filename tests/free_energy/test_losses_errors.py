"""Bad arguments of the losses that PyTorch's own operators compute: a clear error each, which names the argument."""

import math
import re
import warnings

import numpy as np
import pytest
import torch

import fekernels as fe

X = torch.zeros(3, 2)
NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
FLOAT8 = X.to(torch.float8_e4m3fn)
HUGE = 10**400


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fe.likelihoods.mean(["x"], X), ValueError, "likelihoods.mean: name must be one of 'mse', "),
        (
            lambda: fe.likelihoods.mean("mse", None),
            TypeError,
            "params must be a tensor or a tuple of tensors; got NoneType",
        ),
        (
            lambda: fe.likelihoods.mean("mse", X.numpy()),
            TypeError,
            "params must be a tensor or a tuple of tensors; got ndarray",
        ),
        (
            lambda: fe.likelihoods.mean("mse", X.to_sparse()),
            TypeError,
            "location must be dense; got layout sparse_coo",
        ),
        (lambda: fe.likelihoods.mean("mse", NESTED), TypeError, "location must be dense; got nested"),
        (
            lambda: fe.likelihoods.mean("mse", FLOAT8),
            TypeError,
            "location must be float32, bfloat16, float16 or float64; got",
        ),
        (
            lambda: fe.likelihoods.mean("laplace", (X, X.to("meta"))),
            ValueError,
            "log_scale must be on cpu like the others",
        ),
        (
            lambda: fe.likelihoods.mean("laplace", (X, torch.zeros(5))),
            ValueError,
            "likelihoods.mean: params of 'laplace' must have shapes that broadcast; got (3, 2), (5,)",
        ),
        (
            lambda: fe.likelihoods.sample("mse", X, seed=2**64),
            ValueError,
            "likelihoods.sample: seed must be in [",
        ),
        (
            lambda: fe.likelihoods.sample("mse", X, seed=1.5),
            TypeError,
            "likelihoods.sample: seed must be an int; got float",
        ),
        (
            lambda: fe.likelihoods.sample("mse", X, sample_shape=-1),
            TypeError,
            "sample_shape must be a tuple of sizes; got int",
        ),
        (
            lambda: fe.likelihoods.sample("mse", X, sample_shape=(2, -1)),
            ValueError,
            "sample_shape[1] must be at least 0; got -1",
        ),
        (
            lambda: fe.likelihoods.sample("mse", X, generator=3),
            TypeError,
            "generator must be a torch.Generator; got int",
        ),
        (
            lambda: fe.importance_weighted_bound(X.to_sparse()),
            TypeError,
            "importance_weighted_bound: log_w must be dense",
        ),
        (
            lambda: fe.importance_weighted_bound(FLOAT8),
            TypeError,
            "importance_weighted_bound: log_w must be float32",
        ),
        (
            lambda: fe.importance_weighted_bound(X.numpy()),
            TypeError,
            "importance_weighted_bound: log_w must be a Tensor",
        ),
        (
            lambda: fe.importance_weighted_bound(NESTED),
            TypeError,
            "importance_weighted_bound: log_w must be dense; got nested",
        ),
        (
            lambda: fe.importance_weighted_bound(X, estimator=["iwae"]),
            ValueError,
            "estimator must be one of 'iwae'",
        ),
        (
            lambda: fe.importance_weighted_bound(X, estimator="dreg", z=X.to_sparse()),
            TypeError,
            "z must be dense",
        ),
        (
            lambda: fe.monte_carlo_kl(X, X.numpy(), X),
            TypeError,
            "monte_carlo_kl: logvar must be a Tensor; got ndarray",
        ),
        (lambda: fe.monte_carlo_kl(X, X, FLOAT8), TypeError, "monte_carlo_kl: z must be float32"),
        (lambda: fe.monte_carlo_kl(X.to_sparse(), X, X), TypeError, "monte_carlo_kl: mean must be dense"),
        (
            lambda: fe.GaussianMixturePrior(X, FLOAT8),
            TypeError,
            "GaussianMixturePrior: logvar must be float32",
        ),
        (
            lambda: fe.energy(X, FLOAT8, "mse"),
            TypeError,
            "energy: target must be float32, bfloat16, float16, float64, an",
        ),
        (lambda: fe.energy(X, NESTED, "mse"), TypeError, "energy: target must be dense; got nested"),
        (
            lambda: fe.energy(X, X, "mse", batch_dims=0),
            ValueError,
            "energy: batch_dims must be at least 1; got 0",
        ),
        (
            lambda: fe.energy(X, X, "mse", batch_dims=1.0),
            TypeError,
            "energy: batch_dims must be an int; got float",
        ),
        (
            lambda: fe.energy(X, X, "mse", batch_dims=3),
            ValueError,
            "params must have shape (batch0, batch1, batch2, ...); got (3, 2)",
        ),
        (
            lambda: fe.energy(X, X, "mse", weight=torch.ones(3), batch_dims=2),
            ValueError,
            "weight must have shape (3, 2); got (3,)",
        ),
        (
            lambda: fe.gaussian_kl(X, X, reduction=np.zeros((2, 2))),
            TypeError,
            "gaussian_kl: reduction must be one of none, mean, sum, elements; got ndarray",
        ),
        (
            lambda: fe.gaussian_kl(X, X, batch_dims=3),
            ValueError,
            "gaussian_kl: mean must have shape (batch0, batch1, batch2, ...)",
        ),
        (
            lambda: fe.gaussian_kl(X, X, latent_mask=X),
            TypeError,
            "latent_mask must be a bool tensor, True = a latent, False = padding; got float32",
        ),
        (
            lambda: fe.gaussian_kl(X, X, latent_mask=torch.ones(4) > 0),
            ValueError,
            "latent_mask must have shape (3, 2) like mean; got (4,)",
        ),
        (
            lambda: fe.free_energy(X, X, X, X, beta=HUGE),
            ValueError,
            "free_energy: beta must be finite and >= 0",
        ),
        (
            lambda: fe.free_energy(X, X, X, X, beta=torch.ones(1)),
            ValueError,
            "beta must be one number, a tensor without dimensions; got shape (1,)",
        ),
        (
            lambda: fe.free_energy(X, X, X, X, beta=torch.tensor(True)),
            TypeError,
            "beta must be a real number; got a tensor of bool",
        ),
        (
            lambda: fe.free_energy(X, X, X, X, beta=np.ones(2)),
            TypeError,
            "free_energy: beta must be a number; got ndarray",
        ),
        (
            lambda: fe.free_energy(X, X, X, X, validate="yes"),
            TypeError,
            "free_energy: validate must be a bool; got str",
        ),
        (
            lambda: fe.free_energy(X, X, X, X, inplace_backward=1),
            TypeError,
            "free_energy: inplace_backward must be a bool; got int",
        ),
        (
            lambda: fe.free_energy(X, X, torch.zeros(3, 4, 1), torch.zeros(3, 4, 1), batch_dims=2),
            ValueError,
            "mean must have the batch sizes (3, 2) of params; got shape (3, 4, 1)",
        ),
        (lambda: fe.FreeEnergyLoss("normal"), ValueError, "FreeEnergyLoss: likelihood must be one of"),
        (lambda: fe.FreeEnergyLoss(["mse"]), ValueError, "FreeEnergyLoss: likelihood must be one of"),
        (
            lambda: fe.FreeEnergyLoss("mse", reduction="foo"),
            ValueError,
            "FreeEnergyLoss: reduction must be one of none, mean, sum; got 'foo'",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", beta="x"),
            TypeError,
            "FreeEnergyLoss: beta must be a number; got str",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", beta=-1.0),
            ValueError,
            "FreeEnergyLoss: beta must be finite and >= 0; got -1.0",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", free_bits=math.nan),
            ValueError,
            "FreeEnergyLoss: free_bits must be finite",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", free_bits=0.1, reduction="none"),
            ValueError,
            "FreeEnergyLoss: free_bits needs a batch mean",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", inplace_backward=True, reduction="none"),
            ValueError,
            "FreeEnergyLoss: inplace_backward needs",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", validate=None),
            TypeError,
            "FreeEnergyLoss: validate must be a bool; got NoneType",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", batch_dims=0),
            ValueError,
            "FreeEnergyLoss: batch_dims must be at least 1; got 0",
        ),
        (
            lambda: fe.FreeEnergyLoss("mse", ignore_index=1),
            ValueError,
            "FreeEnergyLoss: ignore_index is a class of likelihood",
        ),
    ],
)
def test_the_argument_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_quantised_targets_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="energy: target must be float32"):
        fe.energy(X, target, "mse")
    with pytest.raises(TypeError, match="energy: target must hold class indices"):
        fe.energy(torch.zeros(3, 2, 4), target, "categorical")


def test_counts_of_impossible_rates_are_nan():
    rates = torch.tensor([1e3, 60.0, 0.0, -math.inf])
    drawn = fe.likelihoods.sample("poisson", rates, seed=0)
    assert drawn[:2].isnan().all() and drawn[2] >= 0 and drawn[3] == 0
    mu = torch.tensor([math.inf, -1.0, 5.0])
    for name, params in (
        ("negative_binomial", (mu, torch.ones(3))),
        ("zero_inflated_negative_binomial", (mu, torch.ones(3), torch.full((3,), -40.0))),
    ):
        assert fe.likelihoods.sample(name, params, seed=0).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (-1.0, "is no lower bound"),
        (-math.inf, "is no lower bound"),
        (1.5, "no finite variance"),
        (math.inf, "no finite"),
    ],
)
def test_renyi_bounds_that_are_none_warn(alpha, message):
    log_w = torch.randn(5, 3)
    with pytest.warns(
        UserWarning, match=f"importance_weighted_bound: .*alpha={alpha:g} .*{message}"
    ) as caught:
        fe.importance_weighted_bound(log_w, estimator="renyi", alpha=alpha)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for within in (0, 0.5, 1, np.float32(0.5)):
            fe.importance_weighted_bound(log_w, estimator="renyi", alpha=within)


def test_renyi_bounds_lie_where_the_warning_says():
    """Of a linear Gaussian model: above the evidence for alpha < 0, below the ELBO for alpha > 1."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.distributions.Normal
    z = 0.5 * torch.randn(200, 20_000, generator=generator, dtype=torch.float64)
    log_w = (
        normal(z, 1.0).log_prob(torch.tensor(1.0))
        + normal(0.0, 1.0).log_prob(z)
        - normal(0.0, 0.5).log_prob(z)
    )
    evidence = normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(1.0)).item()
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for alpha in (-1.0, 0.5, 1.0, 2.0):
            bound = fe.importance_weighted_bound(log_w, estimator="renyi", alpha=alpha)
            found[alpha] = bound.mean().item(), 5 * (bound.std() / len(bound) ** 0.5).item()
    assert found[-1.0][0] - found[-1.0][1] > evidence > found[0.5][0] + found[0.5][1]
    assert found[0.5][0] > found[1.0][0] + found[1.0][1] and found[1.0][0] > found[2.0][0] + found[2.0][1]


def test_the_module_takes_every_option():
    r, x, m, v = torch.randn(2, 3, 5), torch.rand(2, 3, 5), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    there = torch.rand(4) < 0.5
    loss = fe.FreeEnergyLoss("bernoulli", beta=torch.tensor(0.5), batch_dims=2, reduction="none")
    got = loss(r, x, m, v, latent_mask=there)
    wanted = fe.free_energy(
        r, x, m, v, likelihood="bernoulli", beta=0.5, batch_dims=2, reduction="none", latent_mask=there
    )
    assert got.free_energy.shape == (2, 3) and torch.equal(got.kl, wanted.kl)
    torch.testing.assert_close(got.free_energy, wanted.free_energy)
    loss.beta = np.float32(2.0)
    torch.testing.assert_close(
        loss(r, x, m, v).free_energy, got.energy + 2 * fe.gaussian_kl(m, v, batch_dims=2)
    )
    assert "batch_dims=2" in repr(loss)
