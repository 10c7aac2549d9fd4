"""Langevin-Adam: Adam that can also sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fekernels._catalogue.optimizers import NOISES
from fekernels._checks import boolean, number, one_of, pair
from fekernels._runtime.parts import local_tensor
from fekernels._runtime.pointer_table import DTYPE_CODES, Row, supported_dtypes
from fekernels._runtime.torch_internals import never_traced
from fekernels.ops.optimizers.langevin_adam import OPERATION
from fekernels.optim._checkpoint import loaded_unit, momentum_unit
from fekernels.optim._preconditioner import Uncorrected, check_scaled, memory_weight, scale
from fekernels.optim._state import zero_state
from fekernels.optim._table_cache import TableCache
from fekernels.optim._table_optimizer import TableOptimizer, traced_number
from fekernels.optim.shared_noise import is_hot

__all__ = ["LangevinAdam"]


class LangevinAdam(TableOptimizer):
    """Adam with a temperature: at T = 0 it is ``torch.optim.Adam``, at T > 0 it samples exp(-loss / T).

    With L the loss, h = ``lr``, T = ``temperature``, D = sqrt(v / bias correction) + ``eps`` and xi standard normal::

        m     <- beta1 m + (1 - beta1) (grad + prior_precision (theta - anchor) + c_t sqrt(2 T D / h) xi)    "momentum"
        theta <- theta - h (m / bias correction) / D

    The noise is made inside the kernel from counters (``fe.random``): it costs no memory traffic, and it is
    the same bit for bit on every device, sharding, number of threads and restart.

    Args:
        params: parameters, dicts of parameter groups, or (name, parameter) pairs, as for every torch
            optimizer. float32, float64, bfloat16 or float16; one device per group. Named parameters get their
            noise stream from the name, others from their position over all groups.
        lr: step size h, a float or a one-element tensor. At 0 nothing moves.
        betas: decay of the gradient's and of the squared gradient's averages, floats or one-element tensors (one on a
            GPU is read by the host at every step). Adam's defaults.
        eps: added to the denominator; Adam's default. Sampling without a prior wants 1e-6 or more (a warning says so).
        weight_decay: L2 penalty added to the gradient as in Adam, or AdamW's decay with
            ``decoupled_weight_decay=True``.
        amsgrad: divide by the largest average of squared gradients so far (Reddi et al. 2018).
        temperature: T, a float or a one-element tensor; a group value that ``fe.optim.TemperatureScheduler``
            can move. With a mean loss over N data points T = 1/N samples the Bayesian posterior, with a sum T
            = 1. Default 0: Adam.
        noise: where the noise enters. "momentum" (the default: its stationary distribution is exp(-L/T) to
            first order in lr for every beta1), "preconditioned" (pSGLD, Li et al. 2016, arXiv:1512.07666;
            wants betas[0] = 0), or "isotropic" (exploration; its variance is scaled by the preconditioner).
        prior_precision: of a Gaussian prior around ``anchor``, divided by N like the loss. It enters the
            drift but not the second moment, and D is kept at lr * prior_precision or more, so that weights
            without gradient settle on it.
        anchor: the prior's mean: None (zero), "init" (the parameters as they are now; in a process group of several
            ranks as they are at the first step, when what wraps the model has made them one), or a list of tensors
            like params.
        decoupled_weight_decay: see ``weight_decay``.
        bias_correction: divide the averages by 1 - beta^t.
        maximize: ascend.
        foreach: taken for compatibility and not needed; there is one implementation, which is fused.
        fused: True, as in torch, makes GradScaler leave the gradients as they are and hand scale and found_inf to the
            kernel: a read and a write of the gradients saved, and no clipping between. None and False let it unscale
            them. The step itself is the same.
        capturable: likewise: steps live on a GPU parameter's device and nothing is read back, so that a CUDA graph may
            always capture the step.
        differentiable: must be False.
        seed: 64 bits, the key of the noise. None draws one from torch's default generator now and keeps it; the ranks
            of a process group take rank 0's at their first step with noise.
        state_dtype: of exp_avg and exp_avg_sq; None is the parameter's dtype, as in Adam, but float32 for float16, in
            which a square below 6e-8 is 0 and the steps come out many times too long.
        stochastic_rounding: round bfloat16 parameters and states up or down at random, without bias, so that
            small steps and slow decays are not lost. float32, float64 and float16 tensors are not concerned. A warning
            says where a temperature above 0 wants it.
        backend: "reference", "cpp", "triton" or "cuda" for this optimizer; None follows ``fe.use_backend``.

    The state of a parameter is Adam's (``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``), so
    checkpoints of ``torch.optim.Adam`` and ``AdamW`` load and go on. ``grad`` is never written to. A parameter
    without gradient gets no step and no noise, nor does a step that GradScaler skips. Under "momentum" each
    parameter has one number more, ``noise_unit``, from its first hot step on: q = lr (1 + beta1) / (1 - beta1) of
    the last step that moved it, 0 when that step was cold. When lr or beta1 changes, the noise that exp_avg keeps
    is rescaled by sqrt(q before / q now), without which a cyclical lr would overshoot.

    A group has the value ``frozen`` beside the arguments: see ``freeze_preconditioner``.

    Raises:
        TypeError: a hyperparameter of the wrong type; complex parameters or gradients.
        ValueError: one out of its range; several devices in a group; at the step, sparse gradients, a parameter
            whose elements share memory or that is on the meta device, a state that does not fit, a first gradient in
            a frozen group.
        RuntimeError: the step counter reached 2^24, the end of float32 counting.

    Source: Kingma & Ba 2015 (Adam); Chen, Fox & Guestrin 2014 and Li et al. 2016 (preconditioned SGHMC).
    """

    _kind = "LangevinAdam"
    _operation = OPERATION
    _states = ("step", "exp_avg", "exp_avg_sq")
    _optional_states = ("max_exp_avg_sq", "noise_unit", "anchor")
    _switches = (
        "maximize", "amsgrad", "decoupled_weight_decay", "bias_correction", "stochastic_rounding", "differentiable",
        "capturable", "frozen",
    )  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        temperature: float | Tensor = 0.0,
        noise: str = "momentum",
        prior_precision: float = 0.0,
        anchor: str | Sequence[Tensor] | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        seed: int | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "temperature": temperature,
            "noise": noise,
            "prior_precision": prior_precision,
            "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "backend": backend,
            "frozen": False,
        }
        self._uncorrected = Uncorrected()
        super().__init__(params, defaults, seed, anchor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Groups without ``frozen``, of Adam's checkpoints and earlier releases, have v with its bias correction."""
        self.__dict__.setdefault("_uncorrected", Uncorrected())
        super().__setstate__(state)
        for values in (self.defaults, *self.param_groups):
            values.setdefault("frozen", False)

    @never_traced
    @torch.no_grad()
    def freeze_preconditioner(self, frozen: bool = True) -> None:
        """Let the preconditioner D stand still from now on, or, with ``frozen=False``, adapt again.

        While v adapts, D follows the chain, and the drift lacks the term that would correct for that: at small lr the
        variance comes out too large (1.31 times at lr = 1e-3 sigma, see docs/langevin_adam.md). Frozen, v is read and
        no longer written (24 instead of 28 bytes a parameter), and the stationary law is exp(-loss / T) to first order
        in lr. Freeze at the end of a burn-in at T > 0: v of a T = 0 run is that of the optimum.

        v stands without bias correction while it is frozen: freezing divides ``exp_avg_sq`` (and ``max_exp_avg_sq``) of
        every parameter by 1 - betas[1]^t of its own t, and letting go multiplies by that of its t then, so that D
        does not jump. At t = 0 both leave v as it is: one that was written by hand, such as a Fisher information, is
        taken as it stands. So it is where the group value ``frozen``, which checkpoints carry, is set by hand: D =
        sqrt(v) + eps from then on. bfloat16 moments are rounded to nearest.

        Groups that are so already are left alone. Nothing is read from a GPU, except float16 moments.

        Under ``ZeroRedundancyOptimizer`` call it on ``zero.optim``, on every rank: the groups that it shows follow.
        Where anything else sets ``frozen`` back to False, step and ``state_dict`` raise ValueError.

        Args:
            frozen: whether D is to stand still.

        Raises:
            TypeError: ``frozen`` that is no bool, a state that is no tensor. ValueError: a float16 moment that would be
                infinite without its bias correction. Nothing has changed then. At the step, a parameter that gets its
                first gradient while frozen: it has no v yet.
        """
        function = f"{self._name}.freeze_preconditioner"
        frozen = boolean(function, "frozen", frozen)
        scaled: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            stands = bool(group["frozen"])
            # The moments are made to agree here, with whatever it says.
            self._check_group({**group, "frozen": group["frozen"] or True})
            for i, param in enumerate(group["params"]):
                if not self._has_moments(param):
                    continue
                state = self._state_of(group, param, i)
                if (stands or self._uncorrected.has(param, state)) is frozen:
                    continue
                weight = memory_weight(group, state["step"])
                factor = 1 / weight if frozen else weight
                for key in ("exp_avg_sq", "max_exp_avg_sq"):
                    if key in state:
                        check_scaled(function, f"{key} of params[{i}]", state[key], factor)
                        scaled.append((state[key], factor))
        for moment, factor in scaled:
            scale(moment, factor)
        for group in self.param_groups:
            group["frozen"] = frozen
        self._uncorrected.mark(self.param_groups, self.state)
        self._kept.clear()  # checked before that, with a value that a group may have again
        for group in getattr(self._zero and self._zero(), "param_groups", ()):
            group["frozen"] = frozen

    def state_dict(self) -> dict[str, Any]:
        """As every torch optimizer's. ValueError where ``frozen`` was set to False and v is that of a frozen group."""
        for group in self.param_groups:
            self._uncorrected.check(f"{self._name}.state_dict", group, self.state)
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_uncorrected": self._uncorrected}

    def _has_moments(self, param: Tensor) -> bool:
        return any(key in self.state.get(param, {}) for key in self._states)

    def _state_of(self, group: dict[str, Any], param: Tensor, i: int) -> dict[str, Any]:
        if group["frozen"] and param.numel() and not self._has_moments(param):
            name = f" ({group['param_names'][i]!r})" if "param_names" in group else ""
            raise ValueError(
                f"{self._name}: params[{i}]{name} must have exp_avg_sq where the preconditioner is frozen; got its "
                "first gradient, with which D would be eps (take steps with it before freeze_preconditioner(), or set "
                "its step, exp_avg and exp_avg_sq by hand)"
            )
        return super()._state_of(group, param, i)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_number(group, "eps")
        betas = pair(self._name, "betas", group["betas"])
        if type(betas[0]) is not float or type(betas[1]) is not float:
            group["betas"] = betas = tuple(self._checked_beta(group, i, beta) for i, beta in enumerate(betas))
        for i, beta in enumerate(betas):
            if not isinstance(beta, Tensor):
                number(self._name, f"betas[{i}]", beta, below=1.0)
        one_of(self._name, "noise", group["noise"], tuple(NOISES))
        if group["differentiable"]:
            raise ValueError(
                f"{self._name}: differentiable must be False (the step overwrites its inputs); got True"
            )
        dtype = group["state_dtype"]
        if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPE_CODES):
            error = ValueError if isinstance(dtype, torch.dtype) else TypeError
            raise error(
                f"{self._name}: state_dtype must be None or one of {supported_dtypes()}; got {dtype!r}"
            )
        if group["params"]:
            self._uncorrected.check(self._name, group, self.state)
            self._warn(group)

    def _checked_beta(self, group: dict[str, Any], i: int, beta: Any) -> float | Tensor:
        if not isinstance(beta, Tensor):
            return number(self._name, f"betas[{i}]", beta, below=1.0)
        self._check_scalar_tensor(group, f"betas[{i}]", beta, below=1.0)
        return beta

    def _beta(self, group: dict[str, Any], i: int, moving: bool) -> tuple[float, Tensor | None]:
        """A beta as a number; in a compiled step as a tensor, where it may move, which the operator reads."""
        beta = group["betas"][i]
        if not torch.compiler.is_compiling():
            return float(beta), None
        if isinstance(beta, Tensor):
            return 0.0, beta
        return (0.0, traced_number(beta)) if moving else (beta, None)

    def _numbers_move(self, group: dict[str, Any]) -> bool:
        """Whether the betas of a compiled step are to be tensors: on a GPU only once they have changed.

        A tensor of the host in its graph keeps torch.compile from capturing it as a CUDA graph.
        """
        if group["params"][0].device.type == "cpu":
            return True
        betas = [beta for beta in group["betas"] if not isinstance(beta, Tensor)]
        return self._first_betas.setdefault(id(group), betas) != betas

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._first_betas: dict[int, list[float]] = {}

    def _warn(self, group: dict[str, Any]) -> None:
        """Once each, of what a temperature does that hardly anybody wants."""
        if not is_hot(group):
            return
        if group["prior_precision"] == 0 and group["eps"] < 1e-6:
            self._warn_once(
                f"temperature > 0 with prior_precision = 0 and eps = {group['eps']:g}: a weight that never gets a "
                "gradient (a dead pixel, a dead unit) walks by sqrt(2 * temperature * lr / eps) per step. Set "
                "prior_precision, or a larger eps."
            )
        if group["decoupled_weight_decay"] and group["weight_decay"] > 0:
            self._warn_once(
                "temperature > 0 with decoupled_weight_decay=True: the decay is a prior of precision weight_decay * "
                "D, another for every weight, D being Adam's denominator. A Gaussian prior is prior_precision, or "
                "weight_decay with decoupled_weight_decay=False."
            )

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        dtype = self._state_dtype(group, param)
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        keys = ["exp_avg", "exp_avg_sq"] + (["max_exp_avg_sq"] if group["amsgrad"] else [])
        for key in keys:
            state[key] = zero_state(param, dtype, group["backend"])

    def _row(self, group: dict[str, Any], row: dict[str, Any], state: dict[str, Any]) -> Row:
        largest = state.get("max_exp_avg_sq") if group["amsgrad"] else None
        if group["amsgrad"] and largest is None:  # switched on later, as a loaded checkpoint may be
            largest = state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
        if self._keeps_noise_units(group) and "noise_unit" not in state:
            state["noise_unit"] = self._no_noise(row["param"])
        return Row(
            **row,
            noise_unit=state.get("noise_unit"),
            exp_avg=local_tensor(state["exp_avg"]),
            exp_avg_sq=local_tensor(state["exp_avg_sq"]),
            max_exp_avg_sq=local_tensor(largest) if largest is not None else None,
        )

    @staticmethod
    def _keeps_noise_units(group: dict[str, Any]) -> bool:
        """Whether noise may enter exp_avg at this step; until then the states of a parameter are exactly Adam's."""
        temperature = group["temperature"]
        traced = torch.compiler.is_compiling() and isinstance(temperature, (Tensor, np.generic, np.ndarray))
        return (traced or is_hot(group, unknown=True)) and group["noise"] == "momentum"

    def _has_states(self, group: dict[str, Any], cache: TableCache) -> bool:
        has_units = cache.noise_units or not self._keeps_noise_units(group)
        return has_units and super()._has_states(group, cache)

    def _restore_numbers(self, param: Tensor, state: dict[str, Any], saved: dict[str, Any]) -> None:
        if "noise_unit" in saved:
            unit = loaded_unit(self._name, "a parameter", saved["noise_unit"])
            state["noise_unit"] = self._no_noise(param).fill_(unit)

    def _restore_group(self, group: dict[str, Any]) -> None:
        """Checkpoints of 0.1 have ``previous`` in a group: lr and temperature of its last step that moved."""
        self._uncorrected.mark(self.param_groups, self.state)
        unit = momentum_unit(self._name, group.pop("previous", (0.0, 0.0)), float(group["betas"][0]))
        if not (unit > 0 and group["noise"] == "momentum"):
            return
        for param in group["params"]:
            if "step" in self.state[param]:
                self.state[param].setdefault("noise_unit", self._no_noise(param).fill_(unit))

    @staticmethod
    def _no_noise(param: Tensor) -> Tensor:
        # Of one dimension: torch.compile takes a float64 without any for a number, and then fixes all others too.
        return torch.zeros(1, dtype=torch.float64, device=param.device)

    def _own_settings(self, group: dict[str, Any], moving: bool) -> dict[str, Any]:
        values = {"noise": group["noise"]}
        for i, name in enumerate(("beta1", "beta2")):
            values[name], values[f"{name}_tensor"] = self._beta(group, i, moving)
        return values

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        live = [param for param in group["params"] if param.grad is not None]
        if any("noise_unit" in self.state[param] for param in live):  # the operator's list is of all or none
            for param in live:
                self.state[param].setdefault("noise_unit", self._no_noise(param))
        return super()._init_group(group, *lists)
