"""Arguments of the free energy as a kernel takes them: two dimensions, broadcasting written as a size of 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels._checks import FLOATS, dense, floating, same_device
from fekernels.ops._layouts import in_memory_order

__all__ = ["Operands", "gather"]


@dataclass(slots=True)
class Operands:
    """Checked arguments. Shapes: [B or 1, D or 1] and [B or 1, Z or 1], for a categorical [B, P, K] and [B, P]."""

    params: list[Tensor]
    target: Tensor | None
    mask: Tensor | None
    latent: list[Tensor]
    weight: Tensor | None


def resolved(tensor: Tensor) -> Tensor:
    """With its own values in memory: the imaginary part of a conjugate is kept as a view that says "negate"."""
    return tensor if torch.compiler.is_compiling() or not tensor.is_neg() else tensor.resolve_neg()


def whole(tensor: Tensor) -> Tensor:
    """[B, ...] as [B, D], copied only where the elements of a row do not lie in order, or are yet to be negated."""
    tensor = resolved(tensor)
    if tensor.dim() != 2:
        tensor = tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:]))
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    return all(size in (1, full) for size, full in zip(reversed(shape), reversed(to), strict=False))


def rows(function: str, name: str, tensor: Tensor, full: Sequence[int], like: str) -> Tensor:
    """An operand that broadcasts to ``full`` = (B, ...) as [B or 1, D or 1].

    Whatever varies along some of the event's dimensions only is expanded, which costs a copy; a value an element of the
    event, a value a sample, and a single value are taken as they are.
    """
    shape = tensor.shape
    if shape == full:
        return whole(tensor)
    if not broadcasts(shape, full):
        raise ValueError(
            f"{function}: {name} must have a shape that broadcasts to {tuple(full)} like {like}; got {tuple(shape)}"
        )
    shape = torch.Size((1,) * (len(full) - len(shape))) + shape
    event = math.prod(shape[1:])
    if event == math.prod(full[1:]) or event == 1:
        return whole(tensor.reshape(shape[0], event))
    return whole(tensor.reshape(shape).expand(shape[0], *full[1:]))


def prepare_target(function: str, target: object, params: list[Tensor], categorical: bool) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"{function}: target must be a tensor; got {type(target).__name__}")
    dense(function, "target", target)
    same_device(function, "target", target, params[0].device)
    if target.requires_grad:
        raise ValueError(f"{function}: target must not require a gradient, since it gets none; detach it")
    expected = params[0].shape[:-1] if categorical else params[0].shape
    if target.shape != expected:
        without = " without its last dimension (the classes)" if categorical else ""
        raise ValueError(
            f"{function}: target must have shape {tuple(expected)} like params{without}; got {tuple(target.shape)}"
        )
    if categorical:
        if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
            raise TypeError(
                f"{function}: target must hold class indices, an integer dtype; got {str(target.dtype)[6:]}"
            )
        return target.long().reshape(target.shape[0], math.prod(target.shape[1:])).contiguous()
    if target.dtype.is_complex:
        raise TypeError(f"{function}: target must be real; got {str(target.dtype)[6:]}")
    wide = any(param.dtype is torch.float64 for param in params)
    if (
        target.dtype is torch.float64 and not wide
    ) or target.dtype not in FLOATS:  # counts often come as integers
        target = target.double() if wide else target.float()
    return whole(target)


def prepare_params(
    function: str, params: Tensor | Sequence[Tensor] | None, likelihood: str, numbers: list[int]
) -> list[Tensor]:
    given = (
        [params]
        if isinstance(params, Tensor)
        else list(params)
        if isinstance(params, (tuple, list))
        else None
    )
    if given is None:
        raise TypeError(
            f"{function}: params must be a tensor or a tuple of tensors; got {type(params).__name__}"
        )
    if len(given) not in numbers:
        expected = " or ".join(map(str, numbers))
        raise ValueError(
            f"{function}: params must hold {expected} tensor(s) for {likelihood!r}; got {len(given)}"
        )
    for i, tensor in enumerate(given):
        floating(function, f"params[{i}]" if len(given) > 1 else "params", tensor)
        same_device(function, f"params[{i}]", tensor, given[0].device)
    least = 2 if likelihood == "categorical" else 1
    if given[0].dim() < least:
        shape = "(batch, ..., classes)" if least == 2 else "(batch, ...)"
        raise ValueError(f"{function}: params must have shape {shape}; got {tuple(given[0].shape)}")
    return given


def prepare_latent(
    function: str,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
) -> list[Tensor]:
    logvar = floating(function, "logvar", logvar)
    if mean.dim() < 1:
        raise ValueError(f"{function}: mean must have shape (batch, ...); got ()")
    if logvar.shape != mean.shape:
        raise ValueError(
            f"{function}: logvar must have shape {tuple(mean.shape)} like mean; got {tuple(logvar.shape)}"
        )
    same_device(function, "logvar", logvar, mean.device)
    latent = [whole(mean), whole(logvar)]
    if prior_mean is None and prior_logvar is None:
        return latent
    for name, prior in (("prior_mean", prior_mean), ("prior_logvar", prior_logvar)):
        if prior is None:  # the standard normal's
            latent.append(mean.new_zeros(1, 1))
            continue
        floating(function, name, prior)
        same_device(function, name, prior, mean.device)
        latent.append(rows(function, name, prior, mean.shape, "mean"))
    return latent


def gather(
    function: str,
    params: Tensor | Sequence[Tensor] | None,
    target: Tensor | None,
    mean: Tensor | None,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    likelihood: str,
    numbers: list[int],
) -> Operands:
    """Checks every argument and brings it into the kernels' shape.

    ``numbers``: of parameters that the likelihood may have, empty where there is no energy. ``mean``: None for no KL.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: one of a wrong shape or on another device; the message has its name, what was expected, what came.
    """
    if likelihood != "categorical":
        params, target, (mask,) = in_memory_order(params, target, (mask,))
    mean, logvar, (prior_mean, prior_logvar) = in_memory_order(mean, logvar, (prior_mean, prior_logvar))
    kernel_params: list[Tensor] = []
    kernel_target = None
    if numbers:
        categorical = likelihood == "categorical"
        given = prepare_params(function, params, likelihood, numbers)
        kernel_target = prepare_target(function, target, given, categorical)
        if categorical:
            shape = given[0].shape
            flat = resolved(given[0]).reshape(shape[0], math.prod(shape[1:-1]), shape[-1])
            kernel_params = [flat.contiguous()]
        else:
            kernel_params = [whole(given[0])]
            kernel_params += [
                rows(function, f"params[{i}]", given[i], given[0].shape, "params[0]")
                for i in range(1, len(given))
            ]
        batch, device = given[0].shape[0], given[0].device
    latent = []
    if mean is not None or not numbers:
        mean = floating(function, "mean", mean)
        latent = prepare_latent(function, mean, logvar, prior_mean, prior_logvar)
        if not numbers:
            batch, device = mean.shape[0], mean.device
        elif mean.shape[0] != batch:
            raise ValueError(
                f"{function}: mean must have the batch size {batch} of params; got shape {tuple(mean.shape)}"
            )
        same_device(function, "mean", mean, device)
    if mask is not None:
        assert target is not None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = str(mask.dtype)[6:] if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{function}: mask must be a bool tensor, True = observed; got {kind}")
        dense(function, "mask", mask)
        if mask.shape != target.shape:
            raise ValueError(
                f"{function}: mask must have shape {tuple(target.shape)} like target; got {tuple(mask.shape)}"
            )
        same_device(function, "mask", mask, device)
        mask = whole(mask)
        if likelihood == "categorical":
            mask = mask.contiguous()
    if weight is not None:
        floating(function, "weight", weight)
        if weight.shape != (batch,):
            raise ValueError(f"{function}: weight must have shape ({batch},); got {tuple(weight.shape)}")
        same_device(function, "weight", weight, device)
        if weight.requires_grad:
            raise ValueError(f"{function}: weight must not require a gradient, since it gets none; detach it")
        wide = any(tensor.dtype is torch.float64 for tensor in (*kernel_params, *latent))
        weight = resolved(weight.double() if wide else weight.float()).contiguous()
    return Operands(kernel_params, kernel_target, mask, latent, weight)
