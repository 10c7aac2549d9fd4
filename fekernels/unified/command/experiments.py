"""What ``python -m fekernels unified`` runs: every class of the document on real data, beside what is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

import fekernels as fe
from fekernels.models.latent import COMPARISON
from fekernels.unified.command import pictures
from fekernels.unified.command.ising import minus_log_z_of_bethe_lattice, minus_log_z_of_onsager
from fekernels.unified.demonstrations import landscape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EXPERIMENTS", "QUICK", "Finding", "Row", "Settings"]

COMPARE = 32  # eps by which refined and amortised latents are compared


@dataclass(frozen=True)
class Settings:
    """How long each experiment takes: all together below two minutes on two cores."""

    vae_epochs: int = 40
    refine_steps: int = 100
    message_steps: int = 200
    bayes_steps: int = 3000
    inference_steps: int = 500
    optimizer_steps: int = 300
    rbm_epochs: int = 60
    particles: int = 1000
    betas: int = 200
    relevance_epochs: int = 30
    lattice: int = 24
    temperatures: int = 25


QUICK = Settings(
    vae_epochs=1,
    refine_steps=5,
    message_steps=10,
    bayes_steps=60,
    inference_steps=30,
    optimizer_steps=20,
    rbm_epochs=2,
    particles=50,
    betas=20,
    relevance_epochs=1,
    lattice=8,
    temperatures=5,
)


@dataclass(frozen=True)
class Row:
    """A number beside its exact answer.

    Attributes:
        name: the document's, of what computed it.
        quantity: what the number is, with its unit.
        value: what came out.
        exact: what it must be; None where nobody knows.
        within: how far from ``exact`` it may be: rounding, or what the run's own noise comes to.
    """

    name: str
    quantity: str
    value: float
    exact: float | None = None
    within: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether it is as near as it must be; NaN is not."""
        return self.exact is None or abs(self.value - self.exact) <= self.within


@dataclass(frozen=True)
class Finding:
    """The rows of one experiment, and what draws its panel."""

    rows: list[Row]
    draw: Callable[[Axes], None]
    details: dict[str, Any] = field(default_factory=dict)


def digits() -> Tensor:
    """1797 pictures of 8 x 8 in [0, 1], [1797, 64]."""
    return torch.from_numpy(load_digits().data).float() / 16


def diabetes() -> tuple[Tensor, Tensor]:
    """442 patients: the 10 principal components of what was measured, [442, 10], each of variance 1, and how the
    disease went on, in units of its noise about a regression on them. float64."""
    found = load_diabetes()
    measured = torch.from_numpy(found.data).double()
    x = torch.linalg.svd(measured - measured.mean(0), full_matrices=False)[0] * len(measured) ** 0.5
    y = torch.from_numpy(found.target).double()
    y = y - y.mean()
    return x, y / (y - x @ (x.T @ y) / len(y)).std()


def four_views(settings: Settings, seed: int) -> Finding:
    """A FreeEnergyMinimizer learns digits; on what it has not seen, the four views of its free energy are compared."""
    x = digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(seed))]
    train, test = x[:1500], x[1500:]
    torch.manual_seed(seed)
    model = fe.unified.FreeEnergyMinimizer(64, 8, 64, seed=seed)
    optimizer = fe.UnifiedOptimizer(model, lr=2e-3, seed=seed)
    history = []
    for _ in range(settings.vae_epochs):
        for batch in train.split(100):
            optimizer.step(model.loss_as_optimization(batch)["total_loss"] / len(batch))
        with torch.no_grad():
            parts = model.loss_as_free_energy(test)
            history.append(
                [parts[key].item() / len(test) for key in ("free_energy", "energy", "neg_entropy")]
            )
    found = fe.views.verify_equivalence(model.double(), test.double(), seed=seed, reduction="sum")
    gradients = [each for of in found.gradient_differences.values() for each in of.values()]
    apart = max(*found.differences.values(), *gradients)
    model.float().eval()
    with torch.no_grad():
        found_by = [
            model.infer(test, refine_steps=steps, compare=COMPARE) for steps in (0, settings.refine_steps)
        ]
        key = model.noise(test, step=0)
        key["stream"] += COMPARISON  # as ``infer`` compares: what it promises of every datum
        by_its_noise, by_other_noise = (
            [model._terms(test, *at, key, COMPARE, True, reduction="none").free_energy for at in found_by],
            [
                model.free_energy(test, posterior=at, samples=64, reduction="none", seed=seed + 1).free_energy
                for at in found_by
            ],
        )
    kept, better = (
        (refined <= amortised).double().mean().item() for amortised, refined in (by_its_noise, by_other_noise)
    )
    gain = (by_other_noise[0] - by_other_noise[1]).mean().item()
    of_latents = "EfficientFreeEnergyMinimizer"
    rows = [
        Row("TheTrainStation", "four views, largest relative difference, gradients too", apart, 0.0, 1e-12),
        Row("FreeEnergyMinimizer", "free energy of test digits, nats each", history[-1][0]),
        Row(of_latents, "share of digits that refined latents explain no worse", kept, 1.0),
        Row(of_latents, "the same by noise that refinement has not seen", better),
        Row(of_latents, "nats that refinement gains, each, by that noise", gain),
    ]
    return Finding(rows, partial(pictures.energies, history=history))


def messages(settings: Settings, seed: int) -> Finding:
    """Error messages of a network that learns which digit it sees; its weights beside those of torch's SGD."""
    data = load_digits()
    x, y = digits(), nn.functional.one_hot(torch.from_numpy(data.target).long(), 10).float()
    torch.manual_seed(seed)
    model, other = (fe.unified.GradientAsMessagePassing(64, 32, 10) for _ in range(2))
    other.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(other.parameters(), lr=0.5)
    norms = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.message_steps):
        picked = torch.randint(len(x), (100,), generator=generator)
        sent = model.backward_as_messages((model(x[picked])[0] - y[picked]).square().mean())
        model.update_with_messages(sent, lr=0.5)
        norms.append([float(message["error_message"].norm()) for message in sent])
        sgd.zero_grad()
        (other(x[picked])[0] - y[picked]).square().mean().backward()
        sgd.step()
    apart = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    rows = [Row("GradientAsMessagePassing", "weights beside torch's SGD, largest difference", apart, 0.0)]
    return Finding(rows, partial(pictures.norms, norms=norms))


def descent(settings: Settings, seed: int) -> Finding:
    """Gradient descent on a regression, and the KL of its consecutive beliefs."""
    x, y = diabetes()
    torch.manual_seed(seed)
    model = nn.Linear(10, 1).double()
    descent = fe.unified.GradientDescentAsVI(model, std=0.1)
    for _ in range(50):
        descent.step(lambda data: (model(x)[:, 0] - data).square().mean(), y, lr=0.05)
    kl = descent.visualize_as_inference()
    ends = [*descent.param_history, {name: p.detach() for name, p in model.named_parameters()}]
    exact = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(after[name], 0.1), torch.distributions.Normal(before[name], 0.1)
        ).sum().item()
        for before, after in zip(ends, ends[1:], strict=False)
        for name in after
    )  # fmt: skip
    rows = [Row("GradientDescentAsVI", "KL of 50 consecutive beliefs, nats", sum(kl), exact, 1e-9 * exact)]
    return Finding(rows, partial(pictures.kl_by_step, values=kl))


def regression(settings: Settings, seed: int) -> Finding:
    """Bayesian regression three ways beside its closed form: q step by step, q at once, and annealed particles."""
    x, y = diabetes()
    prior_std = 1.0
    precision = x.T @ x + torch.eye(10).double() / prior_std**2
    mean = torch.linalg.solve(precision, x.T @ y)
    std = precision.diagonal().rsqrt()  # of uncorrelated components, so that independent weights can be exact
    covariance = torch.eye(len(y)).double() + prior_std**2 * x @ x.T
    evidence = (
        torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y).item()
    )

    model = nn.Linear(10, 1, bias=False).double()
    optimizer = fe.unified.BayesianOptimizer(model, prior_std, lr=0.005, seed=seed)

    def minus_log_likelihood(data: tuple[Tensor, Tensor]) -> Tensor:
        return -torch.distributions.Normal(model(data[0])[:, 0], 1.0).log_prob(data[1]).sum()

    found_mean, found_std, kept = torch.zeros(10).double(), torch.zeros(10).double(), 0
    for step in range(settings.bayes_steps):
        optimizer.step(minus_log_likelihood, (x, y))
        if step >= settings.bayes_steps // 2:
            found_mean += optimizer.q_mean["weight"][0]
            found_std += optimizer.q_std["weight"][0]
            kept += 1
    found_mean, found_std = found_mean / kept, found_std / kept

    fit = fe.unified.optimization_as_inference(
        y, lambda theta: torch.distributions.Normal(x @ theta, 1.0),
        torch.distributions.Normal(torch.zeros(10).double(), torch.full((10,), prior_std).double()),
        steps=settings.inference_steps, seed=seed,
    )  # fmt: skip

    base = torch.distributions.Normal(torch.zeros(10).double(), torch.full((10,), prior_std).double())
    products, moment = x.T @ x, x.T @ y

    def log_joint(theta: Tensor) -> Tensor:
        squares = y @ y - 2 * theta @ moment + ((theta @ products) * theta).sum(1)
        return -(squares + len(y) * math.log(2 * math.pi)) / 2 + base.log_prob(theta).sum(1)

    # As many steps for each doubling of what the data have said: 1 + n beta is the precision on the way.
    betas = ((1 + len(y)) ** torch.linspace(0, 1, settings.betas + 1).double() - 1) / len(y)
    annealed = fe.anneal.importance_sampling(
        log_joint, base, particles=settings.particles, betas=betas.clamp(max=1.0), seed=seed
    )
    rows = [
        Row("BayesianOptimizer", "q's means off the exact ones, largest, in its deviations",
            ((found_mean - mean) / std).abs().max().item(), 0.0, 0.5),
        Row("BayesianOptimizer", "q's deviations over the exact ones, mean",
            (found_std / std).mean().item(), 1.0, 0.1),
        Row("optimization_as_inference", "bound of the log evidence, nats", fit.elbo, evidence, 0.5),
        Row("annealing (Jarzynski)", "log evidence, nats", annealed.log_z, evidence, 4 * annealed.standard_error),
        Row("annealing (Jarzynski)", f"effective particles of {settings.particles}", annealed.effective_sample_size),
    ]  # fmt: skip
    return Finding(
        rows,
        partial(pictures.weights, exact=(mean, std), found=(found_mean, found_std)),
        {"work": annealed.work, "free_energy": -evidence},
    )


def optimizer(settings: Settings, seed: int) -> Finding:
    """The document's benchmark of its optimizer."""
    found = fe.unified.benchmark_unified_view(steps=settings.optimizer_steps)
    rows = [
        Row("UnifiedOptimizer", "speed of the whole step over torch.optim.Adam's", found["speedup"]),
    ]  # fmt: skip
    return Finding(rows, partial(pictures.speed, found=found))


def boltzmann(settings: Settings, seed: int) -> Finding:
    """A Boltzmann machine of 64 pixels and 12 hidden units, whose partition function can be enumerated."""
    x = (digits() > 0.5).float()
    train, test = x[:1500], x[1500:]
    rbm = fe.models.BernoulliRBM(64, 12, seed=seed)
    before = rbm.log_prob(test).mean().item()
    rbm.fit(train, epochs=settings.rbm_epochs, lr=0.02, progress=False)
    exact = rbm.log_partition("exact").item()
    annealed = rbm.log_partition("ais", particles=settings.particles, betas=settings.betas, seed=seed)
    rows = [
        Row(
            "clamped and equilibrium F",
            "log Z by annealing, nats",
            annealed.log_z,
            exact,
            4 * annealed.standard_error,
        ),
        Row("clamped and equilibrium F", "log p of test digits, nats each", rbm.log_prob(test).mean().item()),
        Row("clamped and equilibrium F", "the same before training", before),
    ]
    with torch.no_grad():
        samples = rbm.sample(32, 500, seed=seed)
    return Finding(rows, partial(pictures.grid, images=samples))


def lattice(settings: Settings, seed: int) -> Finding:
    """Belief propagation on Ising's square lattice, a torus: Bethe's free energy, beside Onsager's exact one."""
    side = settings.lattice
    site = torch.arange(side * side).reshape(side, side)
    edges = torch.cat([torch.stack([site, site.roll(-1, axis)], -1).reshape(-1, 2) for axis in (0, 1)])
    temperatures = torch.linspace(1.6, 4.0, settings.temperatures).double()
    spins = torch.tensor([1.0, -1.0]).double()
    pairwise = spins.outer(spins) / temperatures.reshape(-1, 1, 1, 1)
    unary = 1e-3 * spins.expand(len(temperatures), side * side, 2)  # which of the two phases is meant
    found = fe.graph.belief_propagation(
        unary, edges, pairwise.expand(-1, len(edges), 2, 2), tol=1e-12, max_iters=20_000
    )
    bethe = found.bethe_free_energy / side**2
    exact = torch.stack([minus_log_z_of_bethe_lattice(1 / t, 1e-3) for t in temperatures])
    onsager = torch.stack([minus_log_z_of_onsager(1 / t) for t in temperatures])
    chain = fe.graph.belief_propagation(
        torch.zeros(200, 2).double(),
        torch.stack([torch.arange(199), torch.arange(1, 200)], 1),
        (spins.outer(spins) / 2).expand(199, 2, 2),
    )
    rows = [
        Row("belief propagation", "-log Z of a chain of 200 spins", chain.bethe_free_energy.item(),
            -math.log(2) - 199 * math.log(2 * math.cosh(0.5)), 1e-8),
        Row("belief propagation", "Bethe F of the square lattice, largest error a spin",
            (bethe - exact).abs().max().item(), 0.0, 1e-8),
        Row("belief propagation", "Bethe's approximation off Onsager's F, largest, a spin",
            (bethe - onsager).abs().max().item()),
    ]  # fmt: skip
    return Finding(rows, partial(pictures.lattice, temperatures=temperatures, bethe=bethe, onsager=onsager))


def halves(settings: Settings, seed: int) -> Finding:
    """Which lower half of a digit belongs to an upper one, among 200: a relevance that says how sure it is."""
    x = digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(seed))]
    upper, lower = x[:, :32], x[:, 32:]
    torch.manual_seed(seed)
    of_upper, of_lower = (
        nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32), nn.BatchNorm1d(32, affine=False))
        for _ in range(2)
    )
    model = fe.models.RelevanceModel(of_upper, of_lower, query_dim=32, context_dim=32, seed=seed)
    batches = list(zip(upper[:1400].split(100), lower[:1400].split(100), strict=True))
    model.fit(batches, epochs=settings.relevance_epochs, lr=3e-3, progress=False)
    model.calibrate(upper[1400:1597], lower[1400:1597])
    with torch.no_grad():
        found = model.encode_contexts(lower[1597:]).score(upper[1597:])
    right = found.score.diagonal().unsqueeze(1)
    ranks = (found.score > right).sum(1) + 1
    apart = (found.total_variance - found.epistemic - found.aleatoric).abs().max().item()
    rows = [
        Row("RelevanceAsUnifiedObjective", "total less epistemic and aleatoric variance", apart, 0.0, 1e-6),
        Row(
            "RelevanceAsUnifiedObjective", "mean reciprocal rank among 200 halves", (1 / ranks).mean().item()
        ),
        Row("RelevanceAsUnifiedObjective", "the same by chance", sum(1 / k for k in range(1, 201)) / 200),
    ]
    sure = found.choice.max(1).values
    return Finding(rows, partial(pictures.coverage, sure=sure, right=ranks == 1))


def station(settings: Settings, seed: int) -> Finding:
    """The document's landscape: its critical points by value, and how three optimizers go over it."""
    found = fe.unified.visualize_train_station()
    rows = [
        Row("visualize_train_station", f"F at the {found['minima']} minima", found["minimum"], 0.0, 1e-9),
        Row("visualize_train_station", f"F at the {found['saddles']} saddles", found["saddle"], 0.39, 1e-9),
        Row("visualize_train_station", f"F at the {found['maxima']} maximum", found["maximum"], 4.0, 1e-9),
    ]
    draw = partial(pictures.landscape, surface=landscape, points=found["points"], seed=seed)
    return Finding(rows, draw)


EXPERIMENTS: dict[str, Callable[[Settings, int], Finding]] = {
    "four views": four_views,
    "messages": messages,
    "descent": descent,
    "regression": regression,
    "optimizer": optimizer,
    "Boltzmann machine": boltzmann,
    "lattice": lattice,
    "relevance": halves,
    "landscape": station,
}
