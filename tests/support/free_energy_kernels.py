"""Implementations of the free energy's operators, called alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fekernels._runtime import backends


class Kernels(NamedTuple):
    """One implementation of the free energy's operators, with the arguments of `torch.ops.fekernels_native`."""

    name: str
    device: str | torch.device
    free_energy: Callable[..., list[Tensor]]
    reparameterize: Callable[..., Tensor]
    reparameterize_backward: Callable[..., list[Tensor]]
    scale_: Callable[[list[Tensor], Tensor], object]
    exact: bool = True  # where interpreted, whether an fma is rounded once, as on a GPU

    @property
    def interpreted(self) -> bool:
        return self.name == "triton_interpreted"


def implementation(backend: str, device: str | torch.device, name: str = "") -> Kernels:
    """That of a backend, which must be there."""
    operators = ("free_energy", "reparameterize", "reparameterize_backward", "scale_")
    return Kernels(name or backend, device, *(backends.implementation(each, backend) for each in operators))


@functools.cache
def cpp() -> Kernels | None:
    """The C++ kernels, where they can be compiled."""
    return implementation("cpp", "cpu") if backends._obstacle("cpp", "cpu") is None else None
