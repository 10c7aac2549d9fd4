"""Random arguments of the free energy, what it must give for them in plain float64, and the judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fekernels._catalogue.free_energy import LIKELIHOODS, NAMES, Target, longest
from tests.fuzz import energies
from tests.fuzz.drawn_arguments import LAYOUTS, laid_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What the parameters of each likelihood may be.
KINDS = {
    "mse": ("real",),
    "gaussian": ("real", "logvar"),
    "bernoulli": ("logit",),
    "continuous_bernoulli": ("logit",),
    "categorical": ("logit",),
    "laplace": ("real", "logvar"),
    "student_t": ("real", "logvar", "positive"),
    "poisson": ("logvar",),
    "negative_binomial": ("positive", "positive"),
    "zero_inflated_negative_binomial": ("positive", "positive", "logit"),
    "gamma": ("positive", "positive"),
}
VARIANTS = tuple((row.name, len(row.parameters)) for row in LIKELIHOODS)
SPREADS = {
    "real": (0.1, 1.0, 30.0),
    "logit": (0.01, 1.0, 20.0),
    "logvar": (0.01, 0.5, 2.0),
    "positive": (0.5, 2.0),
}
COUNTS = tuple(name for name in NAMES if longest(name).target is Target.COUNTS)
# Of the scales of energies.py. free_energy/test_numerics.py allows an element 1e-6; factors and sums get as much.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-9}


@dataclass
class Problem:
    likelihood: str
    params: list[Tensor]
    target: Tensor
    mean: Tensor
    logvar: Tensor
    prior_mean: Tensor | None
    prior_logvar: Tensor | None
    mask: Tensor | None
    latent_mask: Tensor | None
    weight: Tensor | None

    def __repr__(self) -> str:
        parts = {k: v for k, v in vars(self).items() if v is not None and k != "likelihood"}
        parts |= {f"params[{i}]": p for i, p in enumerate(parts.pop("params"))}
        texts = (
            f"{name}: {str(t.dtype)[6:]} {tuple(t.shape)} by {t.stride()}"
            + (f" = {t.tolist()}" if t.numel() <= 4 else "")
            for name, t in parts.items()
        )
        return f"<{self.likelihood}; {'; '.join(texts)}>"

    @property
    def latent(self) -> list[Tensor | None]:
        return [self.mean, self.logvar, self.prior_mean, self.prior_logvar]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.params, *(t for t in self.latent if t is not None)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""
        in_float64 = any(t.dtype == torch.float64 for t in self.leaves)
        return torch.float64 if in_float64 else torch.float32

    def keywords(self) -> dict[str, object]:
        names = ("prior_mean", "prior_logvar", "mask", "latent_mask", "weight")
        return {"likelihood": self.likelihood, **{name: getattr(self, name) for name in names}}


class Drawing:
    """Hypothesis' choices and a generator for the numbers, which hypothesis need not choose one by one."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def one_of(self, *options):  # type: ignore[no-untyped-def]
        return self.draw(st.sampled_from(options))

    def shape(self, sizes: tuple[int, ...], least: int) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(st.sampled_from(sizes), min_size=least, max_size=2)))

    def broadcasting(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to this one: the whole, or some sizes 1, or leading dimensions left out."""
        kept = shape[self.draw(st.integers(0, len(shape))) :]
        return tuple(self.one_of(size, 1) for size in kept)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def values(self, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = self.normal(shape) * self.one_of(*SPREADS[kind])
        made = made.exp().clamp(1e-3, 1e4) if kind == "positive" else made
        return laid_out(made.to(dtype), self.draw(LAYOUTS))

    def maybe(self, make):  # type: ignore[no-untyped-def]
        return make() if self.draw(st.booleans()) else None

    def bools(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(self.broadcasting(shape), generator=self.generator) < 0.7


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    by = Drawing(draw)
    likelihood, count = by.one_of(*VARIANTS)
    batch = by.one_of(1, 2, 3, 5, 0)
    full = (batch, *by.shape((1, 2, 3, 7, 17, 33, 0), 0))
    latent = (batch, *by.shape((1, 2, 5, 16, 0), 1))
    dtype, latent_dtype = by.one_of(*DTYPES), by.one_of(*DTYPES)
    kinds, kind_of_target = KINDS[likelihood][:count], longest(likelihood).target
    first = (*full, by.one_of(1, 2, 5, 11)) if kind_of_target is Target.CLASSES else full
    params = [by.values(kinds[0], first, dtype)]
    params += [by.values(kind, by.broadcasting(full), dtype) for kind in kinds[1:]]
    if kind_of_target is Target.CLASSES:
        target = torch.randint(0, first[-1], full, generator=by.generator)
    elif kind_of_target is Target.COUNTS:
        rate = torch.exp(by.normal(full) * by.one_of(0.5, 2.0))
        target = torch.poisson(rate, generator=by.generator).to(by.one_of(torch.int64, torch.float32))
    elif kind_of_target is Target.UNIT:
        target = torch.rand(full, generator=by.generator, dtype=torch.float64).to(dtype)
        target = target.round() if draw(st.booleans()) else target
    else:
        target = by.values("positive" if kind_of_target is Target.POSITIVE else "real", full, dtype)
    return Problem(
        likelihood,
        params,
        target,
        by.values("real", latent, latent_dtype),
        by.values("logvar", latent, latent_dtype),
        by.maybe(lambda: by.values("real", by.broadcasting(latent), latent_dtype)),
        by.maybe(lambda: by.values("logvar", by.broadcasting(latent), latent_dtype)),
        by.maybe(lambda: by.bools(full)),
        by.maybe(lambda: by.bools(latent)),
        by.maybe(lambda: torch.rand(batch, generator=by.generator) * by.one_of(1.0, 10.0)),
    )


@dataclass(frozen=True)
class Judged:
    """Elements of a term with everything that multiplies them, and the scales of their errors; by gradient too."""

    elements: Tensor
    scales: Tensor
    gradients: list[Tensor]
    gradient_scales: list[Tensor]

    @property
    def value(self) -> Tensor:
        return rows(self.elements)

    @property
    def scale(self) -> Tensor:
        return rows(self.scales)


def rows(values: Tensor) -> Tensor:
    """Sums over the event."""
    return values.reshape(len(values), -1).sum(1) if values.numel() else values.new_zeros(len(values))


def like(factor: Tensor, values: Tensor) -> Tensor:
    """A factor a sample, or one an element without the classes, with the dimensions of `values`."""
    return factor.view(*factor.shape, *[1] * (values.dim() - factor.dim())) if factor.dim() else factor


def _judged(term: energies.Term, mask: Tensor | None, weight: Tensor | None) -> Judged:
    factor = torch.ones_like(term.value)
    if weight is not None:
        factor = factor * like(weight.double(), factor)
    if mask is not None:
        factor = factor * mask

    def times(values: Tensor) -> Tensor:
        return values * like(factor, values)

    return Judged(
        times(term.value),
        times(term.scale),
        [times(g) for g in term.gradients],
        [times(g) for g in term.scales],
    )


def exact_energy(problem: Problem) -> Judged:
    full = problem.target.shape
    in_float64 = [problem.params[0].double(), *(p.double().expand(full) for p in problem.params[1:])]
    target = problem.target if problem.likelihood == "categorical" else problem.target.double()
    return _judged(energies.TERMS[problem.likelihood](target, *in_float64), problem.mask, problem.weight)


def exact_kl(problem: Problem, weighted: bool = True) -> Judged:
    shape = problem.mean.shape
    latent = [torch.zeros(shape).double() if t is None else t.double().expand(shape) for t in problem.latent]
    return _judged(energies.gaussian_kl(*latent), problem.latent_mask, problem.weight if weighted else None)


def reduced(values: Tensor, reduction: str) -> Tensor:
    return values if reduction == "none" else getattr(values, reduction)()


def close(got: Tensor, exact: Tensor, scale: Tensor, tolerance: float, what: str, rounded: int = 1) -> None:
    """`rounded`: how many terms of the result were rounded to its dtype before they were added up."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    info = torch.finfo(got.dtype)
    # Half an ulp of the result, or the spacing of subnormal numbers; an infinity only where no number is near.
    bound = tolerance * scale + info.eps * (scale if rounded > 1 else exact.abs())
    bound = bound + info.smallest_normal * rounded + 1e-15
    error = (got.double() - exact).abs()
    wrong = ~(error <= bound) & (exact.abs() < info.max / 4)
    if bool(wrong.any()):
        at = int(wrong.flatten().int().argmax())
        raise AssertionError(
            f"{what}: {got.flatten()[at]:.9g} for {exact.flatten()[at]:.9g}, error {error.flatten()[at]:.2g} > "
            f"{bound.flatten()[at]:.2g}"
        )
