"""The free energy's cases of ``python -m fekernels bench``: forward + backward beside PyTorch eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fekernels._catalogue.free_energy import Parameter, Target, longest
from fekernels.bench.optimizers import COPY, Group, Row, copy
from fekernels.bench.timing import Contestant, interleave
from fekernels.ops.free_energy import free_energy

__all__ = [
    "COMPILED",
    "EAGER",
    "INPLACE",
    "OURS",
    "PEERS",
    "Problem",
    "Sizes",
    "groups",
    "problem",
    "step",
    "sweep",
]

EAGER, COMPILED = "eager PyTorch", "torch.compile"
OURS, INPLACE = "free_energy", "free_energy, inplace_backward"

Shape = tuple[int, int, int]  # batch, elements of a sample, latents
Loss = Callable[..., Tensor]  # (*params, target, mean, logvar) -> scalar


@dataclass(frozen=True)
class Sizes:
    """Shapes of the cases, and how long each group is timed."""

    large: Shape = (8192, 4096, 128)
    middle: Shape = (4096, 784, 64)
    small: Shape = (128, 784, 20)
    counts: Shape = (1024, 5000, 10)
    images: tuple[tuple[int, int, int, int], ...] = ((64, 64, 32, 32), (64, 3, 64, 64))
    # Samples of each width, so many that the data stays the same size.
    sweep_elements: int = 1 << 24
    sweep_widths: tuple[int, ...] = tuple(1 << k for k in range(10, 18))
    rounds: int = 15
    seconds: float = 5.0
    turn_seconds: float = 0.01


# What users write today. Means over the batch of sums over the event, as ours; constants left out where they do.


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(1).mean()


def mse(r: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return F.mse_loss(r, x, reduction="none").sum(1).mean() + kl(mean, logvar)


def bernoulli(logit: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    energy = F.binary_cross_entropy_with_logits(logit, x, reduction="none").sum(1).mean()
    return energy + kl(mean, logvar)


def gaussian(r: Tensor, s: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (s + (r - x).pow(2) * torch.exp(-s)).sum(1).mean() + kl(mean, logvar)


def negative_binomial(mu: Tensor, theta: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """As scvi-tools computes it: logarithms kept from 0 by 1e-8, three lgamma an element."""
    eps = 1e-8
    log_sum = torch.log(theta + mu + eps)
    log_p = (
        theta * (torch.log(theta + eps) - log_sum)
        + x * (torch.log(mu + eps) - log_sum)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )
    return -log_p.sum(1).mean() + kl(mean, logvar)


PEERS: dict[str, Loss] = {
    "mse": mse,
    "bernoulli": bernoulli,
    "gaussian": gaussian,
    "negative_binomial": negative_binomial,
}

CLASSES = 16  # of a categorical element

# Bytes an element that no forward and backward can avoid to move: operands read once, gradients written once.
BYTES = {"mse": 12, "bernoulli": 12, "gaussian": 20, "negative_binomial": 12}


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


def problem(likelihood: str, shape: Shape, seed: int = 0) -> Problem:
    """Random values of realistic size; counts are zero in nine places of ten and have a dispersion a column."""
    batch, width, latents = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.empty(size).normal_(generator=generator)

    def uniform(*size: int) -> Tensor:
        return torch.empty(size).uniform_(generator=generator)

    def parameter(at: int, given: Parameter) -> Tensor:
        if not given.not_negative:
            return normal(batch, width).mul_(0.3 if at else 1.0)
        if not at:
            return uniform(batch, width).mul_(0.5).add_(0.01)
        return normal(width).exp_().add_(2 if given.name == "degrees_of_freedom" else 0)

    row = longest(likelihood)
    if row.target is Target.COUNTS:
        target = torch.empty(batch, width).geometric_(0.5, generator=generator)
        target.mul_(uniform(batch, width) < 0.1)
    elif row.target is Target.UNIT:
        target = uniform(batch, width)
    elif row.target is Target.CLASSES:
        target = torch.randint(0, CLASSES, (batch, width), generator=generator)
    else:
        target = normal(batch, width)
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
            prediction = torch.ops.aten._unsafe_view(first, first.shape) if inplace else first
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
    run = step(given, torch.compile(PEERS[given.likelihood], dynamic=False))
    try:
        run()
    except Exception as error:  # without a C++ compiler, and whatever else torch.compile may raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return None, f"torch.compile: {reason}"
    return run, ""


def groups(sizes: Sizes) -> list[Callable[[], Group]]:
    """One maker a group, as ``optimizers.groups``."""
    return [
        partial(_large, sizes, "mse"),
        partial(_large, sizes, "bernoulli"),
        partial(_plain, sizes, "mse", sizes.middle, (0.25, 0.6)),
        partial(_plain, sizes, "bernoulli", sizes.middle, (0.25, 0.6)),
        partial(_plain, sizes, "mse", sizes.small, (0.7, 0.7)),
        partial(_plain, sizes, "bernoulli", sizes.small, (0.4, 0.7)),
        partial(_plain, sizes, "gaussian", sizes.middle, (0.12, 0.6), "gaussian, learned variance,"),
        partial(_plain, sizes, "negative_binomial", sizes.counts, (0.08, 0.25)),
    ]


def _case(name: str, shape: Shape) -> str:
    return f"{name} {shape[0]} x {shape[1]}"


def _contestants(given: Problem) -> tuple[list[Contestant], str]:
    """Eager, compiled where it can be, and ours; and why compiled is missing."""
    torch._dynamo.reset()  # the last group's shapes would count as recompiles of the same function
    run, missing = compiled(given)
    contestants = [Contestant(EAGER, step(given, PEERS[given.likelihood]))]
    if run is not None:
        contestants.append(Contestant(COMPILED, run))
    return [*contestants, Contestant(OURS, step(given))], missing


def _plain(sizes: Sizes, likelihood: str, shape: Shape, reach: tuple[float, float], name: str = "") -> Group:
    contestants, missing = _contestants(problem(likelihood, shape))
    case, size = _case(name or likelihood, shape), BYTES[likelihood]
    rows = [
        Row(case, EAGER, OURS, reach[0], size),
        Row(case, COMPILED, OURS, reach[1], size, missing),
    ]
    return Group(shape[0] * shape[1], contestants, rows, sizes.turn_seconds)


def _large(sizes: Sizes, likelihood: str) -> Group:
    batch, width, _ = sizes.large
    given = problem(likelihood, sizes.large)
    contestants, missing = _contestants(given)
    overwritten, restore = own_prediction(given)
    moved = (
        batch * width * 3 // 2
    )  # elements to copy, each read and written: as many bytes as ours has to move
    contestants += [
        Contestant(INPLACE, step(overwritten, inplace=True), prepare=restore),
        copy(moved),
    ]
    case, size = _case(likelihood, sizes.large), BYTES[likelihood]
    rows = [
        Row(case, EAGER, OURS, 0.15, size),
        Row(f"{case}, inplace_backward", EAGER, INPLACE, 0.09, size),
        Row(case, COMPILED, OURS, 0.25, size, missing),
        Row(f"{case}, inplace_backward", COMPILED, INPLACE, 0.15, size, missing),
    ]
    if likelihood == "mse":
        rows.append(Row(f"{case}, inplace_backward", COPY, INPLACE, 1.3, size))
    return Group(batch * width, contestants, rows, copied=moved)


def sweep(sizes: Sizes) -> list[dict[str, Any]]:
    """Ours on data of one size in samples of every width: a row a width and likelihood, timed in the same rounds."""
    elements, widths = sizes.sweep_elements, sizes.sweep_widths
    contestants = [copy(elements * 3 // 2)]
    for likelihood in ("mse", "bernoulli"):
        flat = problem(likelihood, (1, elements, elements // 32))
        for width in widths:
            shaped = Problem(
                likelihood,
                tuple(p.detach().view(-1, width).requires_grad_() for p in flat.params),
                flat.target.view(-1, width),
                flat.mean.detach().view(elements // width, -1).requires_grad_(),
                flat.logvar.detach().view(elements // width, -1).requires_grad_(),
            )
            contestants.append(Contestant(f"{likelihood} {width}", step(shaped)))
    times = interleave(contestants, rounds=sizes.rounds, seconds=sizes.seconds)
    copied = elements * 12 / times[COPY].median / 1e9
    rows = []
    for likelihood in ("mse", "bernoulli"):
        best = min(times[f"{likelihood} {width}"].median for width in widths)
        for width in widths:
            seconds = times[f"{likelihood} {width}"].median
            rows.append(
                {
                    "likelihood": likelihood,
                    "batch": elements // width,
                    "width": width,
                    "ours_ms": seconds * 1e3,
                    "gb_per_s": elements * BYTES[likelihood] / seconds / 1e9,
                    "copy_gb_per_s": copied,
                    "of_best_width": seconds / best,
                }
            )
    return rows


def sweep_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'ours':14}{'batch x width':>18}{'ms':>9}{'GB/s':>7}{'of copy':>9}{'of best width':>15}"]
    for row in rows:
        shape = f"{row['batch']} x {row['width']}"
        lines.append(
            f"{row['likelihood']:14}{shape:>18}{row['ours_ms']:9.2f}{row['gb_per_s']:7.1f}"
            f"{row['gb_per_s'] / row['copy_gb_per_s']:9.2f}{row['of_best_width']:15.2f}"
        )
    return "\n".join(lines)


def sweep_figure(rows: list[dict[str, Any]]) -> Any:
    """Bandwidth over the width of a sample; a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for likelihood, color in (("mse", "#1f5a93"), ("bernoulli", "#b5523b")):
        chosen = [row for row in rows if row["likelihood"] == likelihood]
        ax.plot(
            [r["width"] for r in chosen], [r["gb_per_s"] for r in chosen], "o-", color=color, label=likelihood
        )
    ax.axhline(rows[0]["copy_gb_per_s"], color="#8a8a8a", ls="--", lw=1, label="copy of the same bytes")
    elements = rows[0]["batch"] * rows[0]["width"]
    ax.set_xscale("log", base=2)
    ticks = sorted({row["width"] for row in rows})
    ax.set_xticks(ticks, [f"{w // 1024}k" if w % 1024 == 0 else str(w) for w in ticks])
    ax.set(
        ylim=(0, None),
        xlabel=f"elements of a sample, of {elements / 1e6:.3g} million in all",
        ylabel="GB/s, forward + backward",
        title="fe.free_energy, float32",
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure
