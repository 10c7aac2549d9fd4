"""The parameters of a restricted Boltzmann machine over binary vectors, its energies and conditional probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._catalogue.random import LATENT_SAMPLE
from fekernels._checks import boolean, dense, integer, number, one_of, same_device
from fekernels._runtime.ranks import draw_seed
from fekernels.models.rbm_partition import softplus_sum
from fekernels.ops.free_energy.domains import validate_data
from fekernels.ops.noise_key import signed_seed

__all__ = ["STREAMS", "RBMEnergy"]

# Of the seed's noise. A Gibbs sweep takes two, for the hidden and the visible units.
STREAMS = {"train": 0, "sample": 2, "exact": 4, "anneal": 6, "shuffle": 8, "weights": 9}


class RBMEnergy(nn.Module):
    """What of ``BernoulliRBM`` needs neither log Z nor a chain; see there."""

    def __init__(
        self,
        n_visible: int,
        n_hidden: int,
        *,
        std: float = 0.01,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        name = "BernoulliRBM"
        self.n_visible = integer(name, "n_visible", n_visible, 1, 1 << 31)
        self.n_hidden = integer(name, "n_hidden", n_hidden, 1, 1 << 31)
        std = number(name, "std", std)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: dtype must be float32 or float64; got {dtype}")
        self.seed = draw_seed() if seed is None else signed_seed(name, seed)
        self.draws = self.calls = 0
        self._doubted: str | None = None
        weight = random.normal(
            (self.n_visible, self.n_hidden),
            seed=self.seed,
            stream=STREAMS["weights"],
            purpose=LATENT_SAMPLE,
            device=device,
        )
        self.weight = nn.Parameter(weight.to(dtype) * std)
        self.visible_bias = nn.Parameter(torch.zeros(self.n_visible, device=device, dtype=dtype))
        self.hidden_bias = nn.Parameter(torch.zeros(self.n_hidden, device=device, dtype=dtype))
        self.chains: Tensor
        self.register_buffer("chains", torch.empty(0, self.n_visible, device=device, dtype=dtype))
        self.base_odds: Tensor
        self.register_buffer("base_odds", torch.empty(0, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"n_visible={self.n_visible}, n_hidden={self.n_hidden}, seed={self.seed}"

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "draws": self.draws, "calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.seed, self.draws, self.calls = (
            int(state["seed"]),
            int(state["draws"]),
            int(state.get("calls", 0)),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}chains")  # as many as there were
        if isinstance(saved, Tensor) and saved.dim() == 2 and saved.shape[1] == self.n_visible:
            self.chains = self.chains.new_empty(saved.shape)
        # States that are older than these odds have none.
        saved = state_dict.setdefault(f"{prefix}base_odds", self.base_odds.new_empty(0))
        if isinstance(saved, Tensor) and saved.shape in ((0,), (self.n_visible,)):
            self.base_odds = self.base_odds.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def free_energy(self, v: Tensor, *, reduction: str = "none", validate: bool | None = None) -> Tensor:
        """F(v) = -a v - sum softplus(c + v W), the clamped free energy, in nats; differentiable in v and parameters.

        Two matrix products, forward and backward, and one read of their results: softplus and its derivative are the
        fused `fe.energy` of a Bernoulli variable at 0.

        Args:
            v: [n, n_visible], of the parameters' dtype; 0 and 1 (or probabilities, for gradients and mean fields).
            reduction: "none" gives [n]; "mean", "sum" scalars, whose gradients come with the value in one pass.
            validate: whether v outside of [0, 1] raises. None: on a CPU; on a GPU it would wait for the GPU.

        Raises:
            TypeError, ValueError: naming v.
        """
        v = self._visible("free_energy", v)
        self.check_domain("free_energy", v, validate)
        reduction = one_of("free_energy", "reduction", reduction, ("none", "mean", "sum"))
        x = torch.addmm(self.hidden_bias, v, self.weight)
        if reduction == "none":
            return -(v @ self.visible_bias) - softplus_sum(x)
        # The sign is the rows' weight: a gradient that -1 came down to would be scaled, one more pass over x's size.
        hidden = softplus_sum(x, reduction, weight=-torch.ones_like(v[:, 0]))
        # Of the sum over the rows the gradient is known with the value: one read of v for both.
        rows = v.mean(0) if reduction == "mean" else v.sum(0)
        return hidden - rows @ self.visible_bias

    def joint_energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v, h) = -a v - c h - v W h, [n], of pairs v [n, n_visible], h [n, n_hidden]: F(v) = -log sum_h exp(-E)."""
        v, h = self._visible("joint_energy", v), self._units("joint_energy", "h", h, self.n_hidden)
        if len(v) != len(h):
            raise ValueError(f"joint_energy: h must have {len(v)} rows like v; got {len(h)}")
        return -(v @ self.visible_bias) - h @ self.hidden_bias - ((v @ self.weight) * h).sum(1)

    def hidden_probabilities(self, v: Tensor) -> Tensor:
        """p(h_j = 1 | v), [n, n_hidden]."""
        return torch.sigmoid(
            torch.addmm(self.hidden_bias, self._visible("hidden_probabilities", v), self.weight)
        )

    def visible_probabilities(self, h: Tensor) -> Tensor:
        """p(v_i = 1 | h), [n, n_visible]."""
        h = self._units("visible_probabilities", "h", h, self.n_hidden)
        return torch.sigmoid(torch.addmm(self.visible_bias, h, self.weight.t()))

    def check_domain(
        self, function: str, v: Tensor, validate: bool | None = None, *, name: str = "v"
    ) -> bool:
        """Whether it was looked at: ValueError, beginning with ``function``, for numbers outside of [0, 1], or NaN."""
        if validate is None:
            validate = v.is_cpu and not torch.compiler.is_compiling()
        if checked := boolean(function, "validate", validate):
            validate_data(function, "bernoulli", v, name=name)
        return checked

    def _visible(self, function: str, v: Tensor, name: str = "v") -> Tensor:
        return self._units(function, name, v, self.n_visible)

    def _units(self, function: str, name: str, units: Tensor, count: int) -> Tensor:
        units = dense(function, name, units)
        if units.dim() != 2 or units.shape[1] != count:
            raise ValueError(f"{function}: {name} must have shape (n, {count}); got {tuple(units.shape)}")
        if units.dtype != self.weight.dtype:
            raise TypeError(
                f"{function}: {name} must be {str(self.weight.dtype)[6:]} like the weights; got {str(units.dtype)[6:]}"
            )
        same_device(function, name, units, self.weight.device)
        return units
