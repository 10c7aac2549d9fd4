"""The Stein operations on a device against the float64 reference on the CPU, and what a device alone can show.

Products of tensor cores round otherwise than a CPU's, so that results are near each other, not equal; but order
statistics of distances must be those of the kernel's own distances to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS
from fekernels._runtime import backends
from tests.gpu.checks import Check, NotPossible, Numbers, Target

# The others are the reference's everywhere.
NATIVE = [(code, row) for code, row in enumerate(KERNELS) if row.native]
BETA, C, TEMPERATURE = -0.4, 1.3, 0.7
PRECISIONS = ("fp32", "tf32", "bf16x3")
TOLERANCE = (1e-5, 4e-3, 2e-4)  # of the largest element, by precision

# (B, n, d): one particle, tiles of 16 to 128 give or take one, every padding of d, several strips and parts of sums.
SHAPES = (
    (1, 1, 1), (3, 2, 1), (2, 129, 2), (1, 5000, 3), (5, 33, 8), (256, 16, 6), (1, 127, 9), (2, 128, 16), (1, 1000, 17),
    (3, 64, 33), (1, 2049, 64), (1, 300, 65), (1, 1025, 128), (2, 65, 129), (1, 700, 784), (1, 50, 20_011), (0, 4, 3),
    (2, 0, 3), (2, 4, 0),
)  # fmt: skip
GRADIENT_SHAPES = (
    (1, 1, 1),
    (2, 129, 2),
    (5, 33, 8),
    (1, 1000, 17),
    (2, 300, 65),
    (1, 130, 784),
    (0, 4, 3),
)
WIDTHS = (1, 3, 70)  # columns of weights


@dataclass(frozen=True)
class Problem:
    """Operands on the CPU."""

    x: Tensor
    s: Tensor
    h: Tensor
    grad: Tensor

    def on(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(particles, scores, bandwidth, gradient) there; dtype of all of them, unless each keeps its own."""
        operands = (self.x, self.s, self.h, self.grad)
        return tuple(t.to(device=device, dtype=dtype, copy=True) for t in operands)  # type: ignore[return-value]


def make_problem(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, offset: float = 3.0
) -> Problem:
    """Bandwidths of a tenth of the typical squared distance, 2 d, to half of it."""
    batch, n, d = shape
    generator = torch.Generator().manual_seed(1000 * n + d)
    x, s, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    h = max(d, 1) * (0.2 + 0.8 * torch.rand(batch, generator=generator))
    return Problem((x + offset).to(dtype), s.to(dtype), h, grad.to(dtype))


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


def check_direction(kernel: int, target: Target) -> Numbers:
    """Every shape and precision; 16-bit particles; far from the origin; no bandwidth; the same bits again."""
    run = implementation("svgd_direction", target)
    near = Nearness()
    constants = (kernel, BETA, C, TEMPERATURE)
    problems = [(str(shape), make_problem(shape), 1.0) for shape in SHAPES]
    problems += [
        (f"{shape} at 10^4", make_problem(shape, offset=1e4), 3.0) for shape in ((1, 700, 3), (1, 700, 64))
    ]
    for name, problem, slack in problems:
        x, s, h, _ = problem.on(CPU, torch.float64)
        exact = reference("svgd_direction", x, s, h, *constants, 0)
        x, s, h, _ = problem.on(target.device)
        for precision, tolerance in enumerate(TOLERANCE):
            got = run(x, s, h, *constants, precision)
            near.add(f"{name}, {PRECISIONS[precision]}", got, exact, slack * tolerance)
            assert torch.equal(got, run(x, s, h, *constants, precision)), (
                f"{name}: other bits the second time"
            )
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        for shape in ((1, 500, 3), (1, 500, 64), (1, 100, 300)):
            problem = make_problem(shape, dtype)
            x, s, h, _ = problem.on(CPU)
            exact = reference("svgd_direction", x.double(), s.double(), h.double(), *constants, 0)
            x, s, h, _ = problem.on(target.device)
            got = run(x, s, h, *constants, 0)
            assert got.dtype == dtype, f"{got.dtype} for {dtype} particles"
            near.add(f"{shape}, {dtype}", got, exact, tolerance)
    for d in (3, 64, 300):
        problem = make_problem((2, 200, d))
        problem.x[:, 100:] = problem.x[:, :100]
        problem.h[1] = 0
        x, s, h, _ = problem.on(CPU, torch.float64)
        exact = reference("svgd_direction", x, s, h, *constants, 0)
        x, s, h, _ = problem.on(target.device)
        near.add(f"no bandwidth, d = {d}", run(x, s, h, *constants, 0), exact, TOLERANCE[0])
    return near.result()


def check_batches(target: Target) -> Numbers:
    """A problem's bits do not depend on those beside it."""
    run = implementation("svgd_direction", target)
    problems = 0
    for shape in ((5, 100, 3), (5, 300, 20), (3, 200, 64), (3, 100, 300)):
        x, s, h, _ = make_problem(shape).on(target.device)
        whole = run(x, s, h, 0, BETA, C, TEMPERATURE, 0)
        for i in range(shape[0]):
            alone = run(
                x[i : i + 1].clone(), s[i : i + 1].clone(), h[i : i + 1].clone(), 0, BETA, C, TEMPERATURE, 0
            )
            assert torch.equal(whole[i], alone[0]), f"{shape}: problem {i} has other bits alone"
            problems += 1
    return {"problems": problems}


def check_backward(kernel: int, target: Target) -> Numbers:
    """Gradients of every shape by particles, scores and bandwidth."""
    run = implementation("svgd_direction_backward", target)
    near = Nearness()
    constants = (kernel, BETA, C, TEMPERATURE)
    for shape in GRADIENT_SHAPES:
        problem = make_problem(shape)
        x, s, h, grad = problem.on(CPU, torch.float64)
        exact = reference("svgd_direction_backward", grad, x, s, h, *constants, 0, 7)
        x, s, h, grad = problem.on(target.device)
        for precision in (0, 1):
            got = run(grad, x, s, h, *constants, precision, 7)
            for name, a, b in zip(("particles", "scores", "bandwidth"), got, exact, strict=True):
                near.add(f"{shape}, {PRECISIONS[precision]}, {name}", a, b, 3 * TOLERANCE[precision])
    return near.result()


def check_discrepancy(target: Target) -> Numbers:
    """The kernels that have one, one set of weights for all problems and one each, few columns and many."""
    run = implementation("kernel_stein_discrepancy", target)
    near = Nearness()
    for kernel, row in NATIVE:
        if not row.discrepancy:
            continue
        for shape in GRADIENT_SHAPES:
            problem = make_problem(shape)
            for columns in WIDTHS:
                generator = torch.Generator().manual_seed(columns)
                rows = 1 if columns == 1 else shape[0]
                weights = torch.randn(rows, shape[1], columns, generator=generator)
                x, s, h, _ = problem.on(CPU, torch.float64)
                exact = reference("kernel_stein_discrepancy", x, s, h, weights.double(), kernel, BETA, C)
                ones = torch.ones(1, shape[1], 1, dtype=torch.float64)
                whole = reference("kernel_stein_discrepancy", x, s, h, ones, kernel, BETA, C)
                x, s, h, _ = problem.on(target.device)
                got = run(x, s, h, weights.to(target.device), kernel, BETA, C)
                # A sum over n^2 terms of either sign, and a whole one of which it is a part.
                scale = max(
                    [
                        0.0,
                        *exact.abs().flatten().tolist(),
                        *(whole.abs() / shape[1] ** 0.5).flatten().tolist(),
                    ]
                )
                near.add(f"{row.name}, {shape}, {columns} columns", got, exact, TOLERANCE[0], scale)
    return near.result()


def own_distances(x: Tensor) -> Tensor:
    """The squared distances of pairs i < j, sorted, in float32: differences, and a chain of fma (by way of float64)."""
    t = torch.zeros(x.shape[1], x.shape[1])
    for column in x[0].float().unbind(1):
        difference = (column.unsqueeze(1) - column.unsqueeze(0)).double()
        t = (difference * difference + t.double()).float()
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return t[above].sort().values


def check_ranks(target: Target) -> Numbers:
    """Order statistics: all ranks of few particles to the bit (Triton's), some of many; with and without hints."""
    run = implementation("sq_dist_rank", target)
    near = Nearness()
    large = ((5000, 3), (5000, 64)) if target.device.type == "cuda" else ()  # of which a sample is taken
    for n, d in ((2, 1), (37, 3), (200, 20), *large):
        x = make_problem((1, n, d)).x
        expected = own_distances(x)
        count = len(expected)
        ranks = sorted({0, count // 3, (count - 1) // 2, count // 2, count - 1})
        wanted = expected[torch.tensor(ranks)].unsqueeze(0)
        there = x.to(target.device)
        hints = (None, wanted, wanted * 1.01, wanted * 7)
        for hint in hints:
            got = run(there, ranks, None if hint is None else hint.to(target.device))
            if target.backend == "triton":
                assert torch.equal(got.cpu(), wanted), f"{n} x {d}: {got.tolist()}, not {wanted.tolist()}"
            near.add(f"{n} x {d}", got, wanted, 1e-5)
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
    for shape in ((1, 300, 3), (1, 5000, 20), (1, 100, 300)):
        x, s, h, grad = make_problem(shape).on(target.device)
        weights = torch.ones(1, shape[1], 1, device=target.device)
        for again in range(2):  # what is compiled at first use may wait
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if again else mode)
            try:
                direction(x, s, h, 0, BETA, C, TEMPERATURE, 0)
                backward(grad, x, s, h, 0, BETA, C, TEMPERATURE, 0, 7)
                discrepancy(x, s, h, weights, 0, BETA, C)
                rank(x, [0, 7], None)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    return {"shapes": 3}


def check_graph(target: Target) -> Numbers:
    """A captured median and direction, replayed with other particles, give the eager bits."""
    direction, rank = (implementation(name, target) for name in ("svgd_direction", "sq_dist_rank"))

    def step(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        h = rank(x, [x.shape[1] * (x.shape[1] - 1) // 4], None).view(-1)
        return h, direction(x, s, h, 0, BETA, C, TEMPERATURE, 0)

    replays = 0
    for shape in ((1, 300, 3), (1, 5000, 20), (1, 100, 300)):
        x, s, _, _ = make_problem(shape).on(target.device)
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
    phi = run(x, s, h, 0, BETA, C, TEMPERATURE, 0)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 40 * 4 * n * d, f"{extra / 1e6:.0f} MB beyond the operands"
    near = Nearness()
    wide, scores = x[0].double(), s[0].double()
    for i in (0, 1, 499_999, 999_999):
        difference = wide[i] - wide
        k = torch.exp(-difference.square().sum(1) / 0.5)
        k[i] = 0
        repulsion = TEMPERATURE * (2 / 0.5) * (k[:, None] * difference).sum(0)
        exact = (scores[i] + k @ scores + repulsion) / n
        near.add(f"particle {i}", phi[0, i], exact.cpu(), TOLERANCE[0])
    return {**near.result(), "extra_bytes_per_element": round(extra / (n * d), 1)}


def svgd_checks() -> list[Check]:
    return [
        *(Check(f"svgd_direction: {row.name}", partial(check_direction, code)) for code, row in NATIVE),
        Check("svgd_direction: batches", check_batches),
        *(
            Check(f"svgd_direction backward: {row.name}", partial(check_backward, code))
            for code, row in NATIVE
        ),
        Check("kernel_stein_discrepancy", check_discrepancy),
        Check("sq_dist_rank", check_ranks),
        Check("svgd: no host synchronisation", check_no_sync, needs_gpu=True),
        Check("svgd: CUDA graph of median and direction", check_graph, needs_gpu=True),
        Check("svgd_direction: a million particles", check_many, needs_gpu=True, slow=True),
    ]
