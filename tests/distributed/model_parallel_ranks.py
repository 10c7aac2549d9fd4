"""What each process does inside Lightning's ModelParallelStrategy: FSDP2, samples that all collect, a resumed run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fekernels as fe

ROWS, BATCH, EPOCHS = 48, 8, 4


class Sharded(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
        self.rows = TensorDataset(x, x[:, :3].argmax(1))

    def configure_model(self) -> None:
        if not isinstance(self.net, torch.distributed.fsdp.FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size
        sampler = DistributedSampler(self.rows, world, self.trainer.global_rank, seed=0)
        return DataLoader(self.rows, BATCH // world, sampler=sampler)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = fe.LangevinAdam(
            self.parameters(), lr=1e-2, temperature=1e-2, prior_precision=1e-2, anchor="init", seed=0
        )
        temperature = fe.optim.CosineTemperature(optimizer, 40, burn_in=5)
        return [optimizer], [{"scheduler": temperature, "interval": "step"}]


class Collect(pl.Callback):
    """As the page says: made once there is a group and the model is sharded, and called by every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.refused = folder, ""

    def on_fit_start(self, trainer: pl.Trainer, module: Sharded) -> None:
        self.samples = fe.PosteriorSamples(
            module.net, burn_in=6, thinning=3, directory=self.folder, process_group=dist.group.WORLD
        )
        if trainer.is_global_zero:  # as of replicas; here it would wait for ever
            try:
                fe.PosteriorSamples(module.net, burn_in=10**6).update(step=1)
            except ValueError as error:
                self.refused = str(error)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.samples.update(step=trainer.global_step)


def fit(folder: Path, epochs: int, checkpoint: Path | None = None) -> tuple[list[torch.Tensor], Collect]:
    module, collect = Sharded(), Collect(folder / "samples")
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=2, logger=False, enable_progress_bar=False,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=[collect, ModelCheckpoint(folder, save_last=True)], enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=checkpoint)
    whole: Any = [p.full_tensor() for p in module.parameters()]
    return whole, collect


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path)
    folder = parser.parse_args().folder
    weights, collected = fit(folder / "whole", EPOCHS)
    fit(folder / "resumed", EPOCHS // 2)
    again, others = fit(folder / "resumed", EPOCHS, folder / "resumed" / "last.ckpt")
    same = all(torch.equal(p, q) for p, q in zip(weights, again, strict=True))
    pairs = zip(collected.samples, others.samples, strict=True)
    same &= all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    os.write(1, f"\nsharded, {len(others.samples)} samples on rank {dist.get_rank()}: {same}\n".encode())
    if collected.refused:
        os.write(1, f"\nrefused: {collected.refused}\n".encode())


if __name__ == "__main__":
    main()
