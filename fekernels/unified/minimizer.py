"""The document's latent-variable models: one free energy under three names, with amortised inference or without."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fekernels import views
from fekernels._checks import boolean, integer, number
from fekernels.losses import reparameterize
from fekernels.models import VAE, LatentModel
from fekernels.models.networks import features
from fekernels.models.noise_counter import NoiseCounter

__all__ = ["EfficientFreeEnergyMinimizer", "FreeEnergyMinimizer"]


class FreeEnergyMinimizer(VAE):
    """A variational autoencoder of the squared error, whose loss goes by three names.

        model = fe.unified.FreeEnergyMinimizer(784, 20, 784)
        loss = model.loss_as_free_energy(x)["free_energy"]

    ``fe.models.VAE`` with likelihood "mse": -log p(x | z) = |decode(z) - x|^2, a Gaussian of variance 1/2 less its
    constant. All values are sums over the batch, in nats. In training every batch has fresh noise at every step of the
    weights; the three names given the same batch have the same, so they agree.

    Args:
        input_dim: size of x.
        latent_dim: size of z.
        output_dim: size of the reconstruction: x's.
        seed: of the noise; None draws one from torch's default generator.

    Raises:
        TypeError, ValueError: a size that is none; an output_dim that is not input_dim.
    """

    def __init__(self, input_dim: int, latent_dim: int, output_dim: int, *, seed: int | None = None) -> None:
        if integer("FreeEnergyMinimizer", "output_dim", output_dim, 1) != input_dim:
            raise ValueError(
                f"FreeEnergyMinimizer: output_dim must be input_dim, {input_dim}, as the decoded is compared with x; "
                f"got {output_dim}"
            )
        super().__init__(input_dim, latent_dim, likelihood="mse", seed=seed)

    def reparameterize(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """A draw of z ~ N(mean, exp(logvar)), [B, latent]; other noise at every call in training."""
        return reparameterize(mean, logvar, **self.noise(mean))

    def loss_as_free_energy(self, x: Tensor) -> dict[str, Tensor]:
        """F = E - T H at T = 1.

        Returns:
            Scalars: "free_energy"; "energy", E_q[-log p(x, z)], the prior's with it; "neg_entropy", -H[q]; "elbo", -F.
        """
        value, parts = views.physics(self, x, reduction="sum")
        return {
            "free_energy": value,
            "energy": parts["energy"],
            "neg_entropy": -parts["entropy"],
            "elbo": -value,
        }

    def loss_as_inference(self, x: Tensor) -> dict[str, Tensor]:
        """The bound of -log p(x): expected negative log-likelihood plus the KL of q(z | x) to the prior.

        Returns:
            Scalars: "neg_log_posterior" (the document's name for F), "neg_likelihood", "kl_to_prior",
            "evidence_lower_bound".
        """
        value, parts = views.machine_learning(self, x, reduction="sum")
        return {
            "neg_log_posterior": value,
            "neg_likelihood": parts["reconstruction"],
            "kl_to_prior": parts["regulariser"],
            "evidence_lower_bound": -value,
        }

    def loss_as_optimization(self, x: Tensor) -> dict[str, Tensor]:
        """Reconstruction error plus regularisation.

        Returns:
            Scalars: "total_loss", "reconstruction_loss", "regularization".
        """
        value, parts = views.machine_learning(self, x, reduction="sum")
        return {
            "total_loss": value,
            "reconstruction_loss": parts["reconstruction"],
            "regularization": parts["regulariser"],
        }


class EfficientFreeEnergyMinimizer(LatentModel):
    """The free energy of a decoder, with an inference network of its own or with latents fitted to each data point.

    Args:
        model: a module with ``decode(z)``, ``input_dim`` and ``latent_dim``, as ``fe.models.VAE``; its ``likelihood``,
            or "mse" where it has none. None, as the document has it, builds nothing that could infer.
        amortized_inference: True infers by a network (input_dim -> 128 -> 2 latent_dim), one pass for any number of
            data points. False fits mean and log-variance of each by ``refine_steps`` steps of Adam from the prior
            (``LatentModel.infer``): no parameters, but latents of every data point.
        amortized: another name for amortized_inference.
        refine_steps, refine_lr: of the fit.
        seed: of the noise; None draws one from torch's default generator.

    Raises:
        TypeError: a model that is no module, or without these attributes.

    Source: Kingma & Welling 2014, arXiv:1312.6114, amortised; Hoffman et al. 2013, stochastic variational inference.
    """

    def __init__(
        self,
        model: Any,
        amortized_inference: bool = True,
        *,
        amortized: bool | None = None,
        refine_steps: int = 100,
        refine_lr: float = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        function = "EfficientFreeEnergyMinimizer"
        self.amortized = boolean(
            function, "amortized_inference", amortized_inference if amortized is None else amortized
        )
        self.refine_steps = integer(function, "refine_steps", refine_steps, 1)
        self.refine_lr = number(function, "refine_lr", refine_lr, above=0.0)
        self.noise_counter = NoiseCounter(seed, function)
        self.model = model
        self.inference_net: nn.Module | None = None
        if model is None:
            return
        for name in ("decode", "input_dim", "latent_dim"):
            if not isinstance(model, nn.Module) or not hasattr(model, name):
                raise TypeError(
                    f"{function}: model must be a torch.nn.Module with decode, input_dim and latent_dim; got "
                    f"{type(model).__name__}"
                )
        self.likelihood = getattr(model, "likelihood", "mse")
        self.classes = getattr(model, "classes", 1)
        self.latent_dim = model.latent_dim
        self.event = model.input_dim if isinstance(model.input_dim, tuple) else (model.input_dim,)
        if self.amortized:
            self.inference_net = nn.Sequential(
                nn.Linear(math.prod(self.event) * self.classes, 128),
                nn.ReLU(),
                nn.Linear(128, 2 * self.latent_dim),
            ).to(self._like())

    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of the model."""
        return next(self.model.parameters(), torch.empty(0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The network's answer, or the prior where there is none: mean and log-variance, [B, latent_dim] each."""
        function = "EfficientFreeEnergyMinimizer"
        if self.model is None:
            raise ValueError(f"{function}: model must have decode, input_dim and latent_dim; got None")
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: x must be a Tensor; got {type(x).__name__}")
        if x.shape[1:] != self.event:
            expected = ", ".join(map(str, ("batch", *self.event)))
            raise ValueError(f"{function}: x must have shape ({expected}); got {tuple(x.shape)}")
        like = self._like()
        if self.inference_net is None:
            prior = torch.zeros(len(x), self.latent_dim, device=like.device, dtype=like.dtype)
            return prior, prior.clone()
        seen = features(self.likelihood, x, self.classes, like.dtype)
        mean, logvar = self.inference_net(seen).chunk(2, dim=-1)
        return mean, logvar

    def decode(self, z: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The model's."""
        found: Tensor | tuple[Tensor, ...] = self.model.decode(z)
        return found

    def infer_latents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z) for every data point of x [B, *input_dim]: [B, latent_dim] each.

        Raises:
            ValueError: there is no model; data of another shape, or outside of the likelihood's domain.
        """
        if self.amortized or self.model is None:
            return self.encode(x)
        return self.infer(x, self.refine_steps, lr=self.refine_lr)

    def compute_free_energy_batch(self, x_batch: Tensor) -> Tensor:
        """F of a batch in nats, summed over the event, averaged over the batch: a scalar to minimise.

        Without an inference network its gradients are those of the decoder, at the latents that were found.
        """
        return self.free_energy(x_batch, posterior=self.infer_latents(x_batch)).free_energy

    def memory(self, data_size: int) -> int:
        """Bytes that inference keeps for ``data_size`` data points: a network's weights, or latents of each."""
        data_size = integer("EfficientFreeEnergyMinimizer.memory", "data_size", data_size, 0)
        if self.inference_net is not None:
            return sum(p.numel() * p.element_size() for p in self.inference_net.parameters())
        return 0 if self.model is None else 2 * self._like().element_size() * self.latent_dim * data_size
