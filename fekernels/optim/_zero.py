"""What an optimizer that ``ZeroRedundancyOptimizer`` has made for its rank's part owes to the whole."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fekernels.optim._checkpoint import check_kind
from fekernels.optim.shared_noise import decided_alone, have_decided, leave_undecided

if TYPE_CHECKING:
    from fekernels.optim.parameter_groups import ParameterGroups

__all__ = ["join_zero", "zero_around"]


def zero_around() -> Any:
    """The ``ZeroRedundancyOptimizer`` that this is called for, as it makes its own rank's optimizer; or None.

    It hands over groups like any other's, without a sign that they are a part: who constructs tells.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe(1) if zero is not None else None
    while frame is not None:
        if frame.f_globals is vars(zero):
            maker = frame.f_locals.get("self")
            if isinstance(maker, zero.ZeroRedundancyOptimizer):  # type: ignore[union-attr]
                return maker
        frame = frame.f_back
    return None


def join_zero(optimizer: ParameterGroups, zero: Any) -> weakref.ref[Any]:
    """Make checkpoints of ``zero``, whose values are those of rank 0's part, checkpoints of the whole.

    They are then those of one optimizer of all parameters, which loads them, as any number of ranks does.
    """
    streams = optimizer._whole_streams

    def save(zero: Any, saved: dict[str, Any]) -> None:
        first = 0
        for group, packed in zip(zero.param_groups, saved["param_groups"], strict=True):
            packed["streams"] = _streams(group["params"], streams, first)
            first += len(group["params"])
        leave_undecided(saved["param_groups"], optimizer._drawn_seed)

    def load(zero: Any, saved: dict[str, Any]) -> None:
        check_kind(f"{optimizer._name}.load_state_dict", optimizer._kind, saved["param_groups"])
        if have_decided(optimizer._drawn_seed, zero.param_groups, decided_alone(saved)):
            optimizer._drawn_seed = None
        for group, own in zip(saved["param_groups"], zero.param_groups, strict=False):
            if "seed" in group and group["seed"] is None:
                group["seed"] = own["seed"]  # in place: what was given is read again after this hook

    zero.register_state_dict_post_hook(save)
    zero.register_load_state_dict_pre_hook(load)
    return weakref.ref(zero)


def _streams(params: list[Tensor], streams: Mapping[Tensor, int] | None, first: int) -> list[int]:
    """Of all parameters of a group: those of ``streams_of``; without it, where nothing makes noise, positions."""
    return list(range(first, first + len(params))) if streams is None else [streams[p] for p in params]
