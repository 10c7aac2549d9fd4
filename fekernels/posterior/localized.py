"""Chains that stay in the well around trained weights, and the step size that suits it (Lau et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._loader_batches import rows
from fekernels.optim import SGLD, LangevinAdam
from fekernels.posterior.chains import Chains, LossFunction
from fekernels.posterior.pilot import Data, Energy, batch_noise, curvature, flat

__all__ = ["SAMPLERS", "Localized"]

SAMPLERS = ("sgld", "rmsprop")
ALPHA, EPS = 0.99, 0.1  # of RMSprop: devinterp's, so that its step sizes can be taken over
# x = h k of the stiffest direction, whose part of the estimate is then 1 / (1 - x / 2), 8% too large.
MOTION = 0.15
NOISE = 0.1  # r, in the directions that are noisy
PILOT_STEPS, ATTEMPTS = 30, 16
NOISE_BATCHES = 8

Masks = Mapping[str, Tensor | None]


def _finite(tensors: list[nn.Parameter]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


class _Masked(Energy):
    """Gradients that are 0 where ``hidden`` says so: what is measured of them is of the other weights."""

    def __init__(
        self, chains: Chains, loss_fn: LossFunction, data: Data, hidden: list[Tensor | None]
    ) -> None:
        super().__init__(chains, loss_fn, data)
        self._hidden = hidden

    def _of(self, batch: Any, each: bool, points: int) -> tuple[Tensor, list[Tensor]]:
        losses, found = super()._of(batch, each, points)
        return losses, [
            g if hidden is None else g.masked_fill(hidden, 0.0)
            for g, hidden in zip(found, self._hidden, strict=True)
        ]


class Localized:
    """n chains that sample exp(-n_beta L(w) - localization / 2 |w - w0|^2), w0 the model's weights.

    Args:
        masks: from the names of the parameters that move to boolean masks of their shapes, True where they move, or
            None for all of one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        n: int,
        n_beta: float,
        localization: float,
        sampler: str,
        masks: Masks,
        seed: int,
        vectorize: bool | None,
        tick: Callable[[str], None],
    ) -> None:
        self.data, self.n, self.sampler, self.seed, self.tick = data, n, sampler, seed, tick
        self.temperature, self.prior = 1.0 / n_beta, localization / n_beta
        self.chains = Chains(model, n, names=tuple(masks), vectorize=vectorize)
        self.parameters = list(self.chains.parameters())
        shown = [masks[name] for name, _ in self.chains.named_parameters()]
        self._hidden = [
            None if mask is None else ~mask.to(p.device)
            for mask, p in zip(shown, self.parameters, strict=True)
        ]
        self.energy = _Masked(self.chains, loss_fn, data, self._hidden)
        own = dict(self.chains.model().named_parameters())
        self._start = [own[name].detach() for name, _ in self.chains.named_parameters()]
        self.weights = int(self.moving.sum())
        self._origin = self.chains.origin(n)
        self._known: dict[int, Tensor] = {}
        self.initial = self._initial_loss()

    @property
    def moving(self) -> Tensor:
        """[weights]: which of the stacked parameters' weights move."""
        shown = [
            torch.ones_like(p[0], dtype=torch.bool) if hidden is None else ~hidden
            for p, hidden in zip(self.parameters, self._hidden, strict=True)
        ]
        return torch.cat([each.flatten() for each in shown])

    @torch.no_grad()
    def _initial_loss(self) -> float:
        """Of all the data, every point counting the same: n_beta times its error is the estimate's."""
        one = self.chains.origin(1)
        total = 0.0
        for batch in self.data.loader:
            loss = one.losses(self.energy.loss_fn, [batch], each=True)[0].double()
            if isinstance(self.data.loader, (list, tuple)):
                self._known[id(batch)] = loss
            total += float(loss) * rows(self.data.owner, batch) / self.data.points
        if not math.isfinite(total):
            raise ValueError(f"{self.data.owner}: loss_fn must be finite at the model's weights; got {total}")
        return total

    @torch.no_grad()
    def _at_start(self, batches: list[Any]) -> Tensor:
        """[n]: the losses of these batches with the weights of the start."""
        if self._known:
            return torch.stack([self._known[id(batch)] for batch in batches])
        return self._origin.losses(self.energy.loss_fn, batches, each=True).double()

    @torch.no_grad()
    def reset(self) -> None:
        for p, start in zip(self.parameters, self._start, strict=True):
            p.copy_(start)

    def follow(self, h: float) -> None:
        """Begin anew at the start, with the step size ``h`` of `SGLD` or `LangevinAdam`: epsilon n_beta / 2."""
        self.reset()
        shared: dict[str, Any] = {
            "lr": h, "temperature": self.temperature, "prior_precision": self.prior, "anchor": "init",
            "stochastic_rounding": True, "seed": self.seed,
        }  # fmt: skip
        self.optimizer: SGLD | LangevinAdam
        if self.sampler == "sgld":
            self.optimizer = SGLD(self.parameters, **shared)
        else:
            self.optimizer = LangevinAdam(
                self.parameters, betas=(0.0, ALPHA), eps=EPS, noise="preconditioned", **shared
            )

    def freeze(self) -> None:
        if isinstance(self.optimizer, LangevinAdam):
            self.optimizer.freeze_preconditioner()

    @torch.no_grad()
    def _preconditioners(self) -> list[Tensor | None]:
        """D of every weight, [n, *shape] each; None where it is 1."""
        if not isinstance(self.optimizer, LangevinAdam):
            return [None] * len(self.parameters)
        group = self.optimizer.param_groups[0]
        found: list[Tensor | None] = []
        for p in self.parameters:
            state = self.optimizer.state[p]
            memory = 1.0 if group["frozen"] else 1 - ALPHA ** state["step"].double()
            found.append(((state["exp_avg_sq"] / memory).sqrt() + EPS).clamp_min(group["lr"] * self.prior))
        return found

    def denominators(self) -> list[Tensor]:
        """D of every weight, [n, *shape] each."""
        return [
            p.detach().new_ones(()).expand_as(p) if d is None else d
            for p, d in zip(self.parameters, self._preconditioners(), strict=True)
        ]

    def step(self, what: str) -> tuple[Tensor, Tensor]:
        """[n] each: how far losses are above the start's, and what the batches' gradients are long, g^2 / D summed.

        Both are of the positions before the step. The rise is that of the batch that the step takes, over its own loss
        at the start: the difference is known far better than either, which are as noisy as single points.
        """
        if self.data.batches == 1:  # not copied for every chain
            losses, found = self.energy.gradient(self.data.next(1)[0][0])
            rise = losses.double() - self.initial
        else:
            batches = self.data.next(self.n)
            losses, found = self.energy.gradients_of(batches)
            weights = torch.tensor([w for _, w in batches], dtype=torch.float64, device=losses.device)
            rise = (losses.double() - self._at_start([b for b, _ in batches])) * weights
        for p, g in zip(self.parameters, found, strict=True):
            p.grad = g
        self.optimizer.step()
        with torch.no_grad():
            for p, start, hidden in zip(self.parameters, self._start, self._hidden, strict=True):
                if hidden is not None:
                    p.copy_(torch.where(hidden, start, p))
            length = torch.zeros(self.n, dtype=torch.float64, device=rise.device)
            for g, d in zip(found, self._preconditioners(), strict=True):
                scaled = g if d is None else g / d.sqrt()  # one pass over g without D: no square is kept
                dtype = torch.promote_types(g.dtype, torch.float32)
                length += torch.linalg.vector_norm(scaled.flatten(1), dim=1, dtype=dtype).square()
        self.tick(what)
        return rise, length

    @torch.no_grad()
    def held(self) -> Tensor:
        """[n]: what the localization adds to the exponent where the chains are, localization / 2 |w - w0|^2."""
        squares = torch.zeros(self.n, dtype=torch.float64, device=self.parameters[0].device)
        for p, start in zip(self.parameters, self._start, strict=True):
            dtype = torch.promote_types(p.dtype, torch.float32)
            squares += torch.linalg.vector_norm((p - start).flatten(1), dim=1, dtype=dtype).square()
        return squares * (self.prior / self.temperature / 2)

    def noise(self) -> list[Tensor]:
        """The variance of the gradient that a step takes, at the chains' positions, [n, *shape] each."""
        if self.data.batches == 1:
            return [torch.zeros_like(p) for p in self.parameters]
        return batch_noise(self.energy, NOISE_BATCHES)

    def choose(self) -> float:
        """The step size h that curvature and gradient noise allow where the chains go.

        That need not be as at the start: at a degenerate minimum (w^4) the curvature is 0, and grows with the distance.
        So chains are sent, and sent again with smaller steps, until what they find allows the steps that they took.

        Raises:
            ValueError: no step size could be found.
        """
        self.follow(1e-12)
        self.step("pilot")
        self.reset()
        h = self._allowed()
        for _ in range(ATTEMPTS):
            if not math.isfinite(h):
                break
            self.follow(h)
            for _ in range(PILOT_STEPS):
                rise, _ = self.step("pilot")
            # At most d/2 on average, and hardly ever twice that where d is large, nor ten more where it is not. Far
            # outside of the well the preconditioner may be so large that any step would seem allowed.
            if not float(rise.max()) <= self.temperature * (self.weights + 10) or not _finite(
                self.parameters
            ):
                h /= 8
                continue
            allowed = self._allowed()
            if allowed >= h / 1.5:
                return min(h, allowed)
            h = max(allowed, h / 8)
        raise ValueError(
            f"{self.data.owner}: lr must be given for a loss whose curvature cannot be measured; got None"
        )

    def _allowed(self) -> float:
        """By what is measured at the chains' positions."""
        denominators = self.denominators()
        stiffest = float(curvature(self.energy, denominators, self.temperature).max())
        stiffest += self.prior / min(float(d.min()) for d in denominators)
        found = MOTION / stiffest if stiffest > 0 else math.inf
        ratio = flat(self.noise()).double() / flat(denominators)
        # Weighted by itself: weights that have no noise (dead ones) are also those that have no part in the estimate.
        noisy = float(ratio.square().sum() / ratio.sum()) if float(ratio.sum()) > 0 else 0.0
        return min(found, NOISE * 2 * self.temperature / noisy) if noisy > 0 else found
