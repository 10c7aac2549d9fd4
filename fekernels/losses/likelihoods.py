"""The likelihoods of ``fe.free_energy``: names, parameters and their order, means, and samples.

``NAMES`` lists them; ``PARAMETERS[name]`` the parameters in the order that every function takes them in. Log-variances,
log-scales, log-rates and logits are unbounded; ``mean``, ``inverse_dispersion``, ``shape`` and ``degrees_of_freedom``
must be positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CODES, NAMES, longest
from fekernels._checks import integer, same_device
from fekernels.losses._checks import floating_tensor
from fekernels.ops.free_energy.distributions import MEANS, SAMPLES

__all__ = ["NAMES", "OPTIONAL", "PARAMETERS", "mean", "sample"]

PARAMETERS: dict[str, tuple[str, ...]] = {
    name: tuple(parameter.name for parameter in longest(name).parameters) for name in NAMES
}
# Those that may be left out: "gaussian" has a variance of 1 then.
OPTIONAL: dict[str, tuple[str, ...]] = {
    name: PARAMETERS[name][min(CODES[name]) :] for name in NAMES if len(CODES[name]) > 1
}


def _parameters(function: str, name: str, params: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Checked, broadcast against each other, in float32 or, where any is, float64."""
    if not isinstance(name, str) or name not in PARAMETERS:
        raise ValueError(f"{function}: name must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    if not isinstance(params, (Tensor, list, tuple)):
        raise TypeError(
            f"{function}: params must be a tensor or a tuple of tensors; got {type(params).__name__}"
        )
    given = (params,) if isinstance(params, Tensor) else tuple(params)
    most, optional = len(PARAMETERS[name]), len(OPTIONAL.get(name, ()))
    if not most - optional <= len(given) <= most:
        raise ValueError(
            f"{function}: params of {name!r} must be {PARAMETERS[name]}; got {len(given)} tensors"
        )
    for parameter, value in zip(PARAMETERS[name], given, strict=False):
        floating_tensor(function, parameter, value)
        same_device(function, parameter, value, given[0].device)
    double = any(value.dtype == torch.float64 for value in given)
    try:
        torch.broadcast_shapes(*(value.shape for value in given))
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in given)
        raise ValueError(
            f"{function}: params of {name!r} must have shapes that broadcast; got {shapes}"
        ) from None
    return torch.broadcast_tensors(*(value.double() if double else value.float() for value in given))


def mean(name: str, params: Tensor | Sequence[Tensor]) -> Tensor:
    """Expectation of x, differentiable in the parameters.

    Args:
        name: A name of ``NAMES``.
        params: One tensor, or a sequence in the order of ``PARAMETERS[name]``; they broadcast against each other.

    Returns:
        float32 (float64 for float64 parameters), of the shape of x; for ``categorical`` the probabilities [..., K];
        for ``student_t`` NaN where degrees_of_freedom <= 1, which have no mean. NaN where a parameter that must be
        positive is negative or NaN: there is no such distribution.
    """
    values = _parameters("likelihoods.mean", name, params)
    return _in_domain(name, values, MEANS[name](*values))


def _in_domain(name: str, values: Sequence[Tensor], result: Tensor) -> Tensor:
    """``result``, NaN where a parameter is outside of its domain."""
    for parameter, value in zip(longest(name).parameters, values, strict=False):
        if parameter.not_negative:
            result = torch.where(value >= 0, result, math.nan)
    return result


@torch.no_grad()
def sample(
    name: str,
    params: Tensor | Sequence[Tensor],
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    sample_shape: Sequence[int] = (),
) -> Tensor:
    """Draw x from the likelihood; no gradient flows. ``mse`` is the Gaussian of variance 1/2.

    Args:
        name: A name of ``NAMES``.
        params: One tensor, or a sequence in the order of ``PARAMETERS[name]``; they broadcast against each other.
        seed: Start a fresh torch generator on the parameters' device; the same seed gives the same draw on it.
        generator: Or draw from this one. With neither, from torch's default.
        sample_shape: Dimensions put in front: that many independent draws.

    Returns:
        float32 (float64 for float64 parameters) [*sample_shape, *event]; for ``categorical`` int64 classes. NaN for
        counts of an infinite rate, or one of 2^62 and more, and outside of the parameters' domain, as ``mean``.

    Raises:
        TypeError: an argument of a wrong type. ValueError: a wrong value or shape.
    """
    function = "likelihoods.sample"
    values = _parameters(function, name, params)
    if not isinstance(sample_shape, (tuple, list)):
        raise TypeError(
            f"{function}: sample_shape must be a tuple of sizes; got {type(sample_shape).__name__}"
        )
    sizes = [integer(function, f"sample_shape[{i}]", size, 0) for i, size in enumerate(sample_shape)]
    if seed is not None and generator is not None:
        raise ValueError(f"{function}: expected seed or generator; got both")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: generator must be a torch.Generator; got {type(generator).__name__}")
    if seed is not None:
        key = integer(function, "seed", seed, -(1 << 63), 1 << 64)
    if values[0].is_meta:  # nothing is drawn
        generator = None
    elif seed is not None:
        generator = torch.Generator(values[0].device).manual_seed(key)
    elif generator is not None and generator.device.type != values[0].device.type:
        raise ValueError(
            f"{function}: generator must be on {values[0].device} like params; got one on {generator.device}"
        )
    shape = (*sizes, *values[0].shape)
    values = tuple(value.expand(shape) for value in values)
    return _in_domain(name, values, SAMPLES[name](generator, *values))
