"""``FreeEnergyLoss``: ``fe.free_energy`` with its options bound, as a Module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fekernels.losses.likelihoods import NAMES
from fekernels.ops.free_energy import FreeEnergyTerms, free_energy

__all__ = ["FreeEnergyLoss"]


class FreeEnergyLoss(nn.Module):
    """F = energy + beta KL by ``fe.free_energy``. The options are attributes, so that a schedule can set beta.

    Args:
        likelihood: A name of ``fe.likelihoods.NAMES``.
        beta: Factor of the KL.
        free_bits: Nats of each latent that cost nothing.
        reduction: "mean" over the batch of per-sample sums, "sum", or "none" for [B].
        inplace_backward: Write the gradient over the prediction.
        validate: Check the target's values, which reads them once more.
        ignore_index: Of "categorical": a target equal to it counts as unobserved.

    Example:
        >>> loss = fe.FreeEnergyLoss("bernoulli", beta=4.0)
        >>> terms = loss(logits, x, mean, logvar)
        >>> terms.free_energy.backward()
    """

    def __init__(
        self,
        likelihood: str = "gaussian",
        *,
        beta: float = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        inplace_backward: bool = False,
        validate: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if likelihood not in NAMES:
            raise ValueError(
                f"FreeEnergyLoss: likelihood must be one of {', '.join(map(repr, NAMES))}; got {likelihood!r}"
            )
        self.likelihood = likelihood
        self.beta = beta
        self.free_bits = free_bits
        self.reduction = reduction
        self.inplace_backward = inplace_backward
        self.validate = validate
        self.ignore_index = ignore_index

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
            weight=weight,
            reduction=self.reduction,
            inplace_backward=self.inplace_backward,
            validate=self.validate,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.likelihood!r}, beta={self.beta}, free_bits={self.free_bits}, reduction={self.reduction!r}, "
            f"inplace_backward={self.inplace_backward}, validate={self.validate}, ignore_index={self.ignore_index}"
        )
