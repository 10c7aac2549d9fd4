"""Variational inference over the weights at the cost of Adam."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from fekernels._checks import boolean, integer, number, one_of, pair
from fekernels._runtime import backends
from fekernels._runtime.parts import local_tensor
from fekernels._runtime.pointer_table import Row
from fekernels._runtime.torch_internals import never_traced
from fekernels.ops.optimizers import langevin_adam, variational_adam
from fekernels.ops.optimizers.langevin_adam import LangevinAdamSettings
from fekernels.ops.optimizers.variational_adam import VariationalAdamSettings
from fekernels.optim._checkpoint import loaded_draws
from fekernels.optim._raw_deviations import SCALES, deviation_of, raw_of, slope_of
from fekernels.optim._state import zero_state
from fekernels.optim._table_optimizer import Loss
from fekernels.optim._weight_draws import run_rows
from fekernels.optim._weight_posterior import WeightPosterior

__all__ = ["VariationalAdam"]

ESTIMATORS = ("natural", "reparam")
EPS = 1e-8  # Adam's, of "reparam"


class VariationalAdam(WeightPosterior):
    """Learns a Gaussian over the weights, N(mean, diag(std^2)), by the gradients at draws from it.

        optimizer = fe.VariationalAdam(model.parameters(), lr=0.1, ess=len(dataset))
        for x, y in loader:
            with optimizer.sampled_params(train=True):     # the weights are a draw here, and the mean outside
                optimizer.zero_grad()
                loss = loss_fn(model(x), y)                # a mean over the batch
                loss.backward()
            optimizer.step()

    It minimises the variational free energy per data point, E_q[loss] + KL(q || prior) / ess, the prior being
    N(0, 1 / (ess weight_decay)). With g the gradient at a draw mean + std xi, xi standard normal, delta =
    ``weight_decay`` and lambda = ``ess``, "natural" is the rule of IVON (Shen et al. 2024)::

        std   = sqrt(temperature / (lambda (h + delta)))
        h_hat = g xi / std
        m     <- beta1 m + (1 - beta1) g
        h     <- h + (1 - beta2) (h_hat - h) + (1 - beta2)^2 (h_hat - h)^2 / (2 (h + delta))
        mean  <- mean - lr clip((m / (1 - beta1^t) + delta mean) / (h + delta))

    and "reparam" is Bayes by backprop (Blundell et al. 2015): Adam on the mean and on a parameter of std, by the
    gradients g + delta mean and g xi + delta std - temperature / (lambda std).

    The noise is made inside the kernels from counters (``fe.random``), by the draw and again by the step: it is never
    stored, and the same bit for bit on every device, sharding, number of threads and restart.

    Args:
        params: parameters, dicts of parameter groups, or (name, parameter) pairs, as for every torch optimizer.
            float32, float64, bfloat16 or float16; one device per group. Noise streams as for ``fe.LangevinAdam``.
        lr: step size, a float or a one-element tensor. "natural" wants one near that of SGD (0.1), "reparam" Adam's.
        ess: effective sample size lambda, the number of data points: the loss is a mean over them.
        hess_init: h of the first step. The Gaussian begins with std = 1 / sqrt(ess (hess_init + weight_decay)), for
            "reparam" too. Above 0.
        betas: decay of the averages m and h; for "reparam" Adam's. The second default is for "natural", where h must
            be averaged over very many draws; "reparam" wants 0.999.
        weight_decay: precision of the prior divided by ess. Above 0 where curvatures may be 0.
        mc_samples: how often ``step(closure)`` calls its closure: draws that one step averages over. Without a closure,
            enter as many training contexts before ``step``.
        clip_radius: bound of each element's natural step, before lr.
        rescale_lr: multiply lr by hess_init + weight_decay, so that one lr fits every hess_init ("natural" alone).
        estimator: "natural" or "reparam".
        scale: how "reparam" keeps std positive: "softplus", std = log(1 + exp(scale)), or "log", std = exp(scale).
        temperature: T. Scales the variance: q becomes that of exp(-(ess loss + prior energy) / T). At 0 the draws are
            the mean and std stands still.
        sync: replicas draw independently, and each step averages their gradients and products over the default
            process group. The gradients must be those of the replica alone: keep DistributedDataParallel from
            averaging them (``no_sync``). All make as many draws per step, and skip one together where any rank's
            GradScaler found an overflow; scales may differ. Without it replicas draw the same, and averaged gradients
            are right.
        seed: 64 bits, the key of the noise. None draws one from torch's default generator now and keeps it; the ranks
            of a process group take rank 0's at their first draw.
        backend: "reference", "cpp", "triton" or "cuda" for this optimizer; None follows ``fe.use_backend``.

    The state of a parameter: ``step``; ``draws``, how many were made in training contexts and in others; ``exp_avg``,
    m; ``hessian``, h; ``mean``, where a draw keeps the mean, and for 16-bit parameters the mean itself in float32, of
    which the parameter is the rounding. "reparam" has ``exp_avg`` and ``exp_avg_sq`` of the mean, ``scale`` with
    ``scale_exp_avg`` and ``scale_exp_avg_sq``, and ``deviation``, the std, in place of the hessian. All but the
    counters have the parameter's shape, and float32 unless it is float64.

    One draw a step reads ``.grad`` as it is at the step, clipped or not. With several, each context's gradients are
    summed as they are when the next begins, or ``optimizer.zero_grad`` or ``step`` is called: clip after each. A
    parameter without gradient gets no step (with ``sync``: without one on any rank). A frozen one,
    ``requires_grad_(False)``, is no part of the Gaussian while it is: draws and steps leave it as it is, ``kl`` and
    ``free_energy`` leave it out, and the noise of the others does not change. GradScaler always hands its scale over
    (``scaler.unscale_`` before a step of several draws is an error), and a step that it skips forgets its draws.

    Raises:
        TypeError: a hyperparameter of the wrong type; complex parameters or gradients.
        ValueError: one out of its range; several devices in a group; states that do not fit.
        RuntimeError: contexts inside each other; a step inside one, or without any since the last.

    Source: Shen et al. 2024, arXiv:2402.17641, algorithm 1; Blundell et al. 2015, arXiv:1505.05424.
    """

    _kind = "VariationalAdam"
    _operation = variational_adam.OPERATION
    _optional_states = ()
    _numbers = ("weight_decay",)
    _switches = ("rescale_lr",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        ess: float,
        *,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        estimator: str = "natural",
        scale: str = "softplus",
        temperature: float | Tensor = 1.0,
        sync: bool = False,
        seed: int | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "betas": betas,
            "weight_decay": weight_decay,
            "clip_radius": clip_radius,
            "rescale_lr": rescale_lr,
            "estimator": estimator,
            "scale": scale,
            "temperature": temperature,
            "backend": backend,
        }
        self._mc_samples = integer(self._name, "mc_samples", mc_samples, 1)
        self._sync = boolean(self._name, "sync", sync)
        super().__init__(params, defaults, seed, None)

    def _offer_unscaling(self, defaults: dict[str, Any]) -> None:
        # Always: a step that GradScaler skips without a word would leave draws behind, which the next would count.
        self._step_supports_amp_scaling = True

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        name = self._name
        for key in ("ess", "hess_init"):
            group[key] = number(name, key, group[key], above=0.0)
        group["clip_radius"] = number(name, "clip_radius", group["clip_radius"], above=0.0, infinite=True)
        betas = pair(name, "betas", group["betas"])
        checked = tuple(number(name, f"betas[{i}]", beta, below=1.0) for i, beta in enumerate(betas))
        if type(betas) is not tuple or any(type(beta) is not float for beta in betas):
            group["betas"] = checked  # another object is another value to what was made of the group's
        one_of(name, "estimator", group["estimator"], ESTIMATORS)
        one_of(name, "scale", group["scale"], SCALES)
        for key in ("mc_samples", "sync"):
            if key in group:
                raise ValueError(f"{name}: {key} must be given to the optimizer; got it in a parameter group")
        for key in ("estimator", "scale"):
            if group["params"] and group[key] != self.defaults[key]:
                raise ValueError(
                    f"{name}: {key} must be the same in every group, {self.defaults[key]!r}; got {group[key]!r}"
                )

    def _warn_of_lost_steps(self, group: dict[str, Any], dtypes: Any) -> None:
        """Nothing is lost: the mean is float32."""

    @property
    def _reparam(self) -> bool:
        return bool(self.defaults["estimator"] == "reparam")

    def _always_sums(self) -> bool:
        return self._reparam or self._sync

    # States.

    @property
    def _states(self) -> tuple[str, ...]:  # type: ignore[override]
        own = ("exp_avg_sq", "scale", "scale_exp_avg", "scale_exp_avg_sq", "deviation")
        return ("step", "draws", "exp_avg", *(own if self._reparam else ("hessian",)), "mean")

    @staticmethod
    def _state_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
        """A mean moves by less than a 16-bit number shows."""
        return torch.float64 if param.dtype == torch.float64 else torch.float32

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        # A first draw may be an evaluation under inference mode, whose tensors training could not write to.
        with torch.inference_mode(False), torch.no_grad():
            self._make_state(group, param, state)

    def _make_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        dtype = self._state_dtype(group, param)
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        # Of one dimension: torch.compile takes a float64 without any for a number.
        state["draws"] = torch.zeros(2, dtype=torch.float64, device=param.device)
        for key in self._states[2:]:
            state[key] = zero_state(param, dtype, group["backend"])
        # By what lives here: every operator on a DTensor costs its dispatch, a first one tens of milliseconds.
        here = {key: local_tensor(state[key]) for key in self._states[2:]}
        here["mean"].copy_(local_tensor(param))
        if not self._reparam:
            here["hessian"].fill_(group["hess_init"])
            return
        std = 1 / math.sqrt(group["ess"] * (group["hess_init"] + group["weight_decay"]))
        here["scale"].fill_(raw_of(std, group["scale"]))
        here["deviation"].copy_(deviation_of(here["scale"], group["scale"]))

    def _spread(self, state: dict[str, Any]) -> tuple[Tensor, bool]:
        return (state["deviation"], True) if self._reparam else (state["hessian"], False)

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super()._check_checkpoint(state_dict)
        for saved in state_dict["param_groups"]:
            for key in ("estimator", "scale"):
                if saved.get(key, self.defaults[key]) != self.defaults[key]:
                    raise ValueError(
                        f"{self._name}.load_state_dict: {key} must be {self.defaults[key]!r}; got {saved[key]!r}"
                    )

    def _restore_numbers(self, param: Tensor, state: dict[str, Any], saved: dict[str, Any]) -> None:
        state["draws"] = loaded_draws(self._name, "a parameter", saved["draws"]).to(param.device)

    # The step.

    def _row(self, group: dict[str, Any], row: dict[str, Any], state: dict[str, Any]) -> Row:
        return Row(
            **row,
            exp_avg=local_tensor(state["exp_avg"]),
            exp_avg_sq=local_tensor(state["hessian"]),
            max_exp_avg_sq=local_tensor(state["mean"]),
            noise_unit=state["draws"][:1],
        )

    def _own_settings(self, group: dict[str, Any], moving: bool) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        scale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        return {"beta1": beta1, "beta2": beta2, "lr_scale": scale, "samples": 0.0}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step by the gradients of the training contexts since the last.

        Args:
            closure: enters ``sampled_params(train=True)``, evaluates the model, calls ``backward`` and returns the
                loss; called ``mc_samples`` times.

        Returns:
            The mean of the closure's losses, or None without one.

        Raises:
            TypeError: a complex gradient. ValueError: a sparse gradient, or a group value out of its range.
            RuntimeError: inside a context; without a training context since the last step; on every rank with ``sync``,
                where they have had different numbers of contexts. Nothing has changed then.
        """
        if self._inside:
            raise RuntimeError(f"{self._name}: step must be called outside of sampled_params")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                losses = [closure() for _ in range(self._mc_samples)]
            loss = losses[0] if len(losses) == 1 else sum(losses) / len(losses)
        if self._since.drawn is None and not self._since.samples:
            self._step_without_draw()
            return loss
        current = self._since.drawn is not None and not self._since.samples and not self._gradients_are_gone()
        if current and not self._always_sums():
            super().step()
        else:
            if current:
                self._since.drawn = self._gradients()
            self._fold()
            self._step_by_sums(current)
        if not torch.compiler.is_compiling():
            self._written([param for group in self.param_groups for param in group["params"]])
        self._since.forget()
        return loss

    @never_traced
    def _step_without_draw(self) -> None:
        """At lr = 0 it makes the states, as torch's distributed checkpoints want of it; otherwise it is a mistake."""
        if any(float(group["lr"]) != 0 for group in self.param_groups):
            if self._is_replica():
                self._tell_ranks()
            raise RuntimeError(
                f"{self._name}: step must follow a backward inside `with optimizer.sampled_params(train=True)`; "
                "got none since the last step"
            )
        for group in self.param_groups:
            for i, param in enumerate(group["params"]):
                if param.requires_grad:  # draws make none for the frozen, so checkpoints have none
                    self._state_of(group, param, i)

    @never_traced
    def _step_by_sums(self, current: bool) -> None:
        """``current``: the sums are of one draw, and of its gradients as they are now."""
        for group in self.param_groups:
            self._check_group(group)
        unscaled = getattr(self, "found_inf", None) is not None and getattr(self, "grad_scale", None) is None
        if unscaled and not current:
            raise RuntimeError(
                f"{self._name}: GradScaler.unscale_ must not come before a step of several draws, or one whose "
                "gradients zero_grad has cleared: those before are summed as they were"
            )
        samples, elsewhere = self._average_over_ranks()
        lost = self._overflow(elsewhere)
        for group in self.param_groups:
            summed = self._since.summed
            live = [(i, p) for i, p in enumerate(group["params"]) if p in summed and p.requires_grad]
            if not live:
                continue
            backend = backends.choose(group["params"][0].device.type, group["backend"])
            scale = None if self._is_replica() else self._amp(group)[0]
            found = None if lost is None else lost.to(group["params"][0].device)
            rows = [self._sums_row(group, i, param) for i, param in live]
            if self._reparam:
                self._step_reparam(group, live, rows, samples, scale, found, backend)
            else:
                settings = self._settings(group)
                assert isinstance(settings, VariationalAdamSettings)
                settings.samples, settings.grad_scale, settings.found_inf = float(samples), scale, found
                run_rows(self._operation, rows, settings, backend)
            torch.autograd.graph.increment_version([param for _, param in live])
            rounded = [(row, param) for row, (_, param) in zip(rows, live, strict=True)
                       if row.param.dtype != param.dtype]  # fmt: skip
            for row, param in rounded:
                local_tensor(param).copy_(row.param)

    def _sums_row(self, group: dict[str, Any], i: int, param: Tensor) -> Row:
        """As ``_row``, over the sums, which have the noise in them; of a 16-bit parameter the mean is stepped."""
        state, (total, product) = self.state[param], self._sums[param]
        local = local_tensor(param)
        mean = local_tensor(state["mean"])
        return Row(
            local if mean.dtype == local.dtype else mean,
            total,
            state["step"],
            group["streams"][i],
            local_tensor(state["exp_avg"]),
            local_tensor(state["exp_avg_sq" if self._reparam else "hessian"]),
            anchor=None if self._reparam else product,
        )

    def _step_reparam(
        self,
        group: dict[str, Any],
        live: list[tuple[int, Tensor]],
        rows: list[Row],
        samples: int,
        scale: Tensor | None,
        found: Tensor | None,
        backend: str,
    ) -> None:
        """Adam on the means by the mean gradient and the prior's, and on what the deviations come from."""
        temperature = group["temperature"]
        lr, lr_tensor = self._scalar(group, "lr")
        beta1, beta2 = group["betas"]
        settings = LangevinAdamSettings(
            lr=lr, lr_tensor=lr_tensor, temperature=0.0, temperature_tensor=None, beta1=beta1, beta2=beta2, eps=EPS,
            weight_decay=group["weight_decay"], prior_precision=0.0, noise="momentum", amsgrad=False, maximize=False,
            decoupled_weight_decay=False, bias_correction=True, stochastic_rounding=False, seed=group["seed"],
            grad_scale=scale, found_inf=found,
        )  # fmt: skip
        scales = []
        for row, (_, param) in zip(rows, live, strict=True):
            state, (total, product) = self.state[param], self._sums[param]
            total /= samples
            product /= samples
            if scale is not None:
                product /= scale
            std, raw = local_tensor(state["deviation"]), local_tensor(state["scale"])
            product += group["weight_decay"] * std - temperature / (group["ess"] * std)
            product *= slope_of(raw, std, group["scale"])
            moments = (local_tensor(state["scale_exp_avg"]), local_tensor(state["scale_exp_avg_sq"]))
            scales.append(Row(raw, product, row.step.clone(), row.stream, *moments))
        run_rows(langevin_adam.OPERATION, rows, settings, backend)
        if float(temperature) > 0:
            for_scales = replace(settings, weight_decay=0.0, grad_scale=None)
            run_rows(langevin_adam.OPERATION, scales, for_scales, backend)
        for _, param in live:
            state = self.state[param]
            raw = local_tensor(state["scale"])
            local_tensor(state["deviation"]).copy_(deviation_of(raw, group["scale"]))
