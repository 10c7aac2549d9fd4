"""What the free energy's public operators ask of their arguments, which kernels take by address.

Nothing is brought into shape here: that is done by ``broadcasting.py``, for the functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import CATEGORICAL, CODES, NAMES, REDUCTIONS
from fekernels._checks import dense, floating, same_device

__all__ = ["check_gradients", "check_operands", "has_float64"]

LATENT = ("mean", "logvar", "prior_mean", "prior_logvar")


def has_float64(operands: Sequence[Tensor]) -> bool:
    """Whether the call is computed in float64, by the reference."""
    return any(operand.dtype == torch.float64 for operand in operands)


def check_operands(
    function: str,
    params: Sequence[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    latent: Sequence[Tensor],
    weight: Tensor | None,
    latent_mask: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: int,
) -> int:
    """Raises for whatever does not fit together; returns B, the number of rows.

    Raises:
        TypeError: a wrong dtype or layout. ValueError: a wrong name, count, shape or device.
    """
    for name, value, names in (("likelihood", likelihood, NAMES), ("reduction", reduction, REDUCTIONS)):
        if value not in names:
            raise ValueError(f"{function}: {name} must be one of {', '.join(names)}; got {value!r}")
    if len(latent) not in (0, 2, 4) or not (params or latent):
        raise ValueError(
            f"{function}: latent must hold 2 tensors, 4 with a prior, or none beside params; got {len(latent)}"
        )
    if (target is None) != (not params):
        raise ValueError(f"{function}: params and target must be given together")
    codes = CODES[likelihood]
    if params and len(params) not in codes:
        expected = " or ".join(map(str, codes))
        raise ValueError(
            f"{function}: params must hold {expected} tensor(s) for {likelihood!r}; got {len(params)}"
        )
    if not 0 <= needs < 1 << (len(params) + len(latent)):
        raise ValueError(
            f"{function}: needs must have a bit for each of {len(params) + len(latent)} operands; got {needs}"
        )

    device = (params or latent)[0].device
    named = {f"params[{i}]": tensor for i, tensor in enumerate(params)}
    named |= dict(zip(LATENT, latent, strict=False))
    for name, tensor in named.items():
        same_device(function, name, floating(function, name, tensor), device)
    rows = _check_energy(function, params, target, mask, CATEGORICAL in codes.values(), device)
    if latent:
        _check_kl(function, latent, latent_mask, rows, device)
        rows = latent[0].shape[0] if rows is None else rows
    elif latent_mask is not None:
        raise ValueError(f"{function}: latent_mask must come with latent")
    assert rows is not None
    if weight is not None:
        check_rows(function, "weight", weight, rows, device)
    return rows


def check_gradients(function: str, gradients: dict[str, Tensor], rows: int, like: Tensor) -> None:
    for name, tensor in gradients.items():
        check_rows(function, name, tensor, rows, like.device)


def check_rows(function: str, name: str, tensor: Tensor, rows: int, device: torch.device) -> None:
    same_device(function, name, floating(function, name, tensor), device)
    if tensor.shape != (rows,):
        raise ValueError(f"{function}: {name} must have shape ({rows},); got {tuple(tensor.shape)}")


def _check_energy(
    function: str,
    params: Sequence[Tensor],
    target: Tensor | None,
    mask: Tensor | None,
    categorical: bool,
    device: torch.device,
) -> int | None:
    if target is None:
        if mask is not None:
            raise ValueError(f"{function}: mask must come with a target")
        return None
    same_device(function, "target", dense(function, "target", target), device)
    if categorical:
        if params[0].dim() != 3:
            raise ValueError(
                f"{function}: params[0] must have shape (rows, positions, classes); got {tuple(params[0].shape)}"
            )
        _check_dtype(function, "target", target, torch.int64)
        if target.shape != params[0].shape[:2]:
            raise ValueError(
                f"{function}: target must have shape {tuple(params[0].shape[:2])} like params[0] without its last"
                f" dimension; got {tuple(target.shape)}"
            )
    else:
        floating(function, "target", target)
        if target.dtype == torch.float64 and not has_float64(params):
            raise TypeError(
                f"{function}: target must be float32, bfloat16 or float16 like params; got float64"
            )
        if target.dim() != 2:
            raise ValueError(f"{function}: target must have shape (rows, columns); got {tuple(target.shape)}")
        for i, param in enumerate(params):
            _check_broadcasts(function, f"params[{i}]", param, target.shape[0], target.shape[1])
    if mask is not None:
        _check_mask(function, "mask", mask, target.shape[0], target.shape[1], device)
    return target.shape[0]


def _check_kl(
    function: str,
    latent: Sequence[Tensor],
    latent_mask: Tensor | None,
    rows: int | None,
    device: torch.device,
) -> None:
    mean = latent[0]
    if mean.dim() != 2:
        raise ValueError(f"{function}: mean must have shape (rows, latents); got {tuple(mean.shape)}")
    rows = mean.shape[0] if rows is None else rows
    for name, tensor in zip(LATENT, latent, strict=False):
        _check_broadcasts(function, name, tensor, rows, mean.shape[1])
    if latent_mask is not None:
        _check_mask(function, "latent_mask", latent_mask, rows, mean.shape[1], device)


def _check_broadcasts(function: str, name: str, tensor: Tensor, rows: int, columns: int) -> None:
    shape = tensor.shape
    fits = len(shape) == 2 and (shape[0] == rows or shape[0] == 1) and (shape[1] == columns or shape[1] == 1)
    if not fits:
        raise ValueError(
            f"{function}: {name} must have shape ({rows} or 1, {columns} or 1); got {tuple(shape)}"
        )


def _check_mask(
    function: str, name: str, mask: Tensor, rows: int, columns: int, device: torch.device
) -> None:
    _check_dtype(function, name, dense(function, name, mask), torch.bool)
    if mask.shape != (rows, columns):
        raise ValueError(f"{function}: {name} must have shape ({rows}, {columns}); got {tuple(mask.shape)}")
    same_device(function, name, mask, device)


def _check_dtype(function: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{function}: {name} must be {str(dtype)[6:]}; got {str(tensor.dtype)[6:]}")
