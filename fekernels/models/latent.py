"""What a model with an encoder and a decoder can do: free energy, bounds, inference, training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fekernels._catalogue.free_energy import NONE, REDUCTIONS, SUM
from fekernels._checks import integer, number, one_of
from fekernels._runtime.ranks import group_of
from fekernels.distributed.batches import share
from fekernels.losses.importance_bounds import importance_weighted_bound
from fekernels.losses.monte_carlo import monte_carlo_kl
from fekernels.models import inference, training
from fekernels.models.inference import ACTIVE, Posterior, evaluating
from fekernels.models.noise_counter import CountedNoise
from fekernels.ops.free_energy.broadcasting import check_mask
from fekernels.ops.free_energy.domains import validate_data
from fekernels.ops.free_energy.free_energy import FreeEnergyTerms, energy, free_energy
from fekernels.ops.free_energy.reparameterize import reparameterize

__all__ = ["PRIOR", "LatentModel"]

# Added to the stream of the model's noise, by use. Sample k of several takes stream + k.
BOUND, REFINEMENT, COMPARISON, PRIOR = (k << 29 for k in range(1, 5))


class LatentModel(CountedNoise):
    """A module with q(z | x) = N(mean, exp(logvar)), prior N(0, I), and p(x | z) of a likelihood of ``fe.likelihoods``.

    A subclass sets ``likelihood``, ``latent_dim``, ``classes`` (1 but for "categorical") and ``noise_counter``, and
    defines ``encode`` and ``decode``.
    """

    likelihood: str
    classes: int

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), [B, latents] each."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The likelihood's parameters at z [..., latents], in their domains."""
        raise NotImplementedError

    def _nobody_else_sees_what_it_decodes(self) -> bool:
        """Whether the gradient may overwrite the likelihood's parameters, which are no operation's saved result."""
        return False

    def free_energy(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int | None = None,
        offset: int | str | None = None,
        samples: int | None = None,
        antithetic: bool = False,
        posterior: tuple[Tensor, Tensor] | None = None,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        validate: bool | None = None,
        process_group: Any = None,
    ) -> FreeEnergyTerms:
        """F = E_q[-log p(x | z)] + beta KL(q || p), by one sample of z per data point or several.

        Args:
            x: [B, *event], data that the likelihood can produce.
            seed, step, offset: of the noise, see ``noise``. Without them it is fresh at every training step.
            samples: of z per data point, over which the energy is averaged; None is one.
            antithetic: with ``samples`` eps, -eps is taken too: twice as many decodings, and noise that is odd in eps
                cancels.
            posterior: (mean, logvar) to take in place of the encoder's, as ``infer`` gives them.
            beta, free_bits, mask, weight, reduction: as of ``fe.free_energy``. The encoder sees 0 where ``mask`` says
                that nothing was observed.
            validate: whether data outside of the likelihood's domain raise. None: on a CPU. On a GPU it would wait for
                the GPU, and torch.compile does not look at values.
            process_group: over whose ranks the batch is split, each with ``x`` its rows, none even: reductions, noise
                and gradients are then the whole batch's, as of ``fe.free_energy`` and of ``noise``.

        Returns:
            ``FreeEnergyTerms(free_energy, energy, kl)`` per data point summed over the event: the batch's mean, sum,
            or [B].

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
        """
        function = "VAE.free_energy"
        target = self._checked(function, x, mask, validate)
        mean, logvar = self._encode_observed(x, mask) if posterior is None else posterior
        if antithetic and samples is None:
            raise ValueError(f"{function}: antithetic needs samples; got samples=None")
        count = None if samples is None else integer(function, "samples", samples, 1)
        noise = self.noise(x, seed=seed, step=step, offset=offset, process_group=process_group)
        return self._terms(
            target, mean, logvar, noise, count, antithetic, beta=beta, free_bits=free_bits, mask=mask, weight=weight,
            reduction=reduction, process_group=process_group,
        )  # fmt: skip

    def _terms(
        self,
        target: Tensor,
        mean: Tensor,
        logvar: Tensor,
        noise: dict[str, int],
        samples: int | None = None,
        antithetic: bool = False,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        **options: Any,
    ) -> FreeEnergyTerms:
        if samples is None:
            z = reparameterize(mean, logvar, **noise)
            overwritten = reduction != REDUCTIONS[NONE] and self._nobody_else_sees_what_it_decodes()
            return free_energy(
                self.decode(z), target, mean, logvar, likelihood=self.likelihood, mask=mask, weight=weight,
                reduction=reduction, inplace_backward=overwritten, **options,
            )  # fmt: skip
        z = reparameterize(mean, logvar, samples=samples, **noise)
        if antithetic:
            z = torch.cat([z, 2 * mean - z])
        count = len(z)
        weights = None if weight is None else weight.expand(count, *weight.shape)
        means, logvars, targets = (part.expand(count, *part.shape) for part in (mean, logvar, target))
        terms = free_energy(
            self.decode(z), targets, means, logvars, likelihood=self.likelihood, mask=_of_samples(mask, count, target),
            weight=weights, reduction=reduction, batch_dims=2, **options,
        )  # fmt: skip
        if reduction == REDUCTIONS[NONE]:
            return FreeEnergyTerms(*(term.mean(0) for term in terms))
        return FreeEnergyTerms(*(term / count for term in terms)) if reduction == REDUCTIONS[SUM] else terms

    @torch.no_grad()
    def infer(
        self,
        x: Tensor,
        refine_steps: int = 0,
        *,
        lr: float = 0.05,
        samples: int = 4,
        compare: int = 32,
        beta: float = 1.0,
        mask: Tensor | None = None,
        seed: int | None = None,
        offset: int | str | None = None,
        validate: bool | None = None,
    ) -> Posterior:
        """The posterior of each data point: the encoder's (amortised), or that after steps of its own (refined).

        Refinement is stochastic variational inference from the encoder's answer: Adam on mean and log-variance of each
        data point, the weights held, the modules in evaluation. It is kept only for data points whose free energy it
        has lowered. What is compared are means over the same 2 ``compare`` samples of z for both, which neither the
        steps nor ``free_energy`` use, with the KL exact. No gradient flows.

        Args:
            x: [B, *event].
            refine_steps: 0 gives the encoder's. A step decodes 2 ``samples`` times; 100 are usually enough.
            lr: of the first step, in units of z; it falls to 0.
            samples: of eps per step, each with its negative.
            compare: of eps, each with its negative, by which refined and amortised are compared.
            beta, mask, validate: as of ``free_energy``.
            seed, offset: of the noise; None is the model's seed, always the same noise.

        Returns:
            ``Posterior(mean, logvar)``, [B, latents], for ``posterior=`` of ``free_energy`` and
            ``importance_weighted_bound``.
        """
        function = "VAE.infer"
        steps = integer(function, "refine_steps", refine_steps, 0)
        samples, compare = (
            integer(function, *named, 1) for named in (("samples", samples), ("compare", compare))
        )
        lr, beta = number(function, "lr", lr), number(function, "beta", beta)
        target = self._checked(function, x, mask, validate)
        with evaluating(self):
            start = Posterior(*self._encode_observed(x, mask))
            if steps == 0:
                return start
            noise = self.noise(x, seed=seed, step=0, offset=offset)

            def estimate(at: Posterior, use: int, step: int, count: int, reduction: str) -> Tensor:
                key = {**noise, "stream": noise["stream"] + use, "step": step}
                return self._terms(
                    target, *at, key, count, True, mask=mask, beta=beta, reduction=reduction
                ).free_energy

            return inference.refine(
                start,
                lambda at, step: estimate(at, REFINEMENT, step, samples, "sum"),
                lambda at: estimate(at, COMPARISON, 0, compare, "none"),
                steps,
                lr,
            )

    def semi_amortised_free_energy(
        self,
        x: Tensor,
        refine_steps: int = 10,
        *,
        beta: float = 1.0,
        free_bits: float = 0.0,
        lr: float = 0.05,
        process_group: Any = None,
    ) -> FreeEnergyTerms:
        """A loss whose decoder learns from refined posteriors, and whose encoder from its own free energy.

        The value is the free energy at ``infer(x, refine_steps)``, and so is the decoder's gradient; the encoder's is
        that of ``free_energy(x)``. Gradients do not flow through the refinement. ``process_group`` as of
        ``free_energy``.

        Source: Krishnan, Liang & Hoffman 2018, arXiv:1710.06085.
        """
        target = self._checked("VAE.semi_amortised_free_energy", x, None, False)
        noise = self.noise(x, process_group=process_group)
        refined = self.infer(x, refine_steps, lr=lr, samples=1, compare=4, beta=beta, offset=noise["offset"])
        options: dict[str, Any] = {"beta": beta, "free_bits": free_bits, "process_group": process_group}
        mean, logvar = self.encode(x)
        leaf, of_logvar = mean.detach().requires_grad_(), logvar.detach().requires_grad_()
        own = self._terms(target, leaf, of_logvar, noise, **options).free_energy
        gradients = torch.autograd.grad(own, (leaf, of_logvar))
        terms = self._terms(target, *refined, noise, **options)
        return inference.with_gradient_of_encoder(terms, mean, logvar, *gradients)

    @torch.no_grad()
    def active_units(self, data: Tensor | Iterable[Any], threshold: float = ACTIVE) -> int:
        """How many latents the model uses: those whose posterior mean varies over the data by more than ``threshold``.

        Fewer than were asked for say that the others do not pay; none at all is a posterior collapse.

        Args:
            data: [N, *event], or batches, whose first tensor it is.

        Source: Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519, appendix C.
        """
        batches = data.split(4096) if isinstance(data, Tensor) else data
        device = next(self.parameters()).device
        found = inference.VarianceOfMeans()
        with evaluating(self):
            for batch in batches:
                found.add(self.encode(training.inputs(batch).to(device))[0])
        return found.active(threshold)

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        lr: float = 1e-3,
        beta: float | Callable[[int], float] = 1.0,
        free_bits: float = 0.0,
        refine_steps: int = 0,
        validation: Iterable[Any] | None = None,
        progress: bool = True,
    ) -> training.History:
        """Train on batches, with a progress bar; any other loop over ``free_energy`` does as well.

        Args:
            loader: batches, iterated again every epoch: tensors, or tuples whose first tensor is x.
            epochs: passes over ``loader``.
            optimizer: None is ``fe.LangevinAdam`` at temperature 0, which is Adam.
            lr: of that one.
            beta: factor of the KL, or a function of the epoch, 0 for the first.
            free_bits: as of ``fe.free_energy``.
            refine_steps: above 0 trains on ``semi_amortised_free_energy``.
            validation: batches whose free energy is measured after each epoch.
            progress: show the bar.

        Returns:
            ``History``: free energy, energy, KL, validation and active units per epoch; printed, a line;
            ``plot()``, a figure.

        Raises:
            FloatingPointError: the free energy of a batch is not finite; on a CPU before the step, which is not made,
                on a GPU, where each look would wait for it, 25 steps later at most.
            TypeError, ValueError: as elsewhere.

        Warns:
            UserWarning: posterior collapse: no latent is active at the end. One of several ranks of a process group:
                each trains a model of its own, and nothing here makes them one.
        """
        steps = integer("VAE.fit", "refine_steps", refine_steps, 0)
        training.warn_of_own_training(
            "VAE.fit", "free_energy(x, process_group=torch.distributed.group.WORLD)"
        )

        def loss(x: Tensor, weight: float) -> tuple[FreeEnergyTerms, Tensor]:
            if steps:
                terms = self.semi_amortised_free_energy(x, steps, beta=weight, free_bits=free_bits)
                with torch.no_grad():
                    return terms, self.encode(x)[0]
            mean, logvar = self.encode(x)
            return self.free_energy(x, posterior=(mean, logvar), beta=weight, free_bits=free_bits), mean

        return training.fit(
            self, loader, epochs=epochs, optimizer=optimizer, lr=lr, beta=beta, loss=loss, validation=validation,
            progress=progress,
        )  # fmt: skip

    def importance_weighted_bound(
        self,
        x: Tensor,
        samples: int = 500,
        *,
        seed: int | None = None,
        step: int | None = None,
        estimator: str = "iwae",
        mask: Tensor | None = None,
        posterior: tuple[Tensor, Tensor] | None = None,
        chunk: int | None = None,
        validate: bool | None = None,
        offset: int | str | None = None,
        process_group: Any = None,
    ) -> Tensor:
        """log mean_k p(x, z_k) / q(z_k | x), [B]: a lower bound of log p(x), in expectation tighter with every sample.

        Args:
            x: [B, *event].
            samples: K, of z per data point.
            seed, step, offset: of the noise, as ``noise``; sample k has the same noise whatever ``chunk`` is.
            estimator: "iwae" or "dreg" of ``fe.importance_weighted_bound``, for training; "dreg" decodes in one chunk.
            mask, posterior, validate: as ``free_energy``.
            chunk: samples that are decoded at once. None: as many as keep a decoded tensor under 2^22 numbers (16 MB).
                Under ``torch.no_grad`` memory is that of a chunk; with gradients that of all.
            process_group: over whose ranks the K samples are split, as ``fe.distributed.share`` does; ``x`` is then the
                same on each of them, and ``offset`` None is 0. The bound is that of one process, on every rank, with
                gradients for DDP to average.

        Warns:
            UserWarning: in evaluation or without gradients: for over 5% of the data, weights worth under 10 samples.

        Source: Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519.
        """
        function = "VAE.importance_weighted_bound"
        one_of(function, "estimator", estimator, ("iwae", "dreg"))
        count = integer(function, "samples", samples, 1)
        target = self._checked(function, x, mask, validate)
        mean, logvar = self._encode_observed(x, mask) if posterior is None else posterior
        group = group_of(function, process_group)
        mine = range(count) if group is None else share(count, group)
        noise = self.noise(
            x, seed=seed, step=step, offset=0 if group is not None and offset is None else offset
        )
        if chunk is None:
            chunk = max(1, (1 << 22) // max(1, target.numel() * self.classes))
        chunk = max(len(mine), 1) if estimator == "dreg" else integer(function, "chunk", chunk, 1)
        q = (mean.detach(), logvar.detach()) if estimator == "dreg" else (mean, logvar)
        log_w, z = [], mean
        for first in range(mine.start, max(mine.stop, mine.start + 1), chunk):
            size = min(chunk, mine.stop - first)  # 0 on a rank that has none
            key = {**noise, "stream": noise["stream"] + BOUND + first}
            z = reparameterize(mean, logvar, samples=size, **key)
            found = energy(
                self.decode(z), target.expand(size, *target.shape), self.likelihood,
                _of_samples(mask, size, target), batch_dims=2,
            )  # fmt: skip
            log_w.append(-found - monte_carlo_kl(*q, z))
        weights = torch.cat(log_w)
        bound = importance_weighted_bound(
            weights, estimator=estimator, z=z if estimator == "dreg" else None, process_group=group
        )
        if not (self.training and torch.is_grad_enabled()):
            inference.warn_of_few_effective(function, weights, bound, count, posterior is not None, group)
        return bound

    def _encode_observed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.encode(x if mask is None else torch.where(mask, x, 0))

    def _checked(self, function: str, x: Tensor, mask: Tensor | None, validate: bool | None) -> Tensor:
        """``x`` as the target: no float64 that the model does not compute in, and in the likelihood's domain."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: x must be a Tensor; got {type(x).__name__}")
        if validate is None:
            validate = x.is_cpu and not torch.compiler.is_compiling()
        if mask is not None:
            check_mask(function, "mask", mask, x, "x", "observed")
        if validate:
            validate_data(function, self.likelihood, x, self.classes, mask=mask)
        if x.dtype == torch.float64 and next(self.parameters()).dtype != torch.float64:
            return x.float()
        return x


def _of_samples(mask: Tensor | None, count: int, target: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand_as(target).expand(count, *target.shape)
