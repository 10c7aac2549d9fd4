"""Four ways to write the free energy of a latent-variable model, which are one number with one gradient.

With z = mean + exp(logvar / 2) eps, one eps for all, and the energy e = -log p(x | z) of the likelihood:

* ``physics``: F = E - T H: the energy E = e + E_q[-log p(z)], with the prior's, less temperature times q's entropy H;
* ``machine_learning``: reconstruction e plus the regulariser KL(q || p);
* ``inference``: the negative log joint, -log p(x, z), plus log q(z | x);
* ``message_passing``: the error that the prediction sends forward to the data, -log p(x | z), plus the error that each
  data point's latents send back to their prior, KL(q || p).

The decoder sees one sample. What depends on z alone is the expectation under q, not that sample: log p(z) and log q(z)
are quadratic in eps, so that averaging over eps = -1 and eps = +1 (Gauss and Hermite's rule of two points) is exact.
With the sample itself in all terms, the inference view would be unbiased, but equal only on average.

A model is anything with ``encode(x) -> (mean, logvar)`` and ``decode(z) -> parameters`` of its ``likelihood``, an
attribute; without one it is "mse", whose energy is the squared error.

Source: Kingma & Welling 2014, arXiv:1312.6114, equations 2 and 3; Neal & Hinton 1998 for the physics.
"""

from fekernels.views.equivalence import Equivalence, verify_equivalence
from fekernels.views.forms import (
    VIEWS,
    Shared,
    inference,
    machine_learning,
    message_passing,
    physics,
    share,
)

__all__ = [
    "VIEWS",
    "Equivalence",
    "Shared",
    "inference",
    "machine_learning",
    "message_passing",
    "physics",
    "share",
    "verify_equivalence",
]
