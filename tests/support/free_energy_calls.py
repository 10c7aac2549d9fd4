"""Calls of the free energy's kernels with random operands: likelihoods, shapes, kinds of operands, dtypes, masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, LIKELIHOODS, MEAN, NONE, SUM, Target
from fekernels._runtime import backends

CLASSES = 5
KINDS = ("full", "column", "row", "scalar")
__all__ = ["CATEGORICAL", "CLASSES", "KINDS", "MEAN", "NONE", "SHAPES", "SUM", "Call", "make_call"]

# (rows, columns, latents): vectors and blocks (128) give or take one, segments (4096), blocks of rows (64).
SHAPES = (
    (1, 1, 1),
    (3, 17, 5),
    (5, 128, 16),
    (4, 129, 17),
    (130, 20, 20),
    (2, 4097, 3),
    (65, 300, 7),
    (0, 5, 2),
    (4, 0, 3),
    (3, 5, 0),
)


@dataclass(frozen=True)
class Call:
    """One call of a backend's ``free_energy``."""

    params: list[Tensor]
    target: Tensor | None
    mask: Tensor | None
    latent: list[Tensor]
    weight: Tensor | None
    upstream: list[Tensor]
    likelihood: int
    reduction: int = MEAN
    beta: float = 0.7
    inplace: bool = False
    latent_mask: Tensor | None = None

    @property
    def operands(self) -> list[Tensor]:
        return [*self.params, *self.latent]

    def run_on(self, backend: str, device: str | torch.device, needs: int | None = None) -> list[Tensor]:
        """needs: bits of the operands whose gradients are wanted, all where it is None."""
        there = self.to(device)
        needs = (1 << len(self.operands)) - 1 if needs is None else needs
        kernel: Callable[..., list[Tensor]] = backends.implementation("free_energy", backend)  # type: ignore[assignment]
        return kernel(
            there.params, there.target, there.mask, there.latent, there.weight, there.upstream, self.likelihood,
            self.reduction, self.beta, needs, self.inplace, there.latent_mask,
        )  # fmt: skip

    def to(self, device: str | torch.device) -> Any:
        return self.map(lambda t: t.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The call with every tensor changed, of the class that this one has."""

        def each(given: Any) -> Any:
            if isinstance(given, list):
                return [change(tensor) for tensor in given]
            return None if given is None else change(given)

        names = ("params", "target", "mask", "latent", "weight", "upstream", "latent_mask")
        return replace(self, **{name: each(getattr(self, name)) for name in names})


def make_call(
    likelihood: int,
    shape: tuple[int, int, int] = (5, 130, 7),
    kind: str = "full",
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    weighted: bool = False,
    reduction: int = MEAN,
    prior: bool = True,
    generator: torch.Generator | None = None,
    padded: bool = False,
    dropped: bool = False,
) -> Call:
    """Random operands: the first parameter full, the others of ``kind``.

    What a mask hides holds NaN, of the target (``masked``) and of the latents (``padded``), and so does the row that
    ``dropped`` gives a weight of 0.
    """
    rows, columns, latents = shape
    row = LIKELIHOODS[likelihood]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    def operand(kind: str, columns: int, positive: bool) -> Tensor:
        values = normal(rows if kind in ("full", "row") else 1, columns if kind in ("full", "column") else 1)
        return (values.exp() if positive else values).to(dtype)

    if likelihood == CATEGORICAL:
        params = [3 * normal(rows, columns, CLASSES).to(dtype)]
        target = torch.randint(0, CLASSES, (rows, columns), generator=generator)
    else:
        params = [
            operand(kind if i else "full", columns, parameter.not_negative)
            for i, parameter in enumerate(row.parameters)
        ]
        target = uniform(rows, columns)
        if row.target is Target.COUNTS:
            target = torch.poisson(torch.where(uniform(rows, columns) < 0.7, 0.0, 6.0), generator=generator)
        elif row.target is Target.POSITIVE:
            target = target + 0.01
        target = target.to(dtype)
    mask = uniform(rows, columns) < 0.7 if masked else None
    if mask is not None:
        params[0][~mask] = torch.nan
        if likelihood != CATEGORICAL:
            target[~mask] = torch.nan
    latent = [operand("full", latents, False) for _ in range(2)]
    if prior:
        latent += [operand(each, latents, False) for each in ("column", "scalar")]
    weight = uniform(rows) if weighted or dropped else None
    latent_mask = uniform(rows, latents) < 0.7 if padded else None
    for operand_of_q in latent[:2]:
        if latent_mask is not None:
            operand_of_q[~latent_mask] = torch.nan
    if weight is not None and dropped and rows > 1:
        weight[rows // 2] = 0.0
        for operand_of_row in (*params, *latent, *([] if likelihood == CATEGORICAL else [target])):
            if len(operand_of_row) == rows:
                operand_of_row[rows // 2] = torch.nan
    upstream = [normal(rows), normal(rows)] if reduction == NONE else []
    return Call(
        params, target, mask, latent, weight, upstream, likelihood, reduction, latent_mask=latent_mask
    )
