"""The operators ``torch.ops.fekernels.*``: their schemas, which exist without compiled code, and their checks."""

from fekernels.ops import langevin_adam, random, sgld

__all__ = ["langevin_adam", "random", "sgld"]
