"""Natural gradients of a Gaussian, and the step that they make in its natural parameters.

Sources: Amari 1998; Khan & Lin 2017, arXiv:1703.04265 (conjugate-computation variational inference).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fekernels._checks import number
from fekernels.losses._checks import floating_tensor

__all__ = ["GaussianParameters", "natural_gradient", "natural_step"]


class GaussianParameters(NamedTuple):
    """Of independent Gaussians N(mean, exp(logvar)), or one derivative for each."""

    mean: Tensor
    logvar: Tensor


@torch.no_grad()
def natural_gradient(logvar: Tensor, grad_mean: Tensor, grad_logvar: Tensor) -> GaussianParameters:
    """The gradient times the inverse Fisher information: exp(logvar) grad_mean and 2 grad_logvar.

    A step along it is the same whatever the Gaussian's parameters are, as far as its size goes to 0.

    Args:
        logvar: of the Gaussians, of any shape.
        grad_mean, grad_logvar: of a loss in mean and logvar, of that shape.

    Raises:
        TypeError: what is no floating point tensor. ValueError: shapes that differ.
    """
    _check("natural_gradient", logvar, grad_mean=grad_mean, grad_logvar=grad_logvar)
    return GaussianParameters(logvar.exp() * grad_mean, 2 * grad_logvar)


@torch.no_grad()
def natural_step(
    mean: Tensor, logvar: Tensor, grad_mean: Tensor, grad_logvar: Tensor, rho: float = 1.0
) -> GaussianParameters:
    """The mean and log-variance after a step of size rho in natural parameters, down a free energy.

    With l = exp(-logvar) the precision and F = E_q[U] - entropy, whose gradients ``fe.free_energy`` or autograd give::

        l    <- (1 - rho) l + rho H = l (1 + 2 rho grad_logvar),   H = E_q[U''], the expected curvature of the energy
        mean <- mean - rho grad_mean / l                           with the new l

    On a conjugate model rho = 1 lands on the exact posterior, from anywhere; a step of size 1 in (mean, logvar), also
    along ``natural_gradient``, does not. ``fe.VariationalAdam``'s "natural" is this step with averages over draws, and
    a square completed that keeps l positive.

    Args:
        mean, logvar: of the Gaussians before, of any shape.
        grad_mean, grad_logvar: of the free energy in them, of that shape.
        rho: step size, in (0, 1].

    Raises:
        TypeError: what is no floating point tensor, or no number. ValueError: shapes that differ, rho out of its range;
            a precision that would not stay above 0, as the energy is not convex there: take a smaller rho.

    Source: Khan & Lin 2017, equation 11.
    """
    function = "natural_step"
    _check(function, logvar, mean=mean, grad_mean=grad_mean, grad_logvar=grad_logvar)
    if number(function, "rho", rho, above=0.0) > 1:
        raise ValueError(f"{function}: rho must be in (0, 1]; got {rho}")
    growth = 2 * rho * grad_logvar
    if not bool((growth > -1).all()):
        raise ValueError(
            f"{function}: grad_logvar must be > {-0.5 / rho:g} with rho={rho:g}, so that the precision stays positive; "
            f"got {float(grad_logvar.min()):g}"
        )
    after = logvar - growth.log1p()
    return GaussianParameters(mean - rho * after.exp() * grad_mean, after)


def _check(function: str, logvar: Tensor, **tensors: Tensor) -> None:
    floating_tensor(function, "logvar", logvar)
    for name, tensor in tensors.items():
        floating_tensor(function, name, tensor)
        if tensor.shape != logvar.shape:
            raise ValueError(
                f"{function}: {name} must have shape {tuple(logvar.shape)} like logvar; got {tuple(tensor.shape)}"
            )
