"""The expectation of x and a draw of it, by a likelihood's name, for `fekernels.losses.likelihoods`.

No backend has kernels of its own for these: the reference's plain PyTorch runs on every device.
"""

from __future__ import annotations

from fekernels.reference.free_energy.likelihoods import MEANS, SAMPLES

__all__ = ["MEANS", "SAMPLES"]
