"""A variational autoencoder for data of any shape and any likelihood of ``fe.likelihoods``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._catalogue.free_energy import REDUCTIONS, SUM, Target, longest
from fekernels._checks import integer, one_of
from fekernels._runtime.ranks import has_ranks
from fekernels.losses import likelihoods
from fekernels.losses.importance import importance_weighted_bound
from fekernels.losses.monte_carlo import monte_carlo_kl
from fekernels.models import networks
from fekernels.models.noise import NoiseCounter
from fekernels.ops.free_energy.domains import validate_target
from fekernels.ops.free_energy.free_energy import FreeEnergyTerms, energy, free_energy
from fekernels.ops.free_energy.reparameterize import reparameterize

__all__ = ["VAE", "Posterior"]

# Streams of the model's noise: one of the first two, plus what it is for. Sample k of several takes stream + k.
TRAINING, EVALUATION = 0, 1 << 28
BOUND, PRIOR = (k << 29 for k in (1, 4))


class Posterior(NamedTuple):
    """q(z | x) of each data point: means and log-variances, [B, latents]."""

    mean: Tensor
    logvar: Tensor


class VAE(nn.Module):
    """Encoder q(z | x) = N(mean, exp(logvar)), prior N(0, I), decoder p(x | z) of any likelihood.

        vae = fe.models.VAE(784, 20)
        for x in batches:
            terms = vae.free_energy(x)               # fresh noise at every step, without being asked
            optimizer.zero_grad(); terms.free_energy.backward(); optimizer.step()

    Args:
        input_dim: size of a data point, an int or a shape such as (1, 28, 28).
        latent_dim: size of z.
        hidden: widths of the default encoder's layers, the decoder's backwards.
        likelihood: a name of ``fe.likelihoods``. The default encoder sees log(1 + x) of counts and positive numbers.
        dispersion: where the parameters behind a likelihood's first come from: "decoder", "feature", "shared" or
            "fixed" (``models.networks.Output``). None is "shared" for real-valued data, since a variance of each
            element's own runs to 0, and the free energy to minus infinity, at an element that is constant (Rybkin,
            Daniilidis & Levine 2021, arXiv:2006.13202), and "decoder" for the others.
        classes: of "categorical", whose data are integers [B, *event].
        encoder: own module, x -> (mean, logvar) or one tensor [B, 2 latent_dim] of both.
        decoder: own module, [N, latent_dim] -> real numbers for each parameter that it gives, a tensor or a tuple, of
            [N, *event] or flat; softplus brings into its domain what must be positive.
        seed: of all noise nobody else gave a seed for; None draws one from torch's default generator. Seed and count of
            draws are in the state dict, so that a checkpoint goes on with the same noise.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    Source: Kingma & Welling 2014, arXiv:1312.6114.
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        latent_dim: int,
        hidden: Sequence[int] = (128, 64),
        likelihood: str = "bernoulli",
        *,
        dispersion: str | None = None,
        classes: int | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        function = "VAE"
        shape = input_dim if isinstance(input_dim, Sequence) else (input_dim,)
        self.event = tuple(integer(function, "input_dim", size, 1) for size in shape)
        self.input_dim = input_dim if isinstance(input_dim, int) else self.event
        self.latent_dim = integer(function, "latent_dim", latent_dim, 1)
        widths = [integer(function, f"hidden[{i}]", width, 1) for i, width in enumerate(hidden)]
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if module is not None and not isinstance(module, nn.Module):
                raise TypeError(f"{function}: {name} must be a torch.nn.Module; got {type(module).__name__}")
        output = networks.Output(function, likelihood, self.event, dispersion)
        categorical = longest(likelihood).classes
        if categorical and classes is None:
            raise ValueError(f"{function}: classes must be given for likelihood 'categorical'; got None")
        if classes is not None and not categorical:
            raise ValueError(
                f"{function}: classes must be None for likelihood {likelihood!r}; got {classes!r}"
            )
        self.classes = 1 if classes is None else integer(function, "classes", classes, 2)
        self.likelihood = likelihood
        numbers = math.prod(self.event) * self.classes

        self.fc_mean: nn.Linear | None = None
        self.fc_logvar: nn.Linear | None = None
        if encoder is None:
            encoder = networks.perceptron([numbers, *widths])
            last = widths[-1] if widths else numbers
            self.fc_mean, self.fc_logvar = (nn.Linear(last, self.latent_dim) for _ in range(2))
        self.encoder = encoder
        self.plain_decoder = decoder is None
        if decoder is None:
            decoder = networks.perceptron([self.latent_dim, *widths[::-1]])
            first = widths[0] if widths else self.latent_dim
            one = output.heads == 1
            decoder.append(nn.Linear(first, numbers) if one else networks.Heads(first, numbers, output.heads))
        self.decoder = decoder
        self.output = output
        self.noise_counter = NoiseCounter(seed, function)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), [B, latents] each, of data x [B, *event]."""
        function = "VAE.encode"
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: x must be a Tensor; got {type(x).__name__}")
        if x.dim() < 1 or x.shape[1:] != self.event:
            expected = ", ".join(map(str, ("batch", *self.event)))
            raise ValueError(f"{function}: x must have shape ({expected}); got {tuple(x.shape)}")
        if self.fc_mean is not None and self.fc_logvar is not None:
            h = self.encoder(networks.features(self.likelihood, x, self.classes, self.fc_mean.weight.dtype))
            return self.fc_mean(h), self.fc_logvar(h)
        found = self.encoder(x)
        mean, logvar = found.chunk(2, -1) if isinstance(found, Tensor) else found
        expected_shape = (len(x), self.latent_dim)
        if mean.shape != expected_shape or logvar.shape != expected_shape:
            raise ValueError(
                f"{function}: encoder must give mean and logvar of shape {expected_shape} each, or both in one tensor;"
                f" got {tuple(mean.shape)} and {tuple(logvar.shape)}"
            )
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The likelihood's parameters at z [..., latents], in their domains: [..., *event], or a tuple of several.

        For "categorical" [..., *event, classes]. Logits, log-rates, log-scales and log-variances are what
        ``fe.likelihoods`` calls them; ``fe.likelihoods.mean(vae.likelihood, vae.decode(z))`` is the expected x.
        """
        batch = z.shape[:-1]
        result: Tensor | tuple[Tensor, ...] = self.output(
            self.decoder(z if len(batch) == 1 else z.flatten(0, -2)), batch
        )
        return result

    def noise(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int | None = None,
        offset: int | None = None,
    ) -> dict[str, int]:
        """Seed, stream, step and offset of the noise of batch ``x``, as ``fe.reparameterize`` takes them.

        A seed or a step that is given is taken (the other is the model's seed, or 0). Without either, in training:
        fresh for every batch and after every step of the weights, but the same for the same batch under the same
        weights, so that several views of it agree (``models.noise.NoiseCounter``). In evaluation always the same, so
        that the free energy of a test set is a number. ``offset`` is the global index of the batch's first row; None
        is 0, in a process group this rank's, for batches of one size.
        """
        if offset is None:
            offset = torch.distributed.get_rank() * len(x) if has_ranks() else 0
        stream = TRAINING
        if seed is not None or step is not None:
            seed = self.noise_counter.read()[0] if seed is None else seed
            step = 0 if step is None else step
        elif self.training:
            seed, step = self.noise_counter.next(x, self.parameters())
        else:
            seed, step, stream = self.noise_counter.read()[0], 0, EVALUATION
        return {"seed": seed, "stream": stream, "step": step, "offset": offset}

    def forward(
        self, x: Tensor, *, seed: int | None = None, step: int | None = None
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor, Tensor]:
        """(parameters of the likelihood at a sample of z, mean, logvar); ``seed`` and ``step`` as ``noise``."""
        mean, logvar = self.encode(x)
        z = reparameterize(mean, logvar, **self.noise(x, seed=seed, step=step))
        return self.decode(z), mean, logvar

    def free_energy(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int | None = None,
        offset: int | None = None,
        samples: int | None = None,
        antithetic: bool = False,
        posterior: tuple[Tensor, Tensor] | None = None,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        validate: bool | None = None,
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

        Returns:
            ``FreeEnergyTerms(free_energy, energy, kl)`` per data point summed over the event: the batch's mean, sum,
            or [B].

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape or value.
        """
        function = "VAE.free_energy"
        target = self._checked(function, x, mask, validate)
        mean, logvar = self._encode_observed(x, mask) if posterior is None else posterior
        noise = self.noise(x, seed=seed, step=step, offset=offset)
        if samples is None:
            if antithetic:
                raise ValueError(f"{function}: antithetic needs samples; got samples=None")
            z = reparameterize(mean, logvar, **noise)
            return free_energy(
                self.decode(z), target, mean, logvar, likelihood=self.likelihood, beta=beta, free_bits=free_bits,
                mask=mask, weight=weight, reduction=reduction,
            )  # fmt: skip
        z = reparameterize(mean, logvar, samples=integer(function, "samples", samples, 1), **noise)
        if antithetic:
            z = torch.cat([z, 2 * mean - z])
        count = len(z)

        def each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(count, *tensor.shape)

        means, logvars = (tensor.expand(count, *tensor.shape) for tensor in (mean, logvar))
        terms = free_energy(
            self.decode(z), target.expand(count, *target.shape), means, logvars, likelihood=self.likelihood,
            beta=beta, free_bits=free_bits, mask=_of_samples(mask, count, target), weight=each(weight),
            reduction=reduction, batch_dims=2,
        )  # fmt: skip
        if reduction == "none":
            return FreeEnergyTerms(*(term.mean(0) for term in terms))
        return FreeEnergyTerms(*(term / count for term in terms)) if reduction == REDUCTIONS[SUM] else terms

    def reconstruct(self, x: Tensor) -> Tensor:
        """The expected x at the posterior's mean, [B, *event]; for "categorical" probabilities [B, *event, classes]."""
        return likelihoods.mean(self.likelihood, self.decode(self.encode(x)[0]))

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0, mean: bool = False) -> Tensor:
        """Data made up by the model, [count, *event].

        Args:
            count: how many.
            seed: of z, by counter-based noise, and of x given z, by a torch generator on the model's device.
            mean: the expected x given z in place of a draw of it: of pixels, grey where a draw is black or white.
        """
        weight = next(self.parameters())
        count = integer("VAE.sample", "count", count, 0)
        z = random.normal((count, self.latent_dim), seed=seed, stream=PRIOR, device=weight.device)
        params = self.decode(z.to(weight.dtype))
        if mean:
            return likelihoods.mean(self.likelihood, params)
        return likelihoods.sample(self.likelihood, params, seed=seed)

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
    ) -> Tensor:
        """log mean_k p(x, z_k) / q(z_k | x), [B]: a lower bound of log p(x), in expectation tighter with every sample.

        Args:
            x: [B, *event].
            samples: K, of z per data point.
            seed, step: of the noise, as ``noise``; sample k has the same noise whatever ``chunk`` is.
            estimator: "iwae" or "dreg" of ``fe.importance_weighted_bound``, for training; "dreg" decodes in one chunk.
            mask, posterior, validate: as ``free_energy``.
            chunk: samples that are decoded at once. None: as many as keep a decoded tensor under 2^22 numbers (16 MB).
                Under ``torch.no_grad`` memory is that of a chunk; with gradients that of all.

        Source: Burda, Grosse & Salakhutdinov 2016, arXiv:1509.00519.
        """
        function = "VAE.importance_weighted_bound"
        one_of(function, "estimator", estimator, ("iwae", "dreg"))
        count = integer(function, "samples", samples, 1)
        target = self._checked(function, x, mask, validate)
        mean, logvar = self._encode_observed(x, mask) if posterior is None else posterior
        noise = self.noise(x, seed=seed, step=step)
        if chunk is None:
            chunk = max(1, (1 << 22) // max(1, target.numel() * self.classes))
        chunk = count if estimator == "dreg" else integer(function, "chunk", chunk, 1)
        q = (mean.detach(), logvar.detach()) if estimator == "dreg" else (mean, logvar)
        log_w, z = [], mean
        for first in range(0, count, chunk):
            size = min(chunk, count - first)
            z = reparameterize(
                mean, logvar, samples=size, **{**noise, "stream": noise["stream"] + BOUND + first}
            )
            found = energy(
                self.decode(z), target.expand(size, *target.shape), self.likelihood,
                _of_samples(mask, size, target), batch_dims=2,
            )  # fmt: skip
            log_w.append(-found - monte_carlo_kl(*q, z))
        return importance_weighted_bound(
            torch.cat(log_w), estimator=estimator, z=z if estimator == "dreg" else None
        )

    def _encode_observed(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.encode(x if mask is None else torch.where(mask, x, 0))

    def _checked(self, function: str, x: Tensor, mask: Tensor | None, validate: bool | None) -> Tensor:
        """``x`` as the target: no float64 that the model does not compute in, and in the likelihood's domain."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: x must be a Tensor; got {type(x).__name__}")
        if validate is None:
            validate = x.is_cpu and not torch.compiler.is_compiling()
        if validate and x.numel():
            self._validate(function, x, mask)
        if x.dtype == torch.float64 and next(self.parameters()).dtype != torch.float64:
            return x.float()
        return x

    def _validate(self, function: str, x: Tensor, mask: Tensor | None) -> None:
        row = longest(self.likelihood)
        if row.target is Target.REAL:
            return
        support = row.target.value
        if mask is None and not support.whole and x.is_floating_point():
            # Both ends in one read: as much as a training step can afford. NaN fails it too.
            low, high = (end.item() for end in torch.aminmax(x.detach()))
            if (low > support.lowest if support.above else low >= support.lowest) and high <= support.highest:
                if high < math.inf:
                    return
        seen = x if mask is None else x[mask.expand_as(x)]
        like = seen.new_empty((0, self.classes))
        validate_target(function, self.likelihood, seen, like)


def _of_samples(mask: Tensor | None, count: int, target: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand_as(target).expand(count, *target.shape)
