"""Free energy, energy and KL under random arguments, against plain float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

import fekernels as fe
from tests.fuzz.budget import examples
from tests.fuzz.drawn_arguments import BACKENDS, on
from tests.fuzz.free_energy_problems import (
    COUNTS,
    KINDS,
    TOLERANCE,
    Problem,
    close,
    exact_energy,
    exact_kl,
    like,
    problems,
    reduced,
)

REDUCTIONS = st.sampled_from(("mean", "sum", "none"))
FACTORS = {"number": float, "NumPy's": np.float32, "tensor": lambda beta: torch.tensor(beta)}


def results(problem: Problem, seed: int, **keywords):  # type: ignore[no-untyped-def]
    """Terms, the random factors of a loss over all three, and its gradients."""
    leaves = [t.requires_grad_() for t in problem.leaves]
    terms = fe.free_energy(
        tuple(problem.params), problem.target, problem.mean, problem.logvar, **problem.keywords(), **keywords
    )
    generator = torch.Generator().manual_seed(seed)
    shape = (3, *terms.energy.shape)
    factors = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(terms.energy.dtype)
    loss = sum((factor * term).sum() for factor, term in zip(factors, terms, strict=True))
    return terms, factors.double(), torch.autograd.grad(loss, leaves)


@examples(0.22)
@given(
    problems(), BACKENDS, REDUCTIONS, st.sampled_from((0.0, 0.25, 1.0, 4.0)), st.sampled_from(tuple(FACTORS)),
    st.sampled_from((0.0, 0.0, 0.05, 1.0)), st.integers(0, 1 << 30),
)  # fmt: skip
def test_free_energy(problem, backend, reduction, beta, kind, free_bits, seed) -> None:
    event(problem.likelihood)
    energy, kl = exact_energy(problem), exact_kl(problem)
    batch = len(problem.mean)
    share = 1 / batch if reduction == "mean" and batch else 1.0
    want_kl, scale_kl = reduced(kl.value, reduction), reduced(kl.scale, reduction)
    counts = None
    if reduction == "none":
        free_bits = 0.0
    if free_bits:
        # Where a part of the batch has a latent, so much of the bound is its own: padding changes nothing.
        there = torch.ones_like(kl.elements)
        there = there if problem.latent_mask is None else there * problem.latent_mask
        means, bounds = kl.elements.mean(0), free_bits * there.mean(0)
        # Either gradient is right.
        assume(bool(((means - bounds).abs() > 1e-4).logical_or(bounds == 0).all()))
        counts = means > bounds
        want_kl = torch.maximum(means, bounds).sum()
        want_kl = want_kl if reduction == "mean" else want_kl * batch if batch else torch.zeros(()).double()
        scale_kl = want_kl.abs()

    terms, factors, gradients = on(
        backend,
        lambda: results(problem, seed, beta=FACTORS[kind](beta), free_bits=free_bits, reduction=reduction),
    )
    tolerance = TOLERANCE[problem.dtype]
    want, scale = reduced(energy.value, reduction), reduced(energy.scale, reduction)
    assert all(term.dtype == problem.dtype for term in terms)
    close(terms.energy, want, scale, tolerance, "energy")
    close(terms.kl, want_kl, scale_kl, tolerance, "kl")
    close(terms.free_energy, want + beta * want_kl, scale + beta * scale_kl, tolerance, "free_energy")

    whole, alone, latent = factors
    upstream = {"energy": (whole + alone) * share, "KL": (beta * whole + latent) * share}
    sizes = {
        "energy": (whole.abs() + alone.abs()) * share,
        "KL": (beta * whole.abs() + latent.abs()) * share,
    }
    judged = [("energy", energy, i) for i in range(len(problem.params))]
    judged += [("KL", kl, i) for i, t in enumerate(problem.latent) if t is not None]
    for (name, part, i), leaf, got in zip(judged, problem.leaves, gradients, strict=True):
        assert got.dtype == leaf.dtype
        exact = part.gradients[i] * like(upstream[name], part.gradients[i])
        size = part.gradient_scales[i] * like(sizes[name], part.gradients[i])
        if name == "KL" and counts is not None:
            exact, size = exact * counts, size * counts
        rounded = exact.numel() // max(leaf.numel(), 1)
        exact, size = exact.sum_to_size(leaf.shape), size.sum_to_size(leaf.shape)
        close(got, exact, size, tolerance, f"gradient {i} of the {name}", max(rounded, 1))


def accuracy(*tensors: Tensor) -> float:
    return TOLERANCE[torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32]


@examples(0.08)
@given(problems(), BACKENDS, REDUCTIONS)
def test_energy_and_gaussian_kl_alone(problem, backend, reduction) -> None:
    energy, kl = exact_energy(problem), exact_kl(problem, weighted=False)
    latent = [t for t in problem.latent if t is not None]
    params, leading = tuple(problem.params), {"mask": problem.mask, "likelihood": problem.likelihood}

    def call():  # type: ignore[no-untyped-def]
        return (
            fe.energy(params, problem.target, reduction=reduction, weight=problem.weight, **leading),
            fe.gaussian_kl(*problem.latent, reduction=reduction, latent_mask=problem.latent_mask),
            fe.gaussian_kl(*problem.latent, reduction="elements", latent_mask=problem.latent_mask),
        )

    got_energy, got_kl, elements = on(backend, call)
    close(
        got_energy,
        reduced(energy.value, reduction),
        reduced(energy.scale, reduction),
        accuracy(*params),
        "energy",
    )
    close(got_kl, reduced(kl.value, reduction), reduced(kl.scale, reduction), accuracy(*latent), "kl")
    close(elements, kl.elements, kl.scales, accuracy(*latent), "elements of the kl")


@examples(0.04)
@given(problems(), BACKENDS, st.integers(1, 3))
def test_samples_before_the_batch(problem, backend, samples) -> None:
    """[K, B, ...] with batch_dims=2 is every sample on its own."""
    assume(problem.mask is None or problem.mask.dim() == problem.target.dim())

    def stacked(tensor: Tensor, full: int) -> Tensor:
        """K different ones, where the tensor has the dimensions of a batch."""
        if tensor.dim() < full:
            return tensor
        return torch.stack([tensor.flip(0) if k % 2 else tensor for k in range(samples)])

    full, latent = problem.target.dim(), problem.mean.dim()
    params = [stacked(problem.params[0], full), *(stacked(p, full) for p in problem.params[1:])]
    target, mask = stacked(problem.target, full), problem.mask
    mask = None if mask is None else stacked(mask, full)
    latents = [None if t is None else stacked(t, latent) for t in problem.latent]

    def call():  # type: ignore[no-untyped-def]
        return (
            fe.energy(tuple(params), target, problem.likelihood, mask, batch_dims=2),
            fe.gaussian_kl(*latents, batch_dims=2),
        )

    energy, kl = on(backend, call)
    for k in range(samples):
        one = replace(
            problem, params=[p[k] if p.dim() > full else p for p in params], target=target[k],
            mask=None if mask is None else mask[k], latent_mask=None, weight=None,
            **dict(zip(("mean", "logvar", "prior_mean", "prior_logvar"),
                       (t if t is None or t.dim() <= latent else t[k] for t in latents), strict=True)),
        )  # fmt: skip
        first = len(problem.params[0].shape) - full  # the classes
        assert first in (0, 1)
        exact, exact_latent = exact_energy(one), exact_kl(one)
        close(energy[k], exact.value, exact.scale, accuracy(*one.params), f"energy of sample {k}")
        close(kl[k], exact_latent.value, exact_latent.scale, accuracy(one.mean), f"kl of sample {k}")


@dataclass(frozen=True)
class Poisoned:
    """A problem with one impossible number in it: in which sample, in what, and what excuses it, if anything."""

    problem: Problem
    row: int
    name: str
    excuse: str


@st.composite
def poisoned(draw: st.DrawFn) -> Poisoned:
    problem = draw(problems())
    assume(problem.target.numel() and problem.mean.numel())
    # Parameters and masks of the whole shape, so that the number belongs to one sample.
    full, latent = problem.target.shape, problem.mean.shape
    problem.params[1:] = [p.expand(full).clone() for p in problem.params[1:]]
    problem.mask = torch.ones(full, dtype=torch.bool)
    problem.latent_mask = torch.ones(latent, dtype=torch.bool)
    problem.weight = torch.full((len(problem.mean),), 0.5)
    if not problem.target.is_floating_point() and problem.likelihood in COUNTS:
        problem.target = problem.target.to(problem.params[0].dtype)
    row = draw(st.integers(0, len(problem.mean) - 1))
    excuse = draw(st.sampled_from(("", "", "mask", "weight")))
    places = [f"params[{i}]" for i in range(len(problem.params))]
    name = draw(st.sampled_from((*places, "target", "mean", "logvar")))
    tensor = problem.params[int(name[7])] if name in places else getattr(problem, name)
    bad = [math.nan]
    if name in places and KINDS[problem.likelihood][int(name[7])] == "positive":
        bad = [-0.5, math.nan, -math.inf, -1e-3]
    if name == "target" and problem.likelihood == "categorical":
        bad = [-1, -100, 1 << 40]
    elements = tensor[row].view(-1) if tensor[row].is_contiguous() else None
    value = draw(st.sampled_from(bad))
    if elements is None:
        tensor[(row, *(0 for _ in range(tensor.dim() - 1)))] = value
    else:
        elements[draw(st.integers(0, elements.numel() - 1))] = value
    if excuse == "mask":
        (problem.latent_mask if name in ("mean", "logvar") else problem.mask)[row] = False
    elif excuse == "weight":
        problem.weight[row] = 0
    return Poisoned(problem, row, name, excuse)


@examples(0.11)
@given(poisoned(), BACKENDS)
def test_an_impossible_number_is_nan_for_its_sample_and_nothing_where_it_does_not_count(
    case, backend
) -> None:
    problem, row = case.problem, case.row
    event(problem.likelihood)
    terms, _, gradients = on(backend, lambda: results(problem, 0, reduction="none"))
    latent = case.name in ("mean", "logvar")
    hurt, count = terms.kl if latent else terms.energy, len(problem.params)
    others = torch.arange(len(hurt)) != row
    assert bool(hurt[others].isfinite().all()), "another sample is hurt"
    if not case.excuse:
        assert bool(hurt[row].isnan()) and bool(terms.free_energy[row].isnan()), f"{hurt[row]} is no NaN"
        return
    assert hurt[row] == 0 and bool(terms.free_energy[row].isfinite()), f"{hurt[row]} is not 0"
    own = gradients[count : count + 2] if latent else gradients[:count]
    assert all(bool((g[row] == 0).all()) for g in own), "a gradient that is not 0"
