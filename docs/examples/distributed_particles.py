"""A posterior by particles that several processes hold, and the same by one:

    torchrun --nproc-per-node 4 docs/examples/distributed_particles.py [--quick]
    python docs/examples/distributed_particles.py [--quick]

Bayesian logistic regression on scikit-learn's breast cancer data: 30 features, 400 patients to learn from and 169 to
predict. Particles are weights, an intercept and the log-precision of their prior. Each rank holds some of them, as many
as it likes, and computes their scores alone. Rank 0 then runs all of them by itself and compares: not a bit may differ.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor

import fekernels as fe

TRAINED = 400
# Particles whose scores are computed at once, on any number of ranks: of others a product rounds otherwise.
TOGETHER = 10


def data() -> tuple[Tensor, Tensor]:
    """Features of mean 0 and variance 1 with a column of ones, and classes 0 and 1; in a random order."""
    x, y = (torch.tensor(values, dtype=torch.float32) for values in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1)], 1)
    return x[order], y[order]


def log_posterior(particles: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[n] of particles [n, 32]: weights of variance 1/a, an intercept of variance 100, log a with a ~ Gamma(1, 1)."""
    return torch.cat([log_density(some, x, y) for some in particles.split(TOGETHER)])


def log_density(particles: Tensor, x: Tensor, y: Tensor) -> Tensor:
    weights, intercept, log_a = particles[:, :-2], particles[:, -2], particles[:, -1]
    logits = particles[:, :-1] @ x.T
    likelihood = -F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none").sum(1)
    prior = (
        weights.shape[1] / 2 * log_a - log_a.exp() / 2 * weights.square().sum(1) - intercept.square() / 200
    )
    return likelihood + prior + log_a - log_a.exp()


def particles(n: int) -> Tensor:
    return 0.1 * fe.random.normal((n, 32), seed=0)


def sample(own: Tensor, steps: int, batch: tuple[Tensor, Tensor], group: dist.ProcessGroup | None) -> fe.SVGD:
    sampler = fe.SVGD(log_posterior, own, batched=True, lr=0.05, seed=0, process_group=group)
    sampler.run(steps, batches=[batch], every=0)
    return sampler


def predict(posterior: Tensor, x: Tensor) -> Tensor:
    """[N]: the probability of class 1, averaged over the particles."""
    return (x.double() @ posterior[:, :-1].double().T).sigmoid().mean(1)


def report(posterior: Tensor, x: Tensor, y: Tensor) -> None:
    names = ["mean radius", "mean texture", "worst radius", "worst texture", "worst concavity"]
    columns = [list(load_breast_cancer().feature_names).index(name) for name in names]
    print("\n| weight of | mean | standard deviation |\n|---|---|---|")
    for name, column in zip(names, columns, strict=True):
        print(f"| {name} | {posterior[:, column].mean():.2f} | {posterior[:, column].std():.2f} |")
    print("\n| 169 patients | accuracy | NLL |\n|---|---|---|")
    for name, used in (("one particle", posterior[:1]), (f"all {len(posterior)}", posterior)):
        p = predict(used, x)
        nll = F.binary_cross_entropy(p, y.double())
        print(f"| {name} | {((p > 0.5) == (y > 0.5)).double().mean():.3f} | {nll:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer particles and steps")
    quick = parser.parse_args().quick
    n, steps = (50, 20) if quick else (500, 300)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    group = dist.group.WORLD  # None where this process is alone
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    x, y = data()
    batch = x[:TRAINED], y[:TRAINED]

    mine = fe.distributed.share(n // TOGETHER)
    began = time.perf_counter()
    own = particles(n)[mine.start * TOGETHER : mine.stop * TOGETHER]
    sampler = sample(own, steps, batch, group)
    seconds = time.perf_counter() - began
    posterior = sampler.state_dict()["particles"]  # of all ranks, on every rank

    if rank == 0:
        print(f"{ranks} processes, {n} particles, {steps} steps: {seconds:.1f} s")
        began = time.perf_counter()
        alone = sample(particles(n), steps, batch, None)
        print(f"one process:{time.perf_counter() - began:6.1f} s")
        assert torch.equal(posterior, alone.particles), "the number of processes has changed the particles"
        print("every bit of every particle is the same")
        report(posterior, x[TRAINED:], y[TRAINED:])
    if group:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
