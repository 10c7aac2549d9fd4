"""`fe.likelihoods` where there is nothing to draw: outside the parameters' domain, and on the meta device."""

import math

import pytest
import torch

import fekernels as fe
from fekernels._catalogue.free_energy import longest

likelihoods = fe.likelihoods
INSIDE = {
    "student_t": (0.5, 0.0, 3.0),
    "negative_binomial": (2.0, 1.5),
    "zero_inflated_negative_binomial": (2.0, 1.5, 0.0),
    "gamma": (2.0, 1.5),
}


# Of what may not be negative.
PLACES = [(name, at) for name in INSIDE for at, p in enumerate(longest(name).parameters) if p.not_negative]


@pytest.mark.parametrize("bad", [-1.0, -1e-30, -math.inf, math.nan])
@pytest.mark.parametrize(("name", "at"), PLACES)
def test_there_is_no_mean_and_no_draw_outside_the_domain(name, at, bad):
    values = [torch.full((64,), value, dtype=torch.float64) for value in INSIDE[name]]
    values[at][::2] = bad
    values[0].requires_grad_()
    mean = likelihoods.mean(name, values)
    assert mean[::2].isnan().all() and mean[1::2].isfinite().all()
    drawn = likelihoods.sample(name, values, seed=0, sample_shape=(3,))
    assert drawn[:, ::2].isnan().all() and drawn[:, 1::2].isfinite().all()
    mean[1::2].sum().backward()
    assert (values[0].grad[::2] == 0).all() and (values[0].grad[1::2] > 0).all()


@pytest.mark.parametrize("name", ["negative_binomial", "zero_inflated_negative_binomial"])
def test_zero_and_infinity_are_inside(name):
    for th in (0.0, math.inf):
        values = [torch.tensor(2.0), torch.tensor(th), torch.tensor(0.0)][: len(INSIDE[name])]
        assert likelihoods.mean(name, values) == (2.0 if len(values) == 2 else 1.0)
    assert likelihoods.mean(name, [torch.tensor(v) for v in (0.0, 1.0, 0.0)[: len(INSIDE[name])]]) == 0
    # A location has no domain.
    assert likelihoods.mean("student_t", [torch.tensor(v) for v in (-1.0, -1.0, math.inf)]) == -1


@pytest.mark.parametrize("name", likelihoods.NAMES)
def test_the_meta_device_gives_shape_and_dtype(name):
    values = [torch.ones(2, 3) for _ in likelihoods.PARAMETERS[name]]
    real = likelihoods.sample(name, values, seed=1, sample_shape=(4,))
    for options in ({"seed": 1}, {"generator": torch.Generator()}, {}):
        meta = likelihoods.sample(name, [v.to("meta") for v in values], sample_shape=(4,), **options)
        assert meta.is_meta and (meta.shape, meta.dtype) == (real.shape, real.dtype)
