"""The Stein operations on a device against the float64 reference on the CPU, and what a device alone can show.

The cases are the table's, all sizes with all precisions. Products of tensor cores round otherwise than a CPU's, so that
results are near each other, not equal; but order statistics of distances must be those of the kernel's own distances to
the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from fekernels._runtime import backends
from tests.gpu.checks import Check, NotPossible, Numbers, Target
from tests.support.stein import (
    BATCHES,
    DIRECTION_ROWS,
    DISCREPANCY_ROWS,
    DISCREPANCY_SIZES,
    DTYPE_SIZES,
    DTYPES,
    EMPTY_SIZES,
    GRADIENT_ROWS,
    GRADIENT_SIZES,
    HEAVY,
    NATIVE,
    NATIVE_FINITE,
    ON_A_DEVICE,
    PRECISIONS,
    SIZES,
    TEMPERATURE,
    WEIGHTS,
    Case,
    Problem,
    Size,
    constants,
)
from tests.support.stein_exact import direction_of, discrepancies_of, gradients_of, weighted_sums
from tests.support.stein_kernels import by_fma
from tests.support.stein_ranks import EXACT, HINTS, RankRow, some_ranks
from tests.support.stein_ranks import ROWS as RANK_ROWS

Result = TypeVar("Result")

OPERANDS = ("particles", "scores", "bandwidth")
WAYS = (Size(1, 300, 3), Size(1, 5000, 20), Size(1, 100, 300))  # by differences, tiles, strips
# Relative to the largest element, as the others of a size are: what cancels has regimes, and tests/contract.
SHAPES = [*SIZES, *HEAVY, *BATCHES, *ON_A_DEVICE, *EMPTY_SIZES]
GRADIENT_SHAPES = [*GRADIENT_SIZES, *DTYPE_SIZES, *BATCHES, *EMPTY_SIZES]


def make_problem(
    size: Size, dtype: torch.dtype = torch.float32, offset: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(particles, scores, bandwidth, gradient) of a size, the same ones in every process."""
    batch, n, d = size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * n + d)
        problem = Case(n, d, (batch,), offset=offset).make(dtype)
        return (*problem.leaves(), torch.randn(size).to(dtype))  # type: ignore[return-value]


def seeded(make: Callable[[Any], Result], row: Any) -> Result:
    """What does not depend on what was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(row)


def on(device: torch.device, *operands: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies of the operands there; of one dtype, unless each keeps its own."""
    return [t.to(device=device, dtype=dtype, copy=True) for t in operands]


class Nearness:
    """Compares results with float64 ones, relative to the largest element of each."""

    def __init__(self) -> None:
        self.results = 0
        self.largest = 0.0
        self.differences: list[str] = []

    def add(
        self, name: str, got: Tensor, exact: Tensor, tolerance: float, scale: float | None = None
    ) -> None:
        got, exact = got.detach().double().cpu(), exact.double()
        assert got.shape == exact.shape, f"{name}: {tuple(got.shape)}, not {tuple(exact.shape)}"
        self.results += 1
        if not got.numel():
            return
        if scale is None:
            scale = float(exact.abs().max())
        error = float((got - exact).abs().max()) / max(scale, 1e-30)
        self.largest = max(self.largest, error / tolerance)
        if not error <= tolerance:  # NaN is no small error
            self.differences.append(f"{name}: off by {error:.2e} of the largest, not {tolerance:.0e}")

    def result(self) -> Numbers:
        assert not self.differences, "; ".join(self.differences[:6])
        return {"results": self.results, "of_tolerance": round(self.largest, 3)}


def implementation(name: str, target: Target):  # type: ignore[no-untyped-def]
    obstacle = backends._obstacle(target.backend, target.device.type, name)
    if obstacle is not None:
        raise NotPossible(obstacle)
    return backends.implementation(name, target.backend)


def reference(name: str, *arguments: object):  # type: ignore[no-untyped-def]
    return backends.implementation(name, "reference")(*arguments)


CPU = torch.device("cpu")


def check_direction(name: str, target: Target) -> Numbers:
    """Every size and precision; every regime; 16-bit particles and scores; the same bits again."""
    run = implementation("svgd_direction", target)
    near = Nearness()
    call = (*constants(name), TEMPERATURE)
    for size in SHAPES:
        operands = make_problem(size)[:3]
        exact = reference("svgd_direction", *on(CPU, *operands, dtype=torch.float64), *call, 0)
        there = on(target.device, *operands)
        for precision, (label, tolerance) in enumerate(PRECISIONS.items()):
            got = run(*there, *call, precision)
            near.add(f"{size}, {label}", got, exact, tolerance)
            assert torch.equal(got, run(*there, *call, precision)), f"{size}: other bits the second time"
    for row in DIRECTION_ROWS:
        if row.kernel == name:
            problem, _, (exact,), (scale,) = seeded(direction_of, row)
            near.add(
                str(row), run(*on(target.device, *problem.leaves()), *call, 0), exact, 1e-5, float(scale)
            )
    for size, particles, scores in product(DTYPE_SIZES, DTYPES, DTYPES):
        x, s, h, _ = make_problem(size)
        x, s = x.to(particles), s.to(scores)
        exact = reference("svgd_direction", *on(CPU, x, s, h, dtype=torch.float64), *call, 0)
        got = run(*on(target.device, x, s, h), *call, 0)
        assert got.dtype == particles, f"{got.dtype} for {particles} particles"
        near.add(f"{size}, {particles}, {scores}", got, exact, 1e-5 + torch.finfo(particles).eps)
    return near.result()


def check_batches(target: Target) -> Numbers:
    """A problem's bits do not depend on those beside it."""
    run = implementation("svgd_direction", target)
    problems = 0
    call = (*constants("rbf"), TEMPERATURE, 0)
    for size in BATCHES:
        operands = on(target.device, *make_problem(size)[:3])
        whole = run(*operands, *call)
        for i in range(size.batch):
            alone = run(*(t[i : i + 1].clone() for t in operands), *call)
            assert torch.equal(whole[i], alone[0]), f"{size}: problem {i} has other bits alone"
            problems += 1
    return {"problems": problems}


def check_backward(name: str, target: Target) -> Numbers:
    """Gradients of every size and regime by particles, scores and bandwidth."""
    run = implementation("svgd_direction_backward", target)
    near = Nearness()
    call = (*constants(name), TEMPERATURE)
    for size in GRADIENT_SHAPES:
        *operands, grad = make_problem(size)
        exact = reference(
            "svgd_direction_backward", *on(CPU, grad, *operands, dtype=torch.float64), *call, 0, 7
        )
        for precision, tolerance in enumerate((1e-5, 4e-3)):
            got = run(*on(target.device, grad, *operands), *call, precision, 7)
            for what, a, b in zip(OPERANDS, got, exact, strict=True):
                near.add(f"{size}, {precision}, {what}", a, b, 3 * tolerance)
    for row in GRADIENT_ROWS:
        if row.kernel == name:
            problem, upstream, exact, scales = seeded(gradients_of, row)
            got = run(*on(target.device, upstream, *problem.leaves()), *call, 0, 7)
            for what, a, b, scale in zip(OPERANDS, got, exact, scales, strict=True):
                near.add(f"{row}, {what}", a, b, 1e-5, float(scale))
    return near.result()


def check_discrepancy(target: Target) -> Numbers:
    """Kernels that have one, every regime; one set of weights for all problems and one each, few columns and many."""
    run = implementation("kernel_stein_discrepancy", target)
    near = Nearness()
    for row in DISCREPANCY_ROWS:
        problem, weights, (exact,), (scale,) = seeded(discrepancies_of, row)
        got = run(*on(target.device, *problem.leaves(), weights), *constants(row.kernel))
        near.add(str(row), got, exact, 1e-5, float(scale.max()))
    for name, size, columns in product(NATIVE_FINITE, DISCREPANCY_SIZES, WEIGHTS):
        problem = Problem(*make_problem(size)[:3])
        for of in {1, size.batch}:
            weights = torch.randn(of, size.n, columns, generator=torch.Generator().manual_seed(columns))
            exact, scale = weighted_sums(problem, name, weights)
            got = run(*on(target.device, *problem.leaves(), weights), *constants(name))
            near.add(f"{name}, {size}, {of} x {columns} columns", got, exact, 1e-5, float(scale.max()))
    return near.result()


def check_ranks(target: Target) -> Numbers:
    """Order statistics: of every kind and hint to the bit (Triton's), some of many particles."""
    run = implementation("sq_dist_rank", target)
    near = Nearness()
    large = (Size(1, 5000, 3), Size(1, 5000, 64)) if target.device.type == "cuda" else ()  # from a sample
    rows = [*RANK_ROWS, *(RankRow("normal", size, torch.float32, "near") for size in large)]
    for row in rows:
        x = seeded(RankRow.make, row)
        above = torch.triu_indices(x.shape[1], x.shape[1], 1)
        wanted = by_fma(x)[:, above[0], above[1]].sort(1).values
        ranks = some_ranks(wanted.shape[1])
        wanted = wanted[:, ranks]
        hint = HINTS[row.hint](wanted)
        got = run(x.to(target.device), ranks, None if hint is None else hint.to(target.device)).cpu()
        if target.backend == "triton":
            assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1)), f"{row}: other distances"
        if row.kind in EXACT:
            near.add(str(row), got, wanted, 1e-5)
    # Ranks beyond 2^31, of distances whose order is known: particles on a line.
    if target.device.type == "cuda":
        n = 70_000
        x = torch.arange(n, dtype=torch.float32, device=target.device).view(1, n, 1)
        gaps = (0, 1, n // 2, n - 1)  # the last pair with each gap or less
        ranks = [sum(n - g for g in range(1, gap + 1)) - 1 for gap in gaps[1:]]
        got = run(x, ranks, None)
        assert got.tolist() == [[float(torch.tensor(gap, dtype=torch.float32).square()) for gap in gaps[1:]]]
    return near.result()


def check_no_sync(target: Target) -> Numbers:
    """None of them waits for the device."""
    names = ("svgd_direction", "svgd_direction_backward", "kernel_stein_discrepancy", "sq_dist_rank")
    direction, backward, discrepancy, rank = (implementation(name, target) for name in names)
    mode = torch.cuda.get_sync_debug_mode()
    for shape in WAYS:
        x, s, h, grad = on(target.device, *make_problem(shape))
        weights = torch.ones(1, shape.n, 1, device=target.device)
        for again in range(2):  # what is compiled at first use may wait
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if again else mode)
            try:
                direction(x, s, h, *constants("rbf"), TEMPERATURE, 0)
                backward(grad, x, s, h, *constants("rbf"), TEMPERATURE, 0, 7)
                discrepancy(x, s, h, weights, *constants("rbf"))
                rank(x, [0, 7], None)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    return {"shapes": 3}


def check_graph(target: Target) -> Numbers:
    """A captured median and direction, replayed with other particles, give the eager bits."""
    direction, rank = (implementation(name, target) for name in ("svgd_direction", "sq_dist_rank"))

    def step(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        h = rank(x, [x.shape[1] * (x.shape[1] - 1) // 4], None).view(-1)
        return h, direction(x, s, h, *constants("rbf"), TEMPERATURE, 0)

    replays = 0
    for shape in WAYS:
        x, s, _, _ = on(target.device, *make_problem(shape))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(x, s)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(x, s)
        for replay in range(3):
            x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(replay)) * (1 + replay))
            graph.replay()
            for a, b in zip(captured, step(x, s), strict=True):
                assert torch.equal(a, b), f"{shape}: replay {replay} has other bits"
            replays += 1
    return {"replays": replays}


def check_many(target: Target) -> Numbers:
    """A million particles in three dimensions, in O(n d) memory; rows of the result against float64."""
    run = implementation("svgd_direction", target)
    n, d = 1_000_000, 3
    generator = torch.Generator(target.device).manual_seed(0)
    x, s = (torch.randn(1, n, d, device=target.device, generator=generator) for _ in range(2))
    h = torch.full((1,), 0.5, device=target.device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    phi = run(x, s, h, *constants("rbf"), TEMPERATURE, 0)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 40 * 4 * n * d, f"{extra / 1e6:.0f} MB beyond the operands"
    near = Nearness()
    exact_x, scores = x[0].double(), s[0].double()
    for i in (0, 1, 499_999, 999_999):
        difference = exact_x[i] - exact_x
        k = torch.exp(-difference.square().sum(1) / 0.5)
        k[i] = 0
        repulsion = TEMPERATURE * (2 / 0.5) * (k[:, None] * difference).sum(0)
        exact = (scores[i] + k @ scores + repulsion) / n
        near.add(f"particle {i}", phi[0, i], exact.cpu(), PRECISIONS["fp32"])
    return {**near.result(), "extra_bytes_per_element": round(extra / (n * d), 1)}


def svgd_checks() -> list[Check]:
    return [
        *(Check(f"svgd_direction: {name}", partial(check_direction, name)) for name in NATIVE),
        Check("svgd_direction: batches", check_batches),
        *(Check(f"svgd_direction backward: {name}", partial(check_backward, name)) for name in NATIVE),
        Check("kernel_stein_discrepancy", check_discrepancy),
        Check("sq_dist_rank", check_ranks),
        Check("svgd: no host synchronisation", check_no_sync, needs_gpu=True),
        Check("svgd: CUDA graph of median and direction", check_graph, needs_gpu=True),
        Check("svgd_direction: a million particles", check_many, needs_gpu=True, slow=True),
    ]
