"""The Stein cases: direction, discrepancy and median beside PyTorch and packages, float32, the bandwidth given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fekernels._catalogue import stein as catalogue
from fekernels._runtime.backends import use_backend
from fekernels.bench import peers
from fekernels.bench.case import Case, Cost, Group, Row, Shape
from fekernels.bench.packages import KEOPS, NUMPYRO, PACKAGES, PYRO, reason
from fekernels.bench.peers import Direction
from fekernels.bench.timing import Contestant
from fekernels.ops.stein.kernel_stein_discrepancy import kernel_stein_discrepancy
from fekernels.ops.stein.svgd_direction import svgd_direction
from fekernels.stein.median import median_bandwidth

__all__ = ["BACKWARD", "BARE", "CASES", "CDIST", "DISCREPANCY", "OURS", "PLAIN", "WRITTEN", "problem"]

OURS, BACKWARD, DISCREPANCY = "svgd_direction", "svgd_direction, backward", "kernel_stein_discrepancy"
MEDIAN, HINTED = "median_bandwidth", "median_bandwidth, hint"
PLAIN, WRITTEN = "plain torch, in place", "plain torch, cdist"
REFERENCE = "reference backend"
BARE = "X X^T and K V alone"
CDIST = "torch.cdist + median"

KERNELS = tuple(row.name for row in catalogue.KERNELS if row.native and row.name != "rbf")  # beside rbf

TOLERANCE = 1e-4  # of the largest element, between two float32 results of different summation orders
FEW = 1000  # particles on which a peer has to agree with ours


def problem(shape: Shape) -> tuple[Tensor, Tensor, float]:
    """Particles, scores and a bandwidth at which far pairs still count, so that wrong ones would show."""
    generator = torch.Generator().manual_seed(0)
    x, s = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, s, float(shape[-1])


def ours(x: Tensor, s: Tensor, h: float, kernel: str = "rbf") -> Tensor:
    return svgd_direction(x, s, bandwidth=h, kernel=kernel)


def discrepancy(x: Tensor, s: Tensor, h: float) -> Tensor:
    return kernel_stein_discrepancy(x, s, bandwidth=h)


def on_the_reference(x: Tensor, s: Tensor, h: float, kernel: str) -> Tensor:
    with use_backend("reference"):
        return ours(x, s, h, kernel)


def backward(direction: Direction, x: Tensor, s: Tensor, h: float) -> Tensor:
    """Forward and the gradients of particles and scores."""
    x, s = x.detach().requires_grad_(), s.detach().requires_grad_()
    # s as the upstream gradient: any will do.
    return torch.stack(torch.autograd.grad(direction(x, s, h), (x, s), s.detach()))


def differs(peer: Tensor, own: Tensor) -> str:
    """What is wrong with a peer that does not compute what ours does, or nothing."""
    error = float((peer - own).abs().max() / own.abs().max())
    return "" if error <= TOLERANCE else f"computes something else: {error:.1e} off"


def _against(name: str, own: Direction, others: Mapping[str, Direction], shape: Shape) -> Group:
    """Ours beside functions of the same operands, each checked on the first particles."""
    x, s, h = problem(shape)
    few = x[..., :FEW, :], s[..., :FEW, :], h
    expected = own(*few)
    contestants, missing = [Contestant(name, partial(own, x, s, h))], {}
    for peer, other in others.items():
        if why := differs(other(*few), expected):
            missing[peer] = why
        else:
            contestants.append(Contestant(peer, partial(other, x, s, h)))
    return Group(contestants, missing)


def _with_bare(others: Mapping[str, Direction], shape: Shape) -> Group:
    group = _against(OURS, ours, others, shape)
    x, s, _ = problem(shape)
    return Group([*group.contestants, Contestant(BARE, peers.bare(x, s))], group.missing)


def _packages(names: tuple[str, ...], shape: Shape) -> Group:
    x, s, h = problem(shape)
    few = x[:FEW].contiguous(), s[:FEW].contiguous(), h
    contestants, missing = [Contestant(OURS, partial(ours, x, s, h))], {}
    for name in names:
        package = PACKAGES[name]
        why = package.missing()
        if not why:
            try:
                why = differs(package.direction(*few)(), ours(*few))
                contestants += [] if why else [Contestant(name, package.direction(x, s, h))]
            except (
                Exception
            ) as error:  # no compiler for KeOps, no memory for Pyro, another version's interface
                why = reason(error)
        if why:
            missing[name] = why
    return Group(contestants, missing)


def _median(shape: Shape) -> Group:
    """The exact median bandwidth, without and with the last one as a hint."""
    x, s, h = problem(shape)
    found = median_bandwidth(x)
    # An odd number of distances: of an even one torch takes the lower of the two middle ones.
    few = x[: FEW - 1]
    contestants = [
        Contestant(OURS, partial(ours, x, s, h)),
        Contestant(MEDIAN, partial(median_bandwidth, x)),
        Contestant(HINTED, partial(median_bandwidth, x, hint=found)),
    ]
    if why := differs(peers.cdist_median(few), median_bandwidth(few)):
        return Group(contestants, {CDIST: why})
    return Group([*contestants, Contestant(CDIST, partial(peers.cdist_median, x))])


def _label(what: str, shape: Shape) -> str:
    n, d = shape[-2:]
    problems = f"{shape[0]} of " if len(shape) == 3 else ""
    return f"{what}, {problems}n = {n:,}, d = {d:,}"


def _pairs(shape: Shape) -> int:
    return shape[-2] ** 2 * (shape[0] if len(shape) == 3 else 1)


# Of an ordered pair of particles: multiply-adds in units of d, and functions. Both orders share distance and function.
# rbf: a distance and one row of K V. Other radial kernels weigh scores and particles differently: two such rows. The
# discrepancy needs of an unordered pair one inner product of particles and one of scores that have them in.
PAIR = {
    OURS: (1.5, {"exponential": 0.5}),
    DISCREPANCY: (1.0, {"exponential": 0.5}),
    MEDIAN: (0.5, {}),
    HINTED: (0.5, {}),
    **{f"{OURS}, {kernel}": (2.5, {}) for kernel in KERNELS},
}
MOVED = {OURS: 12, DISCREPANCY: 8, MEDIAN: 4, HINTED: 4, **{f"{OURS}, {kernel}": 12 for kernel in KERNELS}}


def _costs(shape: Shape) -> dict[str, Cost]:
    found = {}
    for name, (products, functions) in PAIR.items():
        pair = Cost(operations={"multiply-add": products * shape[-1], **functions}) * _pairs(shape)
        found[name] = Cost(MOVED[name] * math.prod(shape), pair.operations)
    return found


def _case(
    name: str,
    shapes: tuple[Shape, Shape, Shape],
    build: Callable[[Shape], Group],
    rows: tuple[Row, ...],
    what: str = "direction",
    slow: bool = False,
    cached: bool = False,
) -> Case:
    """``slow``: a contestant takes seconds; three rounds and no more."""
    return Case(
        f"stein/{name}",
        partial(_label, what),
        shapes,
        build,
        rows,
        _pairs,
        _costs,
        cached=cached,
        pairs=True,
        rounds=3 if slow else 9,
        seconds=0.0 if slow else 3.0,
    )


def _of_packages(
    name: str, shapes: tuple[Shape, Shape, Shape], aims: Mapping[str, float], slow: bool = True
) -> Case:
    rows = tuple(Row(OURS, package, aim) for package, aim in aims.items())
    return _case(name, shapes, partial(_packages, tuple(aims)), rows, slow=slow)


def _of_kernel(kernel: str) -> Case:
    name = f"{OURS}, {kernel}"
    if kernel in peers.DIRECTIONS:
        peer, other = f"{PLAIN}, {kernel}", peers.DIRECTIONS[kernel]
    else:
        peer, other = REFERENCE, partial(on_the_reference, kernel=kernel)
    build = partial(_against, name, partial(ours, kernel=kernel), {peer: other})
    return _case(kernel, MIDDLE, build, (Row(name, peer),), f"direction, {kernel}")


MIDDLE = ((10_000, 64), (1_000, 64), (41, 6))
BOTH: Mapping[str, Direction] = {WRITTEN: peers.written, PLAIN: peers.plain}
JUST_PLAIN: Mapping[str, Direction] = {PLAIN: peers.plain}

CASES = (
    _case(
        "middle",
        MIDDLE,
        partial(_with_bare, BOTH),
        (Row(OURS, WRITTEN, 0.08), Row(OURS, PLAIN, 0.08), Row(OURS, BARE, 0.5)),
    ),
    _case(
        "low_dimension",
        ((20_000, 16), (2_000, 16), (50, 4)),
        partial(_against, OURS, ours, BOTH),
        (Row(OURS, WRITTEN, 0.035), Row(OURS, PLAIN, 0.035)),
        slow=True,
    ),
    _case(
        "high_dimension",
        ((10_000, 256), (1_000, 256), (30, 9)),
        partial(_with_bare, {}),
        (Row(OURS, BARE, 0.6),),
    ),
    _case(
        "odd_dimension",
        ((10_000, 37), (1_000, 37), (30, 5)),
        partial(_with_bare, {}),
        (Row(OURS, BARE, 0.7),),
    ),
    _of_packages("planar_packages", ((50_000, 2), (2_000, 2), (60, 2)), {KEOPS: 0.3}),
    _of_packages("middle_packages", MIDDLE, {KEOPS: 0.2, NUMPYRO: 0.2, PYRO: 0.2}),
    _of_packages("small_packages", ((1_000, 64), (200, 64), (20, 6)), {PYRO: 0.2}, slow=False),
    _case(
        "few_particles",
        ((50, 1_000_000), (50, 20_000), (5, 300)),
        partial(_against, OURS, ours, JUST_PLAIN),
        (Row(OURS, PLAIN, 0.5),),
    ),
    _case(
        "batch",
        ((256, 16, 6), (32, 16, 6), (4, 16, 6)),
        partial(_against, OURS, ours, JUST_PLAIN),
        (Row(OURS, PLAIN, 0.5),),
        cached=True,
    ),
    _case(
        "median",
        MIDDLE,
        _median,
        (Row(MEDIAN, OURS, 0.8), Row(HINTED, OURS, None, "hint"), Row(MEDIAN, CDIST)),
        "exact median",
    ),
    *(_of_kernel(kernel) for kernel in KERNELS),
    _case(
        "discrepancy",
        MIDDLE,
        partial(_against, DISCREPANCY, discrepancy, {PLAIN: peers.discrepancy}),
        (Row(DISCREPANCY, PLAIN),),
        "discrepancy",
    ),
    _case(
        "backward",
        MIDDLE,
        partial(
            _against,
            BACKWARD,
            partial(backward, ours),
            {f"{PLAIN}, autograd": partial(backward, peers.plain)},
        ),
        (Row(BACKWARD, f"{PLAIN}, autograd"),),
        "forward + backward",
        slow=True,
    ),
)
