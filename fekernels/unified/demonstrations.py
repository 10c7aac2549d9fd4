"""The document's demonstrations: each prints what it finds and returns it."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._checks import integer
from fekernels.diagnostics import critical_points
from fekernels.optim import UnifiedOptimizer
from fekernels.unified.minimizer import FreeEnergyMinimizer

__all__ = ["benchmark_unified_view", "landscape", "show_unified_perspective", "visualize_train_station"]


def show_unified_perspective(seed: int = 0) -> dict[str, float]:
    """One batch's free energy as physics, as inference and as optimization: three names, one value, one gradient.

    Returns:
        What is printed: the value of each by its name, its parts, and ``gradient_difference``, the largest relative to
        the largest gradient of a weight.

    Raises:
        AssertionError: values or gradients differ by more than rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FreeEnergyMinimizer(784, 20, 784, seed=seed)
        x = torch.randn(32, 784)
    physics, inference, optimization = (
        model.loss_as_free_energy(x), model.loss_as_inference(x), model.loss_as_optimization(x)
    )  # fmt: skip
    values = {
        "free energy": physics["free_energy"],
        "inference": inference["neg_log_posterior"],
        "optimization": optimization["total_loss"],
    }
    gradients = {name: torch.autograd.grad(value, list(model.parameters())) for name, value in values.items()}
    first, *others = gradients.values()
    largest = max(float(g.abs().max()) for g in first)
    apart = max(
        float((g - h).abs().max()) / largest for other in others for g, h in zip(first, other, strict=True)
    )
    found = {name: value.item() for name, value in values.items()} | {"gradient_difference": apart}
    found |= {f"physics: {name}": value.item() for name, value in physics.items()}
    found |= {f"inference: {name}": value.item() for name, value in inference.items()}
    found |= {f"optimization: {name}": value.item() for name, value in optimization.items()}
    print(
        f"physics       F = {physics['free_energy']:.2f} = energy {physics['energy']:.2f} - T entropy "
        f"{-physics['neg_entropy']:.2f}\n"
        f"inference     F = {inference['neg_log_posterior']:.2f} = -E log p(x|z) {inference['neg_likelihood']:.2f} + "
        f"KL {inference['kl_to_prior']:.2f}, ELBO {inference['evidence_lower_bound']:.2f}\n"
        f"optimization  F = {optimization['total_loss']:.2f} = reconstruction "
        f"{optimization['reconstruction_loss']:.2f} + regularization {optimization['regularization']:.2f}\n"
        f"gradients of all weights differ by {apart:.1e} of the largest"
    )
    reference = values["free energy"].item()
    if (
        any(abs(value.item() - reference) > 1e-5 * abs(reference) for value in values.values())
        or not apart < 1e-5
    ):
        raise AssertionError(f"show_unified_perspective: the views differ: {found}")
    return found


def benchmark_unified_view(steps: int = 100) -> dict[str, float]:
    """The document's benchmark: torch.optim.Adam's loop beside UnifiedOptimizer's, on one network and one data set.

    Both are warmed up, and take turns in rounds of 10 steps, so that what else the machine does hits both. Both loops
    are whole steps, forward and backward included.

    Returns:
        What is printed: "adam_seconds" and "unified_seconds" of all steps, "speedup", and the two last losses.
    """
    steps = integer("benchmark_unified_view", "steps", steps, 1)

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 1))

    with torch.random.fork_rng(devices=[]):
        model1, model2 = network(), network()
        x, y = torch.randn(1000, 100), torch.randn(1000, 1)
    adam, unified = torch.optim.Adam(model1.parameters(), lr=0.01), UnifiedOptimizer(model2, seed=0)

    def adam_step() -> Tensor:
        loss: Tensor = ((model1(x) - y) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    def unified_step() -> Tensor:
        loss: Tensor = ((model2(x) - y) ** 2).mean()
        unified.step(loss)
        return loss

    seconds, losses = {"adam": 0.0, "unified": 0.0}, {}
    for step in (adam_step, unified_step):
        step()
    for first in range(0, steps, 10):
        for name, step in (("adam", adam_step), ("unified", unified_step)):
            start = perf_counter()
            for _ in range(min(10, steps - first)):
                losses[name] = step()
            seconds[name] += perf_counter() - start
    found = {
        "adam_seconds": seconds["adam"],
        "unified_seconds": seconds["unified"],
        "speedup": seconds["adam"] / seconds["unified"],
        "adam_loss": losses["adam"].item(),
        "unified_loss": losses["unified"].item(),
    }
    print(
        f"Adam time: {found['adam_seconds']:.3f} s\nUnified time: {found['unified_seconds']:.3f} s\n"
        f"Speedup: {found['speedup']:.2f}x, losses {found['adam_loss']:.4f} and {found['unified_loss']:.4f}"
    )
    return found


def landscape(points: Tensor) -> Tensor:
    """F(a, b) = (a^2 + b^2 - 2)^2 + (a + b)^2 / 10 at points [..., 2]: the document's, [...]."""
    a, b = points.unbind(-1)
    return (a * a + b * b - 2) ** 2 + 0.1 * (a + b) ** 2


def visualize_train_station() -> dict[str, Any]:
    """The critical points of the document's surface, by Newton's method: free energy, loss and -log p are this one F.

    Three formulas that are the same have the same graph; that is all the topology there is to it. A gradient flow
    over it ends in a minimum, and conserves no volume.

    Returns:
        What is printed: values "minimum", "saddle" and "maximum" of F, how many of each ("minima", "saddles",
        "maxima"), and "points", the ``fe.diagnostics.CriticalPoint`` of all.
    """
    points = critical_points(landscape)
    of = {
        kind: [point for point in points if point.kind == kind] for kind in ("minimum", "saddle", "maximum")
    }
    found: dict[str, Any] = {kind: of[kind][0].value for kind in of}
    found |= {"minima": len(of["minimum"]), "saddles": len(of["saddle"]), "maxima": len(of["maximum"])}
    for point in points:
        a, b = point.position.tolist()
        print(f"{point.kind:8} F = {point.value:.3f} at ({a:+.4f}, {b:+.4f})")
    return found | {"points": points}
