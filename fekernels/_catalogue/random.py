"""What counter-based noise is for: part of the counter, so that two uses of one (seed, stream, step) share no word.

C++ has the same in ``csrc/core/philox.h``, and a test holds one against the other.
"""

from __future__ import annotations

__all__ = ["LANGEVIN_NOISE", "LATENT_SAMPLE", "STOCHASTIC_ROUNDING", "USER", "WEIGHT_SAMPLE"]

LANGEVIN_NOISE, STOCHASTIC_ROUNDING, WEIGHT_SAMPLE, LATENT_SAMPLE = range(4)
USER = 4  # draws that no part of this package makes
