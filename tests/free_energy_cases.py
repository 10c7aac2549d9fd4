"""What the free energy's kernels run on: likelihoods, shapes, kinds of operands, dtypes; and their judge in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import Place
from torch import Tensor

from fekernels import _backends
from fekernels.reference import free_energy as reference
from fekernels.reference._likelihoods import SAFE
from fekernels.reference.free_energy import LIKELIHOODS

CATEGORICAL = LIKELIHOODS.index("categorical")
NAMES = [f"{name}{len(safe)}" for name, safe in zip(LIKELIHOODS, SAFE, strict=True)]
ELEMENTWISE = [number for number in range(len(LIKELIHOODS)) if number != CATEGORICAL]
COUNTS = [
    NAMES.index(name) for name in ("poisson1", "negative_binomial2", "zero_inflated_negative_binomial3")
]
POSITIVE = {"negative_binomial2": (0, 1), "zero_inflated_negative_binomial3": (0, 1), "student_t3": (2,)}
KINDS = ("full", "column", "row", "scalar")
NONE, MEAN, SUM = range(3)

# (rows, columns, latents): vectors and blocks (128) give or take one, segments (4096), blocks of rows (64).
SHAPES = [
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
]


@dataclass(frozen=True)
class Arguments:
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

    @property
    def operands(self) -> list[Tensor]:
        return [*self.params, *self.latent]

    def run(self, place: Place, needs: int | None = None) -> list[Tensor]:
        kernel = _backends.implementation("free_energy", place.backend)
        arguments = self.to(place.device)
        needs = (1 << len(self.operands)) - 1 if needs is None else needs
        return kernel(
            arguments.params, arguments.target, arguments.mask, arguments.latent, arguments.weight, arguments.upstream,
            self.likelihood, self.reduction, self.beta, needs, self.inplace,
        )  # fmt: skip

    def exact(self) -> list[Tensor]:
        """In float64, of the values that the operands really have."""
        wide = self._map(lambda t: t.double() if t.dtype.is_floating_point else t)
        return reference.free_energy(
            wide.params, wide.target, wide.mask, wide.latent, wide.weight, wide.upstream, self.likelihood,
            self.reduction, self.beta, (1 << len(self.operands)) - 1, False,
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

    def to(self, device: str) -> Arguments:
        return self._map(lambda t: t.to(device))

    def rows(self, begin: int, end: int) -> Arguments:
        """The call on a part of its batch."""
        count = len(self.target if self.target is not None else self.latent[0])
        return self._map(lambda t: t[begin:end] if len(t) == count else t)

    def _map(self, change) -> Arguments:  # type: ignore[no-untyped-def]
        def each(given):  # type: ignore[no-untyped-def]
            if isinstance(given, list):
                return [change(tensor) for tensor in given]
            return None if given is None else change(given)

        names = ("params", "target", "mask", "latent", "weight", "upstream")
        return replace(self, **{name: each(getattr(self, name)) for name in names})


def operand(kind: str, rows: int, columns: int, positive: bool, dtype: torch.dtype) -> Tensor:
    shape = (rows if kind in ("full", "row") else 1, columns if kind in ("full", "column") else 1)
    values = torch.randn(shape)
    return (values.exp() if positive else values).to(dtype)


def arguments(
    likelihood: int,
    shape: tuple[int, int, int] = (5, 130, 7),
    kind: str = "full",
    dtype: torch.dtype = torch.float32,
    masked: bool = False,
    weighted: bool = False,
    reduction: int = MEAN,
    prior: bool = True,
) -> Arguments:
    """Random operands: the first parameter full, the others of ``kind``; masked places hold NaN."""
    rows, columns, latents = shape
    if likelihood == CATEGORICAL:
        params = [3 * torch.randn(rows, columns, 5).to(dtype)]
        target = torch.randint(0, 5, (rows, columns))
    else:
        positive = POSITIVE.get(NAMES[likelihood], ())
        params = [
            operand(kind if i else "full", rows, columns, i in positive, dtype)
            for i in range(len(SAFE[likelihood]))
        ]
        target = torch.rand(rows, columns)
        if likelihood in COUNTS:
            target = torch.poisson(torch.where(torch.rand(rows, columns) < 0.7, 0.0, 6.0))
        target = target.to(dtype)
    mask = torch.rand(rows, columns) < 0.7 if masked else None
    if mask is not None:
        params[0][~mask] = torch.nan
        if likelihood != CATEGORICAL:
            target[~mask] = torch.nan
    latent = [torch.randn(rows, latents).to(dtype) for _ in range(2)]
    if prior:
        latent += [operand(each, rows, latents, False, dtype) for each in ("column", "scalar")]
    weight = torch.rand(rows) if weighted else None
    upstream = [torch.randn(rows), torch.randn(rows)] if reduction == NONE else []
    return Arguments(params, target, mask, latent, weight, upstream, likelihood, reduction)
