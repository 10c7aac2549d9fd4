"""Other packages' Stein directions for ``python -m fekernels bench``: each where it is installed, in its fastest mode.

Each is a function ``(x, s, h) -> run`` of float32 particles, scores [n, d] and a bandwidth; ``run()`` computes phi
[n, d] with the kernel exp(-|x - y|^2 / h), as ours does. NumPyro's and Pyro's kernels always take the median of the
distances first; here they are given h, since ours does not compute it in these rows either.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["KEOPS", "NUMPYRO", "PACKAGES", "PYRO", "Package"]

KEOPS, NUMPYRO, PYRO = "pykeops", "NumPyro's RBFKernel, jitted", "Pyro's RBFSteinKernel"

ROWS = 8  # of NumPyro's kernel at a time, so that their (rows, n, d) differences stay in the cache

Prepare = Callable[[Tensor, Tensor, float], Callable[[], Tensor]]


def keops(x: Tensor, s: Tensor, h: float) -> Callable[[], Tensor]:
    """One reduction over symbolic matrices: K [S - (2/h) X, 1], from which both terms follow, as in our kernels."""
    # What KeOps compiles with, -O3 for any processor by default; read when it is imported.
    os.environ.setdefault("CXXFLAGS", "-march=native -ffast-math")
    pykeops: Any = importlib.import_module("pykeops")
    pykeops.set_verbose(False)
    lazy = importlib.import_module("pykeops.torch").LazyTensor
    n = x.shape[0]

    def run() -> Tensor:
        values = torch.cat([s.sub(x, alpha=2 / h), torch.ones(n, 1)], 1)
        kernel = (-lazy(x[:, None]).sqdist(lazy(x[None])) / h).exp()
        sums = (kernel * lazy(values[None])).sum(1)
        return torch.addcmul(sums[:, :-1], sums[:, -1:], x, value=2 / h).div_(n)

    return run


def numpyro(x: Tensor, s: Tensor, h: float) -> Callable[[], Tensor]:
    """The kernel and its gradient by rows, a few at a time; ten times as fast as the scan of SteinVI over all pairs."""
    jax: Any = importlib.import_module("jax")
    jnp: Any = importlib.import_module("jax.numpy")
    kernels: Any = importlib.import_module("numpyro.contrib.einstein.stein_kernels")

    def direction(particles: Any, scores: Any) -> Any:
        kernel = kernels.RBFKernel().compute(None, particles, {}, None)

        def row(y: Any) -> Any:
            pair = jax.value_and_grad(lambda other: kernel(other, y))
            values, gradients = jax.vmap(pair)(particles)
            return (values @ scores + gradients.sum(0)) / particles.shape[0]

        return jax.lax.map(row, particles, batch_size=ROWS)

    arguments = jnp.asarray(x.numpy()), jnp.asarray(s.numpy())
    median = kernels.median_bandwidth
    kernels.median_bandwidth = lambda *_: h
    try:
        compiled = jax.jit(direction).lower(*arguments).compile()
    finally:
        kernels.median_bandwidth = median
    return lambda: from_dlpack(compiled(*arguments).block_until_ready())


def pyro(x: Tensor, s: Tensor, h: float) -> Callable[[], Tensor]:
    """What pyro.infer.SVGD(mode="multivariate").step computes once it has the scores."""
    infer: Any = importlib.import_module("pyro.infer")
    kernel = infer.RBFSteinKernel()
    kernel._bandwidth = lambda norm_sq: torch.full(norm_sq.shape[-1:], h)
    n, d = x.shape
    # Four (n, n, d) tensors live at a time; a machine that swaps them measures nothing.
    needed, memory = 16 * n * n * d, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise MemoryError(f"its (n, n, d) tensors take {needed / 1e9:.0f} GB")

    @torch.no_grad()
    def run() -> Tensor:
        log_kernel, gradient = kernel.log_kernel_and_grad(x)
        k = log_kernel.sum(-1).exp()
        attraction = torch.mm(k, -s)  # its scores are those of the loss
        return (attraction + torch.einsum("nm,nm...->n...", k, gradient)) / -n

    return run


@dataclass(frozen=True)
class Package:
    """A package and what it computes; ``install`` is its name for pip."""

    module: str
    install: str
    direction: Prepare

    def missing(self) -> str:
        """Why it cannot be asked, or nothing."""
        try:
            importlib.import_module(self.module)
        except ImportError:
            return f"pip install {self.install}"
        except Exception as error:  # a package that is installed and broken
            return f"{self.module}: {reason(error)}"
        return ""


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


PACKAGES: dict[str, Package] = {
    KEOPS: Package("pykeops", "pykeops", keops),
    NUMPYRO: Package("numpyro", "numpyro", numpyro),
    PYRO: Package("pyro", "pyro-ppl", pyro),
}
