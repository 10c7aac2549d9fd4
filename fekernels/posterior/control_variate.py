"""Minibatch gradients with most of their noise taken out: Baker, Fearnhead, Fox & Nemeth 2019 (arXiv:1706.05439)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fekernels._loader_batches import check_batches, rows
from fekernels._runtime.parts import check_unsharded, drop_copies, is_sharded
from fekernels._runtime.ranks import exchange
from fekernels._runtime.torch_internals import uncompiled
from fekernels.posterior.chains import Chains, LossFunction
from fekernels.posterior.model_calls import bare

__all__ = ["ControlVariate", "full_gradient", "gradients"]


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of a loss by parameters, zeros where it does not depend on one.

    In the parameters' layout, as backward() stores them: those of stacked layers come transposed, which costs a step of
    the optimizer ten times what copying them does.
    """
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g.contiguous() if p.is_contiguous() else g
        for p, g in zip(parameters, found, strict=True)
    ]


def full_gradient(
    owner: str, model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any]
) -> tuple[list[Tensor], int]:
    """The gradient of the mean loss over all data points of a loader, every point counting the same; their number."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    points = 0
    for batch in loader:
        count = rows(owner, batch)
        with torch.enable_grad():
            found = gradients(loss_fn(model, batch), parameters)
        for t, g in zip(total, found, strict=True):
            t.add_(g, alpha=count)
        points += count
    if not points:
        raise ValueError(f"{owner}: loader must hold a batch; got none")
    return [t.div_(points) for t in total], points


class ControlVariate:
    """Gradients g_B(theta) - g_B(centre) + g(centre), whose noise is small near the centre.

        control = fe.ControlVariate(model, loss_fn, loader)       # a pass over the data: the gradient at the centre
        for batch in loader:
            control.backward(batch)                               # in place of loss.backward()
            optimizer.step()

    The mean is that of g_B(theta), the variance that of a difference: 0 at the centre, and growing with the square of
    the distance from it. So a sampler near trained weights may take steps that plain minibatches forbid; far from them
    the difference is noisier than the gradient. `fe.sample_posterior` measures which it is.

    Args:
        model: the network, or `fe.Chains` of several, whose weights as they are now are the centre; of chains, their
            mean.
        loss_fn: loss_fn(model, batch), the mean loss over the batch.
        loader: an iterable of batches that starts anew every time: the data whose full gradient is taken.

    Of a model in DistributedDataParallel every rank gives its own batches and its own part of the data as ``loader``.
    Gradients, the full one too, are then the mean over the ranks, as DDP's are, so that replicas stay equal: to make
    the object, `recentre` and `backward` are collectives, and losses stay each rank's own. loss_fn is given the model
    that was wrapped. One that ``fully_shard`` shards is refused.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, model: nn.Module | Chains, loss_fn: LossFunction, loader: Iterable[Any]) -> None:
        if not isinstance(model, (nn.Module, Chains)):
            raise TypeError(
                f"ControlVariate: model must be a torch.nn.Module or fe.Chains; got {type(model).__name__}"
            )
        if isinstance(model, Chains) and any(map(is_sharded, model.parameters())):
            raise ValueError(
                "ControlVariate: model must be chains of one process, whose mean is the centre; got chains over ranks"
            )
        if not callable(loss_fn):
            raise TypeError(f"ControlVariate: loss_fn must be callable; got {type(loss_fn).__name__}")
        check_batches("ControlVariate", loader)
        self._model = model if isinstance(model, Chains) else bare(model)
        if isinstance(self._model, nn.Module):
            check_unsharded("ControlVariate", self._model, parallel=True)
        self._group = _group_of_replicas(model)
        self._loss_fn, self._loader = loss_fn, loader
        self._centre: nn.Module = (
            self._model.model() if isinstance(self._model, Chains) else copy.deepcopy(self._model)
        )
        self._points = 0
        self.recentre()

    @property
    def full_gradient(self) -> list[Tensor]:
        """The gradient of the mean loss over the loader's data at the centre, a tensor for each parameter."""
        return [g.clone() for g in self._full]

    def recentre(self) -> None:
        """Make the present weights the centre (of chains, their mean); a pass over the data."""
        with torch.no_grad():
            for own, now in zip(self._of_centre(), self._parameters(), strict=True):
                own.copy_(now.mean(0) if isinstance(self._model, Chains) else now)
        drop_copies(self._of_centre())
        self._full, self._points = full_gradient("ControlVariate", self._centre, self._loss_fn, self._loader)
        self._average(self._full)

    def _average(self, tensors: list[Tensor]) -> None:
        """Over the ranks of a model in DistributedDataParallel, in place: one all-reduce for each dtype."""
        if self._group is None:
            return
        alike: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for together in alike.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in together]) / dist.get_world_size(self._group)
            exchange("ControlVariate", dist.all_reduce, flat, group=self._group)
            for tensor, part in zip(together, flat.split([t.numel() for t in together]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _of_centre(self) -> list[nn.Parameter]:
        return [p for p in self._centre.parameters() if p.requires_grad]

    def backward(self, batch: Any) -> Tensor:
        """Write ``.grad`` of every parameter, and return the loss of the batch ([n] for chains), detached.

        Random layers draw the same at both positions, else their noise would be in the difference.
        """
        parameters = self._parameters()
        with torch.enable_grad(), _replayed(parameters[0].device) as again:
            if isinstance(self._model, Chains):
                loss = self._model.losses(self._loss_fn, batch)
            else:
                loss = self._loss_fn(self._model, batch)
            found = gradients(loss.sum(), parameters)
            again()
            at_centre = gradients(self._loss_fn(self._centre, batch), self._of_centre())
        if self._group is None:
            for p, g, there, full in zip(parameters, found, at_centre, self._full, strict=True):
                p.grad = g.add_(full - there)
            return loss.detach()
        differences = [g.sub_(there) for g, there in zip(found, at_centre, strict=True)]
        self._average(differences)
        for p, difference, full in zip(parameters, differences, self._full, strict=True):
            p.grad = difference.add_(full)
        return loss.detach()


def _group_of_replicas(model: nn.Module | Chains) -> Any:
    """The process group of a DistributedDataParallel of several ranks, that may be compiled; else None."""
    inner = uncompiled(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, DistributedDataParallel) or dist.get_world_size(inner.process_group) == 1:
        return None
    return inner.process_group


@contextmanager
def _replayed(device: torch.device) -> Iterator[Any]:
    """What it gives is called to draw again, from torch's generators, what was drawn since."""
    states = [torch.get_rng_state()]
    on_gpu = device.type == "cuda"
    if on_gpu:
        states.append(torch.cuda.get_rng_state(device))

    def again() -> None:
        torch.set_rng_state(states[0])
        if on_gpu:
            torch.cuda.set_rng_state(states[1], device)

    yield again
