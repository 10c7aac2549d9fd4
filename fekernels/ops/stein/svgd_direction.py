"""The direction of Stein variational gradient descent, with no n x n matrix in memory.

Source: Liu & Wang 2016, arXiv:1608.04471, equation 8; the temperature of the repulsion: D'Angelo & Fortuin 2021,
arXiv:2101.09815, whose annealing scales the attraction instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.stein import KERNELS, PRECISION_NAMES
from fekernels._checks import number, one_of
from fekernels._runtime import backends
from fekernels._runtime.torch_internals import is_batched
from fekernels.ops._library import LIBRARY, define_functional
from fekernels.ops.stein.bandwidths import bandwidths
from fekernels.ops.stein.particles import (
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
from fekernels.reference.stein.svgd_direction import plain_direction

__all__ = ["Call", "check_settings", "direction_of_rows", "svgd_direction"]

Call = tuple[int, float, float, float, int]  # kernel, beta, c, temperature, precision


def _implementation(name: str, kernel: int, *tensors: Tensor, rows: bool = False) -> Any:
    """That of the backend; float64, and a kernel that no backend has, are the reference's everywhere."""
    backend = "reference"
    if KERNELS[kernel].native and compute_dtype(*tensors) != torch.float64:
        backend = backends.choose(tensors[0].device.type, kernel=name)
    return backends.implementation(f"{name}_rows" if rows else name, backend)


def _check_call(
    function: str, kernel: int, beta: float, c: float, temperature: float, precision: int
) -> None:
    check_kernel(function, kernel, beta, c)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{function}: temperature must be finite and >= 0; got {temperature}")
    if not 0 <= precision < len(PRECISION_NAMES):
        named = ", ".join(f"{code} ({name})" for code, name in enumerate(PRECISION_NAMES))
        raise ValueError(f"{function}: precision must be one of {named}; got {precision}")


def _run(
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    kernel: int,
    beta: float,
    c: float,
    temperature: float,
    precision: int,
) -> Tensor:
    if not particles.numel():
        return torch.empty_like(particles)
    implementation = _implementation("svgd_direction", kernel, particles, scores, bandwidth)
    return implementation(
        plain(particles), plain(scores), plain(bandwidth), kernel, beta, c, temperature, precision
    )


def direction_of_rows(
    particles: Tensor, scores: Tensor, bandwidth: Tensor, call: Call, begin: int, end: int
) -> Tensor:
    """Rows ``begin`` to ``end`` of the direction of particles [n, d], to the bit those of `svgd_direction`."""
    x, s = particles.unsqueeze(0), scores.unsqueeze(0)
    if (begin, end) == (0, len(particles)) or not particles.numel():
        return _run(x, s, bandwidth, *call)[0, begin:end]
    tensors = plain(x), plain(s), plain(bandwidth)
    rows = _implementation("svgd_direction", call[0], *tensors, rows=True)
    return rows(*tensors, *call, begin, end)[0]


def _forward(particles: Tensor, scores: Tensor, bandwidth: Tensor, *call: Any) -> Tensor:
    check_problems("svgd_direction", particles, bandwidth, scores=scores)
    _check_call("svgd_direction", *call)
    return _run(particles, scores, bandwidth, *call)


def _backward(
    grad: Tensor,
    particles: Tensor,
    scores: Tensor,
    bandwidth: Tensor,
    kernel: int,
    beta: float,
    c: float,
    temperature: float,
    precision: int,
    needs: int,
) -> list[Tensor]:
    function = "svgd_direction_backward"
    check_problems(function, particles, bandwidth, scores=scores, grad=grad)
    _check_call(function, kernel, beta, c, temperature, precision)
    if not 0 <= needs < 8:
        raise ValueError(f"{function}: needs must be in [0, 8), a bit per operand; got {needs}")
    if not particles.numel():
        operands = (particles, scores, bandwidth)
        return [torch.zeros_like(o) if needs >> i & 1 else o.new_empty(0) for i, o in enumerate(operands)]
    implementation = _implementation("svgd_direction_backward", kernel, particles, scores, bandwidth)
    tensors = [plain(tensor) for tensor in (grad, particles, scores, bandwidth)]
    return implementation(*tensors, kernel, beta, c, temperature, precision, needs)


def _differentiable(
    grad: Tensor, operands: tuple[Tensor, ...], wanted: tuple[bool, ...], call: Call
) -> list[Tensor | None]:
    """The gradients by plain PyTorch: functions of operands and of ``grad`` for create_graph=True, and of batches."""
    again = torch.is_grad_enabled()
    kernel, beta, c, temperature, _ = call
    with torch.enable_grad():
        # Views, so that a path from one operand to another (a bandwidth made of particles) is left to the outer graph.
        x, s, h = (operand.view_as(operand) for operand in operands)
        phi = plain_direction(x, s, h, kernel, beta, c, temperature)
    chosen = [view for view, want in zip((x, s, h), wanted, strict=True) if want]
    gradients = iter(
        torch.autograd.grad(phi, chosen, grad, create_graph=again, allow_unused=True, materialize_grads=True)
    )
    return [next(gradients) if want else None for want in wanted]


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, particles: Tensor, scores: Tensor, bandwidth: Tensor, call: Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(particles, scores, bandwidth)
        return _run(particles, scores, bandwidth, *call)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = tuple(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() or is_batched(grad):
            return *_differentiable(grad, ctx.saved_tensors, wanted, ctx.call), None
        needs = sum(want << i for i, want in enumerate(wanted))
        x, s, h = ctx.saved_tensors
        kernel, beta, c, temperature, precision = ctx.call
        gradients = _backward(grad, x, s, h, kernel, beta, c, temperature, precision, needs)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None


def check_settings(function: str, kernel: object, temperature: object, precision: object) -> Call:
    """What a caller says beside particles, scores and bandwidth, as operators take it."""
    code, beta, c = which_kernel(function, kernel)
    factor = number(function, "temperature", temperature)
    chosen = one_of(function, "precision", precision, PRECISION_NAMES)
    return code, beta, c, factor, PRECISION_NAMES.index(chosen)


def svgd_direction(
    particles: Tensor,
    scores: Tensor,
    *,
    kernel: object = "rbf",
    bandwidth: Tensor | float | str = "median",
    temperature: float = 1.0,
    precision: str = "fp32",
) -> Tensor:
    """phi_i = (1/n) sum_j [k(x_j, x_i) s_j + temperature * grad_{x_j} k(x_j, x_i)]: where to move each particle.

    The direction in which the distribution of the particles approaches the target fastest. The first term pulls them to
    high density, the second keeps them apart. Memory grows as n d.

    Args:
        particles: [..., n, d]; leading dimensions are problems of their own. float32, bfloat16, float16 (computed in
            float32), or float64 (computed by the reference).
        scores: grad log p at the particles, of their shape; any of the same dtypes.
        kernel: one of ``fe.kernels``, by its name, such as "rbf", exp(-u) with u = \\|x - y\\|^2 / h, or an instance,
            for imq's beta and c (-0.5 and 1). Laplace's repulsion between coincident particles is 0.
        bandwidth: h: a number >= 0, a tensor that broadcasts to the leading dimensions, or "median": the median of all
            n^2 squared distances / log(n + 1), exact, and not differentiated. At h = 0 only coincident particles see
            each other. The linear kernel has none and ignores it.
        temperature: factor of the repulsion, >= 0. Annealing the attraction is scaling ``scores``.
        precision: of matrix products on tensor cores: "fp32" (relative error 1e-5 or better), "tf32" or "bf16x3". A CPU
            computes in float32 whatever it says.

    Returns:
        phi [..., n, d], of the dtype of ``particles``. Differentiable in particles, scores and bandwidth in O(n d)
        memory; a second time by plain PyTorch on n x n matrices, as for batches of gradients (is_grads_batched), under
        torch.func and in forward mode.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong value, shape or device; the message has the name, what was expected and what came.
    """
    function = "svgd_direction"
    particles = check_particles(function, particles)
    scores = check_scores(function, scores, particles)
    call = check_settings(function, kernel, temperature, precision)
    x, s, dtype = flatten(particles), flatten(scores), compute_dtype(particles, scores)
    h = bandwidths(function, bandwidth, call[0], x, particles, dtype)
    if transformed():
        phi = plain_direction(x, s, h, *call[:4])
    elif dispatched(x, s, h):
        phi = torch.ops.fekernels.svgd_direction(x, s, h, *call)
    elif torch.is_grad_enabled() and (x.requires_grad or s.requires_grad or h.requires_grad):
        phi = _Direction.apply(x, s, h, call)
    else:
        phi = _run(x, s, h, *call)
    return phi if particles.dim() == 3 else phi.reshape(particles.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    particles, scores, bandwidth, *call = inputs
    ctx.call = tuple(call)
    ctx.save_for_backward(particles, scores, bandwidth)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = tuple(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled() or is_batched(grad):
        gradients: Any = _differentiable(grad, ctx.saved_tensors, wanted, ctx.call)
    else:
        needs = sum(want << i for i, want in enumerate(wanted))
        gradients = torch.ops.fekernels.svgd_direction_backward(grad, *ctx.saved_tensors, *ctx.call, needs)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 5


def _fake(particles: Tensor, scores: Tensor, bandwidth: Tensor, *call: Any) -> Tensor:
    check_problems("svgd_direction", particles, bandwidth, scores=scores)
    return particles.new_empty(particles.shape)


def _fake_backward(
    grad: Tensor, particles: Tensor, scores: Tensor, bandwidth: Tensor, *call: float
) -> list[Tensor]:
    check_problems("svgd_direction_backward", particles, bandwidth, scores=scores, grad=grad)
    needs = int(call[-1])
    operands = (particles, scores, bandwidth)
    return [o.new_empty(o.shape if needs >> i & 1 else (0,)) for i, o in enumerate(operands)]


_ARGUMENTS = (
    "Tensor particles, Tensor scores, Tensor bandwidth, int kernel, float beta, float c, float temperature,"
    " int precision"
)
_name = define_functional(
    f"svgd_direction({_ARGUMENTS}) -> Tensor",
    _forward,
    _fake,
)
torch.library.register_autograd(_name, _autograd, setup_context=_setup, lib=LIBRARY)
define_functional(
    f"svgd_direction_backward(Tensor grad, {_ARGUMENTS}, int needs) -> Tensor[]", _backward, _fake_backward
)
