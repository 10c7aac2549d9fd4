"""What the tests of fe.SVGD share: a target, particles, and steps by the public direction."""

from __future__ import annotations

import torch

import fekernels as fe


def normal(x: torch.Tensor) -> torch.Tensor:
    return -x.square().sum(-1) / 2


def one_normal(x: torch.Tensor) -> torch.Tensor:
    return -x @ x / 2


def draws(n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return fe.random.normal((n, d), seed=11).to(dtype)


def plain(x: torch.Tensor, lr: float, steps: int = 1, gamma: float = 1.0, **settings) -> torch.Tensor:
    """Descent by the public direction, on N(0, I)."""
    for _ in range(steps):
        x = x + lr * fe.svgd_direction(x, gamma * -x, **settings)
    return x


def same(a, b) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
