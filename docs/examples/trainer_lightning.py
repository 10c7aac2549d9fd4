"""Sampling inside Lightning: ``python docs/examples/trainer_lightning.py [--quick]``.

A network on scikit-learn's digits is trained by Adam, then sampled at T = 1/N, its samples collected by a callback.
The run is done twice: as a whole, and stopped in its middle and resumed by a new Trainer with a new module and a new
optimizer, which ends at the same bits. Three places differ from a script for Adam; they are marked. It runs on
several processes too, where all need to know one folder:

    torchrun --nproc-per-node 2 docs/examples/trainer_lightning.py --folder runs

Needs the packages lightning and scikit-learn.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fekernels as fe

N, BATCH, LR = 1400, 100, 2e-3
STEPS = N // BATCH  # of an epoch


class Digits(pl.LightningModule):
    def __init__(self, rows: TensorDataset, cold: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
        self.rows, self.cold = rows, cold

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:
        # Lightning restores the epoch and no random generator, so that the order of rows must be the epoch's alone.
        # Every number of processes gets the same batches, in equal parts.
        world = self.trainer.world_size
        sampler = DistributedSampler(self.rows, world, self.trainer.global_rank, seed=0)
        return DataLoader(self.rows, BATCH // world, sampler=sampler)

    def configure_optimizers(self) -> tuple[list, list]:
        # 1. The optimizer: of a mean loss over N rows, T = 1/N is the posterior.
        optimizer = fe.LangevinAdam(
            self.parameters(), lr=LR, temperature=1 / N, prior_precision=1 / N, seed=0
        )
        # 2. Its temperature: Adam first. Lightning steps schedules by epochs unless it is told otherwise.
        temperature = fe.optim.ConstantTemperature(optimizer, burn_in=self.cold)
        return [optimizer], [{"scheduler": temperature, "interval": "step"}]


class Collect(pl.Callback):
    """3. The samples. global_step counts steps of the optimizer, whatever is accumulated, also of a resumed run."""

    def __init__(self, samples: fe.PosteriorSamples) -> None:
        self.samples = samples

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.is_global_zero:  # replicas are equal to the bit: one of them collects
            self.samples.update(step=trainer.global_step)


def run(
    rows: TensorDataset, epochs: int, folder: Path, stop: int | None = None, resume: bool = False
) -> tuple[Digits, fe.PosteriorSamples]:
    module = Digits(rows, cold=epochs // 4 * STEPS)
    samples = fe.PosteriorSamples(
        module.net, burn_in=epochs * STEPS // 3, thinning=STEPS // 2, directory=folder / "samples"
    )
    trainer = pl.Trainer(
        max_epochs=stop or epochs, accelerator="cpu", devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        callbacks=[Collect(samples), ModelCheckpoint(folder, save_last=True)],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=folder / "last.ckpt" if resume else None)
    return module, samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 epochs instead of 100")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small lose time to a second thread
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=".*num_workers.*|.*treespec.*|.*is not empty.*|.*samples are worth about.*"
    )

    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:N], order[N:]
    epochs = 4 if options.quick else 100
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        rows = TensorDataset(x[train], y[train])
        module, samples = run(rows, epochs, folder / "whole")
        run(rows, epochs, folder / "resumed", stop=epochs // 2)
        again, others = run(rows, epochs, folder / "resumed", resume=True)

        rank = module.trainer.global_rank
        same = all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))
        print(
            f"rank {rank} of {module.trainer.world_size}: the resumed run's weights are equal to the bit: {same}"
        )
        if rank == 0:
            with torch.no_grad():
                last = F.cross_entropy(module.net(x[test]), y[test])
            average = F.nll_loss(samples.predict(x[test]).log_mean, y[test])
            print(f"test NLL: last weights {last:.4f}, average of {len(samples)} samples {average:.4f}")
            same &= all(torch.equal(a[k], b[k]) for a, b in zip(samples, others, strict=True) for k in a)
            print(f"the resumed run's {len(others)} samples are equal to the bit: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
