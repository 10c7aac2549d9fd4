"""Anchors, the means of the Gaussian prior: what is given for them, and where they are kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fekernels._checks import dense
from fekernels._runtime.pointer_table import check_like
from fekernels._runtime.ranks import has_ranks
from fekernels.ops.plain_memory import check_storage

__all__ = ["Anchors", "check_anchors", "checked_anchor"]


def checked_anchor(function: str, anchor: Any) -> Any:
    """None, "init" or a list of tensors; TypeError or ValueError for anything else."""
    expected = "None, 'init' or a list of tensors"
    if anchor is None or (isinstance(anchor, str) and anchor == "init"):
        return anchor
    if isinstance(anchor, str):
        raise ValueError(f"{function}: anchor must be {expected}; got {anchor!r}")
    if not isinstance(anchor, Iterable) or isinstance(anchor, Tensor):
        raise TypeError(f"{function}: anchor must be {expected}; got {type(anchor).__name__}")
    anchors = list(anchor)
    for i, tensor in enumerate(anchors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: anchor[{i}] must be a tensor; got {type(tensor).__name__}")
    return anchors


def check_anchors(function: str, anchors: list[Tensor], params: list[Tensor]) -> None:
    """ValueError or TypeError where a list of anchors is not one for each of ``params``."""
    if len(anchors) != len(params):
        raise ValueError(
            f"{function}: anchor must have {len(params)} tensors like params; got {len(anchors)}"
        )
    for i, (tensor, param) in enumerate(zip(anchors, params, strict=True)):
        dense(function, f"anchor[{i}]", tensor)
        check_like(function, f"anchor[{i}]", tensor, param)


class Anchors:
    """One anchor per parameter, outside of ``optimizer.state``, which users clear and replace.

    A parameter's state gets its anchor when it is made, and is saved with it. Before the first step there is no state,
    because torch's distributed checkpoints take an optimizer that has any for one that has all of it.

    A parameter that is its own anchor may become rank 0's between construction and the first step, by what wraps the
    model: DDP, and trainers that wrap after they have taken the optimizer. Where there are ranks it is taken again at
    its first step, also one that took another's place before that, as of a model that is sharded. Nothing is sent for
    it, so that ranks with models of their own do not wait for each other.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}
        self._starts: set[Tensor] = set()  # of parameters that are their own anchors and have made no step

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]  # of an earlier release, without starts
        self.__dict__.update(state)

    def keep(self, param: Tensor, anchor: Tensor) -> Tensor:
        """A copy of ``anchor`` is the parameter's from now on."""
        check_storage(f"the anchor of a parameter of shape {tuple(param.shape)}", anchor)
        kept = self._kept[param] = anchor.detach().to(param.device, copy=True)
        self._starts.discard(param)
        return kept

    def keep_start(self, param: Tensor) -> None:
        """So is a copy of the parameter."""
        self.keep(param, param)
        self._starts.add(param)

    def _may_be_rank_0s(self, param: Tensor) -> bool:
        return param in self._starts and has_ranks()

    def of(self, function: str, where: str, kind: str, param: Tensor, state: dict[str, Any]) -> Tensor:
        """The anchor in a parameter's state, put back where it is missing, remembered where somebody set it.

        Args:
            kind: of its group, "init" or "given".

        Raises:
            ValueError: a parameter that has none, as one that was put into a group for another.
        """
        anchor = state.get("anchor")
        if anchor is None:
            if kind == "init" and param not in self._kept and has_ranks() and not float(state.get("step", 0)):
                self.keep_start(param)
            anchor = self._kept.get(param)
            if anchor is None:
                raise ValueError(
                    f"{function}: {where} must have an anchor like the others of its group; got none (of a parameter "
                    "that replaced another, as sharding a model does, make the optimizer after that, or set "
                    "optimizer.state[parameter]['anchor'] to a tensor of its shape)"
                )
            if self._may_be_rank_0s(param):
                anchor = self.keep(param, param)
            elif anchor.device != param.device:  # the model has moved since, as trainers do
                anchor = self.keep(param, anchor)
            state["anchor"] = anchor
        elif anchor is not self._kept.get(param) and anchor.shape == param.shape:
            self._kept[param] = anchor
        self._starts.discard(param)
        return anchor

    def prune(self, groups: list[dict[str, Any]]) -> None:
        """Let go of parameters that are in no group any more."""
        params = [param for group in groups for param in group["params"]]
        if len(self._kept) > len(params):
            self._kept = {param: self._kept[param] for param in params if param in self._kept}
            self._starts &= self._kept.keys()

    def load(self, param: Tensor, state: dict[str, Any], saved: dict[str, Any]) -> None:
        """Take over what a checkpoint holds for a parameter, in the dtype that it was saved in."""
        anchor = saved.get("anchor")
        if isinstance(anchor, Tensor):
            state["anchor"] = self.keep(param, anchor)

    def save(self, groups: list[dict[str, Any]], saved: dict[int, Any]) -> None:
        """Add what the states of ``saved`` lack, by the number of the parameter, as those of a first step do."""
        params = [(group["anchor"], param) for group in groups for param in group["params"]]
        for index, (kind, param) in enumerate(params):
            state = saved.get(index, {})
            if kind is None or "anchor" in state:
                continue
            if self._may_be_rank_0s(param) or (
                kind == "init" and param not in self._kept and has_ranks() and not state
            ):
                saved[index] = {**state, "anchor": param.detach().clone()}
            elif param in self._kept:
                saved[index] = {**state, "anchor": self._kept[param]}
