"""Each operator once, as a user calls it: prints the digests of what comes out. Any warning is an error.

    python -I -W error smoke.py [--compile]

It is run by release.py and check_versions.py, with a fekernels that is installed. --compile: and a step under
torch.compile, whose own warnings are left alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import torch

import fekernels as fe
from fekernels._runtime import extension, host

results: dict[str, str] = {}


def record(name: str, *tensors: torch.Tensor) -> None:
    digest = hashlib.sha256()
    for tensor in tensors:
        assert tensor.isfinite().all(), name
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    results[name] = digest.hexdigest()[:16]


def optimizers() -> None:
    def steps(make: Callable[..., torch.optim.Optimizer], **options: float) -> None:
        weights = [fe.random.normal((37, 29), seed=1), fe.random.normal((1001,), seed=2)]
        optimizer = make(weights, lr=0.01, seed=3, **options)
        for step in range(3):
            for weight in weights:
                weight.grad = fe.random.normal(weight.shape, seed=4, step=step)
            optimizer.step()
        record(make.__name__, *weights)

    steps(fe.LangevinAdam, temperature=1e-3, prior_precision=1.0)
    steps(fe.SGLD, temperature=1e-3)
    weight = torch.nn.Parameter(fe.random.normal((1001,), seed=2))
    optimizer = fe.VariationalAdam([weight], lr=0.01, ess=100.0, seed=3)
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    record("VariationalAdam", weight, optimizer.kl())


def losses() -> None:
    params = fe.random.normal((300, 41), seed=5).requires_grad_()
    target = (fe.random.uniform((300, 41), seed=6) < 0.5).float()
    mean = fe.random.normal((300, 33), seed=8).requires_grad_()
    z = fe.reparameterize(mean, mean, seed=9)
    for likelihood in ("gaussian", "bernoulli", "poisson"):
        params.grad = mean.grad = None
        terms = (
            fe.free_energy(params.exp(), target, z, mean, likelihood=likelihood)
            if likelihood == "poisson"
            else (fe.free_energy(params, target, z, mean, likelihood=likelihood))
        )
        terms.free_energy.backward(retain_graph=True)
        assert params.grad is not None and mean.grad is not None
        record(f"free_energy {likelihood}", terms.free_energy, params.grad, mean.grad)
    record("gaussian_kl", fe.gaussian_kl(mean, mean))


def particles() -> None:
    x, scores = fe.random.normal((200, 20), seed=3), fe.random.normal((200, 20), seed=10)
    record("svgd_direction", fe.svgd_direction(x, scores))
    record("kernel_stein_discrepancy", fe.kernel_stein_discrepancy(x, scores))
    record("median_bandwidth", fe.median_bandwidth(x))
    found = fe.SVGD(lambda points: -points.square().sum(-1) / 2, x).run(5, progress=False)
    record("SVGD", found.particles)


def systems() -> None:
    data = (fe.random.uniform((64, 12), seed=6) < 0.5).float()
    torch.manual_seed(0)
    record("VAE", fe.models.VAE(12, 2, (16,), seed=0).free_energy(data).free_energy)
    edges = torch.tensor([[0, 1], [1, 2], [2, 0]])
    graph = fe.graph.belief_propagation(
        fe.random.normal((3, 2), seed=1), edges, fe.random.normal((3, 2, 2), seed=2) / 4
    )
    record("belief_propagation", graph.beliefs, graph.bethe_free_energy)
    chains = fe.random.normal((4, 200, 3), seed=7)
    statistics = fe.diagnostics.chain_statistics(chains)
    record("chain_statistics", *statistics)
    model = torch.nn.Linear(12, 1)
    batches = [(data, data[:, :1])]
    run = fe.sample_posterior(
        model, lambda net, batch: (net(batch[0]) - batch[1]).square().mean(), batches, data_size=64,
        prior_precision=1.0, samples=5, chains=2, burn_in=10, thinning=2, lr=0.01, progress=False, seed=0,
    )  # fmt: skip
    record("sample_posterior", *run.samples[0].values())


def compiled() -> None:
    """A loss, its gradient and a step. torch.compile has warnings of its own: only those about us count."""
    weight = torch.nn.Parameter(fe.random.normal((300, 41), seed=5))
    target = (fe.random.uniform((300, 41), seed=6) < 0.5).float()
    mean = fe.random.normal((300, 33), seed=8)
    optimizer = fe.LangevinAdam([weight], lr=0.01, temperature=1e-3, prior_precision=1.0, seed=3)

    def loss() -> torch.Tensor:
        return fe.free_energy(weight, target, mean, mean, likelihood="bernoulli").free_energy

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        of_loss, step = torch.compile(loss, fullgraph=True), torch.compile(optimizer.step)
        for _ in range(2):
            value = of_loss()
            value.backward()
            step()
            optimizer.zero_grad()
    ours = [str(each.message) for each in told if "fekernels" in f"{each.filename} {each.message}"]
    assert not ours, ours
    record("torch.compile", weight, value)


def main() -> None:
    extension.load()
    for part in (optimizers, losses, particles, systems, *([compiled] if "--compile" in sys.argv else [])):
        part()
    library = extension.library_path()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "fekernels": fe.__version__,
        "library": "wheel" if library and library.is_relative_to(Path(fe.__file__).parent) else "first use",
        "host module": "none" if host.unavailable_reason() else "compiled",
        "built with": str(torch.ops.fekernels_native.build_info()),
    }
    print(json.dumps({"facts": facts, "results": results}))


if __name__ == "__main__":
    main()
