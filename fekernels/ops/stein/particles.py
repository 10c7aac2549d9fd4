"""Arguments of the Stein functions, checked and brought into the kernels' shape: [B, n, d], [B] bandwidths."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fekernels._catalogue.stein import IMQ, KERNELS, NAMES
from fekernels._checks import floating, same_device
from fekernels._runtime.torch_internals import differentiates_forward, transforms_active
from fekernels.ops.free_energy.autograd import is_dispatched
from fekernels.ops.plain_memory import in_plain_memory

__all__ = [
    "Kernel",
    "check_kernel",
    "check_particles",
    "check_problems",
    "check_scores",
    "dispatched",
    "flatten",
    "plain",
    "transformed",
    "which_kernel",
    "compute_dtype",
]


class Kernel(NamedTuple):
    """A kernel as the operators take it: its code, and the two numbers of imq."""

    code: int
    beta: float
    c: float


DEFAULTS = {name: Kernel(code, IMQ.beta, IMQ.c) for code, name in enumerate(NAMES)}


def which_kernel(function: str, kernel: object) -> Kernel:
    """By name, or an instance of one of ``fe.kernels``, known by its ``name``, ``beta`` and ``c``."""
    if isinstance(kernel, str) and kernel in DEFAULTS:
        return DEFAULTS[kernel]
    name = kernel if isinstance(kernel, str) else getattr(kernel, "name", None)
    expected = f"one of {', '.join(NAMES)} or an instance of fe.kernels"
    if isinstance(kernel, type) or not isinstance(name, str):
        kind = f"the class {kernel.__name__}" if isinstance(kernel, type) else type(kernel).__name__
        raise TypeError(f"{function}: kernel must be {expected}; got {kind}")
    if name not in DEFAULTS:
        raise ValueError(f"{function}: kernel must be {expected}; got {name!r}")
    default = DEFAULTS[name]
    return Kernel(default.code, getattr(kernel, "beta", default.beta), getattr(kernel, "c", default.c))


def check_particles(function: str, particles: object) -> Tensor:
    tensor = floating(function, "particles", particles)
    if tensor.dim() < 2:
        raise ValueError(f"{function}: particles must have shape (..., n, d); got {tuple(tensor.shape)}")
    return tensor


def check_scores(function: str, scores: object, particles: Tensor) -> Tensor:
    tensor = floating(function, "scores", scores)
    if tensor.shape != particles.shape:
        raise ValueError(
            f"{function}: scores must have shape {tuple(particles.shape)} like particles; got {tuple(tensor.shape)}"
        )
    same_device(function, "scores", tensor, particles.device)
    return tensor


def check_problems(function: str, particles: object, bandwidth: object, **alike: object) -> None:
    """Of operators that are called directly: kernels go by addresses and would not notice.

    particles and `alike` [B, n, d], bandwidth [B], any of the dtypes.
    """
    found = floating(function, "particles", particles)
    if found.dim() != 3:
        raise ValueError(f"{function}: particles must have shape (B, n, d); got {tuple(found.shape)}")
    for name, value in alike.items():
        _check_like(function, name, value, found, found.shape, " like particles")
    _check_like(function, "bandwidth", bandwidth, found, found.shape[:1], "")


def _check_like(
    function: str, name: str, value: object, particles: Tensor, shape: torch.Size, like: str
) -> None:
    tensor = floating(function, name, value)
    same_device(function, name, tensor, particles.device)
    if tensor.shape != shape:
        raise ValueError(
            f"{function}: {name} must have shape {tuple(shape)}{like}; got {tuple(tensor.shape)}"
        )


def check_kernel(function: str, kernel: int, beta: float, c: float) -> None:
    """A kernel's code and parameters, of operators that are called directly."""
    if not 0 <= kernel < len(KERNELS):
        named = ", ".join(f"{code} ({name})" for code, name in enumerate(NAMES))
        raise ValueError(f"{function}: kernel must be one of {named}; got {kernel}")
    if KERNELS[kernel].domains:
        KERNELS[kernel].check(function, beta, c)


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, and in memory what it says, as every kernel takes it."""
    return in_plain_memory(tensor).contiguous()


def dispatched(*tensors: Tensor) -> bool:
    """Whether operators are to be seen, by torch.compile, a mode or a subclass, in place of kernels reading memory."""
    return torch.compiler.is_compiling() or is_dispatched(tensors)


def flatten(tensor: Tensor) -> Tensor:
    """[..., n, d] as [B, n, d]."""
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float64 as soon as one operand is that, else float32."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: those take the plain formula."""
    return transforms_active() or differentiates_forward()
