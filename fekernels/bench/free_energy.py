"""The free energy's cases: forward + backward beside PyTorch eager and compiled, and layouts beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import NAMES, Parameter, Target, longest
from fekernels._runtime.backends import use_backend
from fekernels._runtime.torch_internals import view_as_result
from fekernels.bench.case import Case, Cost, Group, Row, Shape, product
from fekernels.bench.floors import COPY
from fekernels.bench.peers import ENERGIES, Loss
from fekernels.bench.timing import Contestant
from fekernels.ops.free_energy.free_energy import free_energy

__all__ = [
    "CASES",
    "COMPILED",
    "EAGER",
    "INPLACE",
    "OURS",
    "REFERENCE",
    "Problem",
    "compiled",
    "cost",
    "label",
    "own_prediction",
    "problem",
    "step",
]

EAGER, COMPILED, REFERENCE = "eager PyTorch", "torch.compile", "reference backend"
OURS, INPLACE = "free_energy", "free_energy, inplace_backward"
CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"
ONE, CHANNELS, GENES = "one value", "one per channel", "one per gene"

CLASSES = 16  # of a categorical element


@dataclass(frozen=True)
class Problem:
    """Operands that require gradients, and the data."""

    likelihood: str
    params: tuple[Tensor, ...]
    target: Tensor
    mean: Tensor
    logvar: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (*self.params, self.mean, self.logvar)

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def _full(at: int, given: Parameter) -> bool:
    """Whether a parameter of a problem has a value per element; else one per column, as dispersions do."""
    return at == 0 or not given.not_negative


def problem(likelihood: str, shape: Shape, seed: int = 0) -> Problem:
    """Random values of realistic size; nine counts of ten are zero, and they have a dispersion per column."""
    batch, width, latents = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.empty(size).normal_(generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.empty(size).uniform_(generator=generator)

    def parameter(at: int, given: Parameter) -> Tensor:
        if not _full(at, given):
            return normal(width).exp_().add_(2 if given.name == "degrees_of_freedom" else 0)
        if given.not_negative:
            return uniform(batch, width).mul_(0.5).add_(0.01)
        return normal(batch, width).mul_(0.3 if at else 1.0)

    row = longest(likelihood)
    if row.target is Target.COUNTS:
        target = torch.empty(batch, width).geometric_(0.5, generator=generator)
        target.mul_(uniform(batch, width) < 0.1)
    elif row.target is Target.CLASSES:
        target = torch.randint(0, CLASSES, (batch, width), generator=generator)
    elif row.target is Target.REAL:
        target = normal(batch, width)
    else:  # in [0, 1], and above 0 where a density ends at 0
        target = uniform(batch, width).clamp_min_(1e-6)
    if row.classes:
        params = [normal(batch, width, CLASSES)]
    else:
        params = [parameter(at, given) for at, given in enumerate(row.parameters)]
    latent = [normal(batch, latents), normal(batch, latents).mul_(0.3)]
    leaves = [tensor.requires_grad_() for tensor in (*params, *latent)]
    return Problem(likelihood, tuple(leaves[:-2]), target, leaves[-2], leaves[-1])


def step(given: Problem, loss: Loss | None = None, inplace: bool = False) -> Callable[[], None]:
    """Forward, backward, and the gradients let go, as a training loop does; by ours without ``loss``."""

    def run() -> None:
        if loss is None:
            first, *others = given.params
            # As from a layer, whose matrix product ends so. Neither a leaf that wants a gradient nor its views may be
            # overwritten.
            prediction = view_as_result(first) if inplace else first
            terms = free_energy(
                (prediction, *others),
                given.target,
                given.mean,
                given.logvar,
                likelihood=given.likelihood,
                inplace_backward=inplace,
            )
            terms.free_energy.backward()
        else:
            loss(*given.params, given.target, given.mean, given.logvar).backward()
        given.clear()

    return run


def own_prediction(given: Problem) -> tuple[Problem, Callable[[], None]]:
    """The problem with a prediction of its own to overwrite, and what puts the values back."""
    start = given.params[0].detach()
    prediction = start.clone().requires_grad_()

    @torch.no_grad()
    def restore() -> None:
        prediction.copy_(start)

    return replace(given, params=(prediction, *given.params[1:])), restore


def compiled(given: Problem) -> tuple[Callable[[], None] | None, str]:
    """The eager peer under torch.compile, compiled for this very shape, or why there is none."""
    run = step(given, torch.compile(ENERGIES[given.likelihood], dynamic=False))
    try:
        run()
    except Exception as error:  # without a C++ compiler, and whatever else torch.compile may raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return None, f"torch.compile: {reason}"
    return run, ""


def cost(likelihood: str) -> Cost:
    """Of an element: operands read once, gradients written once; and the functions that no formula avoids."""
    row = longest(likelihood)
    values = CLASSES if row.classes else sum(_full(at, given) for at, given in enumerate(row.parameters))
    return Cost(8 * values + (8 if row.classes else 4), OPERATIONS.get(likelihood, {}))


# Energy and gradient share their exponential. What is not here is held to the copy alone.
OPERATIONS: dict[str, Mapping[str, float]] = {
    "bernoulli": {"exponential": 1, "logarithm": 1},
    "gaussian": {"exponential": 1},
    "negative_binomial": {"logarithm": 1},  # three lgamma where a count is not 0, which is one in ten here
}


def _beside(likelihood: str, rows: tuple[Row, ...], shape: Shape) -> Group:
    """Ours and the peers that the rows name; why one is missing that cannot be made."""
    given = problem(likelihood, shape)
    named = {row.ours for row in rows} | {row.peer for row in rows}
    contestants, missing = [Contestant(OURS, step(given))], {}
    if EAGER in named:
        contestants.append(Contestant(EAGER, step(given, ENERGIES[likelihood])))
    if REFERENCE in named:
        contestants.append(Contestant(REFERENCE, _on_the_reference(step(given))))
    if COMPILED in named:
        torch.compiler.reset()  # the last case's shapes would count as recompiles of the same function
        run, why = compiled(given)
        if run is None:
            missing[COMPILED] = why
        else:
            contestants.append(Contestant(COMPILED, run))
    if INPLACE in named:
        overwritten, restore = own_prediction(given)
        contestants.append(Contestant(INPLACE, step(overwritten, inplace=True), prepare=restore))
    return Group(contestants, missing)


def _on_the_reference(run: Callable[[], None]) -> Callable[[], None]:
    def chosen() -> None:
        with use_backend("reference"):
            run()

    return chosen


def _images(likelihood: str, shape: Shape) -> Problem:
    flat = problem(likelihood, (shape[0], product(shape[1:]), 16))
    prediction = flat.params[0].detach().view(shape).requires_grad_()
    return replace(flat, params=(prediction,), target=flat.target.view(shape))


def _with_scale(given: Problem, shape: Shape, value: float) -> Problem:
    return replace(given, params=(given.params[0], torch.full(shape, value, requires_grad=True)))


def _layouts(shape: Shape) -> dict[str, Problem]:
    given = _images("bernoulli", shape)
    prediction = given.params[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    target = given.target.contiguous(memory_format=torch.channels_last)
    return {CONTIGUOUS: given, CHANNELS_LAST: replace(given, params=(prediction,), target=target)}


def _channels(shape: Shape) -> dict[str, Problem]:
    given = _images("gaussian", shape)
    channels = (1, shape[1], *(1 for _ in shape[2:]))
    return {ONE: _with_scale(given, (1,), 0.3), CHANNELS: _with_scale(given, channels, 0.3)}


def _genes(shape: Shape) -> dict[str, Problem]:
    given = problem("negative_binomial", shape)
    return {ONE: _with_scale(given, (1,), 1.5), GENES: _with_scale(given, (shape[1],), 1.5)}


def _timed(problems: Callable[[Shape], Mapping[str, Problem]], shape: Shape) -> Group:
    return Group([Contestant(name, step(given)) for name, given in problems(shape).items()])


def label(name: str, shape: Shape) -> str:
    return f"{name} {shape[0]} x {shape[1]}"


def _label_of_images(name: str, shape: Shape) -> str:
    return f"{name} {' x '.join(map(str, shape))}"


def _data(shape: Shape) -> int:
    return shape[0] * shape[1]


def _costs(
    each: Cost, names: tuple[str, ...], elements: Callable[[Shape], int], shape: Shape
) -> dict[str, Cost]:
    return {name: each * elements(shape) for name in names}


Shapes = tuple[Shape, Shape, Shape]

LARGE: Shapes = ((8192, 4096, 128), (1024, 4096, 128), (64, 96, 4))
MIDDLE: Shapes = ((4096, 784, 64), (512, 784, 64), (16, 33, 3))
SMALL: Shapes = ((128, 784, 20), (128, 784, 20), (4, 33, 3))
COUNTS: Shapes = ((1024, 5000, 10), (128, 5000, 10), (8, 50, 3))
OTHER: Shapes = ((1024, 784, 64), (128, 784, 64), (6, 33, 3))
FEATURES: Shapes = ((64, 64, 32, 32), (8, 64, 32, 32), (4, 6, 5, 6))
PHOTOS: Shapes = ((64, 3, 64, 64), (8, 3, 64, 64), (4, 3, 5, 6))


def _case(
    name: str,
    likelihood: str,
    shapes: Shapes,
    rows: tuple[Row, ...],
    called: str = "",
    cached: bool = True,
    seconds: float = 5.0,
) -> Case:
    return Case(
        f"free_energy/{name}",
        partial(label, called or likelihood),
        shapes,
        partial(_beside, likelihood, rows),
        rows,
        _data,
        partial(_costs, cost(likelihood), (OURS, INPLACE), _data),
        cached=cached,
        seconds=seconds,
    )


def _both(eager: float, by_compiler: float) -> tuple[Row, ...]:
    return Row(OURS, EAGER, eager), Row(OURS, COMPILED, by_compiler)


def _layout(
    name: str,
    likelihood: str,
    shapes: Shapes,
    problems: Callable[[Shape], Mapping[str, Problem]],
    row: Row,
    counts: bool = False,
) -> Case:
    """Our own call in another layout: the ratio is what the layout costs."""
    elements = _data if counts else product
    # A scale of one value or one per channel is nothing to read.
    each = Cost(12, OPERATIONS[likelihood])
    return Case(
        f"free_energy/{name}",
        partial(label if counts else _label_of_images, likelihood),
        shapes,
        partial(_timed, problems),
        (row,),
        elements,
        partial(_costs, each, (row.ours,), elements),
        cached=True,
    )


# In place ours moves what a copy of three halves of the data moves: as much read as written.
IN_PLACE = "inplace_backward"
_LARGE_ROWS = (
    *_both(0.15, 0.25),
    Row(INPLACE, EAGER, 0.09, IN_PLACE),
    Row(INPLACE, COMPILED, 0.15, IN_PLACE),
    Row(INPLACE, COPY, 1.3, IN_PLACE),
)
_NAMED = ("mse", "bernoulli", "gaussian", "negative_binomial")

CASES = (
    _case("large_mse", "mse", LARGE, _LARGE_ROWS, cached=False),
    _case("large_bernoulli", "bernoulli", LARGE, _LARGE_ROWS, cached=False),
    _case("middle_mse", "mse", MIDDLE, _both(0.25, 0.6)),
    _case("middle_bernoulli", "bernoulli", MIDDLE, _both(0.25, 0.6)),
    _case("small_mse", "mse", SMALL, _both(0.7, 0.5)),
    _case("small_bernoulli", "bernoulli", SMALL, _both(0.4, 0.4)),
    _case("gaussian", "gaussian", MIDDLE, _both(0.12, 0.6), "gaussian, learned variance,"),
    _case("negative_binomial", "negative_binomial", COUNTS, _both(0.08, 0.25)),
    # Likelihoods that no goal names, and any new one.
    *(
        _case(name, name, OTHER, (Row(OURS, EAGER if name in ENERGIES else REFERENCE),), seconds=2.0)
        for name in NAMES
        if name not in _NAMED
    ),
    *(
        case
        for of, shapes in (("features", FEATURES), ("photos", PHOTOS))
        for case in (
            _layout(
                f"channels_last_{of}",
                "bernoulli",
                shapes,
                _layouts,
                Row(CHANNELS_LAST, CONTIGUOUS, 1.15, CHANNELS_LAST),
            ),
            _layout(f"scales_{of}", "gaussian", shapes, _channels, Row(CHANNELS, ONE, 1.3, CHANNELS)),
        )
    ),
    _layout("dispersions", "negative_binomial", COUNTS, _genes, Row(GENES, ONE, 1.3, GENES), counts=True),
)
