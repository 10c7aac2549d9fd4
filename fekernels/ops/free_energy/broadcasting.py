"""Arguments of the free energy as a kernel takes them: two dimensions, broadcasting written as a size of 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import longest
from fekernels._checks import FLOATS, INTEGERS, dense, floating, same_device
from fekernels.ops.free_energy.memory_order import in_memory_order

__all__ = ["Operands", "gather"]


@dataclass(slots=True, eq=False, repr=False)
class Operands:
    """Checked arguments. Shapes: [B or 1, D or 1] and [B or 1, Z or 1], for a categorical [B, P, K] and [B, P].

    ``batch``: the sizes of the batch's dimensions, of which B is the product.
    """

    params: list[Tensor]
    target: Tensor | None
    mask: Tensor | None
    latent: list[Tensor]
    weight: Tensor | None
    latent_mask: Tensor | None
    batch: torch.Size


def resolved(tensor: Tensor) -> Tensor:
    """With its own values in memory: the imaginary part of a conjugate is kept as a view that says "negate"."""
    return tensor if torch.compiler.is_compiling() or not tensor.is_neg() else tensor.resolve_neg()


def whole(tensor: Tensor, batch_dims: int = 1) -> Tensor:
    """[*batch, ...] as [B, D], copied only where a row's elements do not lie in order, or are yet to be negated."""
    tensor = resolved(tensor)
    if tensor.dim() != 2 or batch_dims != 1:
        shape = tensor.shape
        tensor = tensor.reshape(math.prod(shape[:batch_dims]), math.prod(shape[batch_dims:]))
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    return all(size in (1, full) for size, full in zip(reversed(shape), reversed(to), strict=False))


def rows(
    function: str, name: str, tensor: Tensor, full: Sequence[int], like: str, batch_dims: int = 1
) -> Tensor:
    """An operand that broadcasts to ``full`` = (*batch, ...) as [B or 1, D or 1].

    Whatever varies along some of the event's dimensions only, or of the batch's, is expanded, which costs a copy; a
    value per element of the event, a value per sample, and a single value are taken as they are.
    """
    shape = tensor.shape
    if shape == full:
        return whole(tensor, batch_dims)
    if not broadcasts(shape, full):
        raise ValueError(
            f"{function}: {name} must have a shape that broadcasts to {tuple(full)} like {like}; got {tuple(shape)}"
        )
    shape = torch.Size((1,) * (len(full) - len(shape))) + shape
    parts: list[int] = []
    for part, of in ((shape[:batch_dims], full[:batch_dims]), (shape[batch_dims:], full[batch_dims:])):
        parts += part if math.prod(part) == 1 else of
    return whole(tensor.reshape(shape).expand(parts), batch_dims)


def prepare_target(
    function: str, target: object, params: list[Tensor], classes: bool, batch_dims: int
) -> Tensor:
    target = dense(function, "target", target)
    same_device(function, "target", target, params[0].device)
    if target.requires_grad:
        raise ValueError(f"{function}: target must not require a gradient, since it gets none; detach it")
    expected = params[0].shape[:-1] if classes else params[0].shape
    if target.shape != expected:
        without = " without its last dimension (the classes)" if classes else ""
        raise ValueError(
            f"{function}: target must have shape {tuple(expected)} like params{without}; got {tuple(target.shape)}"
        )
    if classes:
        if target.dtype not in INTEGERS:
            raise TypeError(
                f"{function}: target must hold class indices, an integer dtype; got {str(target.dtype)[6:]}"
            )
        return whole(target.long(), batch_dims).contiguous()
    if target.dtype not in (*FLOATS, *INTEGERS, torch.bool):
        kind = (
            "real" if target.dtype.is_complex else "float32, bfloat16, float16, float64, an integer or bool"
        )
        raise TypeError(f"{function}: target must be {kind}; got {str(target.dtype)[6:]}")
    double = any(param.dtype is torch.float64 for param in params)
    if (
        target.dtype is torch.float64 and not double
    ) or target.dtype not in FLOATS:  # counts often come as integers
        target = target.double() if double else target.float()
    return whole(target, batch_dims)


def prepare_params(
    function: str,
    params: Tensor | Sequence[Tensor] | None,
    likelihood: str,
    numbers: list[int],
    classes: bool,
    batch_dims: int,
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
    if given[0].dim() < batch_dims + classes:
        shape = _shape_of_batch(batch_dims) + (", classes)" if classes else ")")
        raise ValueError(f"{function}: params must have shape {shape}; got {tuple(given[0].shape)}")
    return given


def _shape_of_batch(batch_dims: int) -> str:
    names = ["batch"] if batch_dims == 1 else [f"batch{i}" for i in range(batch_dims)]
    return f"({', '.join(names)}, ..."


def prepare_latent(
    function: str,
    mean: Tensor,
    logvar: Tensor | None,
    prior_mean: Tensor | None,
    prior_logvar: Tensor | None,
    batch_dims: int,
) -> list[Tensor]:
    logvar = floating(function, "logvar", logvar)
    if mean.dim() < batch_dims:
        shape = _shape_of_batch(batch_dims)
        raise ValueError(f"{function}: mean must have shape {shape}); got {tuple(mean.shape)}")
    if logvar.shape != mean.shape:
        raise ValueError(
            f"{function}: logvar must have shape {tuple(mean.shape)} like mean; got {tuple(logvar.shape)}"
        )
    same_device(function, "logvar", logvar, mean.device)
    latent = [whole(mean, batch_dims), whole(logvar, batch_dims)]
    if prior_mean is None and prior_logvar is None:
        return latent
    for name, prior in (("prior_mean", prior_mean), ("prior_logvar", prior_logvar)):
        if prior is None:  # the standard normal's
            latent.append(mean.new_zeros(1, 1))
            continue
        floating(function, name, prior)
        same_device(function, name, prior, mean.device)
        latent.append(rows(function, name, prior, mean.shape, "mean", batch_dims))
    return latent


def prepare_mask(
    function: str, name: str, mask: object, like: Tensor, of: str, true: str, batch_dims: int
) -> Tensor:
    """A mask that broadcasts to ``like``, expanded to [B, D]: one row for all costs no memory, all else a byte each."""
    return whole(check_mask(function, name, mask, like, of, true).expand(like.shape), batch_dims)


def check_mask(function: str, name: str, mask: object, like: Tensor, of: str, true: str) -> Tensor:
    """A bool tensor that broadcasts to ``like``, and lies where it does.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = str(mask.dtype)[6:] if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{function}: {name} must be a bool tensor, True = {true}; got {kind}")
    dense(function, name, mask)
    if not broadcasts(mask.shape, like.shape):
        raise ValueError(
            f"{function}: {name} must have shape {tuple(like.shape)} like {of}; got {tuple(mask.shape)}, which does not"
            " broadcast to it"
        )
    same_device(function, name, mask, like.device)
    return mask


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
    latent_mask: Tensor | None = None,
    batch_dims: int = 1,
) -> Operands:
    """Checks every argument and brings it into the kernels' shape.

    ``numbers``: of parameters that the likelihood may have, empty where there is no energy. ``mean``: None for no KL.
    ``batch_dims``: how many dimensions in front are the batch's; the others are summed.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: one of a wrong shape or on another device; the message has its name, what was expected, what came.
    """
    classes = bool(numbers) and longest(likelihood).classes
    if not classes:
        params, target, (mask,) = in_memory_order(params, target, (mask,), batch_dims)
    of_mean = prior_mean, prior_logvar, latent_mask
    mean, logvar, (prior_mean, prior_logvar, latent_mask) = in_memory_order(mean, logvar, of_mean, batch_dims)
    kernel_params: list[Tensor] = []
    kernel_target = None
    if numbers:
        given = prepare_params(function, params, likelihood, numbers, classes, batch_dims)
        kernel_target = prepare_target(function, target, given, classes, batch_dims)
        shape = given[0].shape
        batch, device = shape[:batch_dims], given[0].device
        if classes:
            flat = resolved(given[0]).reshape(math.prod(batch), math.prod(shape[batch_dims:-1]), shape[-1])
            kernel_params = [flat.contiguous()]
        else:
            kernel_params = [whole(given[0], batch_dims)]
            kernel_params += [
                rows(function, f"params[{i}]", given[i], shape, "params[0]", batch_dims)
                for i in range(1, len(given))
            ]
    latent = []
    if mean is not None or not numbers:
        mean = floating(function, "mean", mean)
        latent = prepare_latent(function, mean, logvar, prior_mean, prior_logvar, batch_dims)
        if not numbers:
            batch, device = mean.shape[:batch_dims], mean.device
        elif mean.shape[:batch_dims] != batch:
            sizes = f"batch size {batch[0]}" if batch_dims == 1 else f"batch sizes {tuple(batch)}"
            raise ValueError(
                f"{function}: mean must have the {sizes} of params; got shape {tuple(mean.shape)}"
            )
        same_device(function, "mean", mean, device)
        if latent_mask is not None:
            latent_mask = prepare_mask(
                function, "latent_mask", latent_mask, mean, "mean", "a latent, False = padding", batch_dims
            )
    if mask is not None:
        assert target is not None
        mask = prepare_mask(function, "mask", mask, target, "target", "observed", batch_dims)
        if classes:
            mask = mask.contiguous()
    if weight is not None:
        floating(function, "weight", weight)
        if weight.shape != batch:
            raise ValueError(f"{function}: weight must have shape {tuple(batch)}; got {tuple(weight.shape)}")
        same_device(function, "weight", weight, device)
        if weight.requires_grad:
            raise ValueError(f"{function}: weight must not require a gradient, since it gets none; detach it")
        weight = resolved(weight).reshape(-1).contiguous()
    return Operands(kernel_params, kernel_target, mask, latent, weight, latent_mask, batch)
