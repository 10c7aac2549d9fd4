"""The squared kernelised Stein discrepancy between particles and a target known by its scores.

Source: Liu, Lee & Jordan 2016, arXiv:1602.03253; Chwialkowski, Strathmann & Gretton 2016, arXiv:1602.02964; the imq
kernel, which detects non-convergence: Gorham & Mackey 2017, arXiv:1703.01717.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS, LINEAR
from fekernels._checks import floating, one_of, same_device
from fekernels._runtime import backends
from fekernels._runtime.torch_internals import is_batched
from fekernels.ops._library import LIBRARY, define_functional
from fekernels.ops.stein.bandwidths import bandwidths, is_median, no_bandwidth, positive_bandwidth
from fekernels.ops.stein.particles import (
    Kernel,
    check_kernel,
    check_particles,
    check_problems,
    check_scores,
    compute_dtype,
    dispatched,
    flatten,
    plain,
    transformed,
    which_kernel,
)
from fekernels.reference.stein import kernel_stein_discrepancy as reference

__all__ = ["kernel_stein_discrepancy", "off_diagonal_sums", "stein_kernel"]

STATISTICS = ("u", "v")


def _check(
    function: str, particles: Tensor, scores: Tensor, bandwidth: Tensor, weights: Tensor, *kernel: Any
) -> None:
    check_problems(function, particles, bandwidth, scores=scores)
    floating(function, "weights", weights)
    same_device(function, "weights", weights, particles.device)
    batch, n, _ = particles.shape
    if weights.dim() != 3 or weights.shape[0] not in (1, batch) or weights.shape[1] != n:
        raise ValueError(
            f"{function}: weights must have shape (1 or {batch}, {n}, m); got {tuple(weights.shape)}"
        )
    check_kernel(function, *kernel)
    row = KERNELS[kernel[0]]
    if not row.discrepancy:
        raise ValueError(
            f"{function}: kernel must not be {row.name}, whose discrepancy is infinite; got {kernel[0]}"
        )


def _forward(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    weights: Tensor,
    kernel: int,
    beta: float,
    c: float,
) -> Tensor:
    _check("kernel_stein_discrepancy", particles, scores, bandwidth, weights, kernel, beta, c)
    if not particles.numel() or not weights.numel():
        return _empty(particles, weights).zero_()
    if KERNELS[kernel].default_bandwidth is not None and particles.shape[1] > 1:
        positive_bandwidth("kernel_stein_discrepancy", bandwidth)
    return _sums(particles, scores, bandwidth, weights, kernel, beta, c)


def _sums(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, weights: Tensor, kernel: int, beta: float, c: float
) -> Tensor:
    implementation: Any
    if not KERNELS[kernel].native or compute_dtype(particles, scores, bandwidth) == torch.float64:
        implementation = reference.kernel_stein_discrepancy
    else:
        name = "kernel_stein_discrepancy"
        implementation = backends.implementation(name, backends.choose(particles.device.type, kernel=name))
        weights = weights.float()
    return implementation(plain(particles), plain(scores), plain(bandwidth), plain(weights), kernel, beta, c)


def _fake(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, weights: Tensor, kernel: int, beta: float, c: float
) -> Tensor:
    _check("kernel_stein_discrepancy", particles, scores, bandwidth, weights, kernel, beta, c)
    return _empty(particles, weights)


def _empty(particles: Tensor, weights: Tensor) -> Tensor:
    return particles.new_empty((particles.shape[0], weights.shape[2]), dtype=torch.float64)


def _differentiable(
    grad: Tensor, operands: tuple[Tensor, ...], wanted: tuple[bool, ...], kernel: Kernel
) -> list[Tensor | None]:
    """The gradients by plain PyTorch: functions of operands and of ``grad`` for create_graph=True, and of batches."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a path from one operand to another is left to the outer graph.
        x, s, h, weights = (operand.view_as(operand) for operand in operands)
        sums = reference.plain_discrepancy(x, s, h, weights, *kernel)
    chosen = [view for view, want in zip((x, s, h), wanted, strict=True) if want]
    gradients = iter(
        torch.autograd.grad(sums, chosen, grad, create_graph=again, allow_unused=True, materialize_grads=True)
    )
    return [next(gradients) if want else None for want in wanted]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, particles: Tensor, scores: Tensor, bandwidth: Tensor, weights: Tensor, kernel: Kernel
    ) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(particles, scores, bandwidth, weights)
        return _forward(particles, scores, bandwidth, weights, *kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_gradients(ctx, grad, reference.kernel_stein_discrepancy_backward), None, None


def _gradients(ctx: Any, grad: Tensor, backward: Any) -> list[Tensor | None]:
    wanted = tuple(ctx.needs_input_grad[:3])
    if ctx.needs_input_grad[3]:
        raise RuntimeError("kernel_stein_discrepancy: weights get no gradient; detach them")
    if torch.is_grad_enabled() or is_batched(grad):
        return _differentiable(grad, ctx.saved_tensors, wanted, ctx.kernel)
    needs = sum(want << i for i, want in enumerate(wanted))
    gradients = backward(grad, *ctx.saved_tensors, *ctx.kernel, needs)
    return [g if want else None for g, want in zip(gradients, wanted, strict=True)]


def off_diagonal_sums(x: Tensor, s: Tensor, h: Tensor, weights: Tensor, kernel: Kernel) -> Tensor:
    """sum_{i != j} w_i w_j kp(i, j): float64 [B, m], of checked operands; weights [1 or B, n, m]."""
    if transformed():
        return reference.plain_discrepancy(x, s, h, weights, *kernel)
    if dispatched(x, s, h, weights):
        return torch.ops.fekernels.kernel_stein_discrepancy(x, s, h, weights, *kernel)
    if torch.is_grad_enabled() and (x.requires_grad or s.requires_grad or h.requires_grad):
        return _Sums.apply(x, s, h, weights, kernel)
    return _forward(x, s, h, weights, *kernel)


def _diagonal_sum(x: Tensor, s: Tensor, h: Tensor, kernel: Kernel) -> Tensor:
    """sum_i kp(i, i): float64 [B]."""
    n, d = x.shape[1:]
    squares = s.to(h.dtype).square()
    if kernel.code == LINEAR:
        x, s = x.double(), s.double()
        squares = squares.double().sum(2)
        return ((x.square().sum(2) + 1) * squares + 2 * (x * s).sum(2)).sum(1) + n * d
    value, p1 = KERNELS[kernel.code].at_zero(kernel.beta, kernel.c)
    h = h.double()
    # Where h = 0 `_statistic` says so; without a coordinate nothing diverges.
    return value * squares.sum((1, 2), dtype=torch.float64) + n * d * p1 / torch.where(h == 0, torch.inf, h)


def stein_kernel(function: str, kernel: object) -> Kernel:
    """A kernel whose discrepancy is finite."""
    found = which_kernel(function, kernel)
    row = KERNELS[found.code]
    if not row.discrepancy:
        finite = ", ".join(other.name for other in KERNELS if other.discrepancy)
        raise ValueError(
            f"{function}: kernel must be one of {finite}; got {row.name!r}, whose discrepancy is infinite"
        )
    return found


def gather(
    function: str,
    particles: Tensor,
    scores: Tensor,
    kernel: Kernel,
    bandwidth: Tensor | float | str,
    *,
    positive: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked particles and scores [B, n, d], and bandwidths [B]; of `positive`, > 0 as far as is looked."""
    particles = check_particles(function, particles)
    scores = check_scores(function, scores, particles)
    x, s, dtype = flatten(particles), flatten(scores), compute_dtype(particles, scores)
    h = bandwidths(function, bandwidth, kernel.code, x, particles, dtype)
    if positive and KERNELS[kernel.code].default_bandwidth is not None and x.numel():
        positive_bandwidth(function, h, is_median(function, bandwidth))
    return x, s, h


def kernel_stein_discrepancy(
    particles: Tensor,
    scores: Tensor,
    *,
    kernel: object = "rbf",
    bandwidth: Tensor | float | str = "median",
    statistic: str = "u",
) -> Tensor:
    """The *squared* kernelised Stein discrepancy: 0 in expectation if the particles are draws from the target.

    Args:
        particles: [..., n, d]; leading dimensions are problems of their own. float32, bfloat16, float16 (computed in
            float32), or float64 (computed by the reference).
        scores: grad log p at the particles, of their shape.
        kernel: one of ``fe.kernels``, by its name or as an instance. "imq" alone tells samples that drift away to
            infinity. Laplace's discrepancy is infinite.
        bandwidth: h, as in ``svgd_direction``, but > 0: as it falls to 0 the discrepancy grows without bound. On a GPU,
            under torch.compile and torch.func, where its value is not looked at, h = 0 gives infinity.
        statistic: "u", unbiased, the mean over pairs of different particles, may be negative (NaN for n = 1);
            or "v", the mean over all pairs, never negative but for rounding, and too large by O(1/n).

    Returns:
        [...], float32, float64 for float64 operands. Differentiable in particles, scores and bandwidth, in
        O(n d) memory; twice, or for batches of gradients (is_grads_batched), by plain PyTorch on n x n matrices.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; the message has the name, what was expected and what came. So does a
            median bandwidth of 0, where particles coincide.
    """
    function = "kernel_stein_discrepancy"
    found = stein_kernel(function, kernel)
    statistic = one_of(function, "statistic", statistic, STATISTICS)
    # The mean over the pairs of one particle, whose median is 0, is NaN at any bandwidth.
    alone = statistic == "u" and check_particles(function, particles).shape[-2] == 1
    x, s, h = gather(function, particles, scores, found, bandwidth, positive=not alone)
    return _statistic(x, s, h, found, statistic).to(compute_dtype(x, s)).reshape(particles.shape[:-2])


def _statistic(x: Tensor, s: Tensor, h: Tensor, found: Kernel, statistic: str) -> Tensor:
    """The statistic [B], float64; infinite where h = 0."""
    n = x.shape[1]
    total = off_diagonal_sums(x, s, h, h.new_ones(1, n, 1), found)[:, 0]
    if statistic == "v":
        value = (total + _diagonal_sum(x, s, h, found)) / (n * n)
    else:
        value = total / (n * (n - 1))
    if KERNELS[found.code].default_bandwidth is None or not x.numel() or (n == 1 and statistic == "u"):
        return value
    return torch.where(no_bandwidth(h), torch.inf, value)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, kernel, beta, c = inputs
    ctx.kernel = Kernel(kernel, beta, c)
    ctx.save_for_backward(*operands)


def _backward(
    grad: Tensor,
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    weights: Tensor,
    kernel: int,
    beta: float,
    c: float,
    needs: int,
) -> list[Tensor]:
    function = "kernel_stein_discrepancy_backward"
    _check(function, particles, scores, bandwidth, weights, kernel, beta, c)
    floating(function, "grad", grad)
    same_device(function, "grad", grad, particles.device)
    expected = (particles.shape[0], weights.shape[2])
    if grad.shape != expected:
        raise ValueError(f"{function}: grad must have shape {expected}; got {tuple(grad.shape)}")
    if not 0 <= needs < 8:
        raise ValueError(f"{function}: needs must be in [0, 8), a bit per operand; got {needs}")
    return reference.kernel_stein_discrepancy_backward(
        grad, particles, scores, bandwidth, weights, kernel, beta, c, needs
    )


def _fake_backward(
    grad: Tensor, particles: Tensor, scores: Tensor, bandwidth: Tensor, weights: Tensor, *call: float
) -> list[Tensor]:
    _check("kernel_stein_discrepancy_backward", particles, scores, bandwidth, weights, *call[:-1])
    needs = int(call[-1])
    operands = (particles, scores, bandwidth)
    return [o.new_empty(o.shape if needs >> i & 1 else (0,)) for i, o in enumerate(operands)]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    backward = torch.ops.fekernels.kernel_stein_discrepancy_backward
    return *_gradients(ctx, grad, backward), *(None,) * 4


_ARGUMENTS = (
    "Tensor particles, Tensor scores, Tensor bandwidth, Tensor weights, int kernel, float beta, float c"
)
_name = define_functional(f"kernel_stein_discrepancy({_ARGUMENTS}) -> Tensor", _forward, _fake)
torch.library.register_autograd(_name, _autograd, setup_context=_setup, lib=LIBRARY)
define_functional(
    f"kernel_stein_discrepancy_backward(Tensor grad, {_ARGUMENTS}, int needs) -> Tensor[]",
    _backward,
    _fake_backward,
)
