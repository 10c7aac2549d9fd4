"""The free energy's layouts in ``python -m fekernels bench``: each beside our own contiguous or unbroadcast call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from fekernels.bench.free_energy import Problem, Sizes, problem, step
from fekernels.bench.optimizers import Group, Row
from fekernels.bench.timing import Contestant

__all__ = ["CHANNELS", "CHANNELS_LAST", "CONTIGUOUS", "GENES", "ONE", "groups"]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
ONE, CHANNELS, GENES = "one value", "one a channel", "one a gene"
BYTES = 12  # an element: a prediction and a target read, a gradient written


def groups(sizes: Sizes) -> list[Callable[[], Group]]:
    """One maker a group, as ``optimizers.groups``."""
    makers: list[Callable[[], Group]] = []
    for shape in sizes.images:
        makers += [partial(_layouts, sizes, shape), partial(_channels, sizes, shape)]
    return [*makers, partial(_genes, sizes)]


def _images(likelihood: str, shape: tuple[int, ...]) -> Problem:
    flat = problem(likelihood, (shape[0], torch.Size(shape[1:]).numel(), 16))
    prediction = flat.params[0].detach().view(shape).requires_grad_()
    return replace(flat, params=(prediction,), target=flat.target.view(shape))


def _with_scale(given: Problem, shape: tuple[int, ...], value: float) -> Problem:
    return replace(given, params=(given.params[0], torch.full(shape, value, requires_grad=True)))


def _named(likelihood: str, shape: tuple[int, ...]) -> str:
    return f"{likelihood} {' x '.join(map(str, shape))}"


def _group(sizes: Sizes, name: str, problems: dict[str, Problem], reach: float) -> Group:
    """The second problem beside the first."""
    peer, ours = problems
    contestants = [Contestant(each, step(given)) for each, given in problems.items()]
    elements = next(iter(problems.values())).params[0].numel()
    return Group(
        elements, contestants, [Row(f"{name}, {ours}", peer, ours, reach, BYTES)], sizes.turn_seconds
    )


def _layouts(sizes: Sizes, shape: tuple[int, ...]) -> Group:
    given = _images("bernoulli", shape)
    prediction = given.params[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    target = given.target.contiguous(memory_format=torch.channels_last)
    moved = replace(given, params=(prediction,), target=target)
    return _group(sizes, _named("bernoulli", shape), {CONTIGUOUS: given, CHANNELS_LAST: moved}, 1.15)


def _channels(sizes: Sizes, shape: tuple[int, ...]) -> Group:
    given = _images("gaussian", shape)
    problems = {
        ONE: _with_scale(given, (1,), 0.3),
        CHANNELS: _with_scale(given, (1, shape[1], *(1 for _ in shape[2:])), 0.3),
    }
    return _group(sizes, _named("gaussian", shape), problems, 1.3)


def _genes(sizes: Sizes) -> Group:
    given = problem("negative_binomial", sizes.counts)
    problems = {ONE: _with_scale(given, (1,), 1.5), GENES: _with_scale(given, (sizes.counts[1],), 1.5)}
    return _group(sizes, _named("negative_binomial", sizes.counts[:2]), problems, 1.3)
