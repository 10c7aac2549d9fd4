"""Several copies of a network side by side: one call of the model, one step of the optimizer for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._checks import boolean, integer, number
from fekernels._loader_batches import map_tensors, stacked, stacked_if_alike
from fekernels._runtime.agreement import NOTHING, BatchDigest, agree, bits_of, tensors_digest
from fekernels._runtime.parts import check_unsharded, local_tensor
from fekernels._runtime.ranks import chunk_of_rank, group_of
from fekernels._runtime.torch_internals import uncompiled
from fekernels.posterior.chain_gradients import StackedGradients
from fekernels.posterior.model_calls import tied_names

__all__ = ["Chains", "LossFunction"]

LossFunction = Callable[[Any, Any], Tensor]
State = dict[str, Tensor]

# Of the noise that moves the chains apart: not a stream that an optimizer gives its parameters, which count from 0.
JITTER = 0xFFFFFFFE
WEIGHTS = "model (names, shapes, weights and buffers)"
BATCH = (
    "batch (of all the data: chains are split over ranks, data are not; minibatches by one seed, or with each=True one "
    "for each chain)"
)
# Weights; 16 chains of a network of three layers, two threads, at once and one by one: 9 and 11 ms a step with 8.5e4
# weights each, 20 and 18 with 1.8e5, 35 and 25 with 3e5, 96 and 75 with 1e6. More layers cost more calls.
LARGE = 1 << 18


class _Loss(nn.Module):
    """``loss_fn(model, batch)`` as a module, so that functional_call can put other weights into the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def _agree(group: Any, model: nn.Module, n: int, seed: int, jitter: Any, names: Any, vectorize: Any) -> None:
    """ValueError on every rank where they were not given the same."""
    if group is None:
        return
    if isinstance(jitter, Mapping):
        parts = sorted(jitter.items())
        jitter = {k: bits_of(v) if isinstance(v, Tensor) else v for k, v in parts}
    values = {
        "n": n, "seed": seed, "jitter": jitter, "vectorize": vectorize,
        "names": sorted(names) if isinstance(names, Collection) else names,
        WEIGHTS: tensors_digest((*model.named_parameters(), *model.named_buffers())),
    }  # fmt: skip
    agree("Chains", values, group, digests=[WEIGHTS])


class Chains:
    """n copies of a network as stacked tensors, which one optimizer steps at once.

        chains = fe.Chains(model, 4)
        optimizer = fe.LangevinAdam(chains.parameters(), temperature=1 / N, prior_precision=1 / N)
        for batch in loader:
            optimizer.zero_grad()
            chains.losses(loss_fn, batch).sum().backward()   # the sum: each chain gets its own loss's gradient
            optimizer.step()

    The noise of an element comes from its index in the stacked tensor: every chain has noise of its own, and the first
    k chains go the same way whatever n is. The model is called once for all chains (`torch.vmap`); random layers draw
    for each chain apart.

    Args:
        model: the network; copied, never written. Parameters that require no gradient are shared by the chains, buffers
            are each chain's own.
        n: number of chains, >= 1.
        jitter: standard deviation of the Gaussian noise that is added to every weight of every chain at the start: a
            number, or a mapping from names to numbers or tensors of the parameters' shapes. R-hat can only see what
            lies between the starts.
        names: of the parameters that every chain has of its own; None: all that require a gradient. The others are
            shared and stand still.
        vectorize: True calls the model once for all chains, False chain by chain, for models that `torch.vmap` cannot
            take. None: once, but for large networks on a CPU, whose products of matrices are faster one by one.
        seed: of the jitter.
        process_group: split the chains over its ranks. A ``ProcessGroup``, such as ``torch.distributed.group.WORLD``,
            or a ``DeviceMesh`` of one dimension, whose group's order is that of the chains. None: all of them are here.
            Every rank must make the object, a collective, of the same model, weights and arguments: these are compared,
            the weights by a digest.

    Over ranks the stacked parameters are DTensors, [n, *shape] in the whole, of which a rank holds whole chains, as
    ``torch.chunk`` splits n: ranks at the end may have none. So each chain has the noise that it has on one process,
    and the same bits where the model's are (with ``vectorize=False``; a product of stacked matrices may depend on how
    many they are). Calls, losses and states are those of this rank's chains, and no step but the first sends anything.
    Checkpoints of ``torch.distributed.checkpoint`` load on any number of ranks; ``fe.diagnostics`` compares the chains
    of all.

    Attributes:
        n (int): how many chains are here.
        numbers (range): which of all chains they are.
        total (int): how many there are on all ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; on every rank where one of them
            was given another.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int,
        *,
        jitter: float | Mapping[str, float | Tensor] = 0.0,
        names: Collection[str] | None = None,
        vectorize: bool | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Chains: model must be a torch.nn.Module; got {type(model).__name__}")
        check_unsharded("Chains", model)
        self.total = integer("Chains", "n", n, 1, 1 << 31)
        group = group_of("Chains", process_group)
        self.numbers = chunk_of_rank(self.total, group)
        self.n = len(self.numbers)
        seed = integer("Chains", "seed", seed, -(1 << 63), 1 << 64)
        _agree(group, model, self.total, seed, jitter, names, vectorize)
        self._model = copy.deepcopy(uncompiled(model))
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("Chains: model must have a parameter that requires a gradient; got none")
        if names is not None:
            if isinstance(names, str) or not isinstance(names, Collection):
                raise TypeError(f"Chains: names must be a collection of strings; got {type(names).__name__}")
            unknown = [name for name in names if name not in trained]
            if unknown or not names:
                raise ValueError(
                    "Chains: names must be of parameters of the model that require a gradient; got "
                    + (repr(unknown[0]) if unknown else "none")
                )
            for name in set(trained).difference(names):
                trained.pop(name).requires_grad_(False)
        if vectorize is None:
            large = sum(p.numel() for p in trained.values()) >= LARGE
            vectorize = not (large and next(iter(trained.values())).device.type == "cpu")
        self.vectorize = boolean("Chains", "vectorize", vectorize)
        self._parameters = {
            name: nn.Parameter(self._stacked(p.detach(), group, process_group)) for name, p in trained.items()
        }
        self._buffers = {
            name: b.detach().repeat(self.n, *(1 for _ in b.shape)) for name, b in self._model.named_buffers()
        }
        self._unchecked = group is not None  # ranks that have not compared a batch yet
        self._tied = tied_names(self._model)  # to look for them costs a small model as much as its call
        self._gradients = StackedGradients()
        if isinstance(jitter, Mapping):
            unknown = sorted(set(jitter) - set(trained))
            if unknown:
                raise ValueError(f"Chains: jitter must name parameters of the model; got {unknown[0]!r}")
        else:
            jitter = dict.fromkeys(trained, number("Chains", "jitter", jitter))
        self._disperse(jitter, seed)

    def _stacked(self, p: Tensor, group: Any, process_group: Any) -> Tensor:
        copies = p.repeat(self.n, *(1 for _ in p.shape))
        if group is None:
            return copies
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        mesh = process_group
        # Numbers, starts and diagnostics go by the rank in the group, a DTensor's noise by the coordinate in the mesh.
        if not isinstance(mesh, DeviceMesh) or mesh.mesh.tolist() != dist.get_process_group_ranks(group):
            mesh = DeviceMesh.from_group(group, p.device.type)
        shape = torch.Size((self.total, *p.shape))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(copies, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _here(self) -> State:
        """The stacked parameters of the chains that are here: of DTensors views, through which gradients go back."""
        here = {name: local_tensor(p) for name, p in self._parameters.items()}
        for name, tensor in here.items():
            if tensor is not self._parameters[name] and tensor.requires_grad:
                # A DTensor's gradient of other strides is laid out anew, by operators that may gather all of it.
                tensor.register_hook(Tensor.contiguous)
        return here

    @torch.no_grad()
    def _disperse(self, scales: Mapping[str, float | Tensor], seed: int) -> None:
        for i, (name, copies) in enumerate(self._here().items()):
            scale = scales.get(name, 0.0)
            if isinstance(scale, Tensor) or scale:
                offset = self.numbers.start * copies.shape[1:].numel()
                noise = random.normal(
                    copies.shape, seed=seed, stream=JITTER, step=i, offset=offset, device=copies.device
                )
                copies.add_(noise.to(copies.dtype) * scale)

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self._parameters.values()) // self.total
        here = f", {self.n} of them here" if self.n < self.total else ""
        return f"Chains({self.total} of {type(self._model).__name__}, {count:,} weights each{here})"

    def parameters(self) -> Iterator[nn.Parameter]:
        """The stacked parameters, [n, *shape] each, in the order of the model's; over ranks DTensors of all chains."""
        return iter(self._parameters.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with the model's names."""
        return iter(self._parameters.items())

    def train(self, mode: bool = True) -> Chains:
        """Training mode of the copied model, as `torch.nn.Module.train`; at first it is the model's own."""
        self._model.train(mode)
        return self

    def eval(self) -> Chains:
        return self.train(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What each chain returns for the same inputs: the model's answer with a first dimension of n."""
        return self._call(self._model, "", args, kwargs, None)

    def losses(self, loss_fn: LossFunction, batch: Any, *, each: bool = False) -> Tensor:
        """[n]: ``loss_fn(model, batch)``, a scalar, with every chain's weights, of those that are here.

        Args:
            batch: what loss_fn takes, the same for all chains, on every rank.
            each: ``batch`` is a sequence of n batches, one for each chain.

        Over ranks the first call with gradients and without ``each`` is a collective, which compares the batches.

        Raises:
            ValueError: another number of batches than chains; a loss that is no scalar; on all ranks, where that first
                batch is not the same on all. Nothing sees later ones, nor those of each=True: give no rank its own
                rows alone, as a DistributedSampler does, or its chains sample another posterior than the others.
        """
        if self._unchecked and not each and torch.is_grad_enabled():
            self._unchecked = False
            group = next(self.parameters()).device_mesh.get_group()  # type: ignore[attr-defined]
            agree(
                "Chains.losses", {BATCH: BatchDigest()(batch) if self.n else NOTHING}, group, digests=[BATCH]
            )
        module = _Loss(self._model, loss_fn)
        if self.n == 0:  # that a step is made here too, and counted
            return torch.cat([p.flatten() for p in self._here().values()])
        if not each:
            losses = self._call(module, "model.", (batch,), {}, None)
        elif len(batch) != self.n:
            raise ValueError(
                f"Chains.losses: batch must be {self.n} batches with each=True; got {len(batch)}"
            )
        elif self.vectorize and (together := stacked_if_alike(batch)) is not None:
            losses = self._call(module, "model.", (together,), {}, 0)
        else:
            losses = self._call_each(module, "model.", [(one,) for one in batch], {})
        if not isinstance(losses, Tensor) or losses.shape != (self.n,):
            came = tuple(losses.shape[1:]) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"Chains.losses: loss_fn must return a scalar tensor; got {came}")
        return losses

    def _call(
        self,
        module: nn.Module,
        prefix: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_dim: int | None,
    ) -> Any:
        if self.n == 0:
            with torch.no_grad():
                one_answer = module(*args, **kwargs)
            return map_tensors(lambda tensor: tensor.new_empty((0, *tensor.shape)), one_answer)
        if not self.vectorize:
            return self._call_each(module, prefix, [args] * self.n, kwargs)

        tensors: State = {**self._here(), **self._buffers}
        names = [prefix + name for name in tensors]

        def one(own: tuple[Tensor, ...], args: tuple[Any, ...]) -> Any:
            state = dict(zip(names, own, strict=True))
            return torch.func.functional_call(module, state, args, kwargs, tie_weights=bool(self._tied))

        mapped = torch.vmap(one, in_dims=(0, in_dim), randomness="different")
        return mapped(tuple(tensors.values()), args)

    def _call_each(
        self, module: nn.Module, prefix: str, args: Sequence[tuple[Any, ...]], kwargs: dict[str, Any]
    ) -> Any:
        tensors: State = {**self._here(), **self._buffers}
        unbound, calling = self._gradients.unbind(tensors)
        ties = bool(self._tied)
        states = [{prefix + name: parts[k] for name, parts in unbound.items()} for k in range(self.n)]
        with calling:
            answers = [
                torch.func.functional_call(module, state, its, kwargs, tie_weights=ties)
                for state, its in zip(states, args, strict=True)
            ]
        return stacked(answers)

    def origin(self, n: int) -> Chains:
        """n copies that share the weights which the model had when the chains were made: what they started from."""
        found = copy.copy(self)
        found._gradients = StackedGradients()
        found.n = found.total = n
        found._unchecked = False
        found.numbers, found._parameters = range(n), {}
        found._buffers = {
            name: b.detach().repeat(n, *(1 for _ in b.shape)) for name, b in self._model.named_buffers()
        }
        return found

    def first(self, n: int) -> Chains:
        """The first n of them, none even, as chains of their own with copies of their weights."""
        found = copy.copy(self)
        found._gradients = StackedGradients()
        found.n = found.total = n
        found._unchecked = False
        found.numbers = range(n)
        found._parameters = {
            name: nn.Parameter(p.detach()[:n].clone()) for name, p in self._parameters.items()
        }
        found._buffers = {name: b[:n].clone() for name, b in self._buffers.items()}
        return found

    def model(self) -> nn.Module:
        """A copy of the network, with the weights that it had when the chains were made."""
        return copy.deepcopy(self._model)

    def states(self) -> list[State]:
        """The weights and buffers of each chain, as `load_state_dict` of the model takes them; copies."""
        saved = self._model.state_dict()
        own = {**self._here(), **self._buffers}
        names = {name: self._tied.get(name, name) for name in saved}
        return [
            {name: own[of][k].detach().clone() if of in own else saved[name] for name, of in names.items()}
            for k in range(self.n)
        ]
