"""Optimizers on a few parameters, with gradients that depend on the number of the step alone."""

import torch

from tests.support.tensors import bits_equal

HOT = dict(lr=0.1, temperature=0.5, eps=0.1, seed=77)
SHAPES = ((33, 7), (130,), (1,))


def parameters(place, dtype=torch.float32):
    torch.manual_seed(1)
    return [
        torch.randn(shape, dtype=torch.float64).to(place.device, dtype).requires_grad_() for shape in SHAPES
    ]


def set_gradients(optimizer, i, scale=1.0):
    """New gradient tensors, which depend on i alone."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            wave = (torch.arange(p.numel(), dtype=torch.float64) * 0.7 + i).sin().view(p.shape) * scale
            p.grad = wave.to(p.device, p.dtype)


def step(optimizer, i):
    set_gradients(optimizer, i)
    optimizer.step()


def everything(optimizer):
    """All tensors that a step may write."""
    tensors = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors += [p, *optimizer.state[p].values()] if p in optimizer.state else [p]
    return tensors


def same(a, b):
    return all(bits_equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))
