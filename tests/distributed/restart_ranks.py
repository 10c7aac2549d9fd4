"""What ``torchrun --max-restarts 1`` starts: the example's training, which saves and collects. Rank 1 is killed once.

It is killed while it writes a checkpoint, by which time samples are kept that are newer than the last whole one.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

import fekernels as fe
from tests.support import ROOT

STEPS, EVERY, KILLED_AT = 12, 4, 8
EXAMPLE = runpy.run_path(str(ROOT / "docs" / "examples" / "distributed_training.py"))


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tensors_of(folder: Path, attempt: int) -> Iterator[torch.Tensor]:
    """Weights at the end, this rank's, and all samples: of a run from its start, or from where it has come to."""
    x, y = EXAMPLE["data"]()
    training = EXAMPLE["Training"](init_device_mesh("cpu", (dist.get_world_size(),)), 1, STEPS)
    samples = fe.PosteriorSamples(
        training.net, burn_in=2, thinning=3, directory=folder / "samples", process_group=dist.group.WORLD
    )
    if any(folder.glob("step-*/.metadata")):
        training.load(folder)
    begin = training.schedule.last_epoch
    if dist.get_rank() == 0:
        told = f"attempt {attempt}, {folder.name}: from step {begin}, {samples.calls} counted"
        os.write(1, f"\n{told}\n".encode())
    for step in range(begin, STEPS):
        training.train(x, y, step, 1)
        samples.update(step=step + 1)
        if (step + 1) % EVERY == 0:
            if attempt == 0 and step + 1 == KILLED_AT and dist.get_rank() == 1:
                FileSystemWriter.write_data = die
            training.save(folder)
    yield training.weights()
    for sample in samples:
        yield from sample.values()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    folder, attempt = parser.parse_args().folder, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    found, whole = (list(tensors_of(folder / name, attempt)) for name in ("killed", "whole"))
    same = len(found) == len(whole) and all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    os.write(1, f"\nrank {dist.get_rank()}: {len(found)} tensors are equal to the bit: {same}\n".encode())
    dist.barrier()
    if dist.get_rank() == 0:
        time.sleep(0.5)  # the store is in this process, and the other's threads still read it
    os._exit(0)  # torch 2.14 now and then aborts at the end of rank 1 ("terminate called"), where all is said


if __name__ == "__main__":
    main()
