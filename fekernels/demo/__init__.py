"""``python -m fekernels demo``: a network on scikit-learn's digits, optimized by Adam, in an ensemble, and sampled."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from fekernels import backends
from fekernels._runtime.command_line import check_outputs
from fekernels._runtime.command_line import parser as command_parser
from fekernels.demo import report
from fekernels.demo.figure import draw
from fekernels.posterior import PosteriorRun, PosteriorSamples, sample_posterior

Pair = tuple[Tensor, Tensor]  # inputs [n, 64], labels [n]


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment."""

    # Few training digits, so that the weights are uncertain; the many others make the test's own noise small.
    train: int = 400
    validation: int = 300
    batch: int = 50
    width: int = 64
    # Adam: every pair is trained; the pair and the step that are best on the validation set count.
    learning_rates: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    weight_decays: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    adam_steps: int = 1200
    check_every: int = 16
    # Networks of the ensemble, each trained as the tuned one from other weights; together they see as many batches as
    # the sampler.
    members: int = 5
    # Langevin-Adam: a posterior run at every temperature, of the likelihood alone and in units of Bayes'; the one that
    # is best on the validation set counts. 1 is reported beside it.
    temperatures: tuple[float, ...] = (0.01, 0.03, 0.1, 1.0)
    prior_precision: float = 10.0  # about that of the initial weights
    chains: int = 4
    samples: int = 25
    burn_in: int = 600
    thinning: int = 20


QUICK = Settings(
    train=200,
    validation=100,
    learning_rates=(1e-2,),
    weight_decays=(0.0, 1e-3),
    adam_steps=64,
    members=2,
    temperatures=(0.1, 1.0),
    chains=2,
    samples=4,
    burn_in=20,
    thinning=2,
)


@dataclass(frozen=True)
class Data:
    """One random split, and what the predictors are asked about: the test digits as they are and shifted."""

    train: Pair
    validation: Pair
    labels: Tensor
    inputs: dict[str, Tensor]


def digits(settings: Settings, seed: int) -> Data:
    """The 1797 8x8 digits in [0, 1], split at random, and three shifts of the test part that no training saw."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, validation, test = order.tensor_split((settings.train, settings.train + settings.validation))
    clean = x[test]
    images = clean.view(-1, 1, 8, 8)
    half = math.sqrt(0.5)
    rotation = torch.tensor([[half, -half, 0.0], [half, half, 0.0]]).expand(len(images), 2, 3)
    rotated = F.grid_sample(images, F.affine_grid(rotation, list(images.shape), False), align_corners=False)
    noisy = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    # A 4x4 patch of each image, anywhere, is blank.
    corner = torch.randint(0, 5, (2, len(images), 1), generator=generator)
    hidden = (torch.arange(8) >= corner) & (torch.arange(8) < corner + 4)
    occluded = images.masked_fill((hidden[0][:, :, None] & hidden[1][:, None, :])[:, None], 0.0)
    shifted = {"rotated": rotated, "noisy": noisy, "occluded": occluded}
    inputs = {"clean": clean, **{name: value.flatten(1) for name, value in shifted.items()}}
    return Data((x[train], y[train]), (x[validation], y[validation]), y[test], inputs)


def network(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def batches(data: Pair, size: int, steps: int, seed: int) -> Iterator[Pair]:
    """`steps` batches, epoch after epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    left: list[Tensor] = []
    for _ in range(steps):
        if not left:
            whole = torch.randperm(len(data[0]), generator=generator).split(size)
            left = [rows for rows in whole if len(rows) == size]
        rows = left.pop()
        yield data[0][rows], data[1][rows]


@dataclass(frozen=True)
class Fit:
    """A network that was trained, and how: by its validation loss."""

    loss: float
    lr: float
    decay: float
    step: int
    weights: dict[str, Tensor]


def train(data: Data, settings: Settings, lr: float, decay: float, steps: int, seed: int) -> Fit:
    """By torch's Adam, stopped at the step that is best on the validation set."""
    model = network(settings.width, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay, fused=True)
    best = Fit(math.inf, lr, decay, 0, {})
    for step, (x, y) in enumerate(batches(data.train, settings.batch, steps, seed), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % settings.check_every == 0 or step == steps:
            with torch.no_grad():
                loss = F.cross_entropy(model(data.validation[0]), data.validation[1]).item()
            if loss < best.loss:
                weights = {name: value.clone() for name, value in model.state_dict().items()}
                best = Fit(loss, lr, decay, step, weights)
    return best


def together(fits: Sequence[Fit], settings: Settings) -> PosteriorSamples:
    """What predicts with all of these networks."""
    kept = PosteriorSamples(network(settings.width, 0))
    for fit in fits:
        kept.collect(fit.weights)
    return kept


def sample(data: Data, settings: Settings, fit: Fit, temperature: float, seed: int) -> PosteriorRun:
    """A posterior run from the tuned network, with the likelihood of as many digits as there are over `temperature`."""
    model = network(settings.width, seed)
    model.load_state_dict(fit.weights)
    x, y = data.train
    return sample_posterior(
        model,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        list(zip(x.split(settings.batch), y.split(settings.batch), strict=True)),
        data_size=round(len(x) / temperature),
        prior_precision=settings.prior_precision,
        chains=settings.chains,
        samples=settings.samples,
        burn_in=settings.burn_in,
        thinning=settings.thinning,
        seed=seed,
        progress=False,
    )


def validation_loss(samples: PosteriorSamples, data: Data) -> float:
    log_mean = samples.predict(data.validation[0]).log_mean
    assert log_mean is not None
    return F.nll_loss(log_mean, data.validation[1]).item()


def one_seed(settings: Settings, seed: int, bar: tqdm) -> report.SeedResult:
    """Everything that one split has to say: the tuned point estimate, the ensemble, and the sampler."""
    data = digits(settings, seed)
    fits = []
    for lr in settings.learning_rates:
        for decay in settings.weight_decays:
            fits.append(train(data, settings, lr, decay, settings.adam_steps, seed))
            bar.update()
    point = min(fits, key=lambda fit: fit.loss)
    runs = {}
    for temperature in settings.temperatures:
        runs[temperature] = sample(data, settings, point, temperature, seed)
        bar.update()
    losses = {temperature: validation_loss(run.samples, data) for temperature, run in runs.items()}
    chosen = min(losses, key=lambda temperature: losses[temperature])
    cost = runs[chosen].report.settings["batches"]
    members = []
    for member in range(settings.members):
        steps = max(settings.check_every, round(cost / settings.members))
        members.append(train(data, settings, point.lr, point.decay, steps, (seed + 1) * 1000 + member))
        bar.update()
    predictors = {
        report.ADAM: together([point], settings),
        report.ENSEMBLE: together(members, settings),
        report.LANGEVIN: runs[chosen].samples,
        report.BAYES: runs[1.0].samples,
    }
    return report.SeedResult(
        chosen={
            report.ADAM: f"lr {point.lr:g}, weight decay {point.decay:g}, step {point.step}",
            report.LANGEVIN: f"T = {chosen:g}",
        },
        outcomes={
            name: report.judge(samples, data.inputs, data.labels) for name, samples in predictors.items()
        },
        reports={report.LANGEVIN: runs[chosen].report, report.BAYES: runs[1.0].report},
    )


def introduction(settings: Settings, seeds: int) -> str:
    rates, decays = len(settings.learning_rates), len(settings.weight_decays)
    sizes = f"{settings.train} digits to train, {settings.validation} to choose with, the others to test"
    return "\n".join(
        [
            f"scikit-learn's digits in {seeds} random splits: {sizes}.",
            f"Network 64-{settings.width}-{settings.width}-10, batches of {settings.batch}.",
            f"Adam: {rates} learning rates x {decays} weight decays, up to {settings.adam_steps} steps each, "
            "stopped early.",
            f"Ensemble: {settings.members} networks trained like the tuned one, together for as many gradients as the "
            "sampler's.",
            f"fe.sample_posterior: {len(settings.temperatures)} temperatures, {settings.chains} chains, "
            f"{settings.samples} samples of each.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = command_parser(
        "demo",
        "Train a network on scikit-learn's digits by Adam, in an ensemble and as samples: scores, a verdict, a figure.",
        codes="0 done, whatever the verdict; 1 something to be installed is missing",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="random splits and initialisations (default 5, quick 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("fekernels_demo.png"), metavar="PATH", help="where the figure goes"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that everything runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the scores of every split to PATH")
    arguments = parser.parse_args(argv)
    seeds = arguments.seeds if arguments.seeds is not None else 2 if arguments.quick else 5
    if seeds < 1:
        parser.error(f"--seeds must be at least 1; got {seeds}")
    check_outputs(parser, json=arguments.json)
    check_outputs(parser, picture=True, out=arguments.out)
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()
    # Looks for the compiled kernels, and compiles them where this is their first use.
    kernels = backends()["langevin_adam_", "cpu"].in_use
    print(f"{introduction(settings, seeds)}\nLangevinAdam runs on the {kernels} backend.", flush=True)
    fits = len(settings.learning_rates) * len(settings.weight_decays)
    fits += len(settings.temperatures) + settings.members
    threads = torch.get_num_threads()
    results = []
    with tqdm(total=seeds * fits, unit="fit", smoothing=0.05) as bar, warnings.catch_warnings():
        try:
            # One network, and five, are not posterior samples, and few draws are what is compared here.
            warnings.filterwarnings("ignore", message=".*samples are worth about")
            # Networks this small lose time to a second thread.
            torch.set_num_threads(1)
            for seed in range(seeds):
                bar.set_description(f"seed {seed + 1} of {seeds}")
                results.append(one_seed(settings, seed, bar))
        finally:
            torch.set_num_threads(threads)
    print(f"\n{report.choices(results)}\n\n{report.table(results)}\n\n{report.verdict(results)}\n")
    print(report.step_times(*(3, 4, 1e-3) if arguments.quick else (15, 40)))
    draw(results).savefig(arguments.out, dpi=150)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.numbers(results), indent=1) + "\n")
        print(f"\nwritten: {arguments.json}")
    print(f"\nFigure: {arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    print(report.summary(results))
    return 0
