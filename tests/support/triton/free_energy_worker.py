"""What `worker` runs in its interpreting process for the free energy and the reparameterisation, and the way there."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.support.free_energy_kernels import Kernels


def interpreted_kernels(interpret: Callable[..., Any], fuses: bool) -> Kernels:
    """Triton's kernels where they run interpreted. What they overwrite there is overwritten here."""

    def free_energy(*arguments: Any) -> list[Tensor]:
        (params, *_), results = interpret("free_energy_and_arguments", *arguments)
        if arguments[10] and params[0].data_ptr() == results[3].data_ptr():
            results[3] = arguments[0][0].copy_(results[3])
        return results

    def scale_(tensors: list[Tensor], factor: Tensor) -> None:
        for tensor, scaled in zip(tensors, interpret("scale_", tensors, factor), strict=True):
            tensor.copy_(scaled)

    others = (partial(interpret, name) for name in ("reparameterize", "reparameterize_backward"))
    return Kernels("triton_interpreted", "cpu", free_energy, *others, scale_, exact=fuses)


def free_energy(calls: list[tuple[Any, ...]]) -> list[list[Tensor]]:
    """fekernels.triton.free_energy.free_energy.free_energy of each set of arguments, with memory that comes as NaN."""
    from fekernels.triton.free_energy import free_energy as backend

    torch.use_deterministic_algorithms(True)  # with which torch.empty is NaN, or the largest integer
    # NumPy warns of what IEEE arithmetic defines; both sides of a selection are computed.
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [backend.free_energy(*arguments) for arguments in calls]


def free_energy_and_arguments(*arguments: Any) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Also the arguments, as the call left them."""
    return arguments, free_energy([arguments])[0]


def scale_(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    from fekernels.triton.free_energy import free_energy as backend

    backend.scale_(tensors, factor)
    return tensors


def reparameterize(mean: Tensor, logvar: Tensor, *key: int) -> Tensor:
    from fekernels.triton.free_energy import reparameterize as backend

    return backend.reparameterize(mean, logvar, *key)


def reparameterize_backward(grad: Tensor, logvar: Tensor, *key: int) -> list[Tensor]:
    from fekernels.triton.free_energy import reparameterize as backend

    return backend.reparameterize_backward(grad, logvar, *key)
