"""The Stein cases of ``python -m fekernels bench``: direction, discrepancy and median beside PyTorch and packages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fekernels.bench.optimizers import Group, Row
from fekernels.bench.packages import KEOPS, NUMPYRO, PEERS, PYRO, reason
from fekernels.bench.timing import Contestant
from fekernels.ops.kernel_stein_discrepancy import kernel_stein_discrepancy
from fekernels.ops.svgd_direction import svgd_direction
from fekernels.stein.bandwidth import median_bandwidth

__all__ = ["BARE", "CDIST", "OURS", "PLAIN", "WRITTEN", "Sizes", "groups", "plain", "problem"]

OURS = "svgd_direction"
PLAIN, WRITTEN = "plain torch, in place", "plain torch, cdist"
BARE = "X X^T and K V alone"
CDIST = "torch.cdist + median"

TOLERANCE = 1e-4  # of the largest element, between two float32 results of different summation orders

Shape = tuple[int, ...]  # [problems,] n, d


@dataclass(frozen=True)
class Sizes:
    """Shapes of the cases, and how long each group is timed."""

    middle: Shape = (10_000, 64)
    low: Shape = (20_000, 16)
    wide: Shape = (10_000, 256)
    odd: Shape = (10_000, 37)
    planar: Shape = (50_000, 2)
    small: Shape = (1_000, 64)
    few: Shape = (50, 1_000_000)
    batch: Shape = (256, 16, 6)
    memory: Shape = (100_000, 16)
    rounds: int = 9
    seconds: float = 3.0
    slow_rounds: int = 3  # of peers that take seconds
    turn_seconds: float = 0.01


def problem(shape: Shape) -> tuple[Tensor, Tensor, float]:
    """Particles, scores and a bandwidth at which far pairs still count, so that wrong ones would show."""
    generator = torch.Generator().manual_seed(0)
    x, s = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, s, float(shape[-1])


def over_h(x: Tensor, h: float) -> Tensor:
    """-|x_i - x_j|^2 / h by one matrix product, n x n; with leading dimensions too."""
    r = x.square().sum(-1) / -h
    if x.dim() == 2:
        t = torch.addmm(r, x, x.mT, alpha=2 / h)
    else:
        t = torch.baddbmm(r.unsqueeze(-2), x, x.mT, alpha=2 / h)
    return t.add_(r.unsqueeze(-1))


def plain(x: Tensor, s: Tensor, h: float) -> Tensor:
    """(1/n) [K (S - (2/h) X) + (2/h) r X], as who cares for speed writes it: two products, one n x n, in place."""
    n = x.shape[-2]
    k = over_h(x, h).exp_()
    if x.dim() == 2 and n < x.shape[1]:  # the fewest passes over X and S, which are what is large
        weights = k.sum(1).diag().sub_(k).mul_(2 / (h * n))
        return (weights @ x).addmm_(k, s, alpha=1 / n)
    phi = k @ torch.sub(s, x, alpha=2 / h)
    return phi.addcmul_(k.sum(-1, keepdim=True), x, value=2 / h).div_(n)


def written(x: Tensor, s: Tensor, h: float) -> Tensor:
    """The formula as papers' code has it."""
    k = torch.exp(-torch.cdist(x, x).square() / h)
    return (k @ s + (2 / h) * (k.sum(1, keepdim=True) * x - k @ x)) / x.shape[0]


def plain_imq(x: Tensor, s: Tensor, h: float) -> Tensor:
    """(1 + t/h)^(-1/2), of repulsion k^3 / h."""
    k = over_h(x, h).neg_().add_(1).rsqrt_()
    g = k.pow(3).div_(h)
    return (k @ s).addcmul_(g.sum(1, keepdim=True), x).sub_(g @ x).div_(x.shape[0])


def plain_laplace(x: Tensor, s: Tensor, h: float) -> Tensor:
    """exp(-sqrt(t/h)), of repulsion k / (sqrt(t/h) h), 0 between a particle and itself."""
    root = over_h(x, h).neg_().clamp_(min=0).sqrt_().fill_diagonal_(0)
    k = root.neg().exp_()
    g = (k / root).div_(h).fill_diagonal_(0)
    return (k @ s).addcmul_(g.sum(1, keepdim=True), x).sub_(g @ x).div_(x.shape[0])


def plain_discrepancy(x: Tensor, s: Tensor, h: float) -> Tensor:
    """Two n x n matrices, two products (Liu, Lee & Jordan 2016): U-statistic, rbf."""
    n, d = x.shape
    u = over_h(x, h)
    k = u.exp()
    rows = k.sum(1, keepdim=True)
    psi = (k @ torch.sub(s, x, alpha=4 / h)).addcmul_(rows, x, value=4 / h)
    total = (s * psi).sum() + (2 * d / h) * (rows.sum() - n) + (4 / h) * torch.dot(k.view(-1), u.view(-1))
    return (total - s.square().sum()) / (n * (n - 1))


def backward(direction: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, s: Tensor, h: float) -> Tensor:
    """Forward and the gradients of particles and scores."""
    x, s = x.detach().requires_grad_(), s.detach().requires_grad_()
    # s as the upstream gradient: any will do.
    return torch.stack(torch.autograd.grad(direction(x, s, h), (x, s), s.detach()))


def ours(x: Tensor, s: Tensor, h: float, kernel: str = "rbf") -> Tensor:
    return svgd_direction(x, s, bandwidth=h, kernel=kernel)


def discrepancy(x: Tensor, s: Tensor, h: float) -> Tensor:
    return kernel_stein_discrepancy(x, s, bandwidth=h)


def cdist_median(x: Tensor) -> Tensor:
    """The bandwidth of Liu & Wang 2016 as their code has it: the median of a whole n x n matrix."""
    return torch.cdist(x, x).square().view(-1).median() / math.log(x.shape[0] + 1)


def bare(x: Tensor, s: Tensor) -> Callable[[], object]:
    """The two matrix products that no n x n formula avoids, and nothing else."""
    k, phi = torch.empty(x.shape[0], x.shape[0]), torch.empty_like(s)
    return lambda: (torch.mm(x, x.mT, out=k), torch.mm(k, s, out=phi))


def differs(peer: Tensor, own: Tensor) -> str:
    """What is wrong with a peer that does not compute what ours does, or nothing."""
    error = float((peer - own).abs().max() / own.abs().max())
    return "" if error <= TOLERANCE else f"computes something else: {error:.1e} off"


def groups(sizes: Sizes) -> list[Callable[[], Group]]:
    """One maker a group, as ``optimizers.groups``."""
    return [
        partial(_middle, sizes),
        partial(_both_forms, sizes, sizes.low, 0.035, sizes.slow_rounds),
        partial(_bare, sizes, sizes.wide, 0.6),
        partial(_bare, sizes, sizes.odd, 0.7),
        partial(_packages, sizes, sizes.planar, {KEOPS: 0.3}),
        partial(_packages, sizes, sizes.middle, {KEOPS: 0.2, NUMPYRO: 0.2, PYRO: 0.2}),
        partial(_packages, sizes, sizes.small, {PYRO: 0.2}),
        partial(_plain, sizes, sizes.few, 0.5),
        partial(_plain, sizes, sizes.batch, 0.5),
        partial(_median, sizes),
        partial(_kernels, sizes),
        partial(_discrepancy, sizes),
        partial(_backward, sizes),
    ]


def case(shape: Shape, what: str = "direction") -> str:
    n, d = shape[-2:]
    size = f"n = {n:,}, d = {d:,}"
    return f"{what}, {f'{shape[0]} of ' if len(shape) == 3 else ''}{size}"


def _pairs(shape: Shape) -> int:
    return shape[-2] ** 2 * (shape[0] if len(shape) == 3 else 1)


Function = Callable[[Tensor, Tensor, float], Tensor]


def _against(
    sizes: Sizes,
    shape: Shape,
    own: tuple[str, Function],
    peers: dict[str, tuple[Function, float | None]],
    what: str = "direction",
    rounds: int = 0,
    turn_seconds: float = 0.0,
) -> Group:
    """Ours beside functions of the same operands, each checked on the first thousand particles."""
    x, s, h = problem(shape)
    name, function = own
    few = x[..., :1000, :], s[..., :1000, :], h
    expected = function(*few)
    contestants = [Contestant(name, partial(function, x, s, h))]
    rows = []
    for peer, (other, reach) in peers.items():
        missing = differs(other(*few), expected)
        rows.append(Row(case(shape, what), peer, name, reach, 0, missing))
        if not missing:
            contestants.append(Contestant(peer, partial(other, x, s, h)))
    return Group(_pairs(shape), contestants, rows, turn_seconds, rounds=rounds)


def _plain(sizes: Sizes, shape: Shape, reach: float) -> Group:
    # Only the small problems fit in the cache.
    turn_seconds = sizes.turn_seconds if _pairs(shape) * shape[-1] < 1 << 20 else 0.0
    return _against(sizes, shape, (OURS, ours), {PLAIN: (plain, reach)}, turn_seconds=turn_seconds)


def _both_forms(sizes: Sizes, shape: Shape, reach: float, rounds: int = 0) -> Group:
    peers: dict[str, tuple[Function, float | None]] = {WRITTEN: (written, reach), PLAIN: (plain, reach)}
    return _against(sizes, shape, (OURS, ours), peers, rounds=rounds)


def _middle(sizes: Sizes) -> Group:
    return _with_bare(_both_forms(sizes, sizes.middle, 0.08), sizes.middle, 0.5)


def _bare(sizes: Sizes, shape: Shape, reach: float) -> Group:
    return _with_bare(_against(sizes, shape, (OURS, ours), {}), shape, reach)


def _with_bare(group: Group, shape: Shape, reach: float) -> Group:
    x, s, _ = problem(shape)
    group.contestants.append(Contestant(BARE, bare(x, s)))
    group.rows.append(Row(case(shape), BARE, OURS, reach, 0))
    return group


def _packages(sizes: Sizes, shape: Shape, reaches: dict[str, float]) -> Group:
    x, s, h = problem(shape)
    few = x[:1000].contiguous(), s[:1000].contiguous(), h
    contestants = [Contestant(OURS, partial(ours, x, s, h))]
    rows = []
    for name, reach in reaches.items():
        peer = PEERS[name]
        missing = peer.missing()
        if not missing:
            try:
                missing = differs(peer.direction(*few)(), ours(*few))
                contestants += [] if missing else [Contestant(name, peer.direction(x, s, h))]
            except (
                Exception
            ) as error:  # no compiler for KeOps, no memory for Pyro, another version's interface
                missing = reason(error)
        rows.append(Row(case(shape), name, OURS, reach, 0, missing))
    slow = _pairs(shape) >= 1 << 25
    return Group(_pairs(shape), contestants, rows, rounds=sizes.slow_rounds if slow else 0)


def _median(sizes: Sizes) -> Group:
    """The exact median bandwidth, without and with the last one as a hint."""
    x, s, h = problem(sizes.middle)
    found = median_bandwidth(x)
    few = x[:999]  # an odd number of distances: of an even one torch takes the lower of the two middle ones
    contestants = [
        Contestant(OURS, partial(ours, x, s, h)),
        Contestant("median", partial(median_bandwidth, x)),
        Contestant("hinted", partial(median_bandwidth, x, hint=found)),
    ]
    missing = differs(cdist_median(few), median_bandwidth(few))
    if not missing:
        contestants.append(Contestant(CDIST, partial(cdist_median, x)))
    rows = [
        Row(case(sizes.middle, "exact median"), OURS, "median", 0.8, 0),
        Row(case(sizes.middle, "exact median, hint"), OURS, "hinted", None, 0),
        Row(case(sizes.middle, "exact median"), CDIST, "median", None, 0, missing),
    ]
    return Group(_pairs(sizes.middle), contestants, rows)


def _kernels(sizes: Sizes) -> Group:
    made = [
        _against(
            sizes,
            sizes.middle,
            (f"svgd_direction, {kernel}", partial(ours, kernel=kernel)),
            {f"{PLAIN}, {kernel}": (other, None)},
            f"direction, {kernel}",
        )
        for kernel, other in (("imq", plain_imq), ("laplace", plain_laplace))
    ]
    first, second = made
    return Group(first.elements, first.contestants + second.contestants, first.rows + second.rows)


def _discrepancy(sizes: Sizes) -> Group:
    return _against(
        sizes,
        sizes.middle,
        ("kernel_stein_discrepancy", discrepancy),
        {PLAIN: (plain_discrepancy, None)},
        "discrepancy",
    )


def _backward(sizes: Sizes) -> Group:
    return _against(
        sizes,
        sizes.middle,
        ("svgd_direction, backward", partial(backward, ours)),
        {f"{PLAIN}, autograd": (partial(backward, plain), None)},
        "forward + backward",
        rounds=sizes.slow_rounds,
    )
