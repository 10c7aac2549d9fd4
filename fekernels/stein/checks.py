"""Checks of the sampler's numbers, particles and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fekernels._catalogue.stein import SteinKernel
from fekernels._checks import floating, integer, number
from fekernels.ops.stein.bandwidths import is_median

__all__ = [
    "checked_bandwidth",
    "checked_kernel_batch",
    "checked_particles",
    "first_non_finite",
    "make_optimizer",
    "positive",
    "rows_of_particles",
    "settings_of",
]

NAMED_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
NAMED_LR = 0.1
SMALLEST_HALF = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps


def positive(function: str, name: str, value: object) -> float:
    return number(function, name, value, above=0.0)


def checked_kernel_batch(function: str, kernel_batch: object, row: type[SteinKernel]) -> int | None:
    if kernel_batch is None:
        return None
    size = integer(function, "kernel_batch", kernel_batch, 2, 1 << 62)
    if row.distance is None:
        raise ValueError(
            f"{function}: kernel_batch must have a radial kernel; got {row.name!r}, O(n d) as it is"
        )
    return size


def rows_of_particles(function: str, particles: object, least: int = 0) -> Tensor:
    """Particles [n, d]."""
    rows = floating(function, "particles", particles)
    if rows.dim() != 2 or len(rows) < least:
        many = f" with n >= {least}" if least else ""
        raise ValueError(f"{function}: particles must have shape [n, d]{many}; got {tuple(rows.shape)}")
    return rows


def checked_particles(function: str, particles: object, least: int = 1) -> Tensor:
    """A copy of the particles, contiguous, that no graph reaches."""
    particles = rows_of_particles(function, particles, least)
    if particles.is_meta:
        raise ValueError(f"{function}: particles must have values; got a meta tensor")
    bad = first_non_finite(particles)
    if bad is not None:
        raise ValueError(f"{function}: particles must be finite; got {bad[1]} in particle {bad[0]}")
    return particles.detach().clone(memory_format=torch.contiguous_format)


def first_non_finite(rows: Tensor) -> tuple[int, float] | None:
    """Index of the first row with a NaN or an infinity, and that value; None where all are finite."""
    if not rows.numel():
        return None
    # A Euclidean norm that is finite has no such value in its row, and is 40 times as fast as isfinite; one that is not
    # may have overflowed only.
    if bool(torch.linalg.vector_norm(rows, dim=1).isfinite().all()):
        return None
    finite = rows.isfinite().all(1)
    if bool(finite.all()):
        return None
    index = int(finite.int().argmin())
    row = rows[index]
    return index, float(row[~row.isfinite()][0])


def checked_bandwidth(function: str, value: Any, row: type[SteinKernel], x: Tensor) -> Tensor | None:
    """h as a tensor of one element, for the kernel of this row and particles x; None for the median."""
    if row.default_bandwidth is None:
        return torch.ones((), dtype=torch.float32, device=x.device)  # it has none
    if is_median(function, value, "a number, 'median' or a schedule step -> one of them"):
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return torch.tensor(number(function, "bandwidth", value, infinite=True), dtype=dtype, device=x.device)


def settings_of(optimizer: Optimizer, settings: dict[str, Any] | None = None) -> str:
    """By which ranks tell whether theirs are the same; None: those of the optimizer's group. A seed that nobody gave is
    agreed on later, and what is on a GPU is not read."""
    found = optimizer.param_groups[0] if settings is None else settings
    left_out = ("params", "seed") if settings is None else ("params",)
    told = {
        key: value.tolist() if isinstance(value, Tensor) else value
        for key, value in found.items()
        if key not in left_out and not (isinstance(value, Tensor) and not value.is_cpu)
    }
    return f"{type(optimizer).__name__} of {sorted(told.items())}"


def make_optimizer(function: str, optimizer: Any, lr: object, particles: Tensor) -> Optimizer:
    """The optimizer that `optimizer` (None, a name, a class, a factory) and `lr` mean, over the particles alone."""
    rate = None if lr is None else number(function, "lr", lr)
    if optimizer is None:
        optimizer = "adam"
    if isinstance(optimizer, str):
        if optimizer not in NAMED_OPTIMIZERS:
            raise ValueError(
                f"{function}: optimizer must be one of {sorted(NAMED_OPTIMIZERS)}, a torch.optim class or a factory; "
                f"got {optimizer!r}"
            )
        options: dict[str, Any] = {"lr": NAMED_LR if rate is None else rate}
        return _kept_finite(function, NAMED_OPTIMIZERS[optimizer]([particles], **options), particles)
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{function}: optimizer must be a class or a factory, since it is to hold the sampler's own particles; "
            f"got an instance of {type(optimizer).__name__}"
        )
    if not callable(optimizer):
        raise TypeError(
            f"{function}: optimizer must be a name, a torch.optim class or a factory; got {type(optimizer).__name__}"
        )
    is_class = isinstance(optimizer, type)
    if rate is not None and not is_class:
        raise ValueError(
            f"{function}: lr belongs to a named optimizer or a class, not to a factory; got {lr}"
        )
    made = _built(optimizer, particles) if rate is None else optimizer([particles], lr=rate)
    if not isinstance(made, Optimizer):
        raise TypeError(
            f"{function}: optimizer must return a torch.optim.Optimizer; got {type(made).__name__}"
        )
    held = [param for group in made.param_groups for param in group["params"]]
    if len(held) != 1 or held[0] is not particles:
        raise ValueError(
            f"{function}: optimizer must hold the particles that the factory is given and nothing else; "
            f"got {len(held)} parameters, of shapes {[tuple(param.shape) for param in held]}"
        )
    return _kept_finite(function, made, particles)


def _kept_finite(function: str, optimizer: Optimizer, particles: Tensor) -> Optimizer:
    """Refuses what makes float16 particles infinite in its first step.

    torch's optimizers compute in the parameter's dtype. Squares of gradients below 2e-4 are 0 in float16, and so is an
    eps below half its smallest number: what they divide by is then 0. (LangevinAdam computes in float32.)
    """
    if particles.dtype == torch.float16 and type(optimizer).__module__.startswith("torch.optim"):
        for group in optimizer.param_groups:
            if group.get("eps", 1.0) <= SMALLEST_HALF / 2:
                raise ValueError(
                    f"{function}: optimizer must not divide by 0 in float16, where the eps={group['eps']:g} of "
                    f"{type(optimizer).__name__} is 0; got float16 particles: give float32 or bfloat16 ones, "
                    "optimizer='sgd', or a larger eps"
                )
    return optimizer


def _built(factory: Callable[[Any], Any], particles: Tensor) -> Any:
    """`lambda p: SGD(p)` and `lambda p: SGD([p])` are both written; torch refuses the wrong one by a TypeError."""
    try:
        return factory([particles])
    except TypeError as error:
        if isinstance(factory, type):
            raise
        try:
            return factory(particles)
        except TypeError:
            raise error from None
