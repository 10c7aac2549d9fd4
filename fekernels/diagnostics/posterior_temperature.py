"""The temperature at which a loss, as it is, makes the posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fekernels._checks import integer
from fekernels._loader_batches import rows
from fekernels.diagnostics.mean_check import few_rows, kind_of, measure

__all__ = ["posterior_temperature"]

NAME = "posterior_temperature"


def posterior_temperature(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: Any, data_size: int
) -> float:
    """T at which exp(-loss / T) is Bayes' posterior: 1/N for a mean of -log p over a batch of N data points.

    No optimizer can know this: of a loss that is a mean over N points, T = 1 is N times too hot and the draws spread
    about sqrt(N) times too far; of a sum it is right. So the loss is called on up to eight rows of the batch and on
    parts of them, which tells a mean from a sum. A sum over a batch of B of N points is B times a mean, so T = B/N.
    The precision of a Gaussian prior is to be given times T: ``prior_precision=T * precision``.

        T = fe.diagnostics.posterior_temperature(model, loss_fn, (x, y), data_size=len(x))
        optimizer = fe.LangevinAdam(model.parameters(), lr, temperature=T, prior_precision=T)  # a prior N(0, 1)

    Args:
        model: is copied; its own weights, buffers and modes stay as they are.
        loss_fn: loss_fn(model, batch), a scalar: -log p of the rows, a mean or a sum over them. The same constants for
            every row cancel in a mean, and keep a sum from being one.
        batch: what a step gets, of at least two rows: tensors in tuples, lists and dicts, rows first.
        data_size: N, of the whole data set.

    Raises:
        TypeError: an argument of a wrong type. ValueError: data_size below 1 or below the batch's rows; a loss that is
            neither mean nor sum; one of which nothing can be told, such as a random one, or of a batch with one row.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{NAME}: model must be a torch.nn.Module; got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"{NAME}: loss_fn must be callable; got {type(loss_fn).__name__}")
    few = few_rows(batch)
    count = 0 if few is None else rows(NAME, batch)
    size = integer(NAME, "data_size", data_size, max(count, 1))
    found = measure(model, loss_fn, few)
    if not found:
        raise ValueError(
            f"{NAME}: loss_fn must give a scalar, the same twice, of two or more rows and of parts of them; got a "
            "batch or a loss of which nothing can be told"
        )
    kind = kind_of(found)
    if kind is None:
        _, used, whole, m, one, n, other = found
        raise ValueError(
            f"{NAME}: loss_fn must be the mean or the sum over the rows of a batch; got {whole:.4g} for {used:.0f} "
            f"rows, {one:.4g} for {m:.0f} of them and {other:.4g} for the other {n:.0f}"
        )
    return (1 if kind == "mean" else count) / size
