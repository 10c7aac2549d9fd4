"""What `worker` runs in its interpreting process for the free energy and the reparameterisation."""

import warnings
from typing import Any

import numpy
import torch
from torch import Tensor


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
