"""What a checkpoint holds, checked before any of it is taken: it may come from anywhere, and kernels trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fekernels._checks import integer, number, one_of
from fekernels._runtime.parts import is_sharded
from fekernels._runtime.pointer_table import LAST_FLOAT32_STEP, LAST_STEP, check_like

__all__ = [
    "check_group",
    "check_groups",
    "check_kind",
    "check_state",
    "loaded_draws",
    "loaded_step",
    "loaded_tensors",
    "loaded_unit",
    "momentum_unit",
]

LIKE_THE_PARAMETER = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor",
    "mean", "hessian", "deviation", "scale", "scale_exp_avg", "scale_exp_avg_sq",
)  # fmt: skip


def _kind(value: object) -> str:
    return type(value).__name__


def check_groups(function: str, state_dict: Any) -> None:
    """TypeError or ValueError for what is no state dict of any optimizer; torch compares the numbers of groups."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"{function}: state_dict must be a dict; got {_kind(state_dict)}")
    for key, kind in (("state", dict), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(
                f"{function}: state_dict must have {key!r}; got {', '.join(map(str, state_dict)) or 'none'}"
            )
        if not isinstance(state_dict[key], kind):
            raise TypeError(f"{function}: {key} must be a {kind.__name__}; got {_kind(state_dict[key])}")
    for group in state_dict["param_groups"]:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise TypeError(
                f"{function}: every group must be a dict with a list of params; got {_kind(group)}"
            )


def check_kind(function: str, kind: str, groups: Sequence[dict[str, Any]]) -> None:
    """ValueError for groups of another optimizer of this package than ``kind``; those of torch have no streams."""
    for group in groups:
        if "streams" in group and "lr" in group:
            adam = "noise" in group or "betas" in group
            found = "VariationalAdam" if "ess" in group else "LangevinAdam" if adam else "SGLD"
            if found != kind:
                raise ValueError(
                    f"{function}: param_groups must be {kind}'s; got {found}'s, whose lr and states mean something else"
                )


def check_group(function: str, group: dict[str, Any], count: int) -> None:
    """What only this package's groups hold, where a checkpoint has it; ``count``: of the group's parameters."""
    streams = group.get("streams")
    if not isinstance(streams, (list, tuple)):
        raise TypeError(f"{function}: streams must be a list of ints; got {_kind(streams)}")
    if len(streams) != count:
        raise ValueError(f"{function}: streams must have {count} entries like params; got {len(streams)}")
    for i, stream in enumerate(streams):
        integer(function, f"streams[{i}]", stream, 0, 1 << 32)
    if group.get("anchor") is not None:
        one_of(function, "anchor", group["anchor"], ("init", "given"))
    if "previous" in group:
        momentum_unit(function, group["previous"], 0.0)


def momentum_unit(function: str, previous: Any, beta1: float) -> float:
    """Noise unit by lr and temperature of a group's last step that moved, as earlier releases kept them."""
    values = previous.tolist() if isinstance(previous, Tensor) and not previous.is_meta else previous
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{function}: previous must be two numbers; got {_kind(previous)}")
    if len(values) != 2:
        raise ValueError(f"{function}: previous must be two numbers, lr and temperature; got {len(values)}")
    lr, temperature = (number(function, f"previous[{i}]", value) for i, value in enumerate(values))
    # Not before: only old checkpoints ask for it, and an import of the package does without the reference.
    from fekernels.reference.optimizers.langevin_adam import momentum_noise_unit

    return momentum_noise_unit(lr, beta1) if temperature > 0 else 0.0


def check_state(function: str, where: str, param: Tensor, state: Any, required: Sequence[str]) -> None:
    """TypeError or ValueError where the state of ``param`` is not that of this optimizer.

    More than it needs, as Adam's state has for SGLD, does no harm and is kept.
    """
    if not isinstance(state, dict):
        raise TypeError(f"{function}: the state of {where} must be a dict; got {_kind(state)}")
    if not state.keys() - {"anchor"}:
        required = ()  # saved before the first step
    for key in required:
        if key not in state:
            raise ValueError(
                f"{function}: the state of {where} must have {', '.join(required)}; got {', '.join(map(str, state))}"
            )
    if "step" in state:
        loaded_step(function, where, state["step"])
    if "noise_unit" in state:
        loaded_unit(function, where, state["noise_unit"])
    if "draws" in state:
        loaded_draws(function, where, state["draws"])
    for key in LIKE_THE_PARAMETER:
        if key in state and not (key == "anchor" and state[key] is None):
            _check_tensor(function, f"{key} of {where}", param, state[key])


def _check_tensor(function: str, name: str, param: Tensor, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor; got {_kind(tensor)}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{function}: {name} must be dense; got layout {tensor.layout}")
    check_like(function, name, tensor, param)
    if is_sharded(tensor) != is_sharded(param):
        kinds = [("a DTensor" if is_sharded(t) else "a plain tensor") for t in (param, tensor)]
        raise ValueError(f"{function}: {name} must be {kinds[0]} like its parameter; got {kinds[1]}")


def _one_number(function: str, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1 or value.is_meta or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(
            f"{function}: {name} must be one number; got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
        )
    return value.item()


def loaded_step(function: str, where: str, step: Any) -> Tensor:
    """The number of steps taken, a float32 on the CPU whatever it came as; float64 stays that."""
    double = isinstance(step, Tensor) and step.dtype == torch.float64
    t = number(function, f"step of {where}", _one_number(function, f"step of {where}", step), infinite=True)
    last = LAST_STEP if double else LAST_FLOAT32_STEP
    if t > last or t != math.floor(t):
        raise ValueError(f"{function}: step of {where} must be a whole number in [0, {last}]; got {t:.17g}")
    return torch.tensor(t, dtype=torch.float64 if double else torch.float32)


def loaded_tensors(
    function: str, param: Tensor, saved: dict[str, Any], own: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The step, where the kernel reads it, and the states of ``dtype``: torch casts every one to the parameter's.

    What is loaded is copied: the checkpoint may be loaded twice. But for a tensor of ``own``, the state before, which
    torch.distributed.checkpoint has read into and hands back.
    """
    loaded = {"step": loaded_step(function, "a parameter", saved["step"]).to(param.device)}
    for key, value in saved.items():
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if floating and key not in ("step", "noise_unit", "anchor", "draws"):
            loaded[key] = value.detach().to(param.device, dtype, copy=value is not own.get(key))
    return loaded


def loaded_unit(function: str, where: str, unit: Any) -> float:
    return number(function, f"noise_unit of {where}", _one_number(function, f"noise_unit of {where}", unit))


def loaded_draws(function: str, where: str, draws: Any) -> Tensor:
    """How many draws were made in training contexts and in others: float64 [2], on the CPU."""
    if not isinstance(draws, Tensor) or draws.is_meta or draws.numel() != 2:
        came = tuple(draws.shape) if isinstance(draws, Tensor) else _kind(draws)
        raise ValueError(f"{function}: draws of {where} must be a tensor of two numbers; got {came}")
    last = (1 << 32) - 1
    counts = [number(function, f"draws of {where}", value) for value in draws.tolist()]
    if any(count > last or count != math.floor(count) for count in counts):
        raise ValueError(f"{function}: draws of {where} must be whole numbers in [0, {last}]; got {counts}")
    return torch.tensor(counts, dtype=torch.float64)
