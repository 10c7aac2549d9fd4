"""Checks of values, for ``validate=True``: each costs a read of the data and, on a GPU, a wait for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import Target, longest
from fekernels._runtime.host import model_checks

__all__ = ["validate_data", "validate_parameters", "validate_target"]


def validate_data(
    function: str,
    likelihood: str,
    x: Tensor,
    classes: int = 1,
    *,
    mask: Tensor | None = None,
    name: str = "target",
) -> None:
    """``validate_target`` at a price that every training step can pay: two reductions, where the data are right.

    Args:
        classes: of ``categorical``.
        mask: bool, broadcasting to x; where it is False, x may be anything.
        name: of the argument.
    """
    row = longest(likelihood)
    if row.target is Target.REAL or not x.numel():
        return
    support = row.target.value
    if mask is None and not support.whole and x.is_floating_point():
        native = model_checks()
        if native is not None and native.all_within(x, support.lowest, support.above, support.highest):
            return
        # torch.aminmax takes three times as long. NaN fails it too.
        low, high = x.detach().amin().item(), x.detach().amax().item()
        if (low > support.lowest if support.above else low >= support.lowest) and high <= support.highest:
            if high < math.inf:
                return
    seen = x if mask is None else x[mask.expand_as(x)]
    validate_target(function, likelihood, seen, seen.new_empty((0, classes)), name)


def validate_target(
    function: str, likelihood: str, target: Tensor, params: Tensor | Sequence[Tensor], name: str = "target"
) -> None:
    """ValueError, with the first offender, for a target (NaN too) outside the support.

    Args:
        function: Name of the public function, which begins the message.
        likelihood: Name of the likelihood; those of all real numbers have nothing to check.
        target: What was observed, and nothing that was not.
        params: Parameters of the likelihood; the last dimension of ``categorical``'s is the number of classes.
        name: of the argument.
    """
    row = longest(likelihood)
    if row.target is Target.REAL:
        return
    support, expected = row.target.value, row.target.value.text
    good = target > support.lowest if support.above else target >= support.lowest
    if row.classes:
        classes = (params if isinstance(params, Tensor) else params[0]).shape[-1]
        good, expected = good & (target < classes), f"{expected} in [0, {classes})"
    elif math.isfinite(support.highest):
        good = good & (target <= support.highest)
    else:
        good = good & ~target.isinf()
    if support.whole:
        good = good & (target == torch.floor(target))
    if not bool(good.all()):
        raise ValueError(
            f"{function}: {name} must hold {expected} for likelihood {likelihood!r}; got {target[~good][0].item()}"
        )


def validate_parameters(
    function: str, likelihood: str, params: Sequence[Tensor], mask: Tensor | None = None
) -> None:
    """ValueError, with the parameter's name and the first offender, for one (NaN too) outside the domain.

    Zero and infinity, at which the energy has a limit, are in it.

    Args:
        function: Name of the public function, which begins the message.
        likelihood: Name of the likelihood.
        params: Its parameters; they broadcast against each other.
        mask: Bool, of the shape that they broadcast to: True where one counts. None where all do.
    """
    for at, (parameter, values) in enumerate(zip(longest(likelihood).parameters, params, strict=False)):
        if not parameter.not_negative:
            continue
        bad = ~(values >= 0)
        if mask is not None:
            bad = bad & mask
        if bool(bad.any()):
            value = values.detach().expand(bad.shape)[bad][0].item()
            raise ValueError(
                f"{function}: params[{at}] ({parameter.name}) must be >= 0 for likelihood {likelihood!r}; got {value}"
            )
