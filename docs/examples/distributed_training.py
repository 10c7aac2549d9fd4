"""A network sampled by FSDP2 and LangevinAdam, saved halfway, and gone on with by fewer processes:

    torchrun --nproc-per-node 4 docs/examples/distributed_training.py [--quick]
    python docs/examples/distributed_training.py [--quick]

scikit-learn's digits; each rank learns from its share of every batch. All ranks train to the end, and save on the way.
Then half of the ranks load what was saved, then rank 0 alone, and go on. Two things are compared with the run that
never stopped: the noise of a step, of which no bit may differ, and the weights, but for how gradients' sums round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fekernels as fe

TRAINED, BATCH = 1437, 240  # digits; those of one step, of all ranks
GPU = torch.cuda.is_available()
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which it is for one process
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if GPU else torch.device("cpu")


def data() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and digits, in a random order."""
    x, y = (torch.tensor(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order] / 16).float().to(DEVICE), y[order].to(DEVICE)


class Training:
    """A network on the ranks of ``mesh``; on one process, without a mesh, the same lines without ``fully_shard``."""

    def __init__(self, mesh: DeviceMesh | None, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.net: nn.Module = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 10)).to(DEVICE)
        if mesh is not None:
            fully_shard(self.net, mesh=mesh)
        self.ranks, self.rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
        self.group = None if mesh is None else mesh.get_group()
        self.optimizer = fe.LangevinAdam(
            self.net.parameters(), lr=2e-3, temperature=1 / TRAINED, prior_precision=1 / TRAINED, eps=1e-4,
            anchor="init", seed=seed,
        )  # fmt: skip
        self.schedule = fe.optim.CosineTemperature(self.optimizer, 2 * steps)

    def train(self, x: Tensor, y: Tensor, begin: int, steps: int) -> None:
        for step in range(begin, begin + steps):
            rows = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(step))[:BATCH]
            mine = rows.tensor_split(self.ranks)[self.rank]
            self.optimizer.zero_grad()
            # FSDP averages over ranks: shares of different lengths count by their rows.
            (F.cross_entropy(self.net(x[mine]), y[mine], reduction="sum") * (self.ranks / BATCH)).backward()
            self.optimizer.step()
            self.schedule.step()

    def state(self) -> dict[str, object]:
        weights, of_optimizer = get_state_dict(self.net, self.optimizer)
        return {"model": weights, "optimizer": of_optimizer, "schedule": self.schedule.state_dict()}

    def save(self, folder: Path) -> None:
        """In a folder of its own: into an older one, a rank that ends on the way leaves parts of two steps."""
        own = folder / f"step-{self.schedule.last_epoch:08d}"
        dcp.save(self.state(), checkpoint_id=own, process_group=self.group, no_dist=self.group is None)

    def load(self, folder: Path) -> None:
        """The last that is whole: ``.metadata`` is written once all ranks have written their parts."""
        state, newest = self.state(), max(path.parent for path in folder.glob("step-*/.metadata"))
        dcp.load(state, checkpoint_id=newest, process_group=self.group, no_dist=self.group is None)
        set_state_dict(
            self.net, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.schedule.load_state_dict(state["schedule"])

    def weights(self) -> Tensor:
        """All of them, on every rank."""
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.net.parameters()]
        return torch.cat([p.detach().flatten() for p in whole])

    def noise(self) -> Tensor:
        """What a step adds to 0 without a gradient: the noise alone."""
        for p in self.net.parameters():
            p.detach().zero_()
            p.grad = torch.zeros_like(p)
        fe.SGLD(self.net.parameters(), lr=0.5, seed=0).step()
        return self.weights()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps instead of 400")
    steps = 10 if parser.parse_args().quick else 200
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if GPU else "gloo")
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    x, y = data()
    box = [tempfile.mkdtemp() if rank == 0 else ""]
    if world > 1:
        dist.broadcast_object_list(box)
    folder = Path(box[0])
    # A mesh is made by all ranks together, also where it is of some of them.
    sizes = sorted({world, max(1, world // 2), 1}, reverse=True)
    meshes = {size: DeviceMesh(DEVICE.type, list(range(size))) if world > 1 else None for size in sizes}

    whole = Training(meshes[world], 1, steps)
    whole.train(x, y, 0, steps)
    whole.save(folder)
    whole.train(x, y, steps, steps)
    weights, correct = whole.weights(), (whole.net(x[TRAINED:]).argmax(1) == y[TRAINED:]).float().mean()
    noise = whole.noise()
    if rank == 0:
        print(f"{world} ranks, {2 * steps} steps: {correct:.1%} of {len(x) - TRAINED} other digits right\n")
        print("| went on, from the middle | noise of another bit | largest difference of a weight |")
        print("|---|---|---|")
    differing = 0
    for size in sizes:
        if rank < size:
            resumed = Training(meshes[size] if size > 1 else None, 2, steps)  # all of it is to be loaded
            resumed.load(folder)
            resumed.train(x, y, steps, steps)
            apart = (resumed.weights() - weights).abs().max()
            bits = int((resumed.noise().view(torch.int32) != noise.view(torch.int32)).sum())
            if rank == 0:
                print(f"| {size} of {world} | {bits} of {noise.numel()} weights | {apart:.1e} |")
                differing += bits
    if rank == 0:
        shutil.rmtree(folder)
    if world > 1:
        dist.barrier()  # rank 0 goes on alone at the end, and the others must not leave it the groups that they share
        dist.destroy_process_group()
    return int(differing > 0)


if __name__ == "__main__":
    raise SystemExit(main())
