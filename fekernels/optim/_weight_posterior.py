"""What an optimizer of a Gaussian over the weights has learned: the Gaussian, its KL to the prior, the free energy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fekernels._checks import number
from fekernels._runtime.parts import local_tensor
from fekernels.ops.optimizers.variational_kl import variational_kl
from fekernels.optim._replica_sums import ReplicaSums
from fekernels.optim._shards import sum_over_shards

__all__ = ["WeightGaussian", "WeightPosterior"]


class WeightGaussian(NamedTuple):
    """The Gaussian of one parameter's elements, each independent of the others: tensors of its shape."""

    mean: Tensor
    std: Tensor


class WeightPosterior(ReplicaSums):
    """An optimizer of a Gaussian over the weights, without its step, that tells what it has learned."""

    _start_is_behind = False  # or was told of

    def _warn_of_start(self, steps: int, share: float) -> None:
        if self._start_is_behind:
            return
        for group in self.param_groups:
            made = [self.state[p]["step"] for p in group["params"] if "hessian" in self.state.get(p, {})]
            if not made:
                continue
            count, beta2 = int(made[0]), float(group["betas"][1])
            if count < steps:
                continue
            left = beta2**count
            self._start_is_behind = left < 0.1
            if left > share:
                self._start_is_behind = True
                self._warn_once(
                    f"after {count:,} steps h is still {left:.0%} its start, hess_init={group['hess_init']:g}, and so"
                    f" are the standard deviations: betas[1]={beta2:g} averages over about {1 / (1 - beta2):,.0f}"
                    " steps. Take a betas[1] of 1 - 5 / steps or less"
                )

    def _learned(self) -> list[tuple[dict[str, Any], Tensor, dict[str, Any], Tensor]]:
        """Of every parameter that is not frozen: its group, itself, its state and its mean, also inside a context."""
        found = []
        for group in self.param_groups:
            self._check_group(group)
            for i, param in enumerate(group["params"]):
                if not param.requires_grad:
                    continue
                state = self._state_of(group, param, i)
                own = self._inside or state["mean"].dtype != param.dtype
                found.append((group, param, state, state["mean"] if own else param.detach()))
        return found

    @torch.no_grad()
    def posterior(self) -> list[WeightGaussian]:
        """Mean and standard deviation of every parameter, in the order of ``param_groups``: new tensors.

        A frozen one's mean is its value, its standard deviation 0.

        Warns:
            UserWarning: "natural", once, after steps too few for ``betas[1]``: more than half of h, which the
                deviations come from, is still ``hess_init``. Drawing to evaluate tells of more than nine tenths.
        """
        self._warn_of_start(1, 0.5)
        found = {}
        for group, param, state, mean in self._learned():
            std, itself = self._spread(state)
            if not itself:
                std = (group["temperature"] / group["ess"] / (std + group["weight_decay"])).sqrt()
            found[param] = WeightGaussian(mean.clone(), std.clone() if itself else std)
        for group in self.param_groups:
            for param in group["params"]:
                if param not in found:
                    value = param.detach().to(self._state_dtype(group, param), copy=True)
                    found[param] = WeightGaussian(value, torch.zeros_like(value))
        return [found[param] for group in self.param_groups for param in group["params"]]

    @torch.no_grad()
    def kl(self) -> Tensor:
        """KL(q || prior) in nats, over all parameters but the frozen; the prior is N(0, 1 / (ess weight_decay)).

        Each tensor is read once, and nothing of its size is made.

        Returns:
            float64, without dimensions, where the first parameter is.

        Raises:
            ValueError: weight_decay = 0, which is no prior; temperature = 0, at which "natural" is a point.
        """
        terms = [terms[0] for _, _, terms in self._kl_terms("kl")]
        if not terms:
            return torch.zeros((), dtype=torch.float64, device=self.param_groups[0]["params"][0].device)
        return torch.stack(terms).sum()

    @torch.no_grad()
    def free_energy(self, nll: float | Tensor) -> float | Tensor:
        """The variational free energy per data point: nll + KL / ess, what the optimizer minimises at temperature 1.

        At another temperature T the entropy counts T times: nll + (KL + (1 - T) entropy) / ess.

        Args:
            nll: the loss at draws of the weights, a mean over the data points and, better, over several draws.

        Returns:
            Of nll's kind. Times ess it is in nats: minus the evidence lower bound of all data.

        Raises:
            TypeError: nll is no number and no tensor. ValueError: as ``kl``.
        """
        if not isinstance(nll, Tensor):
            number(f"{self._name}.free_energy", "nll", nll, least=-math.inf, infinite=True)
        total = torch.zeros((), dtype=torch.float64)
        for group, param, (kl, log_ratio) in self._kl_terms("free_energy"):
            cold = 1 - float(group["temperature"])
            entropy = 0.0
            if cold:
                numel = param.numel()
                prior_precision = group["ess"] * group["weight_decay"]
                entropy = 0.5 * (numel * (math.log(2 * math.pi / prior_precision) + 1) + log_ratio)
            total = total.to(kl.device) + (kl + cold * entropy) / group["ess"]
        if isinstance(nll, Tensor):
            return nll.detach() + total.to(nll.device, nll.dtype)
        return float(nll) + float(total)

    def _kl_terms(self, method: str) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        """``variational_kl`` of every parameter, of a sharded one the sum over its shards."""
        function = f"{self._name}.{method}"
        terms = []
        for group, param, state, mean in self._learned():
            temperature = float(group["temperature"])
            spread, deviations = self._spread(state)
            number(function, "weight_decay", group["weight_decay"], above=0.0)
            if not deviations:
                number(function, "temperature", temperature, above=0.0)
            found = variational_kl(
                local_tensor(mean), local_tensor(spread), group["ess"], group["weight_decay"],
                temperature or 1.0, deviations, group["backend"],
            )  # fmt: skip
            terms.append((group, param, sum_over_shards(function, found, param)))
        return terms
