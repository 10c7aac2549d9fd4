"""Calls of the free energy and their judge in float64; and the public functions on the operands of such a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS
from fekernels.reference.free_energy import free_energy as reference
from tests.support.free_energy_calls import (
    CATEGORICAL,
    KINDS,
    MEAN,
    NONE,
    SHAPES,
    SUM,
    Call,
    make_call,
)
from tests.support.places import Place

__all__ = [
    "CATEGORICAL",
    "ELEMENTWISE",
    "KINDS",
    "LIKELIHOOD",
    "MEAN",
    "NAMES",
    "NONE",
    "SHAPES",
    "SUM",
    "Arguments",
    "arguments",
    "close",
    "gradients",
    "inputs",
    "same",
    "terms",
]

NAMES = [f"{row.name}{len(row.parameters)}" for row in LIKELIHOODS]
LIKELIHOOD = pytest.mark.parametrize("likelihood", range(len(NAMES)), ids=NAMES)
ELEMENTWISE = [code for code, row in enumerate(LIKELIHOODS) if not row.classes]


class Arguments(Call):
    """A call, and what it must give."""

    def run(self, place: Place, needs: int | None = None) -> list[Tensor]:
        return self.run_on(place.backend, place.device, needs)

    def exact(self) -> list[Tensor]:
        """In float64, of the values that the operands really have."""
        wide = self.map(lambda t: t.double() if t.dtype.is_floating_point else t)
        return reference.free_energy(
            wide.params, wide.target, wide.mask, wide.latent, wide.weight, wide.upstream, self.likelihood,
            self.reduction, self.beta, (1 << len(self.operands)) - 1, False, wide.latent_mask,
        )  # fmt: skip

    def scales(self) -> list[Tensor]:
        """What an error is measured against: the largest value of each result, where gradients that are sums count the
        sums of absolute values, as their terms may cancel, and no less than 0.1 an element, as a gradient may be a
        difference of numbers near 1."""
        rows, columns = (self.target if self.target is not None else self.latent[0]).shape[:2]
        latents = self.latent[0].shape[1] if self.latent else 0
        spread = replace(
            self,
            params=[p if p.dim() == 3 else p.expand(rows, columns).contiguous() for p in self.params],
            latent=[t.expand(rows, latents).contiguous() for t in self.latent],
        )
        exact = spread.exact()
        least = 0.1 / max(rows, 1)
        gradients = [
            g.abs().clamp_min(least).sum_to_size(o.shape)
            for g, o in zip(exact[3:], self.operands, strict=True)
        ]
        return [
            (each.abs().max() if each.numel() else each.new_zeros(())) for each in [*exact[:3], *gradients]
        ]

    def rows(self, begin: int, end: int) -> Arguments:
        """The call on a part of its batch."""
        count = len(self.target if self.target is not None else self.latent[0])
        return self.map(lambda t: t[begin:end] if len(t) == count else t)


def arguments(*given: Any, **keywords: Any) -> Arguments:
    """`make_call` from torch's global random state."""
    return Arguments(**vars(make_call(*given, **keywords)))


# Calls of the public functions.


def inputs(likelihood, place, dtype=torch.float32, shape=(6, 37, 4), **keywords):
    """(params, target, latent) with gradients wanted."""
    call = arguments(likelihood, shape, dtype=dtype, prior=False, **keywords).to(place.device)
    for operand in call.operands:
        operand.requires_grad_()
    return call


def terms(call, likelihood, **keywords):
    kept = {"mask": call.mask, "weight": call.weight, "latent_mask": call.latent_mask}
    keywords = {"beta": 0.7, **kept, **keywords}
    return fe.free_energy(
        tuple(call.params), call.target, *call.latent, likelihood=LIKELIHOODS[likelihood].name, **keywords
    )


def gradients(value, call, **keywords):
    return torch.autograd.grad(value, call.operands, **keywords)


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones, others):
    """To 2e-6 of the largest: 1e-6 an element, as in free_energy/test_numerics.py, and as much for what is done with
    elements in float32, factors and sums of a few terms."""
    return all(
        (one.double().cpu() - other.double().cpu()).abs().max() <= 2e-6 * other.abs().max()
        for one, other in zip(ones, others, strict=True)
    )
