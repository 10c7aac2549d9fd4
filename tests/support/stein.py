"""What the Stein operations run on, and their judges in float64: direct differences, whole matrices, autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fekernels as fe
from fekernels import stein
from fekernels._catalogue import stein as catalogue
from fekernels._catalogue.stein import Distance

ROWS = {row.name: row for row in catalogue.KERNELS}
KERNELS = {**{name: name for name in ROWS}, "imq": stein.IMQ(beta=-0.3, c=1.2)}
RADIAL = tuple(name for name, row in ROWS.items() if row.distance is not None)
SMOOTH = tuple(name for name in RADIAL if ROWS[name].discrepancy)
ROOTS = tuple(name for name in RADIAL if ROWS[name].distance is Distance.ROOT)
SLOPES = {"matern32": 1.5}  # -phi'(0) of those whose derivative there autograd does not find
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Case:
    """Random particles and scores. ``h`` is in units of the typical squared distance, 2 d; None is the median's."""

    n: int
    d: int
    batch: tuple[int, ...] = ()
    h: float = 0.3
    offset: float = 0.0
    layout: str = "contiguous"
    coincident: int = 0  # the first so many are one point

    def __str__(self) -> str:
        parts = ["x".join(map(str, (*self.batch, self.n, self.d)))]
        parts += [f"h{self.h:g}"] if self.h != 0.3 else []
        parts += [f"at{self.offset:g}"] if self.offset else []
        parts += [self.layout] if self.layout != "contiguous" else []
        parts += [f"coincident{self.coincident}"] if self.coincident else []
        return "-".join(parts)

    def make(self, dtype: torch.dtype = torch.float32) -> Problem:
        shape = (*self.batch, self.n, self.d)
        x, s = torch.randn(shape), torch.randn(shape)
        if self.coincident:
            x[..., : self.coincident, :] = x[..., :1, :]
        x = (x + self.offset).to(dtype)
        # Bandwidths of a batch differ.
        h = 2 * self.d * self.h * (0.5 + torch.rand(self.batch))
        return Problem(lay_out(x, self.layout), lay_out(s.to(dtype), self.layout), h)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same elements in another memory layout."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack((values, torch.full_like(values, torch.nan)), dim=-1).flatten(-2)[..., ::2]
    if layout == "reversed_batch":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


# Vector widths, tiles (64) give or take one; one and several blocks of rows; direct differences and inner products.
CASES = [
    Case(1, 1),
    Case(1, 5),
    Case(2, 1),
    Case(3, 2),
    Case(17, 3),
    Case(63, 16),
    Case(64, 64),
    Case(65, 37),
    Case(65, 1),
    Case(200, 130),
    Case(1000, 2),
    Case(1000, 20),
    Case(450, 64),
    Case(7, 1000),
    Case(16, 6, (9,)),
    Case(33, 5, (2, 3)),
    Case(130, 20, (3,)),
    Case(130, 40, h=1e6),
    Case(130, 3, h=1e-3),
    Case(65, 64, h=1e-6),
    Case(50, 3, h=0.0, coincident=30),
    Case(50, 64, h=0.0, coincident=30),
    Case(50, 3, h=1e-8, coincident=30),
    Case(50, 3, h=1e-20, coincident=30),
    Case(50, 64, coincident=50),
    Case(200, 2, offset=1e4),
    Case(200, 64, offset=1e4),
    Case(65, 37, layout="transposed"),
    Case(65, 5, (2, 3), layout="sliced"),
    Case(65, 5, (2, 3), layout="reversed_batch"),
]
GRADIENT_CASES = [
    case
    for case in CASES
    # h^2 leaves float32 at 1e-20
    if case.n * case.n * case.d <= 1 << 20 and case.layout == "contiguous" and case.h != 1e-20
] + [Case(200, 20), Case(200, 37)]
EMPTY = [Case(0, 3), Case(4, 0), Case(0, 0), Case(5, 2, (0,)), Case(5, 2, (3, 0)), Case(0, 2, (2,))]


@dataclass(frozen=True)
class Problem:
    """Particles and scores [..., n, d] and bandwidths of the leading dimensions."""

    x: Tensor
    s: Tensor
    h: Tensor

    def map(self, change) -> Problem:  # type: ignore[no-untyped-def]
        return Problem(change(self.x), change(self.s), change(self.h))

    def double(self) -> Problem:
        return self.map(lambda t: t.detach().double())

    def leaves(self) -> list[Tensor]:
        return [self.x, self.s, self.h]

    def requiring(self) -> Problem:
        return self.map(lambda t: t.detach().requires_grad_())

    def to(self, device: str) -> Problem:
        return self.map(lambda t: t.to(device))

    def with_h(self, h: float) -> Problem:
        return replace(self, h=torch.full_like(self.h, h))

    def direction(self, name: str, **keywords) -> Tensor:  # type: ignore[no-untyped-def]
        keywords = {"bandwidth": self.h, "temperature": TEMPERATURE, **keywords}
        return stein.svgd_direction(self.x, self.s, kernel=KERNELS[name], **keywords)

    def discrepancy(self, name: str, **keywords) -> Tensor:  # type: ignore[no-untyped-def]
        return stein.kernel_stein_discrepancy(
            self.x, self.s, kernel=KERNELS[name], **{"bandwidth": self.h, **keywords}
        )


def profile(name: str, u: Tensor) -> Tensor:
    """phi(u)."""
    kernel = KERNELS[name]
    if isinstance(kernel, stein.IMQ):
        return (kernel.c**2 + u) ** kernel.beta
    if name == "matern32":
        return (1 + (3 * u).sqrt()) * torch.exp(-(3 * u).sqrt())
    return torch.exp(-u.sqrt() if name == "laplace" else -u)


def derivatives(name: str, u: Tensor, order: int) -> list[Tensor]:
    """[phi, phi', phi'', ...] by autograd."""
    with torch.enable_grad():
        u = u if u.requires_grad else u.detach().requires_grad_()
        values = [profile(name, u)]
        for _ in range(order):
            values += torch.autograd.grad(values[-1].sum(), u, create_graph=True)
    return values


def pairs(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Differences x_i - x_j [..., n, n, d], where they are 0, and which pairs have no repulsion: the diagonal, for
    the kernels of the root all that coincide."""
    differences = x.unsqueeze(-2) - x.unsqueeze(-3)
    coincide = (differences == 0).all(-1)
    still = coincide if name in ROOTS else torch.eye(x.shape[-2], dtype=torch.bool).expand_as(coincide)
    return differences, coincide, still


def exact_direction(problem: Problem, name: str, temperature: float = TEMPERATURE) -> Tensor:
    """phi, from its definition in float64: (1/n) sum_j [k(x_j, x_i) s_j + T grad_{x_j} k(x_j, x_i)]."""
    x, s, h = problem.x.double(), problem.s.double(), problem.h.double()[..., None, None]
    n = x.shape[-2]
    if name == "linear":
        return ((x @ x.mT + 1) @ s) / n + temperature * x
    difference, coincide, still = pairs(x, name)
    u = torch.where(still, 1.0, difference.square().sum(-1) / torch.where(h == 0, 1.0, h))
    value, slope = derivatives(name, u, 1)
    at_zero = profile(name, torch.zeros(()).double())
    k = torch.where(h == 0, at_zero * coincide, torch.where(still, at_zero, value))
    # grad_{x_j} k(x_j, x_i) = phi'(u) (2/h) (x_j - x_i)
    g = torch.where(still, SLOPES.get(name, 0.0), -slope) * 2 / torch.where(h == 0, 1.0, h)
    g = torch.where(h == 0, 0.0, g)
    return (k @ s + temperature * (g.unsqueeze(-1) * difference).sum(-2)) / n


def direction_scale(problem: Problem, name: str) -> Tensor:
    """The largest sum of absolute values that an element of phi is made of: what rounding is measured against."""
    positive = Problem(problem.x, problem.s.abs(), problem.h)
    x, h = problem.x.double(), problem.h.double()[..., None, None]
    if not x.numel():
        return torch.zeros(())
    if name == "linear":
        return exact_direction(Problem(x.abs(), positive.s, problem.h), name).abs().max()
    attraction = exact_direction(positive, name, 0.0).abs().max()
    difference, _, still = pairs(x, name)
    u = torch.where(still, 1.0, difference.square().sum(-1) / torch.where(h == 0, 1.0, h))
    slope = derivatives(name, u, 1)[1].detach().abs()
    g = torch.where(still | (h == 0), 0.0, 2 * slope / torch.where(h == 0, 1.0, h))
    return attraction + (g.unsqueeze(-1) * difference.abs()).sum(-2).max() / x.shape[-2]


def exact_discrepancy(problem: Problem, name: str, statistic: str = "u") -> tuple[Tensor, Tensor]:
    """The squared discrepancy and the mean of the absolute values of its terms, by autograd through k(x, y) itself."""
    x, s, h = problem.x.double(), problem.s.double(), problem.h.double()
    n, d = x.shape[-2:]
    one = x.unsqueeze(-2).expand(*x.shape[:-2], n, n, d)
    other = x.unsqueeze(-3).expand(*x.shape[:-2], n, n, d)
    with torch.enable_grad():
        # k_p = s.s' k + s.grad_y k + s'.grad_x k + tr grad_x grad_y k
        a, b = (
            t.clone().detach().requires_grad_() if not t.requires_grad else t.clone() for t in (one, other)
        )
        if name == "linear":
            k = (a * b).sum(-1) + 1
        else:
            # The root has no derivative at 0: what is found there at 1 is replaced below.
            t = (a - b).square().sum(-1)
            at_once = (t == 0) & (name in ROOTS)
            k = profile(name, torch.where(at_once, 1.0, t) / h[..., None, None])
        by_a, by_b = torch.autograd.grad(k.sum(), (a, b), create_graph=True)
        trace = torch.zeros_like(k)
        for i in range(d):
            (second,) = torch.autograd.grad(
                by_a[..., i].sum(), b, create_graph=True, allow_unused=True, materialize_grads=True
            )
            trace = trace + second[..., i]
    si, sj = s.unsqueeze(-2), s.unsqueeze(-3)
    if name in ROOTS:
        strength = 2 * SLOPES[name] / h[..., None, None]
        push = strength.unsqueeze(-1) * (a - b)
        k, trace = torch.where(at_once, 1.0, k), torch.where(at_once, d * strength, trace)
        by_a, by_b = (torch.where(at_once.unsqueeze(-1), *two) for two in ((-push, by_a), (push, by_b)))
    parts = [(si * sj).sum(-1) * k, (si * by_b).sum(-1), (sj * by_a).sum(-1), trace]
    kp, size = sum(parts), sum(part.detach().abs() for part in parts)
    if statistic == "u":
        off = 1 - torch.eye(n, dtype=torch.float64)
        return (kp * off).sum((-1, -2)) / (n * (n - 1)), (size * off).sum((-1, -2)) / (n * (n - 1))
    return kp.mean((-1, -2)), size.mean((-1, -2))


def weighted_pairs(problem: Problem, name: str, w: Tensor, sizes: bool = False) -> float:
    """sum_{i != j} w_i w_j kp(i, j) from two-particle discrepancies, all pairs at once as a batch."""
    i, j = torch.triu_indices(len(w), len(w), 1)
    two = Problem(
        torch.stack((problem.x[i], problem.x[j]), 1),
        torch.stack((problem.s[i], problem.s[j]), 1),
        problem.h.expand(len(i)),
    )
    terms, size = exact_discrepancy(two, name)
    if sizes:
        return 2 * ((w[i] * w[j]).abs() * size).sum().item()
    return 2 * (w[i] * w[j] * terms).sum().item()


def assert_close(got: Tensor, exact: Tensor, scale: Tensor, what: str = "", bound: float = 1e-5) -> None:
    """Within ``bound`` of the scale, and a rounding to the dtype of the result."""
    assert got.shape == exact.shape, (what, got.shape, exact.shape)
    if not got.numel():
        return
    unit = torch.finfo(got.dtype).eps / 2
    exact, scale = exact.detach(), scale.detach()
    if got.dtype == torch.float64:
        bound = 1e-12
    error = (got.detach().cpu().double() - exact).abs()
    allowed = bound * scale + unit * exact.abs() + torch.finfo(got.dtype).smallest_normal
    worst = (error - allowed).max()
    assert bool((error <= allowed).all()), (
        f"{what}: off by {error.max():.3g}, {error.max() / scale.max():.3g} of the scale {scale.max():.3g}, "
        f"{worst:.3g} too much"
    )


def gaussian_scores(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return -torch.linalg.solve(covariance, (x - mean).mT).mT


def on(place):  # type: ignore[no-untyped-def]
    return fe.use_backend(place.backend)


def gradient_scales(problem: Problem, upstream: Tensor, name: str) -> list[Tensor]:
    """The largest sums of absolute values that the gradients of <upstream, phi> are made of."""
    x, s, g = (t.double() for t in (problem.x, problem.s, upstream))
    h = problem.h.double()[..., None, None]
    n = x.shape[-2]
    if name == "linear":
        a, b, e = x.abs(), s.abs(), g.abs()
        by_x = ((e @ (b.mT @ a) + b @ (e.mT @ a)) / n + TEMPERATURE * e).max()
        return [by_x, ((a @ (a.mT @ e) + e.sum(-2, keepdim=True)) / n).max(), torch.zeros(())]
    difference, coincide, still = pairs(x, name)
    distance = difference.norm(dim=-1)
    safe = torch.where(h == 0, 1.0, h)
    u = torch.where(still, 1.0, distance.square() / safe)
    k, first, second = (value.detach().abs() for value in derivatives(name, u, 2))
    k = torch.where(h == 0, coincide.double(), torch.where(still, 1.0, k))
    first, second = torch.where(still, SLOPES.get(name, 0.0), first), torch.where(still, 0.0, second)
    r1, r2 = (torch.where(h == 0, 0.0, v) for v in (2 * first / safe, 4 * second / safe / safe))
    strengths, pulls = g.norm(dim=-1), s.norm(dim=-1)
    a = strengths.unsqueeze(-1) * pulls.unsqueeze(-2) + pulls.unsqueeze(-1) * strengths.unsqueeze(-2)
    unlike = (g.unsqueeze(-2) - g.unsqueeze(-3)).norm(dim=-1)
    m = (r1 * a + TEMPERATURE * r2 * unlike * distance) / (2 * n)
    # (sum_j M_ij) x_i - sum_j M_ij x_j is a difference of these, each rounded to 6e-8: 1e-2 of them, of 1e-5 allowed.
    folded = 1e-2 * m * (x - x.mean(-2, keepdim=True)).norm(dim=-1).amax(-1)[..., None, None]
    by_x = (TEMPERATURE * r1 * unlike / n + 2 * m * distance + folded).sum(-1)
    by_h = u * r1 * a / 2 + TEMPERATURE * (r1 + u * r2 * safe / 2) / safe * unlike * distance
    return [by_x.max(), (k @ g.abs()).max() / n, by_h.sum((-1, -2)).max() / (2 * n)]
