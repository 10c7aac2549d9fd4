"""The options of the free energy's functions, checked before there are operands."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CODES, LIKELIHOODS, NONE, REDUCTIONS, longest
from fekernels._checks import FLOATS, INTEGERS, boolean, dense, integer, number, one_of
from fekernels._runtime.torch_internals import transforms_active
from fekernels.ops.free_energy.autograd import is_dispatched

__all__ = ["Options", "check_batch_dims", "check_options", "check_reduction"]


class Options(NamedTuple):
    codes: dict[int, int]  # of the likelihood, by its number of parameters
    beta: float | Tensor
    free_bits: float
    reduction: int
    inplace: bool
    validate: bool
    batch_dims: int
    ignored: int | None


def check_options(
    function: str,
    likelihood: str,
    reduction: str,
    batch_dims: int = 1,
    validate: bool = False,
    ignore_index: int | None = None,
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    inplace_backward: bool = False,
) -> Options:
    """All that can be checked without operands; the message has the function's name.

    Raises:
        TypeError: a wrong type. ValueError: a wrong value, or two options that exclude each other.
    """
    codes = CODES.get(likelihood) if isinstance(likelihood, str) else None
    if codes is None:
        raise ValueError(f"{function}: likelihood must be one of {', '.join(CODES)}; got {likelihood!r}")
    how = check_reduction(function, reduction)
    # The usual floats are let through here: the full check takes a microsecond each.
    if type(beta) is not float or not 0.0 <= beta < math.inf:
        beta = _check_beta(function, beta) if isinstance(beta, Tensor) else number(function, "beta", beta)
    if type(free_bits) is not float or not 0.0 <= free_bits < math.inf:
        free_bits = number(function, "free_bits", free_bits)
    if inplace_backward is not False:
        inplace_backward = boolean(function, "inplace_backward", inplace_backward)
    if validate is not False:
        validate = boolean(function, "validate", validate)
    if how == NONE and free_bits:
        raise ValueError(
            f"{function}: free_bits needs a batch mean; reduction must be 'mean' or 'sum', got 'none'"
        )
    if how == NONE and inplace_backward:
        raise ValueError(
            f"{function}: inplace_backward needs a gradient known in advance; reduction must be 'mean' or 'sum', got"
            " 'none'"
        )
    if type(batch_dims) is not int or batch_dims != 1:
        batch_dims = check_batch_dims(function, batch_dims)
    if ignore_index is not None:
        if not longest(likelihood).classes:
            named = " or ".join(repr(row.name) for row in LIKELIHOODS if row.classes)
            raise ValueError(
                f"{function}: ignore_index is a class of likelihood {named}; got likelihood {likelihood!r}"
            )
        ignore_index = integer(function, "ignore_index", ignore_index)
    return Options(codes, beta, free_bits, how, inplace_backward, validate, batch_dims, ignore_index)


def check_reduction(function: str, reduction: str, others: tuple[str, ...] = ()) -> int:
    """Its code; those of ``others``, which only some functions have, follow behind."""
    names = (*REDUCTIONS, *others)
    return names.index(one_of(function, "reduction", reduction, names))


def check_batch_dims(function: str, batch_dims: int) -> int:
    return integer(function, "batch_dims", batch_dims, 1)


def _check_beta(function: str, beta: Tensor) -> Tensor:
    """Its value only where it is at hand: not on a GPU, in a compiled graph, or behind a transform or mode."""
    if beta.dtype not in (*FLOATS, *INTEGERS):
        raise TypeError(f"{function}: beta must be a real number; got a tensor of {str(beta.dtype)[6:]}")
    if dense(function, "beta", beta).dim():
        raise ValueError(
            f"{function}: beta must be one number, a tensor without dimensions; got shape {tuple(beta.shape)}"
        )
    if (
        beta.is_cpu
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not is_dispatched([beta])
    ):
        number(function, "beta", beta.item())
    return beta
