"""The free energy of a latent-variable model in plain PyTorch: energies, KL, their reductions and gradients.

Everything is computed in float64 and rounded once to the type of the result. Gradients are written out beside the
energies; ``values`` is the same map for autograd, any number of times differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, LIKELIHOODS, MEAN, NONE
from fekernels.reference.free_energy.likelihoods import ENERGIES, GRADIENTS
from fekernels.reference.free_energy.special_functions import expm1_excess, growth

__all__ = [
    "energy_elements",
    "free_energy",
    "kl_elements",
    "masked_row_sums",
    "values",
]

CHUNK = 1 << 20  # elements at a time: the float64 temporaries stay small whatever the batch


def energy_elements(params: list[Tensor], target: Tensor, likelihood: int) -> Tensor:
    """e = -log p(target | params), float64 [B, D] (categorical: params [B, P, K], target and result [B, P])."""
    x = target if likelihood == CATEGORICAL else target.double()
    return ENERGIES[likelihood](x, *(p.double() for p in params))


def energy_gradients(params: list[Tensor], target: Tensor, likelihood: int) -> tuple[Tensor, ...]:
    """d e / d params, each of the shape that params and target broadcast to."""
    x = target if likelihood == CATEGORICAL else target.double()
    return GRADIENTS[likelihood](x, *(p.double() for p in params))


def kl_elements(latent: list[Tensor]) -> Tensor:
    """KL(N(m, e^v) || N(p, e^w)) = ((m-p)^2 e^-w + expm1(d) - d)/2 with d = v-w; p = w = 0 where no prior is given."""
    m, v, *prior = (operand.double() for operand in latent)
    if not prior:
        return (m * m + expm1_excess(v)) / 2
    p, w = prior
    z = (m - p) * growth(w / 2)
    return (z * z + expm1_excess(v - w)) / 2


def kl_gradients(latent: list[Tensor]) -> tuple[Tensor, ...]:
    """d kl / d latent."""
    m, v, *prior = torch.broadcast_tensors(*(operand.double() for operand in latent))
    if not prior:
        return m, torch.expm1(v) / 2
    p, w = prior
    root = growth(w / 2)
    z, grown = (m - p) * root, torch.expm1(v - w)
    return z * root, grown / 2, -z * root, (-grown - z * z) / 2


def counted(mask: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """What counts of [B, D]: nothing that ``mask`` hides, and no row whose weight is 0. None where everything does."""
    if weight is None:
        return mask
    kept = (weight != 0).unsqueeze(1)
    return kept if mask is None else mask & kept


def observed(
    params: list[Tensor], target: Tensor, mask: Tensor | None, likelihood: int
) -> tuple[list[Tensor], Tensor]:
    """Operands with harmless values where nothing was observed: a NaN there must not even reach a formula."""
    if mask is None:
        return params, target
    where = mask.unsqueeze(-1) if likelihood == CATEGORICAL else mask
    row = LIKELIHOODS[likelihood]
    safe = [torch.where(where, p, value) for p, value in zip(params, row.safe, strict=True)]
    return safe, torch.where(mask, target, row.target.value.safe)


def present(latent: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The same for latents."""
    return latent if mask is None else [torch.where(mask, operand, 0.0) for operand in latent]


def masked_row_sums(elements: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Sum over each row of what was observed, times the row's weight: [B, D] -> [B]."""
    if mask is not None:
        elements = torch.where(mask, elements, 0.0)
    rows = elements.sum(1)
    return rows if weight is None else rows * weight.double()


def reduced(rows: Tensor, reduction: int) -> Tensor:
    """[B] for "none"; for "mean" the sum over the batch divided by B (NaN for an empty batch), for "sum" the sum."""
    if reduction == NONE:
        return rows
    return rows.sum() / rows.numel() if reduction == MEAN else rows.sum()


def result_dtype(operands: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(o.dtype == torch.float64 for o in operands) else torch.float32


def row_values(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: int,
    latent_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Energy and KL of each row, float64 [B]."""
    energy = kl = None
    if params:
        assert target is not None
        seen = counted(mask, weight)
        elements = energy_elements(*observed(params, target, seen, likelihood), likelihood)
        energy = masked_row_sums(elements, seen, weight)
    if latent:
        kept = counted(latent_mask, weight)
        kl = masked_row_sums(kl_elements(present(latent, kept)), kept, weight)
    if energy is None:
        assert kl is not None, "neither params nor latent given"
        energy = torch.zeros_like(kl)
    return energy, torch.zeros_like(energy) if kl is None else kl


def values(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    likelihood: int,
    reduction: int,
    beta: float,
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(free_energy, energy, kl) for autograd: differentiable in params and latent as often as wanted."""
    rows = row_values(params, target, mask, latent, weight, likelihood, latent_mask)
    energy, kl = (reduced(each, reduction) for each in rows)
    dtype = result_dtype([*params, *latent])
    return (energy + beta * kl).to(dtype), energy.to(dtype), kl.to(dtype)


def sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Undo broadcasting: sum over the dimensions in which the operand has size 1."""
    dims = [i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] != 1]
    return gradient.sum(dims, keepdim=True) if dims else gradient


def free_energy(
    params: list[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: list[Tensor],
    weight: Tensor | None,
    upstream: list[Tensor],
    likelihood: int,
    reduction: int,
    beta: float,
    needs: int,
    inplace: bool,
    latent_mask: Tensor | None = None,
) -> list[Tensor]:
    """[free_energy, energy, kl, *gradients]: the contract of every backend.

    Gradients come for the operands (params, then latent) whose bit of ``needs`` is set: of the energy for params, of
    the KL (not times beta) for latent; of the reduced values or, given ``upstream`` [g_energy, g_kl], of the rows
    times those. What a mask hides, and every row whose weight is 0, counts exactly 0 in all of them.
    """
    operands = [*params, *latent]
    batch = target.shape[0] if target is not None else latent[0].shape[0]
    width = max(o[:1].numel() for o in (operands if target is None else [*operands, target]))
    step = max(CHUNK // max(width, 1), 1)
    dtype, device = result_dtype(operands), operands[0].device
    energies, kls = (torch.empty(batch, dtype=torch.float64, device=device) for _ in range(2))
    gradients: dict[int, Tensor] = {}
    for i, operand in enumerate(operands):
        if not needs >> i & 1:
            continue
        if inplace and i == 0:
            gradients[i] = operand
        elif operand.shape[0] == batch:  # a chunk completes its rows: no float64 copy of the whole is kept
            gradients[i] = torch.empty(operand.shape, dtype=operand.dtype, device=device)
        else:
            gradients[i] = torch.zeros(operand.shape, dtype=torch.float64, device=device)

    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))

        def part(operand: Tensor, rows: slice = rows) -> Tensor:
            return operand[rows] if operand.shape[0] == batch else operand

        p, q = [part(o) for o in params], [part(o) for o in latent]
        x, seen, w, kept = (None if o is None else o[rows] for o in (target, mask, weight, latent_mask))
        energies[rows], kls[rows] = row_values(p, x, seen, q, w, likelihood, kept)
        if not gradients:
            continue

        seen, kept = counted(seen, w), counted(kept, w)
        scale = torch.ones_like(energies[rows]) if w is None else w.double()
        if reduction == MEAN:
            scale = scale / batch
        found: list[Tensor] = []
        if params:
            assert x is not None
            of_rows = scale * upstream[0][rows].double() if upstream else scale
            for g in energy_gradients(*observed(p, x, seen, likelihood), likelihood):
                g = g * of_rows.view(-1, *(1,) * (g.dim() - 1))
                if seen is not None:
                    g = torch.where(seen.unsqueeze(-1) if likelihood == CATEGORICAL else seen, g, 0.0)
                found.append(g)
        if latent:
            of_rows = scale * upstream[1][rows].double() if upstream else scale
            for g in kl_gradients(present(q, kept)):
                g = g * of_rows[:, None]
                found.append(g if kept is None else torch.where(kept, g, 0.0))
        for i, total in gradients.items():
            g = sum_to(found[i], part(operands[i]).shape)
            if operands[i].shape[0] == batch:
                total[rows] = g.to(total.dtype)
            else:
                total += g

    energy, kl = reduced(energies, reduction), reduced(kls, reduction)
    results = [value.to(dtype) for value in (energy + beta * kl, energy, kl)]
    return results + [g.to(operands[i].dtype) for i, g in gradients.items()]


def scale_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply in place by a scalar tensor."""
    for tensor in tensors:
        tensor.mul_(factor)
