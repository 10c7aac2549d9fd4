"""The free energy of latent-variable models, its parts and its bounds."""

from fekernels.losses import likelihoods
from fekernels.losses.importance_bounds import importance_weighted_bound
from fekernels.losses.module import FreeEnergyLoss
from fekernels.losses.monte_carlo import GaussianMixturePrior, VampPrior, monte_carlo_kl
from fekernels.losses.natural import GaussianParameters, natural_gradient, natural_step
from fekernels.ops.free_energy.free_energy import FreeEnergyTerms, energy, free_energy, gaussian_kl
from fekernels.ops.free_energy.reparameterize import reparameterize

__all__ = [
    "FreeEnergyLoss",
    "FreeEnergyTerms",
    "GaussianParameters",
    "GaussianMixturePrior",
    "VampPrior",
    "energy",
    "free_energy",
    "gaussian_kl",
    "importance_weighted_bound",
    "likelihoods",
    "monte_carlo_kl",
    "natural_gradient",
    "natural_step",
    "reparameterize",
]
