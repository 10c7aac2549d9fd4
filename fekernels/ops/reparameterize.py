"""``reparameterize``: a differentiable sample of a Gaussian whose noise is made from its index and never stored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fekernels import _backends
from fekernels.ops._library import LIBRARY, define_functional
from fekernels.ops._noise_key import LAST_INDEX, integer, signed_seed
from fekernels.ops._operands import floating, same_device

__all__ = ["reparameterize"]

LATENT = 3  # the purpose tag of latent noise
STREAMS = STEPS = 1 << 32

Key = tuple[int, int, int, int]  # seed, stream, step, offset


def _wide(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _kernel(name: str, *tensors: Tensor) -> Any:
    backend = "reference" if _wide(*tensors) else _backends.choose(tensors[0].device.type)
    return _backends.implementation(name, backend)


def _forward(
    mean: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int, samples: int
) -> Tensor:
    kernel = _kernel("reparameterize", mean, logvar)
    return kernel(mean.contiguous(), logvar.contiguous(), seed, stream, step, offset, samples)


def _backward(grad: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int) -> list[Tensor]:
    kernel = _kernel("reparameterize_backward", grad, logvar)
    return kernel(grad.contiguous(), logvar.contiguous(), seed, stream, step, offset)


def _noise(samples: int, like: Tensor, key: Key) -> Tensor:
    """eps [samples, B, Z], float32."""
    seed, stream, step, offset = key
    rows, latents = like.shape
    eps = torch.empty(samples, rows, latents, dtype=torch.float32, device=like.device)
    for k in range(samples):
        torch.ops.fekernels.philox_normal(eps[k], seed, stream + k, step, offset * latents, LATENT)
    return eps


def _differentiable_backward(grad: Tensor, logvar: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """The gradients as functions of ``grad`` and ``logvar``, by plain PyTorch: for create_graph=True."""
    dtype = torch.float64 if _wide(grad, logvar) else torch.float32
    eps = _noise(grad.shape[0], logvar, key).to(dtype)
    along_eps = 0.5 * torch.exp(0.5 * logvar.to(dtype)) * (grad.to(dtype) * eps).sum(0)
    return grad.to(dtype).sum(0).to(grad.dtype), along_eps.to(logvar.dtype)


class _Reparameterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, logvar: Tensor, key: Key, samples: int) -> Tensor:
        ctx.key = key
        ctx.save_for_backward(logvar)
        return _forward(mean, logvar, *key, samples)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (logvar,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(grad, logvar, ctx.key), None, None
        return *_backward(grad, logvar, *ctx.key), None, None


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    offset: int = 0,
    samples: int | None = None,
) -> Tensor:
    """z = mean + exp(logvar / 2) eps, eps standard normal: a sample of q that gradients flow through.

    eps comes from counter-based noise (``fe.random``, purpose 3) and is made again in the backward pass, so nothing of
    its size is kept. Element (b, j) is element (offset + b) Z + j of the draw: how a batch is split over calls, devices
    or processes changes no bit of it.

    Args:
        mean, logvar: [B, *latent] of the same shape; log-variances. float32, bfloat16, float16 (computed in float32),
            or float64 (computed by the reference, with the float32 noise widened).
        seed: 64 bits, as in ``fe.random``.
        step: 0 .. 2^32 - 1; the training step, for fresh noise in each.
        stream: 0 .. 2^32 - 1; each latent layer needs its own.
        offset: global index of the first row.
        samples: None for one sample of ``mean``'s shape; K for [K, B, *latent], sample k from stream ``stream + k``.

    Returns:
        z, of ``mean``'s dtype.

    Raises:
        TypeError, ValueError: as elsewhere, with the name, what was expected and what came.

    Source: Kingma & Welling 2014, arXiv:1312.6114, section 2.4.
    """
    function = "reparameterize"
    floating(function, "mean", mean)
    floating(function, "logvar", logvar)
    same_device(function, "logvar", logvar, mean.device)
    if mean.dim() < 1:
        raise ValueError(f"{function}: mean must have shape (batch, ...); got ()")
    if logvar.shape != mean.shape:
        raise ValueError(
            f"{function}: logvar must have shape {tuple(mean.shape)} like mean; got {tuple(logvar.shape)}"
        )
    count = 1 if samples is None else integer(function, "samples", samples, 1, 1 << 31)
    rows, latents = mean.shape[0], math.prod(mean.shape[1:])
    key = (
        signed_seed(function, seed),
        integer(function, "stream", stream, 0, STREAMS - count + 1),
        integer(function, "step", step, 0, STEPS),
        integer(function, "offset", offset, 0, LAST_INDEX // max(latents, 1) - rows + 1),
    )
    flat_mean, flat_logvar = mean.reshape(rows, latents), logvar.reshape(rows, latents)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        wide = flat_mean if flat_mean.dtype == torch.float64 else flat_mean.float()
        deviation = torch.exp(0.5 * flat_logvar.to(wide.dtype))
        z = (wide + deviation * _noise(count, flat_mean, key).to(wide.dtype)).to(mean.dtype)
    elif torch.compiler.is_compiling():
        z = torch.ops.fekernels.reparameterize(flat_mean, flat_logvar, *key, count)
    else:
        z = _Reparameterize.apply(flat_mean, flat_logvar, key, count)
    return z.reshape(mean.shape if samples is None else (count, *mean.shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, logvar, *key, _ = inputs
    ctx.key = key
    ctx.save_for_backward(logvar)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (logvar,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        gradients: Any = _differentiable_backward(grad, logvar, tuple(ctx.key))
    else:
        gradients = torch.ops.fekernels.reparameterize_backward(grad, logvar, *ctx.key)
    return gradients[0], gradients[1], None, None, None, None, None


_KEY = "SymInt seed, SymInt stream, SymInt step, SymInt offset"
_name = define_functional(
    f"reparameterize(Tensor mean, Tensor logvar, {_KEY}, SymInt samples) -> Tensor",
    _forward,
    lambda mean, logvar, seed, stream, step, offset, samples: mean.new_empty((samples, *mean.shape)),
)
torch.library.register_autograd(_name, _autograd, setup_context=_setup, lib=LIBRARY)
define_functional(
    f"reparameterize_backward(Tensor grad, Tensor logvar, {_KEY}) -> Tensor[]",
    _backward,
    lambda grad, logvar, *key: [grad.new_empty(logvar.shape), logvar.new_empty(logvar.shape)],
)
