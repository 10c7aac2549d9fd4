"""Sampling inside a loop of Accelerate: ``python docs/examples/trainer_accelerate.py [--quick]``.

A network on scikit-learn's digits is trained by Adam, then sampled at T = 1/N, its samples collected on the way. The
run is done twice: as a whole, and stopped within an epoch and resumed by a new Accelerator with a new model and a new
optimizer, which ends at the same bits. Each step accumulates the gradients of two batches. Then ``fe.VariationalAdam``
learns a Gaussian over the weights in the same loop. Three places differ from a script for Adam; they are marked. It
runs on several processes too, where all need to know one folder:

    torchrun --nproc-per-node 2 docs/examples/trainer_accelerate.py --folder runs

Needs the packages accelerate and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fekernels as fe

N, BATCH, PARTS = 1400, 100, 2  # a step's rows come in parts, whose gradients are accumulated


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))


def accelerator(parts: int = 1) -> Accelerator:
    # split_batches: every number of processes sees the same batches, and steps a schedule once a step. Without it
    # Accelerate steps schedules as often as there are processes.
    # use_seedable_sampler: an order that only the seed and the epoch decide is resumed.
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=0)
    return Accelerator(cpu=True, dataloader_config=loading, gradient_accumulation_steps=parts)


def batches(here: Accelerator, loader: DataLoader, first: int, last: int) -> Iterator[list]:
    """Batches number first + 1 to last, in the order that a run from the start has."""
    count = first
    with tqdm(total=last, initial=first, desc="batches", disable=not here.is_main_process) as bar:
        while count < last:
            epoch, done = divmod(count, len(loader))
            loader.set_epoch(epoch)
            for batch in here.skip_first_batches(loader, done) if done else loader:
                if count == last:
                    return
                count += 1
                yield batch
                bar.update()


def run(rows: TensorDataset, steps: int, folder: Path, stop: int | None = None, resume: bool = False):  # noqa: ANN201
    here, model = accelerator(PARTS), network()
    # 1. The optimizer: of a mean loss over N rows, T = 1/N is the posterior.
    optimizer = fe.LangevinAdam(model.parameters(), lr=2e-3, temperature=1 / N, prior_precision=1 / N, seed=0)
    # 2. Its temperature: Adam first.
    temperature = fe.optim.ConstantTemperature(optimizer, burn_in=steps // 4)
    samples = fe.PosteriorSamples(model, burn_in=steps // 3, thinning=7, directory=folder / "samples")
    loader = DataLoader(rows, BATCH // PARTS, shuffle=True)
    model, optimizer, loader, temperature = here.prepare(model, optimizer, loader, temperature)
    done = 0  # steps of the optimizer; Accelerate does not count them
    if resume:
        here.load_state(str(folder / "state"))
        done = steps // 2
    for x, y in batches(here, loader, PARTS * done, PARTS * (stop or steps)):
        with here.accumulate(model):
            here.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            temperature.step()
            optimizer.zero_grad()
        if here.sync_gradients:  # 3. The samples, of steps and not of batches.
            done += 1
            if here.is_main_process:  # replicas are equal to the bit: one of them collects
                samples.update(step=done)
    if stop:  # gradients are in no state: save where a step has just been made
        here.save_state(str(folder / "state"))
    return here, here.unwrap_model(model), samples


def learn_gaussian(rows: TensorDataset, steps: int) -> tuple[torch.nn.Module, fe.PosteriorSamples]:
    here, model = accelerator(), network()
    optimizer = fe.VariationalAdam(model.parameters(), lr=0.1, ess=N, betas=(0.9, 0.999), seed=0)
    samples, plain = (
        fe.PosteriorSamples(model),
        optimizer,
    )  # what prepare returns has step and zero_grad alone
    wrapped, optimizer, loader = here.prepare(model, optimizer, DataLoader(rows, BATCH, shuffle=True))
    for x, y in batches(here, loader, 0, steps):
        with plain.sampled_params(train=True):  # all of the step's gradient is made inside
            here.backward(F.cross_entropy(wrapped(x), y))
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(30):
        with plain.sampled_params():
            samples.collect()
    return model, samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="30 steps instead of 1,400")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small lose time to a second thread
    warnings.filterwarnings("ignore", message=".*samples are worth about.*|.*pin_memory.*")

    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:N], order[N:]
    steps, rows = 30 if options.quick else 1400, TensorDataset(x[train], y[train])
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        here, model, samples = run(rows, steps, folder / "whole")
        run(rows, steps, folder / "resumed", stop=steps // 2)
        _, again, others = run(rows, steps, folder / "resumed", resume=True)

        rank = here.process_index
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        print(f"rank {rank} of {here.num_processes}: the resumed run's weights are equal to the bit: {same}")
        mean, draws = learn_gaussian(rows, steps)
        if rank == 0:
            for name, net, kept in (("LangevinAdam", model, samples), ("VariationalAdam", mean, draws)):
                with torch.no_grad():
                    last = F.cross_entropy(net(x[test]), y[test])
                average = F.nll_loss(kept.predict(x[test]).log_mean, y[test])
                print(
                    f"test NLL, {name}: its weights {last:.4f}, average of {len(kept)} samples {average:.4f}"
                )
            same &= all(torch.equal(a[k], b[k]) for a, b in zip(samples, others, strict=True) for k in a)
            print(f"the resumed run's {len(others)} samples are equal to the bit: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
