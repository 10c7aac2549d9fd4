"""A variational autoencoder for data of any shape and any likelihood of ``fe.likelihoods``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._catalogue.free_energy import longest
from fekernels._checks import integer
from fekernels._runtime.torch_internals import has_forward_hooks
from fekernels.losses import likelihoods
from fekernels.models import networks
from fekernels.models.inference import evaluating
from fekernels.models.latent import PRIOR, LatentModel
from fekernels.models.noise_counter import NoiseCounter
from fekernels.ops.free_energy.reparameterize import reparameterize

__all__ = ["VAE"]


class VAE(LatentModel):
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
        seed: of all noise nobody else gave a seed for; None draws one from torch's default generator. Seed and counts
            of draws are in the state dict, so that a checkpoint goes on with the same noise.

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
        if not isinstance(hidden, Iterable) or isinstance(hidden, str):
            raise TypeError(
                f"{function}: hidden must be a sequence of widths, such as (128, 64); got {hidden!r}"
            )
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
        self._plain_decoder = (
            decoder is None and output.heads == 1 and not output.parameter_rows[0].not_negative
        )
        if decoder is None:
            decoder = networks.perceptron([self.latent_dim, *widths[::-1]])
            first = widths[0] if widths else self.latent_dim
            one = output.heads == 1
            heads = output.parameter_rows[: output.heads]
            decoder.append(nn.Linear(first, numbers) if one else networks.Heads(first, numbers, heads))
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
        to_mean, to_logvar = self.fc_mean, self.fc_logvar
        if to_mean is not None and to_logvar is not None:
            h = self.encoder(networks.features(self.likelihood, x, self.classes, to_mean.weight.dtype))
            return to_mean(h), to_logvar(h)
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

        A single z [latents] gives those of one data point. For "categorical" [..., *event, classes]. Logits, log-rates,
        log-scales and log-variances are what ``fe.likelihoods`` calls them; ``fe.likelihoods.mean(vae.likelihood,
        vae.decode(z))`` is the expected x.
        """
        if not isinstance(z, Tensor):
            raise TypeError(f"VAE.decode: z must be a Tensor; got {type(z).__name__}")
        if z.dim() < 1 or z.shape[-1] != self.latent_dim:
            raise ValueError(f"VAE.decode: z must have shape (..., {self.latent_dim}); got {tuple(z.shape)}")
        batch = z.shape[:-1]
        result: Tensor | tuple[Tensor, ...] = self.output(
            self.decoder(z if len(batch) == 1 else z.reshape(-1, self.latent_dim)), batch
        )
        return result

    def _nobody_else_sees_what_it_decodes(self) -> bool:
        # Of the default decoder's last layer, which is linear; a hook on it may have kept its output.
        if not self._plain_decoder or type(self).decode is not VAE.decode:
            return False
        decoder = self.decoder
        assert isinstance(decoder, nn.Sequential)
        return not any(map(has_forward_hooks, (decoder[-1], decoder, self.output)))

    __call__: Callable[
        ..., tuple[Tensor | tuple[Tensor, ...], Tensor, Tensor]
    ]  # torch says Any of every module's

    def forward(
        self,
        x: Tensor,
        *,
        seed: int | None = None,
        step: int | None = None,
        offset: int | str | None = None,
    ) -> tuple[Tensor | tuple[Tensor, ...], Tensor, Tensor]:
        """(parameters of the likelihood at a sample of z, mean, logvar); seed, step and offset as of ``noise``."""
        mean, logvar = self.encode(x)
        z = reparameterize(mean, logvar, **self.noise(x, seed=seed, step=step, offset=offset))
        return self.decode(z), mean, logvar

    def reconstruct(self, x: Tensor) -> Tensor:
        """The expected x at the posterior's mean, [B, *event]; for "categorical" probabilities [B, *event, classes].

        In evaluation (no dropout) whatever the mode, which the modules keep; differentiable.
        """
        with evaluating(self):
            return likelihoods.mean(self.likelihood, self.decode(self.encode(x)[0]))

    @torch.no_grad()
    def sample(self, count: int, *, seed: int | None = None, mean: bool = False) -> Tensor:
        """Data made up by the model, [count, *event], in evaluation (no dropout) whatever the mode.

        Args:
            count: how many.
            seed: of z, by counter-based noise, and of x given z, by a torch generator on the model's device. The same
                seed gives the same data. None: from the model's, and every call makes fresh data; how many calls there
                were is in the state dict.
            mean: the expected x given z in place of a draw of it: of pixels, grey where a draw is black or white.
        """
        weight = next(self.parameters())
        count = integer("VAE.sample", "count", count, 0)
        seed = self.noise_counter.call() if seed is None else seed
        z = random.normal((count, self.latent_dim), seed=seed, stream=PRIOR, device=weight.device)
        with evaluating(self):
            params = self.decode(z.to(weight.dtype))
        if mean:
            return likelihoods.mean(self.likelihood, params)
        return likelihoods.sample(self.likelihood, params, seed=seed)
