"""The operators ``torch.ops.fekernels.*``: their schemas, which exist without compiled code, and their checks."""

from fekernels.ops import random
from fekernels.ops.free_energy import free_energy, reparameterize

__all__ = ["free_energy", "random", "reparameterize"]
