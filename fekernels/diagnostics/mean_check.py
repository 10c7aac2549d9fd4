"""Whether a loss is the mean over the points of a batch, as everything that divides by their number takes it to be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._loader_batches import map_tensors, tensors
from fekernels._runtime.ranks import gathered_numbers

__all__ = ["few_rows", "judge", "kind_of", "measure", "of_rank_0"]

ROWS = 8  # few, as the means of many rows are alike, and a loss that couples rows shows by their differences
TOLERANCE, EPSILONS = 1e-3, 16  # of the losses, and of the loss's own rounding where that is more (16 bits)
SUM = 1e-2
# Of each weight, beside 1 / sqrt(inputs): a fitted model's losses are all 0, and tell nothing.
RELATIVE, ABSOLUTE = 0.1, 0.3

LossFunction = Callable[[Any, Any], Tensor]


def few_rows(batch: Any) -> Any:
    """Up to eight rows from all over a batch; None where it has one row, or tensors of other lengths."""
    held = [t for t in tensors(batch) if t.dim()]
    if not held or len(held[0]) < 2 or any(len(t) != len(held[0]) for t in held):
        return None
    count = len(held[0])
    return _taken(batch, torch.linspace(0, count - 1, min(count, ROWS)).round().long())


def _taken(batch: Any, index: Tensor) -> Any:
    return map_tensors(lambda t: t[index.to(t.device)] if t.dim() else t, batch)


def measure(model: nn.Module, loss_fn: LossFunction, batch: Any) -> list[float]:
    """[tolerance, rows, whole, rows and loss of a part, rows and loss of the other] of the split that fits least.

    Of a copy in eval mode, near the model's weights, or at them where that is not finite. Empty where nothing can be
    said: no rows, a loss that fails for few of them, one that is random.
    """
    if batch is None:
        return []
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices):
        for perturbed in (True, False):
            try:
                own = copy.deepcopy(model).eval()
                if perturbed:
                    _perturb(own)
                found = _splits(own, loss_fn, batch)
            except Exception:  # of whatever kind: the run itself meets what is wrong with the whole batch
                return []
            if all(map(math.isfinite, found)):
                return found
    return []


def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel():
            inputs = p[0].numel() if p.dim() > 1 else p.numel()
            size = RELATIVE * float(p.float().square().mean().sqrt()) + ABSOLUTE / math.sqrt(max(inputs, 1))
            p.add_((torch.randn(p.shape, generator=generator) * size).to(p))


def _splits(model: nn.Module, loss_fn: LossFunction, batch: Any) -> list[float]:
    count = len(next(t for t in tensors(batch) if t.dim()))
    first, again = loss_fn(model, batch), loss_fn(model, batch)
    if first.dim() or not torch.equal(first, again):
        return []
    whole = float(first)
    tolerance = max(TOLERANCE, EPSILONS * torch.finfo(first.dtype).eps)
    index = torch.arange(count)
    worst: list[float] = []
    for bit in range(max(1, (count - 1).bit_length())):
        upper = (index >> bit & 1).bool()
        parts: list[float] = []
        for rows in (index[~upper], index[upper]):
            parts += [float(len(rows)), float(loss_fn(model, _taken(batch, rows)))]
        found = [tolerance, float(count), whole, *parts]
        if not worst or not _off(found) <= _off(worst):
            worst = found
    return worst


def _off(found: list[float]) -> float:
    """How far the whole is from the mean of its parts, in units of the largest."""
    _, count, whole, m, one, n, other = found
    return abs(whole - (m * one + n * other) / count) / max(abs(whole), abs(one), abs(other), 1e-30)


def of_rank_0(owner: str, found: list[float], group: Any) -> list[float]:
    """What rank 0 measured, on every rank: data that are made anew in every pass may differ. A collective."""
    if group is None:
        return found
    theirs: list[float] = gathered_numbers(owner, found or [math.nan] * 7, group)[0]
    return [] if math.isnan(theirs[0]) else theirs


def kind_of(found: list[float]) -> str | None:
    """Whether what was measured is of a "mean" or a "sum"; None of a loss that is neither."""
    if _off(found) <= found[0]:
        return "mean"
    _, _, whole, _, one, _, other = found
    return "sum" if abs(whole - one - other) <= SUM * max(abs(whole), abs(one), abs(other)) else None


def judge(owner: str, found: list[float]) -> str | None:
    """What is to be said of a loss that is no mean; None of one that is, or where nothing was measured.

    Raises:
        ValueError: it is a sum.
    """
    kind = kind_of(found) if found else "mean"
    if kind == "mean":
        return None
    _, count, whole, m, one, n, other = found
    if kind == "sum":
        raise ValueError(
            f"{owner}: loss_fn must be the mean over the points of a batch; got {whole:.4g} for a batch of {count:.0f} "
            f"and {one:.4g}, {other:.4g} for its halves, as a sum gives: divide by the number of points"
        )
    mean = (m * one + n * other) / count
    return (
        f"loss_fn is not the mean over the points of a batch: of {count:.0f} rows it is {whole:.4g}, and the mean of "
        f"its halves {mean:.4g}. Shapes that broadcast ([N] against [N, 1]) do that, a mean over something else "
        "(tokens that are no padding), or a loss that couples points"
    )
