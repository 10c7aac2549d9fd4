"""``python -m fekernels demo``: a network on scikit-learn's digits, optimized by Adam, sampled by LangevinAdam."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from fekernels import backends
from fekernels.demo import report
from fekernels.demo.figure import draw
from fekernels.optim import CyclicalTemperature, LangevinAdam, PosteriorSamples

Pair = tuple[Tensor, Tensor]  # inputs [n, 64], labels [n]


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment. The sampler's were chosen on the validation sets of other splits than these."""

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
    # LangevinAdam: every temperature is run, in units of the 1/N of Bayes' posterior; the one that is best on the
    # validation set counts. 0 is the control, the same schedule and averaging without noise; it and 1 are
    # reported beside the chosen one.
    temperatures: tuple[float, ...] = (0.0, 0.01, 0.03, 1.0)
    learning_rate: float = 2e-2
    lr_min: float = 2e-3
    prior_precision: float = 2.5e-4
    cycle_length: int = 500
    cycles: int = 8
    exploration: float = 0.3
    thinning: int = 25

    @property
    def sampler_steps(self) -> int:
        return self.cycle_length * self.cycles


QUICK = Settings(
    train=200,
    validation=100,
    learning_rates=(1e-2,),
    weight_decays=(0.0, 1e-3),
    adam_steps=64,
    temperatures=(0.0, 0.03, 1.0),
    cycle_length=64,
    cycles=2,
    exploration=0.1,
    thinning=4,
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


def train_adam(data: Data, settings: Settings, seed: int, bar: tqdm) -> tuple[PosteriorSamples, str]:
    """The point estimate: torch's Adam, its learning rate, weight decay and last step chosen on the validation set."""
    best = (math.inf, "")
    model = network(settings.width, seed)
    chosen = PosteriorSamples(model, max_samples=1)
    for lr in settings.learning_rates:
        for decay in settings.weight_decays:
            trained = network(settings.width, seed)
            optimizer = torch.optim.Adam(trained.parameters(), lr=lr, weight_decay=decay, fused=True)
            stream = batches(data.train, settings.batch, settings.adam_steps, seed)
            for step, (x, y) in enumerate(stream, 1):
                optimizer.zero_grad()
                F.cross_entropy(trained(x), y).backward()
                optimizer.step()
                bar.update()
                if step % settings.check_every == 0:
                    with torch.no_grad():
                        loss = F.cross_entropy(trained(data.validation[0]), data.validation[1]).item()
                    if loss < best[0]:
                        best = (loss, f"lr {lr:g}, weight decay {decay:g}, step {step}")
                        model.load_state_dict(trained.state_dict())
                        chosen.collect()
    return chosen, best[1]


def sample_langevin(
    data: Data, settings: Settings, share: float, seed: int, bar: tqdm
) -> tuple[PosteriorSamples, report.Trajectory]:
    """Posterior samples at `share` of the temperature 1/N, by cycles of exploration at T = 0 and of sampling.

    At share 0 the "sampling" phases collect too, from the same steps without noise.
    """
    model = network(settings.width, seed)
    optimizer = LangevinAdam(
        model.parameters(),
        lr=settings.learning_rate,
        # The loss is a mean over N digits, so T = 1/N is Bayes; the prior has variance T / prior_precision.
        temperature=share / settings.train,
        prior_precision=settings.prior_precision,
        seed=seed,
    )
    # The phase is long enough to do without a burn-in: .98 of the variance by the schedule's own account.
    schedule = CyclicalTemperature(
        optimizer, settings.cycle_length, settings.exploration, lr_min=settings.lr_min, proportion_burn_in=0.0
    )
    samples = PosteriorSamples(model, thinning=settings.thinning)
    path = report.Trajectory()
    for x, y in batches(data.train, settings.batch, settings.sampler_steps, seed):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        collected = schedule.sampling and samples.update()
        path.add(loss, optimizer.param_groups[0]["lr"], schedule.sampling, collected, model)
        schedule.step()
        bar.update()
    return samples, path


def validation_loss(samples: PosteriorSamples, data: Data) -> float:
    log_mean = samples.predict(data.validation[0]).log_mean
    assert log_mean is not None
    return F.nll_loss(log_mean, data.validation[1]).item()


def one_seed(settings: Settings, seed: int, bar: tqdm) -> report.SeedResult:
    """Everything that one split has to say: the tuned point estimate, the control, and the chosen sampler."""
    data = digits(settings, seed)
    point, how = train_adam(data, settings, seed, bar)
    runs = {share: sample_langevin(data, settings, share, seed, bar) for share in settings.temperatures}
    losses = {share: validation_loss(samples, data) for share, (samples, _) in runs.items()}
    share = min((share for share in runs if share > 0), key=lambda share: losses[share])
    predictors = {
        report.ADAM: point,
        report.CONTROL: runs[0.0][0],
        report.LANGEVIN: runs[share][0],
        report.BAYES: runs[1.0][0],
    }
    return report.SeedResult(
        chosen={report.ADAM: how, report.LANGEVIN: f"T = {share:g}/N"},
        outcomes={
            name: report.judge(samples, data.inputs, data.labels) for name, samples in predictors.items()
        },
        trajectory=runs[share][1],
        samples=len(runs[share][0]),
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
            f"LangevinAdam: {len(settings.temperatures)} temperatures, {settings.sampler_steps} steps each in "
            f"{settings.cycles} cycles of learning rate and temperature; PosteriorSamples averages.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fekernels demo", description=__doc__)
    parser.add_argument("--seeds", type=int, help="random splits and initialisations (default 5, quick 2)")
    parser.add_argument("--out", type=Path, default=Path("fekernels_demo.png"), help="where the figure goes")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that everything runs")
    arguments = parser.parse_args(argv)
    seeds = arguments.seeds if arguments.seeds is not None else 2 if arguments.quick else 5
    if seeds < 1:
        parser.error(f"--seeds must be at least 1; got {seeds}")
    if not arguments.out.parent.is_dir():
        parser.error(f"--out must be in a directory that exists; got {arguments.out}")
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()
    # Looks for the compiled kernels, and compiles them where this is their first use.
    kernels = backends()["langevin_adam_", "cpu"].in_use
    print(f"{introduction(settings, seeds)}\nLangevinAdam runs on the {kernels} backend.", flush=True)
    pairs = len(settings.learning_rates) * len(settings.weight_decays)
    steps = pairs * settings.adam_steps + len(settings.temperatures) * settings.sampler_steps
    threads = torch.get_num_threads()
    results = []
    with tqdm(total=seeds * steps, unit="step", smoothing=0.05) as bar:
        try:
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
    print(f"\nFigure: {arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0
