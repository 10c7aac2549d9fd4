"""Posteriors whose answer is known: exactly, or by a long run of NUTS (`python -m tests.support.posteriors`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STORED = Path(__file__).parent / "posteriors.json"


@dataclass(frozen=True)
class Problem:
    """What `fe.sample_posterior` takes, and the true means and standard deviations of all weights where known."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    loader: Any
    data_size: int
    prior_precision: float
    mean: Tensor | None = None
    std: Tensor | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sizes = {"data_size": self.data_size, "prior_precision": self.prior_precision}
        return (self.model, self.loss_fn, self.loader), sizes


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def linear_regression(n: int = 20_000, d: int = 20, batch: int = 128) -> Problem:
    """Unit noise; the first two features are correlated."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(n, d, generator=g)
    x[:, 1] += 0.6 * x[:, 0]
    y = x @ torch.randn(d, generator=g) + torch.randn(n, generator=g)
    covariance = torch.linalg.inv(x.double().T @ x.double() + torch.eye(d, dtype=torch.float64))
    torch.manual_seed(0)

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return (model(rows[0])[:, 0] - rows[1]).square().mean() / 2

    return Problem(
        nn.Linear(d, 1, bias=False), loss_fn, batches(x, y, batch), n, 1.0,
        covariance @ (x.double().T @ y.double()), covariance.diagonal().sqrt(),
    )  # fmt: skip


def logistic_regression(batch: int = 64) -> Problem:
    """Breast cancer: 569 rows, 30 standardised features and a constant; NUTS, `numpyro`, is the reference."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0), dtype=torch.float32)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    y = torch.tensor(data.target, dtype=torch.float32)
    known = json.loads(STORED.read_text())["logistic_regression"]
    torch.manual_seed(0)

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(rows[0])[:, 0], rows[1])

    return Problem(
        nn.Linear(x.shape[1], 1, bias=False), loss_fn, batches(x, y, batch), len(x), 1.0,
        torch.tensor(known["mean"], dtype=torch.float64), torch.tensor(known["std"], dtype=torch.float64),
    )  # fmt: skip


class Position(nn.Module):
    """A point on a line."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([at]))

    def forward(self, x: Tensor) -> Tensor:
        return self.at.expand(len(x))


def two_modes(apart: float = 10.0) -> Problem:
    """Half N(apart / 2, 1), half N(-apart / 2, 1); the model stands in the first."""
    n = 100

    def loss_fn(model: Any, rows: Any) -> Tensor:
        at = model(rows)[0]
        return -torch.logaddexp(-(at - apart / 2).square() / 2, -(at + apart / 2).square() / 2) / n

    return Problem(
        Position(apart / 2), loss_fn, [torch.zeros(25, 1)] * 4, n, 0.0,
        torch.zeros(1, dtype=torch.float64), torch.tensor([math.sqrt(1 + apart**2 / 4)], dtype=torch.float64),
    )  # fmt: skip


HIDDEN, NOISE, GAP = 50, 0.1, (-0.4, 0.4)


def _gapped() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.cat([torch.rand(50, generator=g) * 1.5 - 2, torch.rand(50, generator=g) * 1.5 + 0.5])[:, None]
    return x, torch.sin(2 * x) + NOISE * torch.randn(100, 1, generator=g)


def gapped_network(steps: int = 2000) -> Problem:
    """50 tanh units on 100 points with a gap, trained by Adam; a standard normal prior on every weight."""
    x, y = _gapped()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def loss_fn(model: Any, rows: Any) -> Tensor:
        return (model(rows[0]) - rows[1]).square().mean() / (2 * NOISE**2)

    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        loss_fn(model, (x, y)).backward()
        adam.step()
    return Problem(model, loss_fn, batches(x, y, 20), 100, 1.0)


def nuts() -> None:
    """Sample the posteriors of this file that have no formula, and store what came of it."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import MCMC, NUTS

    numpyro.set_host_device_count(2)
    x, y = (jnp.asarray(each.numpy()) for each in _gapped())

    def network() -> None:
        normal = numpyro.distributions.Normal
        w1 = numpyro.sample("w1", normal(0, 1).expand([1, HIDDEN]).to_event())
        b1 = numpyro.sample("b1", normal(0, 1).expand([HIDDEN]).to_event())
        w2 = numpyro.sample("w2", normal(0, 1).expand([HIDDEN, 1]).to_event())
        b2 = numpyro.sample("b2", normal(0, 1))
        numpyro.sample("y", normal(jnp.tanh(x @ w1 + b1) @ w2 + b2, NOISE), obs=y)

    settings = {
        "warmup": 1000,
        "draws": 2000,
        "chains": 4,
        "max_tree_depth": 9,
        "numpyro": numpyro.__version__,
    }
    mcmc = MCMC(
        NUTS(network, max_tree_depth=9), num_warmup=1000, num_samples=2000, num_chains=4, chain_method="sequential"
    )  # fmt: skip
    mcmc.run(jax.random.PRNGKey(0))
    draws = mcmc.get_samples()
    at = jnp.linspace(*GAP, 9)[:, None]
    outputs = jax.vmap(lambda w1, b1, w2, b2: (jnp.tanh(at @ w1 + b1) @ w2)[:, 0] + b2)(
        draws["w1"], draws["b1"], draws["w2"], draws["b2"]
    )
    by_chain = outputs.reshape(4, 2000, -1)
    stored = json.loads(STORED.read_text())
    stored["gapped_network"] = {
        "x": at[:, 0].tolist(),
        "mean": outputs.mean(0).tolist(),
        "std": outputs.std(0).tolist(),
        "std_by_chain": by_chain.std(1).tolist(),
        "rhat_max": float(numpyro.diagnostics.split_gelman_rubin(by_chain).max()),
        "ess_min": float(numpyro.diagnostics.effective_sample_size(by_chain).min()),
        "sampler": {"name": "NUTS", **settings},
    }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    nuts()
