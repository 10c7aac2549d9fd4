"""What each gloo process does with torch.distributed.checkpoint: saves as it trains, or loads and goes on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fekernels as fe
from tests.distributed.mesh_ranks import part
from tests.distributed.optimizer_ranks import gradient

FIRST, SECOND = 3, 3  # steps before the checkpoint and after it
CHOICES: dict[str, tuple[Any, dict[str, Any]]] = {
    "LangevinAdam": (
        fe.LangevinAdam,
        dict(lr=0.05, temperature=0.5, eps=0.1, prior_precision=0.2, anchor="init"),
    ),
    "SGLD": (fe.SGLD, dict(lr=0.05, temperature=0.5, prior_precision=0.2, anchor="init")),
    "VariationalAdam": (fe.VariationalAdam, dict(lr=0.05, ess=30.0, betas=(0.8, 0.9))),
    "reparam": (fe.VariationalAdam, dict(lr=0.05, ess=30.0, betas=(0.8, 0.9), estimator="reparam")),
}
TWO_WAYS = "LangevinAdam, FSDP x TP"  # where there are four processes; fewer load it into FSDP alone
CHOICES[TWO_WAYS] = CHOICES["LangevinAdam"]
SPLITS = {"0.weight": (0, 0), "0.bias": (0, 0), "1.weight": (0, 1), "1.bias": (0, None)}
CASES = [(name, flatten) for name in CHOICES for flatten in (False, True)]


class Training:
    """A network, sharded by FSDP2 where there are several processes, with its optimizer and temperature schedule."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.kind, switches = CHOICES[name]
        self.net: Any = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1))
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.shape: tuple[int, ...] = (self.world,)
        self.splits: dict[str, Any] = dict.fromkeys(SPLITS, (0,))
        if self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            if name == TWO_WAYS and self.world == 4:
                self.shape, self.splits = (2, 2), SPLITS
            mesh = init_device_mesh("cpu", self.shape, mesh_dim_names=("dp", "tp")[: len(self.shape)])
            if len(self.shape) == 2:
                parallelize_module(self.net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
            fully_shard(self.net, mesh=mesh["dp"])
        self.optimizer = self.kind(self.net.parameters(), seed=seed, **switches)
        self.schedule = fe.optim.CosineTemperature(self.optimizer, FIRST + SECOND)

    def train(self, begin: int, count: int) -> None:
        """By given gradients, on which shards agree to the bit."""
        for i in range(begin, begin + count):
            if self.kind is fe.VariationalAdam:
                with self.optimizer.sampled_params(train=True):
                    self._differentiate(i)
            else:
                self._differentiate(i)
            if self.kind is fe.LangevinAdam and i == 2:
                self.optimizer.freeze_preconditioner()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def _differentiate(self, i: int) -> None:
        from torch.distributed.tensor import DTensor

        for key, p in self.net.named_parameters():
            grad = gradient(tuple(p.shape), i)
            if self.world > 1:
                mine = part(grad, self.shape, self.splits[key], dist.get_rank()) + p.to_local()
                p.grad = DTensor.from_local(
                    mine, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
                )
            else:
                p.grad = grad + p

    def weights(self) -> dict[str, Tensor]:
        """Whole, with the moments or whatever else has the parameter's shape."""
        found = {}
        for key, p in self.net.named_parameters():
            state = self.optimizer.state[p]
            tensors = {"": p, **{k: t for k, t in state.items() if t.shape == p.shape and t.ndim}}
            for k, t in tensors.items():
                found[f"{key} {k}"] = (
                    (t.full_tensor() if self.world > 1 and k != "noise_unit" else t).detach().clone()
                )
        return found

    def state(self, flatten: bool) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        return {
            "model": get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.optimizer, options=options),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: dict[str, Any], flatten: bool) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        set_model_state_dict(self.net, state["model"])
        set_optimizer_state_dict(self.net, self.optimizer, state["optimizer"], options=options)
        self.schedule.load_state_dict(state["schedule"])


def save(folder: str) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    results = {}
    for name, flatten in CASES:
        training = Training(name, 11)
        training.train(0, FIRST)
        dcp.save(training.state(flatten), checkpoint_id=f"{folder}/{name}-{flatten}")
        training.train(FIRST, SECOND)
        results[f"{name}-{flatten}"] = training.weights()
    return results


def load(folder: str) -> dict[str, Any]:
    """From another start, with another seed: all of it is to come from the checkpoint."""
    import torch.distributed.checkpoint as dcp

    results = {}
    for name, flatten in CASES:
        training = Training(name, 99)
        state = training.state(flatten)
        dcp.load(state, checkpoint_id=f"{folder}/{name}-{flatten}")
        training.load(state, flatten)
        training.train(FIRST, SECOND)
        results[f"{name}-{flatten}"] = training.weights()
    return results
