"""A model whose weights are its answers, and chains of samples of it that can be told apart."""

import torch
from torch import nn


class Constant(nn.Module):
    """Answers with its weights whatever the input, so that every average is known."""

    def __init__(self, *values):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.value.expand(len(x), -1)


def marks(samples):
    """The number each sample was marked with by `counting`."""
    return [int(state["value"][0]) for state in samples]


def counting(samples, model, calls, start=0):
    for number in range(start + 1, start + calls + 1):
        model.value.data.fill_(number)
        samples.update()
    return samples
