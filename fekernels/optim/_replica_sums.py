"""The sums over draws of replicas that draw apart: exchanged, and skipped by all of them or none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._runtime.parts import is_sharded
from fekernels._runtime.ranks import exchange, max_over_ranks, numbers_device
from fekernels.optim._weight_draws import WeightDraws

__all__ = ["ReplicaSums"]


class ReplicaSums(WeightDraws):
    """An optimizer of a Gaussian over the weights, without its step, of one process or of replicas."""

    def _tell_ranks(self) -> tuple[bool, list[bool]]:
        """With ``sync``: whether GradScaler found infinities on any rank, and which parameters have a gradient on any.

        Raises:
            RuntimeError: on every rank, where one has made more draws than another. Nothing has changed then.
        """
        function = f"{self._name} with sync=True"
        params = [param for group in self.param_groups for param in group["params"]]
        if any(map(is_sharded, params)):
            raise ValueError(
                f"{self._name}: sync=True takes plain parameters, of which every rank has all; got a DTensor"
            )
        mine = [float(param in self._since.summed) for param in params]
        count, found = float(self._since.samples), float(getattr(self, "found_inf", None) or 0)
        told = torch.tensor([count, -count, found, *mine], device=numbers_device())
        most, fewest, found, *summed = max_over_ranks(function, told, None).tolist()
        if most != -fewest:
            raise RuntimeError(
                f"{self._name}: with sync=True every rank must make as many draws per step; got {int(count)} training "
                f"contexts on this rank since the last step, and from {int(-fewest)} to {int(most)} on all"
            )
        return bool(found), list(map(bool, summed))

    def _average_over_ranks(self) -> tuple[int, bool]:
        """With ``sync``: the sums become those of all ranks, a parameter's 0 where it has a gradient on others alone.

        Each rank's GradScaler has a scale of its own, which its sums are freed of first.

        Returns:
            How many draws they are of, and whether GradScaler found infinities on any rank.
        """
        if not self._is_replica():
            return self._since.samples, False
        function = f"{self._name} with sync=True"
        # Ranks that reduced each its own parameters would add up gradients of different ones.
        found, summed = self._tell_ranks()
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for (group, param), somewhere in zip(params, summed, strict=True):
            if not somewhere:
                continue
            sums, scale = self._sums_of(group, param), self._amp(group)[0]
            for total in sums:
                if param not in self._since.summed:
                    total.zero_()
                elif scale is not None:
                    total /= scale
                exchange(function, dist.all_reduce, total)
            self._since.summed[param] = None
        return self._since.samples * dist.get_world_size(), found

    def _overflow(self, elsewhere: bool) -> Tensor | None:
        """Above 0 where this step is to be skipped by all ranks; None without GradScaler on any.

        GradScaler has seen the gradients of the last draw alone.
        """
        found = self._amp(self.param_groups[0])[1]
        if found is None:
            if not elsewhere:
                return None
            found = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        found = found + elsewhere
        for param in self._since.summed:
            if param.requires_grad:
                found = found + (~self._sums[param][0].isfinite().all()).to(found.device)
        return found
