"""The public functions of the free energy on the operands of a case of tests/support/free_energy.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._catalogue.free_energy import LIKELIHOODS
from tests.support.free_energy import NAMES, Call, Case
from tests.support.implementations import Place

LIKELIHOOD = pytest.mark.parametrize("likelihood", range(len(NAMES)), ids=NAMES)


def inputs(
    likelihood: int,
    place: Place,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (6, 37, 4),
    **options: str,
) -> Call:
    """Operands without a prior that want gradients, other ones every time."""
    case = Case(likelihood, shape, dtypes=(dtype,) * 6, **options)  # type: ignore[arg-type]
    call = case.call(torch.default_generator).to(place.device)
    for operand in call.operands:
        operand.requires_grad_()
    return call


def terms(call: Call, likelihood: int, **keywords: Any) -> fe.FreeEnergyTerms:
    kept = {"mask": call.mask, "weight": call.weight, "latent_mask": call.latent_mask}
    keywords = {"beta": 0.7, **kept, **keywords}
    return fe.free_energy(
        tuple(call.params), call.target, *call.latent, likelihood=LIKELIHOODS[likelihood].name, **keywords
    )


def gradients(value: Tensor, call: Call, **keywords: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, call.operands, **keywords)


def same(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """To 2e-6 of the largest: 1e-6 an element, as in free_energy/test_numerics.py, and as much for what is done with
    elements in float32, factors and sums of a few terms."""
    return all(
        bool((one.double().cpu() - other.double().cpu()).abs().max() <= 2e-6 * other.abs().max())
        for one, other in zip(ones, others, strict=True)
    )
