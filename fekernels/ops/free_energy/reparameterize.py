"""``reparameterize``: a differentiable sample of a Gaussian whose noise is made from its index and never stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.random import LATENT_SAMPLE
from fekernels._checks import floating, integer, same_device
from fekernels._runtime import backends
from fekernels._runtime.host import host
from fekernels._runtime.ranks import group_of, has_ranks, offset_of_rank
from fekernels._runtime.torch_internals import (
    apply_directly,
    compiles_backward,
    differentiates_forward,
    is_batched,
    is_of_transform,
    never_traced,
    transforms_active,
)
from fekernels.ops._library import LIBRARY, define_functional
from fekernels.ops.free_energy.autograd import is_dispatched, takes_kernels
from fekernels.ops.noise_key import COUNTERS, LAST_INDEX, check_key, signed_seed
from fekernels.ops.plain_memory import has_plain_memory, in_plain_memory
from fekernels.ops.random import draw, fill, in_front, refuse_chunks

__all__ = ["rank_offset", "reparameterize"]

SAMPLES = 1 << 31

Key = tuple[int, int, int, int]  # seed, stream, step, offset


def _has_float64(*tensors: Tensor) -> bool:
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _kernel(name: str, *tensors: Tensor) -> Any:
    backend = "reference" if _has_float64(*tensors) else backends.choose(tensors[0].device.type)
    return backends.implementation(name, backend)


def _check(function: str, first: str, tensor: Tensor, logvar: Tensor, samples: int | None) -> None:
    """What kernels, which go by addresses, would not notice. ``samples``: None where ``tensor`` has them in front."""
    floating(function, first, tensor)
    floating(function, "logvar", logvar)
    same_device(function, "logvar", logvar, tensor.device)
    if logvar.dim() != 2:
        raise ValueError(f"{function}: logvar must have shape (rows, latents); got {tuple(logvar.shape)}")
    expected = tuple(logvar.shape) if samples is not None else (*tensor.shape[:1], *logvar.shape)
    if tuple(tensor.shape) != expected:
        front = "" if samples is not None else "(samples,) + "
        raise ValueError(
            f"{function}: {first} must have shape {front}{tuple(logvar.shape)} like logvar; got {tuple(tensor.shape)}"
        )
    if samples is not None and not 0 <= samples < SAMPLES:
        raise ValueError(f"{function}: samples must be in [0, {SAMPLES}); got {samples}")


def _last_offset(rows: int, latents: int) -> int:
    return LAST_INDEX // max(latents, 1) - rows


def _check_key(function: str, logvar: Tensor, stream: int, step: int, offset: int, samples: int) -> None:
    check_key(function, stream, step, offset, streams=max(samples, 1), last=_last_offset(*logvar.shape))


def _plain(tensor: Tensor) -> Tensor:
    return in_plain_memory(tensor).contiguous()


def _forward(
    mean: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int, samples: int
) -> Tensor:
    _check("reparameterize", "mean", mean, logvar, samples)
    _check_key("reparameterize", logvar, stream, step, offset, samples)
    kernel = _kernel("reparameterize", mean, logvar)
    return kernel(_plain(mean), _plain(logvar), seed, stream, step, offset, samples)


def _backward(grad: Tensor, logvar: Tensor, seed: int, stream: int, step: int, offset: int) -> list[Tensor]:
    function = "reparameterize_backward"
    _check(function, "grad", grad, logvar, None)
    _check_key(function, logvar, stream, step, offset, grad.shape[0])
    kernel = _kernel(function, grad, logvar)
    return kernel(_plain(grad), _plain(logvar), seed, stream, step, offset)


def _noise(samples: int, like: Tensor, key: Key, *, again: bool) -> Tensor:
    """eps [samples, B, Z], float32. ``again``: that of a forward pass that vmap had no part in."""
    seed, stream, step, offset = key
    rows, latents = like.shape
    numbers = [(seed, stream + k, step, offset * latents, LATENT_SAMPLE) for k in range(samples)]
    if again:
        eps = torch.empty(samples, rows, latents, dtype=torch.float32, device=like.device)
        for k in range(samples):
            fill("normal", eps[k], *numbers[k])
        return eps
    return torch.stack([draw("normal", (rows, latents), *each, like.device) for each in numbers])


def _differentiable_backward(grad: Tensor, logvar: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """The gradients as functions of ``grad`` and ``logvar``, by plain PyTorch: for create_graph=True."""
    dtype = torch.float64 if _has_float64(grad, logvar) else torch.float32
    eps = _noise(grad.shape[0], logvar, key, again=True).to(dtype)
    along_eps = 0.5 * torch.exp(0.5 * logvar.to(dtype)) * (grad.to(dtype) * eps).sum(0)
    return grad.to(dtype).sum(0).to(grad.dtype), along_eps.to(logvar.dtype)


def _check_operands(function: str, mean: Tensor, logvar: Tensor) -> None:
    floating(function, "mean", mean)
    floating(function, "logvar", logvar)
    same_device(function, "logvar", logvar, mean.device)
    if mean.dim() < 1:
        raise ValueError(f"{function}: mean must have shape (batch, ...); got ()")
    if logvar.shape != mean.shape:
        raise ValueError(
            f"{function}: logvar must have shape {tuple(mean.shape)} like mean; got {tuple(logvar.shape)}"
        )


def _is_plain(mean: Any, logvar: Any) -> bool:
    """Rows of float32 on a CPU, as nearly all are, for which the other checks took longer than the kernel."""
    for tensor in (mean, logvar):
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or not tensor.is_cpu
            or tensor.dtype is not torch.float32
            or tensor.dim() != 2
            or not tensor.is_contiguous()
            or not has_plain_memory(tensor)
            or is_of_transform(tensor)  # one that outlived its transform
        ):
            return False
    return mean.shape == logvar.shape and takes_kernels(mean)


class _PlainReparameterize(torch.autograd.Function):
    """``_Reparameterize`` of what ``_is_plain``; samples None for one without a dimension of its own."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, logvar: Tensor, key: Key, samples: int | None) -> Tensor:
        ctx.key = key
        ctx.save_for_backward(logvar)
        kernel = backends.implementation("reparameterize", backends.HOST)
        z: Tensor = kernel(mean, logvar, *key, 1 if samples is None else samples)
        return z.view(mean.shape) if samples is None else z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_again((grad, *ctx.saved_tensors), ctx.key), None, None


def _again(pair: tuple[Tensor, Tensor], key: Key) -> Any:
    """The gradients of mean and logvar, from that of the sample, with or without a dimension of samples, and logvar."""
    grad, logvar = pair
    rows = grad if grad.dim() == 3 else grad.unsqueeze(0)
    if torch.is_grad_enabled() or is_batched(grad):
        return _differentiable_backward(rows, logvar, key)
    if not (type(rows) is Tensor and rows.is_contiguous() and has_plain_memory(rows)):
        return _backward(rows, logvar, *key)
    return backends.implementation("reparameterize_backward", backends.HOST)(rows, logvar, *key)


@functools.cache
def _native() -> Callable[..., Tensor | None] | None:
    """``_PlainReparameterize`` with its checks by csrc/torch/host; None where there is no such module."""
    module = host()
    if module is None:
        return None
    address = backends.implementation("reparameterize", backends.HOST, "plain_address")()
    ends = COUNTERS, LAST_INDEX, SAMPLES
    try:
        module.connect_reparameterize(address, _again, Tensor, torch.nn.Parameter, torch.empty(0), *ends)
    except TypeError:  # tensors are laid out otherwise than it looks for them
        return None
    function: Callable[..., Tensor | None] = module.reparameterize
    return function


class _Reparameterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, logvar: Tensor, key: Key, samples: int) -> Tensor:
        ctx.key = key
        ctx.save_for_backward(logvar)
        return _forward(mean, logvar, *key, samples)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (logvar,) = ctx.saved_tensors
        # Batched gradients too (is_grads_batched): they differ, the noise is the forward pass's.
        if torch.is_grad_enabled() or is_batched(grad):
            return *_differentiable_backward(grad, logvar, ctx.key), None, None
        return *_backward(grad, logvar, *ctx.key), None, None


_apply_plain = apply_directly(_PlainReparameterize)


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    seed: int,
    step: int = 0,
    stream: int = 0,
    offset: int | str = 0,
    samples: int | None = None,
    process_group: Any = None,
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
        offset: global index of the first row. "rank": of a batch that is split over the ranks of a process group, in
            their order, each its rows, as many or few as it has. The ranks tell each other how many these are, one
            number each: every rank must call, and waits for the others. Where the rows stay the same,
            ``fe.distributed.batch_offset`` gives the number once.
        samples: None for one sample of ``mean``'s shape; K for [K, B, *latent], sample k from stream ``stream + k``.
            K may be 0, as of a rank that has no share of few samples; gradients are then zeros.
        process_group: of offset "rank": a ``ProcessGroup`` or a DeviceMesh of one dimension. None: the default group;
            where none is initialised, this process has all rows.

    Returns:
        z, of ``mean``'s dtype.

    Raises:
        TypeError, ValueError: as elsewhere, with the name, what was expected and what came.

    Source: Kingma & Welling 2014, arXiv:1312.6114, section 2.4.
    """
    function = "reparameterize"
    if process_group is None and takes_kernels(mean) and not compiles_backward():
        native = _native()
        z = None if native is None else native(mean, logvar, seed, stream, step, offset, samples)
        if z is not None:
            return z
    plain = not torch.compiler.is_compiling() and _is_plain(mean, logvar)
    if not plain:
        _check_operands(function, mean, logvar)
    count = 1 if samples is None else integer(function, "samples", samples, 0, SAMPLES)
    rows, latents = mean.shape[0], math.prod(mean.shape[1:])
    # Sizes that are symbols must not be compared: an exported program would hold for a range of them only. The operator
    # sees their values.
    last = LAST_INDEX if torch.compiler.is_compiling() else _last_offset(rows, latents)
    if isinstance(offset, str):
        offset = rank_offset(function, offset, rows, process_group)
    elif process_group is not None:
        raise ValueError(f"{function}: process_group belongs to offset='rank'; got offset={offset!r}")
    key = (
        signed_seed(function, seed),
        integer(function, "stream", stream, 0, COUNTERS - max(count, 1) + 1),
        integer(function, "step", step, 0, COUNTERS),
        integer(function, "offset", offset, 0, last + 1),
    )
    if count == 0:  # of a sum, whose gradients are zeros and no None
        return (mean + logvar.to(mean.dtype)).unsqueeze(0)[:0]
    if plain:
        result: Tensor = _apply_plain(mean, logvar, key, None if samples is None else count)
        return result
    flat_mean, flat_logvar = mean.reshape(rows, latents), logvar.reshape(rows, latents)
    if transforms_active() or differentiates_forward():
        center = flat_mean if flat_mean.dtype == torch.float64 else flat_mean.float()
        deviation = torch.exp(0.5 * flat_logvar.to(center.dtype))
        eps = _noise(count, flat_mean, key, again=False)
        z = (center + deviation * eps.to(center.dtype)).to(mean.dtype)
    elif torch.compiler.is_compiling() or is_dispatched((mean, logvar)):
        z = torch.ops.fekernels.reparameterize(flat_mean, flat_logvar, *key, count)
    else:
        z = _Reparameterize.apply(flat_mean, flat_logvar, key, count)
    return z.reshape(mean.shape if samples is None else (count, *mean.shape))


@never_traced  # its number is the host's
def rank_offset(function: str, offset: str, rows: int, process_group: Any) -> int:
    """The number that ``offset="rank"`` stands for; a collective where there are ranks."""
    if offset != "rank":
        raise ValueError(f"{function}: offset must be an integer or 'rank'; got {offset!r}")
    group = group_of(function, process_group)
    return offset_of_rank(function, rows, group) if group is not None or has_ranks() else 0


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, logvar, *key, _ = inputs
    ctx.key = key
    ctx.save_for_backward(logvar)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (logvar,) = ctx.saved_tensors
    if torch.is_grad_enabled() or is_batched(grad):
        gradients: Any = _differentiable_backward(grad, logvar, tuple(ctx.key))
    else:
        gradients = torch.ops.fekernels.reparameterize_backward(grad, logvar, *ctx.key)
    return gradients[0], gradients[1], None, None, None, None, None


def _fake_forward(mean: Tensor, logvar: Tensor, *numbers: int) -> Tensor:
    samples = numbers[-1]
    _check("reparameterize", "mean", mean, logvar, samples)
    return mean.new_empty((samples, *mean.shape))


def _fake_backward(grad: Tensor, logvar: Tensor, *key: int) -> list[Tensor]:
    _check("reparameterize_backward", "grad", grad, logvar, None)
    return [grad.new_empty(logvar.shape), logvar.new_empty(logvar.shape)]


def _instances(function: str, info: Any) -> bool:
    """Whether instances of vmap get noise of their own."""
    if info.randomness == "error":
        raise RuntimeError(
            f"vmap: called random operation {function} while in randomness error mode. Please either use the 'same' or"
            " 'different' randomness flags on vmap or perform the randomness operation out of vmap"
        )
    if info.randomness == "different":
        refuse_chunks()
    return info.randomness == "different"


def _vmapped(info: Any, in_dims: Any, mean: Tensor, logvar: Tensor, *numbers: int) -> Any:
    """The instances' rows one below the other, so that their noise is that of one call on all of them."""
    n = info.batch_size
    means, logvars = in_front(mean, in_dims[0], n), in_front(logvar, in_dims[1], n)
    operator = torch.ops.fekernels.reparameterize
    if not _instances("reparameterize", info):
        return torch.stack([operator(*pair, *numbers) for pair in zip(means, logvars, strict=True)]), 0
    z = operator(means.flatten(0, 1), logvars.flatten(0, 1), *numbers)
    return z.view(numbers[-1], *means.shape), 1


def _vmapped_backward(info: Any, in_dims: Any, grad: Tensor, logvar: Tensor, *key: int) -> Any:
    n = info.batch_size
    grads, logvars = in_front(grad, in_dims[0], n), in_front(logvar, in_dims[1], n)
    operator = torch.ops.fekernels.reparameterize_backward
    if not _instances("reparameterize_backward", info):
        pairs = [operator(*pair, *key) for pair in zip(grads, logvars, strict=True)]
        return [torch.stack(gradients) for gradients in zip(*pairs, strict=True)], [0, 0]
    gradients = operator(grads.movedim(0, 1).flatten(1, 2), logvars.flatten(0, 1), *key)
    return [gradient.view(logvars.shape) for gradient in gradients], [0, 0]


_KEY = "SymInt seed, SymInt stream, SymInt step, SymInt offset"
_name = define_functional(
    f"reparameterize(Tensor mean, Tensor logvar, {_KEY}, SymInt samples) -> Tensor", _forward, _fake_forward
)
torch.library.register_autograd(_name, _autograd, setup_context=_setup, lib=LIBRARY)
torch.library.register_vmap(_name, _vmapped, lib=LIBRARY)
_name = define_functional(
    f"reparameterize_backward(Tensor grad, Tensor logvar, {_KEY}) -> Tensor[]", _backward, _fake_backward
)
torch.library.register_vmap(_name, _vmapped_backward, lib=LIBRARY)
