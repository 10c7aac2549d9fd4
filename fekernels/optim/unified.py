"""The unified optimizer: one call that runs the backward pass and the step."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, nn

from fekernels._checks import number
from fekernels.optim.langevin_adam import LangevinAdam

__all__ = ["UnifiedOptimizer"]


class UnifiedOptimizer(LangevinAdam):
    """``UnifiedOptimizer(model).step(loss)``: backward, one Langevin-Adam step, gradients cleared.

    Args:
        model: whose parameters are optimized, by name, so that their noise does not depend on their order.
        lr: step size.
        beta: of the momentum (the correlation time, in physics' words); betas[0] of ``fe.LangevinAdam``.
        temperature: exploration against exploitation; 0, the default, is Adam. With a mean loss over N data points 1/N
            samples the posterior, and 1 is N times too hot to learn anything.
        kwargs: every other argument of ``fe.LangevinAdam``. noise="isotropic" with bias_correction=False is the plain
            rule velocity / (sqrt(uncertainty) + eps) plus sqrt(2 T lr) of unscaled noise.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.01,
        beta: float = 0.9,
        temperature: float | Tensor = 0.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"UnifiedOptimizer: model must be a torch.nn.Module; got {type(model).__name__}")
        if "betas" in kwargs:
            raise TypeError("UnifiedOptimizer: beta must be given in place of betas; got betas")
        if not isinstance(beta, Tensor):
            beta = number("UnifiedOptimizer", "beta", beta, below=1.0)
        super().__init__(model.named_parameters(), lr, (beta, 0.999), temperature=temperature, **kwargs)

    @overload  # type: ignore[override]
    def step(self, loss: None = None) -> None: ...

    @overload
    def step(self, loss: Tensor) -> Tensor: ...

    def step(self, loss: Tensor | None = None) -> Tensor | None:
        """Backpropagate ``loss`` (a scalar tensor; None when that has been done), step, and clear the gradients."""
        if loss is not None:
            if not isinstance(loss, Tensor):
                raise TypeError(f"UnifiedOptimizer.step: loss must be a tensor; got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(
                    f"UnifiedOptimizer.step: loss must have one element; got shape {tuple(loss.shape)}"
                )
            if not loss.requires_grad:
                raise ValueError(
                    "UnifiedOptimizer.step: loss must require grad (depend on parameters); got one that does not"
                )
            loss.backward()
        super().step()
        self.zero_grad()
        return loss
