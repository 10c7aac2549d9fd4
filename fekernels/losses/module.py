"""``FreeEnergyLoss``: ``fe.free_energy`` with its options bound, as a Module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fekernels._runtime.ranks import group_of
from fekernels.ops.free_energy.free_energy import FreeEnergyTerms, free_energy
from fekernels.ops.free_energy.options import check_options

__all__ = ["FreeEnergyLoss"]


class FreeEnergyLoss(nn.Module):
    """F = energy + beta KL by ``fe.free_energy``. The options are attributes, so that a schedule can set beta.

    Args:
        likelihood: A name of ``fe.likelihoods.NAMES``.
        beta: Factor of the KL: a number, or a 0-dim tensor, whose value can be scheduled without recompiling.
        free_bits: Nats of each latent that cost nothing.
        reduction: "mean" over the batch of per-sample sums, "sum", or "none" for [B].
        inplace_backward: Write the gradient over the prediction.
        validate: Check the values of target and parameters, which reads them once more.
        batch_dims: How many dimensions in front are the batch's.
        ignore_index: Of "categorical": a target equal to it counts as unobserved.
        process_group: Whose ranks hold the batch, each its rows; None is no group.

    Raises:
        TypeError, ValueError: At construction, what ``fe.free_energy`` would raise for these options.

    Examples:
        >>> loss = fe.FreeEnergyLoss("bernoulli", beta=4.0)
        >>> terms = loss(logits, x, mean, logvar)
        >>> terms.free_energy.backward()
    """

    def __init__(
        self,
        likelihood: str = "gaussian",
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        inplace_backward: bool = False,
        validate: bool = False,
        batch_dims: int = 1,
        ignore_index: int | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_options(
            "FreeEnergyLoss", likelihood, reduction, batch_dims, validate, ignore_index, beta, free_bits,
            inplace_backward,
        )  # fmt: skip
        self.likelihood = likelihood
        self.beta = beta
        self.free_bits = free_bits
        self.reduction = reduction
        self.inplace_backward = inplace_backward
        self.validate = validate
        self.batch_dims = batch_dims
        self.ignore_index = ignore_index
        self.process_group = group_of("FreeEnergyLoss", process_group)

    __call__: Callable[..., FreeEnergyTerms]  # torch says Any of every module's

    def forward(
        self,
        params: Tensor | Sequence[Tensor],
        target: Tensor,
        mean: Tensor,
        logvar: Tensor,
        *,
        prior_mean: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        mask: Tensor | None = None,
        latent_mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> FreeEnergyTerms:
        """The terms, as of ``fe.free_energy``; train on ``.free_energy``."""
        return free_energy(
            params,
            target,
            mean,
            logvar,
            likelihood=self.likelihood,
            prior_mean=prior_mean,
            prior_logvar=prior_logvar,
            beta=self.beta,
            free_bits=self.free_bits,
            mask=mask,
            latent_mask=latent_mask,
            weight=weight,
            reduction=self.reduction,
            inplace_backward=self.inplace_backward,
            validate=self.validate,
            batch_dims=self.batch_dims,
            ignore_index=self.ignore_index,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.likelihood!r}, beta={self.beta}, free_bits={self.free_bits}, reduction={self.reduction!r}, "
            f"inplace_backward={self.inplace_backward}, validate={self.validate}, batch_dims={self.batch_dims}, "
            f"ignore_index={self.ignore_index}"
        )
