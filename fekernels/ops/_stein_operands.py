"""Arguments of the Stein functions, checked and brought into the kernels' shape: [B, n, d], [B] bandwidths."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fekernels._checks import floating, number, same_device
from fekernels.ops._free_energy_autograd import is_dispatched
from fekernels.ops._memory import in_plain_memory
from fekernels.ops._operands import broadcasts
from fekernels.reference._stein import IMQ, KERNELS

__all__ = [
    "Kernel",
    "check_kernel",
    "check_particles",
    "check_problems",
    "check_scores",
    "dispatched",
    "flat_bandwidth",
    "flatten",
    "no_bandwidth",
    "plain",
    "positive_bandwidth",
    "transformed",
    "which_kernel",
    "wide",
]


class Kernel(NamedTuple):
    """A kernel as the operators take it: its code, and the two numbers of imq."""

    code: int
    beta: float
    c: float


DEFAULTS = {name: Kernel(code, -0.5, 1.0) for code, name in enumerate(KERNELS)}


def which_kernel(function: str, kernel: object) -> Kernel:
    """By name, or an instance of one of ``fe.kernels``, known by its ``name``, ``beta`` and ``c``."""
    if isinstance(kernel, str) and kernel in DEFAULTS:
        return DEFAULTS[kernel]
    name = kernel if isinstance(kernel, str) else getattr(kernel, "name", None)
    expected = f"one of {', '.join(KERNELS)} or an instance of fe.kernels"
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
    """A kernel's code and the numbers of imq, of operators that are called directly."""
    if not 0 <= kernel < len(KERNELS):
        named = ", ".join(f"{code} ({name})" for code, name in enumerate(KERNELS))
        raise ValueError(f"{function}: kernel must be one of {named}; got {kernel}")
    if kernel == IMQ and not (-1 < beta < 0 and 0 < c < math.inf):
        raise ValueError(f"{function}: beta must be in (-1, 0) and c finite and > 0; got {beta} and {c}")


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, and in memory what it says: the way into every kernel."""
    return in_plain_memory(tensor).contiguous()


def dispatched(*tensors: Tensor) -> bool:
    """Whether operators are to be seen, by torch.compile, a mode or a subclass, in place of kernels reading memory."""
    return torch.compiler.is_compiling() or is_dispatched(tensors)


def flatten(tensor: Tensor) -> Tensor:
    """[..., n, d] as [B, n, d]."""
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def wide(*tensors: Tensor) -> torch.dtype:
    """What is computed in: float64 as soon as one operand is that, else float32."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def flat_bandwidth(function: str, bandwidth: Tensor | float, particles: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor that broadcasts to the batch dimensions, as [B] of ``dtype``.

    A tensor's values are looked at on a CPU only: elsewhere that would wait for the device.
    """
    batch = particles.shape[:-2]
    count = math.prod(batch)
    if not isinstance(bandwidth, Tensor):
        if isinstance(bandwidth, str):
            raise ValueError(
                f"{function}: bandwidth must be 'median', a number or a tensor; got {bandwidth!r}"
            )
        value = number(function, "bandwidth", bandwidth, infinite=True)
        return torch.full((count,), value, dtype=dtype, device=particles.device)
    floating(function, "bandwidth", bandwidth)
    same_device(function, "bandwidth", bandwidth, particles.device)
    if bandwidth.shape != batch and not broadcasts(bandwidth.shape, batch):
        raise ValueError(
            f"{function}: bandwidth must have a shape that broadcasts to the batch {tuple(batch)} of particles; got"
            f" {tuple(bandwidth.shape)}"
        )
    if bandwidth.device.type == "cpu" and _has_values(bandwidth):
        # Of one element directly: a comparison and a reduction would take as long as a small problem.
        least = bandwidth.item() if bandwidth.numel() == 1 else bandwidth.min().item() if count else 0.0
        if not least >= 0:  # NaN too
            raise ValueError(f"{function}: bandwidth must be >= 0; got {least}")
    bandwidth = bandwidth.to(dtype)
    return bandwidth if bandwidth.shape == (count,) else bandwidth.expand(batch).reshape(count)


def _has_values(tensor: Tensor) -> bool:
    """Whether a value can be looked at: not under torch.compile and torch.func, nor of a fake tensor."""
    return not dispatched(tensor) and not transformed()


def no_bandwidth(bandwidth: Tensor) -> Tensor:
    """Where h counts as 0, bool [B]: below the smallest normal number it has no inverse."""
    return bandwidth < torch.finfo(bandwidth.dtype).tiny


def positive_bandwidth(function: str, bandwidth: Tensor, median: bool = False, *, wait: bool = False) -> None:
    """Raise where an h of [B] is 0, which makes a discrepancy infinite: 2 d / h a coincident pair.

    Values are looked at on a CPU, elsewhere only with ``wait``, and never under torch.compile or torch.func.
    """
    if not _has_values(bandwidth) or not (wait or bandwidth.device.type == "cpu"):
        return
    # Of one element directly, as above.
    least = bandwidth.item() if bandwidth.numel() == 1 else bandwidth.min().item() if len(bandwidth) else 1.0
    if least < torch.finfo(bandwidth.dtype).tiny:
        which = f" in problem {int(bandwidth.argmin())}" if len(bandwidth) > 1 else ""
        why = ", the median over particles of which too many coincide: give a number" if median else ""
        raise ValueError(
            f"{function}: bandwidth must be > 0, since the discrepancy grows without bound as it falls; got "
            f"{least:g}{which}{why}"
        )


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: those take the plain formula."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
