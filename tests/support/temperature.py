"""Every temperature schedule with its closed form, and optimizers to run them on."""

import math

import torch

from fekernels.optim.temperature import (
    ConstantTemperature,
    CosineTemperature,
    CyclicalTemperature,
    ExponentialTemperature,
    LambdaTemperature,
)


def optimizer_with(*temperatures, lr=0.1):
    """Any optimizer whose groups have a temperature will do, and plain SGD hides nothing."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "temperature": t} for t in temperatures]
    return torch.optim.SGD(groups, lr=lr)


def run(optimizer, schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append([float(group["temperature"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return seen


def cyclical(step, length, explore):
    return float((step % length) / length >= explore)


def cosine(step, T_max, low):
    return low + (1 - low) * (1 + math.cos(math.pi * min(step, T_max) / T_max)) / 2


class Halving:
    def __init__(self):
        self.every = 3

    def __call__(self, step):
        return 0.5 ** (step // self.every)


SCHEDULES = {
    "constant": (lambda o, **k: ConstantTemperature(o, **k), lambda s: 1.0),
    "exponential": (lambda o, **k: ExponentialTemperature(o, 0.9, **k), lambda s: 0.9**s),
    "cosine": (lambda o, **k: CosineTemperature(o, 7, **k), lambda s: cosine(s, 7, 0.0)),
    "cyclical": (lambda o, **k: CyclicalTemperature(o, 5, 0.6, **k), lambda s: cyclical(s, 5, 0.6)),
    "lambda": (lambda o, **k: LambdaTemperature(o, lambda s: s / 4, **k), lambda s: s / 4),
    "callable": (lambda o, **k: LambdaTemperature(o, Halving(), **k), lambda s: 0.5 ** (s // 3)),
}
