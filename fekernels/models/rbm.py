"""Restricted Boltzmann machines over binary vectors: clamped and equilibrium free energy."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fekernels._checks import boolean, floating, integer, number, one_of
from fekernels.anneal import AnnealedEstimate, along_path
from fekernels.models.noise_counter import nth_seed
from fekernels.models.rbm_doubts import doubt_base, doubt_log_z, log_odds
from fekernels.models.rbm_energy import STREAMS, RBMEnergy
from fekernels.models.rbm_partition import TemperedRBM, draw_units, enumerated_log_z, exact_draws
from fekernels.ops.noise_key import signed_seed

__all__ = ["BernoulliRBM"]

METHODS = ("exact", "ais", "reverse_ais")
MOST_DRAWS = 1 << 32


class BernoulliRBM(RBMEnergy):
    """p(v) = exp(-F(v)) / Z of binary v, with the free energy F(v) = -a v - sum_j softplus(c_j + (v W)_j).

    F with the data clamped to the visible units is what inference of the hidden units makes of the energy
    E(v, h) = -a v - c h - v W h; nothing clamped, the equilibrium's is -log Z, and log p(v) = -F(v) - log Z.

        rbm = fe.models.BernoulliRBM(64, 16, seed=0)
        rbm.fit(digits, epochs=20)                      # or a loop of your own:
        rbm.contrastive_divergence(v, k=1).backward()   # gradients F(data) - F(samples)

    Args:
        n_visible, n_hidden: units, >= 1.
        std: of the initial weights (Hinton 2012, section 8: small, .01); the biases begin at 0.
        seed: of the weights and of every draw; None draws one from torch's default generator. It goes with
            `state_dict`, as do the persistent chains and how many draws were made: a loaded machine trains on, and
            draws on, bit for bit.
        device: of the parameters.
        dtype: of the parameters; float32 or float64.

    Attributes:
        weight (nn.Parameter): W, [n_visible, n_hidden].
        visible_bias (nn.Parameter): a, [n_visible].
        hidden_bias (nn.Parameter): c, [n_hidden].
        chains: the persistent chains, [n, n_visible]; of no rows until they are used.
        seed (int): of all noise.
        draws (int): the Gibbs steps that training has made.
        calls (int): of `sample`, `exact_sample` and annealed `log_partition` that were given no seed: each has noise
            of its own.
        base_odds: log odds of the data's rates, [n_visible], once `fit` or `set_base_rates` has seen data; else empty.

    Source: Hinton 2002, "Training products of experts by minimizing contrastive divergence"; Freund & Haussler 1992;
    persistent chains: Tieleman 2008.
    """

    @overload
    def log_partition(self, method: Literal["exact"] = ..., *, progress: bool = ...) -> Tensor: ...

    @overload
    def log_partition(self, method: Literal["ais", "reverse_ais"], **options: Any) -> AnnealedEstimate: ...

    def log_partition(self, method: str = "exact", **options: Any) -> Tensor | AnnealedEstimate:
        """log Z = log sum_v exp(-F(v)): minus the equilibrium's free energy.

        Args:
            method: "exact" adds up the states of the smaller layer, 25 units at most, in blocks and in float64;
                differentiable, so that it trains small machines by maximum likelihood. "ais" anneals particles from
                the base-rate machine (W = 0) by exact Gibbs steps, and is a stochastic lower bound; "reverse_ais"
                takes ``samples`` of the machine back there, and is a stochastic upper bound **on condition that they
                are exact draws** (`exact_sample`; of long chains only approximately).
            options: of the annealed ones: particles (1000), betas (1000; a number of steps or the inverse
                temperatures), base_rates (the means of the data [n_visible], or a batch of them; None: those that
                `fit` or `set_base_rates` has seen, or else the visible biases), samples ("reverse_ais"), seed (None:
                the machine's, with fresh noise in every call). Of all three: progress (False), a tqdm bar.

        Returns:
            "exact": a float64 scalar. Otherwise a `fe.anneal.AnnealedEstimate`: ``log_z``, ``standard_error``,
            ``effective_sample_size``, ...; ``float()`` of either is log Z.

        Warns:
            Annealed: where the weights are worth few particles. "ais" without base_rates: where a quarter as many
            particles, which begin as fair coins, find a log Z above the first's by more than both errors. Modes that
            no particle found show in neither: all weights agree.

        Raises:
            ValueError: "exact" with more than 25 units in both layers. TypeError, ValueError: options, by name.

        Source: Salakhutdinov & Murray 2008, "On the quantitative analysis of deep belief networks", section 4; the
        reverse: Burda, Grosse & Salakhutdinov 2015, arXiv:1412.8566.
        """
        method = one_of("log_partition", "method", method, METHODS)
        if method == "exact":
            progress = boolean("log_partition", "progress", options.pop("progress", False))
            if options:
                raise TypeError(f"log_partition: {', '.join(options)} belong to 'ais'; got method='exact'")
            return enumerated_log_z(self.weight, self.visible_bias, self.hidden_bias, progress)
        allowed = [name for name in inspect.signature(self._annealed).parameters if name != "reverse"]
        if unknown := [name for name in options if name not in allowed]:
            raise TypeError(
                f"log_partition: options of {method!r} must be of {', '.join(allowed)}; got {', '.join(unknown)}"
            )
        return self._annealed(method == "reverse_ais", **options)

    def _annealed(
        self,
        reverse: bool,
        *,
        particles: int = 1000,
        betas: Any = 1000,
        base_rates: Tensor | None = None,
        samples: Tensor | None = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> AnnealedEstimate:
        name = "log_partition"
        if reverse != (samples is not None):
            came = "None" if samples is None else "samples with method='ais'"
            raise ValueError(
                f"{name}: samples must be given with method='reverse_ais' and no other; got {came}"
            )
        if samples is not None:
            samples = self._visible(name, samples, "samples")
        base, origin = self.visible_bias.detach(), "the visible biases"
        if base_rates is not None:
            base = self._log_odds(name, base_rates)
        elif len(self.base_odds):
            base, origin = self.base_odds, "the data's rates"
        path = TemperedRBM(self.weight, self.visible_bias, self.hidden_bias, base, STREAMS["anneal"])
        key = self._seed_of(name, seed)
        found = along_path(
            path, particles=particles, samples=samples, betas=betas, seed=key, progress=progress
        )
        if base_rates is None and not reverse and (doubt := doubt_base(path, found, origin, key, progress)):
            warnings.warn(doubt, stacklevel=3)
        self.calls += seed is None
        return found

    def _seed_of(self, function: str, seed: int | None) -> int:
        return nth_seed(self.seed, self.calls) if seed is None else signed_seed(function, seed)

    def log_prob(
        self,
        v: Tensor,
        *,
        log_z: float | Tensor | AnnealedEstimate | None = None,
        validate: bool | None = None,
    ) -> Tensor:
        """log p(v) = -F(v) - log Z, [n], in nats, float64.

        Args:
            v: [n, n_visible], 0 and 1.
            log_z: log Z where it is known, as a number or what `log_partition` gave; None adds it up anew, which must
                be possible.
            validate: whether v other than 0 and 1 raises, and a log_z that is too low is warned of; None as of
                `free_energy`.

        Warns:
            A probability above 1: log_z is too low by at least log p. The same numbers in a row are told once.

        Raises:
            ValueError: a v between 0 and 1, which has no probability. TypeError, ValueError: v and log_z, by name.
        """
        v = self._visible("log_prob", v)
        checked = self.check_domain("log_prob", v, validate)
        if checked and bool((grey := (v != 0) & (v != 1)).any()):
            raise ValueError(
                f"log_prob: v must be 0 and 1, of which the machine is a distribution; got {float(v[grey][0]):.4g}: "
                "binarise grey levels, or take free_energy"
            )
        given = log_z
        if log_z is None:
            log_z = self.log_partition("exact")
        elif not isinstance(log_z, Tensor):
            if not hasattr(log_z, "__float__"):
                came = type(log_z).__name__
                raise TypeError(
                    f"log_prob: log_z must be a number, a tensor or what log_partition gave; got {came}"
                )
            log_z = number("log_prob", "log_z", float(log_z), least=-math.inf)
        elif log_z.dim():
            raise ValueError(f"log_prob: log_z must be a scalar; got shape {tuple(log_z.shape)}")
        free_energy = self.free_energy(v, validate=False)
        if checked and given is not None and (doubt := doubt_log_z(free_energy, given)):
            if doubt != self._doubted:
                warnings.warn(doubt, stacklevel=2)
            self._doubted = doubt
        return -free_energy.double() - log_z

    @torch.no_grad()
    def gibbs(self, v: Tensor, steps: int = 1, *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
        """``steps`` Gibbs sweeps of chains at v [n, n_visible], h given v and then v given h, each all at once.

        Args:
            seed, step, stream: of the noise (`fe.random`): sweep t takes step + t and the streams stream, stream + 1.
        """
        v = self._visible("gibbs", v)
        steps = integer("gibbs", "steps", steps, 0, MOST_DRAWS)
        for t in range(step, step + steps):
            h = draw_units(self.hidden_probabilities(v), seed, t, stream)
            v = draw_units(self.visible_probabilities(h), seed, t, stream + 1)
        return v

    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int = 1000,
        *,
        initial: Tensor | None = None,
        probabilities: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """n chains after ``steps`` Gibbs sweeps, [n, n_visible] of 0 and 1.

        Args:
            n: chains. steps: sweeps, >= 0; how many are enough depends on the machine: chains that begin elsewhere
                tell (docs/rbm.md, "What goes wrong").
            initial: [n, n_visible], where the chains begin; None draws from the visible biases alone.
            probabilities: give p(v = 1 | h) of the last sweep instead of its draws, which look smoother.
            seed: the same seed gives the same chains. None: the machine's, and every call makes fresh ones; `calls`
                counts them.
        """
        name = "sample"
        n, steps = integer(name, "n", n, 0, 1 << 31), integer(name, "steps", steps, 0, MOST_DRAWS - 2)
        key = self._seed_of(name, seed)
        if initial is None:
            rates = torch.sigmoid(self.visible_bias).expand(n, -1)
            v = draw_units(rates, key, 0, STREAMS["sample"])
        else:
            v = self._visible(name, initial, "initial")
            if len(v) != n:
                raise ValueError(f"{name}: initial must have {n} rows; got {len(v)}")
        smooth = boolean(name, "probabilities", probabilities)
        self.calls += seed is None
        if not smooth or not steps:
            return self.gibbs(v, steps, seed=key, step=1, stream=STREAMS["sample"])
        v = self.gibbs(v, steps - 1, seed=key, step=1, stream=STREAMS["sample"])
        h = draw_units(self.hidden_probabilities(v), key, steps, STREAMS["sample"])
        return self.visible_probabilities(h)

    @torch.no_grad()
    def exact_sample(self, n: int, *, seed: int | None = None) -> Tensor:
        """n independent draws of p(v), [n, n_visible]; no chain: the smaller layer (25 units at most) is enumerated.

        A seed of None is the machine's, with fresh draws in every call.
        """
        n = integer("exact_sample", "n", n, 0, 1 << 31)
        key = self._seed_of("exact_sample", seed)
        small, visible = exact_draws(
            self.weight, self.visible_bias, self.hidden_bias, n, key, STREAMS["exact"]
        )
        self.calls += seed is None
        return (
            small if visible else draw_units(self.visible_probabilities(small), key, 0, STREAMS["exact"] + 1)
        )

    def contrastive_divergence(
        self, v: Tensor, k: int = 1, persistent: bool = False, *, validate: bool | None = None
    ) -> Tensor:
        """mean F(v) - mean F(samples), a scalar whose gradient is contrastive divergence's.

        The samples come from k Gibbs sweeps and are constants: differentiated through, they would add a term that
        belongs to no objective. Its value is no loss to watch: near 0 all along.

        Args:
            v: [n, n_visible] of data. k: sweeps, >= 1.
            persistent: the chains go on from where the last call left them, instead of from the data (Tieleman 2008):
                nearer to the likelihood's gradient. They are n, in the buffer ``chains``, and begin as the first v;
                of a batch of another size the first n, or more that begin at v.
            validate: as of `free_energy`.

        Every call makes fresh noise, from the seed and the number of sweeps so far.
        """
        name = "contrastive_divergence"
        v = self._visible(name, v)
        k, persistent = integer(name, "k", k, 1, 1 << 24), boolean(name, "persistent", persistent)
        self.check_domain(name, v, validate)
        start = v.detach()
        if persistent:
            missing = start[len(self.chains) :] if len(self.chains) < len(start) else start[:0]
            start = torch.cat([self.chains, missing.to(self.chains.dtype)])[: len(start)]
        samples = self.gibbs(start, k, seed=self.seed, step=self.draws, stream=STREAMS["train"])
        self.draws += k
        if persistent:
            with torch.no_grad():
                self.chains = torch.cat([samples, self.chains[len(samples) :]])
        of_data, of_samples = (
            self.free_energy(units, reduction="mean", validate=False) for units in (v, samples)
        )
        return of_data - of_samples

    def set_base_rates(self, base_rates: Tensor) -> None:
        """Visible biases of a machine without hidden units: log odds of means [n_visible] or data [n, n_visible]."""
        odds = self._log_odds("set_base_rates", base_rates)
        with torch.no_grad():
            self.visible_bias.copy_(odds)
        self.base_odds = odds

    def fit(
        self,
        data: Tensor | Iterable[Any],
        *,
        epochs: int = 10,
        lr: float = 0.01,
        batch_size: int = 100,
        k: int = 1,
        persistent: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
        progress: bool = True,
        callback: Callable[[BernoulliRBM, int], Any] | None = None,
    ) -> list[float]:
        """Train by contrastive divergence.

        Args:
            data: [n, n_visible], shuffled every epoch; or an iterable of batches, gone through once an epoch: tensors,
                or tuples whose first item is the batch (a DataLoader with labels). Batches are flattened to [n, ...].
            epochs: at least 0.
            lr: of the default optimizer, Adam (`fe.LangevinAdam` at T = 0), falling to 0 linearly over the run, as
                chains and weights settle only then; not used with ``optimizer``.
            batch_size: of a tensor's batches. k, persistent: as `contrastive_divergence`.
            optimizer: any, over this machine's parameters.
            progress: a tqdm bar with what each epoch gave.
            callback: called with the machine and the number of epochs done, after each.

        A machine whose visible biases are all 0 begins from the base rates of the data (the first batch, of an
        iterable). Returns the mean of mean F(data) - mean F(samples) for each epoch. The data's rates are kept for
        annealing, in `base_odds`.

        Warns:
            At the end, of some thousand rows of the data: their log p is below that of independent units with the
            data's rates, by .5 nats and 1% of it (log Z exact where 2^units of the smaller layer times the larger are
            at most 2^24, else annealed, which warns less); where exact, the machine's rates are off the data's by .1
            and 3 standard errors, root mean square. Either is what chains that do not mix make.

        Raises:
            TypeError, ValueError: naming the argument; data of another width or outside of [0, 1], no batch at all, an
                iterator, which an epoch would use up; no parameter that requires a gradient. FloatingPointError: the
                loss is not finite; on a CPU before the step, which is not made.
        """
        from fekernels.models.rbm_training import train
        from fekernels.models.training import warn_of_own_training

        warn_of_own_training("BernoulliRBM.fit", "contrastive_divergence(x)")
        return train(
            self,
            data,
            epochs,
            lr,
            batch_size,
            k,
            persistent,
            optimizer,
            progress,
            callback,
            STREAMS["shuffle"],
            STREAMS["anneal"],
        )

    def _log_odds(self, function: str, data: Tensor) -> Tensor:
        data = floating(function, "base_rates", data).detach().to(self.weight)
        rates, count = (data.mean(0), len(data)) if data.dim() == 2 else (data, 1000)
        if rates.shape != (self.n_visible,) or not count:
            raise ValueError(
                f"{function}: the base rates must have shape ({self.n_visible},), or their data (n, "
                f"{self.n_visible}); got {tuple(data.shape)}"
            )
        if not bool(((rates >= 0) & (rates <= 1)).all()):
            raise ValueError(
                f"{function}: the base rates must be in [0, 1]; got {float(rates.min())} to {float(rates.max())}"
            )
        return log_odds(rates, count)
