"""The operators ``torch.ops.fekernels.*``: their schemas, which exist without compiled code, and their checks."""

from fekernels.ops import free_energy, random, reparameterize

__all__ = ["free_energy", "random", "reparameterize"]
