"""Ising's square lattice in closed form: what belief propagation on it must give, and what it approximates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["minus_log_z_of_bethe_lattice", "minus_log_z_of_onsager"]


def minus_log_z_of_bethe_lattice(coupling: Tensor, field: float) -> Tensor:
    """-log Z a spin of the homogeneous Bethe approximation with four neighbours: one message, at its fixed point."""
    bias = torch.tensor(field).double() + 1.0  # on the side of the field
    for _ in range(100_000):
        sent = torch.atanh(torch.tanh(coupling) * torch.tanh(field + 3 * bias))
        if (sent - bias).abs() < 1e-15:
            break
        bias = sent
    spins = torch.tensor([1.0, -1.0]).double()
    cavity = (field + 3 * bias) * spins
    pair = torch.softmax((coupling * spins.outer(spins) + cavity + cavity.unsqueeze(1)).flatten(), 0)
    site = torch.softmax((field + 4 * bias) * spins, 0)
    # Two edges a site.
    edges = 2 * (pair * (pair.log() - coupling * spins.outer(spins).flatten())).sum()
    return edges - field * (site * spins).sum() - 3 * (site * site.log()).sum()


def minus_log_z_of_onsager(coupling: Tensor) -> Tensor:
    """-log Z a spin of the infinite square lattice without a field (Onsager 1944, equation 106)."""
    k = 2 * torch.sinh(2 * coupling) / torch.cosh(2 * coupling) ** 2
    angles = (torch.arange(20_000).double() + 0.5) * (math.pi / 20_000)
    inside = (1 + (1 - (k * angles.sin()) ** 2).clamp(min=0).sqrt()) / 2
    return -(torch.log(2 * torch.cosh(2 * coupling)) + inside.log().mean() / 2)
