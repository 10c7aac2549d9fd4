"""Optimizers of a part of a model's parameters, as ZeRO makes one on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor

from fekernels.optim.noise_streams import Names
from fekernels.optim.parameter_groups import ParameterGroups
from fekernels.optim.shared_noise import COUNTS_ANEW

__all__ = ["streams_of"]

Kind = TypeVar("Kind", bound=ParameterGroups)


def streams_of(optimizer_class: type[Kind], params: Iterable[Any]) -> type[Kind]:
    """``optimizer_class`` for a part of ``params``, whose parameters have the noise that they have among all of them.

        zero = ZeroRedundancyOptimizer(
            model.parameters(),
            optimizer_class=fe.distributed.streams_of(fe.LangevinAdam, model.parameters()),
            lr=1e-3, temperature=1e-4, seed=0,
        )

    ``torch.distributed.optim.ZeroRedundancyOptimizer`` gives each rank an optimizer of its own part, which would count
    the noise streams from 0 on every rank: the first parameter of each would get the same numbers, which is why it
    raises ValueError for ``optimizer_class`` itself where a step makes noise. The weights are those of one
    ``optimizer_class(params)``, to the bit where the gradients are.

    Args:
        optimizer_class: ``fe.LangevinAdam`` or ``fe.SGLD``. (``fe.VariationalAdam`` draws all weights before each
            forward pass, and no rank of ZeRO has the states of all: there it raises ValueError.)
        params: all parameters, as an optimizer of all of them would get them: tensors, (name, tensor) pairs, whose
            streams come from their names, or dicts of groups.

    Returns:
        A subclass. Its optimizers raise ValueError for a parameter that is not among ``params``.

    Raises:
        TypeError: optimizer_class is no such class, or has no noise of its own.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, ParameterGroups)):
        raise TypeError(
            "streams_of: optimizer_class must be an optimizer of fekernels, such as fe.LangevinAdam; "
            f"got {optimizer_class!r}"
        )
    streams, unfit = _streams(params), optimizer_class._unfit_for_zero

    class OfPart(optimizer_class):  # type: ignore[valid-type,misc]
        _whole_streams = streams
        _unfit_for_zero = None if unfit == COUNTS_ANEW else unfit

        def _assign_streams(self, group: dict[str, Any]) -> None:
            for i, param in enumerate(group["params"]):
                if param not in streams:
                    raise ValueError(
                        f"{self._name}: params[{i}] must be one of those given to streams_of; got another, of shape "
                        f"{tuple(param.shape)}"
                    )
            group["streams"] = [streams[param] for param in group["params"]]

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:  # ZeRO's checkpoints bring those of rank 0
                self._assign_streams(group)
            return super().step(closure)

    OfPart.__name__ = OfPart.__qualname__ = optimizer_class.__name__
    return OfPart


def _streams(params: Iterable[Any]) -> dict[Tensor, int]:
    found: dict[Tensor, int] = {}
    entries = list(params)
    groups = [list(entry["params"]) if isinstance(entry, dict) else [entry] for entry in entries]
    given = [pair for group in groups for pair in group if isinstance(pair, tuple)]
    streams = iter(Names(given).streams([name for name, _ in given]))
    for group in groups:
        for each in group:
            if isinstance(each, tuple):
                found[each[1]] = next(streams)
            elif isinstance(each, Tensor):
                found[each] = len(found)
            else:
                raise TypeError(
                    "streams_of: params must hold tensors, (name, tensor) pairs or dicts of them; "
                    f"got {type(each).__name__}"
                )
    return found
