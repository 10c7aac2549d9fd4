"""Draws of the weights from their mean-field Gaussian: contexts, and the sums over several draws of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fekernels._catalogue.random import WEIGHT_SAMPLE
from fekernels._checks import boolean
from fekernels._runtime import backends
from fekernels._runtime.host import host
from fekernels._runtime.parts import drop_copies, is_sharded, local_tensor
from fekernels._runtime.pointer_table import PointerTable, Row
from fekernels._runtime.ranks import has_ranks
from fekernels._runtime.torch_internals import copy_all, never_traced
from fekernels.ops.optimizers import variational_accumulate, variational_draw
from fekernels.ops.optimizers.parameter_rows import check_row, group_rows, readable
from fekernels.ops.optimizers.step import StepOperation, StepSettings
from fekernels.ops.optimizers.variational_accumulate import VariationalAccumulateSettings
from fekernels.ops.optimizers.variational_draw import VariationalDrawSettings
from fekernels.ops.plain_memory import check_storage
from fekernels.optim._shards import local_gradient, sharded_rows
from fekernels.optim._state import zero_state
from fekernels.optim._table_cache import KeptSettings, TableCache
from fekernels.optim._table_optimizer import TableOptimizer
from fekernels.optim.parameter_groups import LAST_SEED

__all__ = ["WeightDraws"]

# Of the streams of draws outside training: however many are made, those of training stay the same. The hash of a name
# has 31 bits.
EVALUATION = 0x80000000
EARLY = 200  # steps before which an evaluation is a look at a beginning
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads the ranks' seeds


def _draws_of(train: bool, state: dict[str, Any]) -> Tensor:
    """What counts a parameter's draws in training contexts, or in others."""
    draws: Tensor = state["draws"]
    return draws[:1] if train else draws[1:]


class DrawTable(TableCache):
    """A group's pointer table for draws.

    Attributes:
        means: where each parameter's mean is kept.
    """

    takes_gradients = False
    means: list[Tensor]

    def restore(self) -> None:
        """Every parameter becomes its mean again, also where one cannot."""
        if self._restored_by_address():
            self.count_write()
            return
        params, means = self.live, self.means
        if self.sharded:
            params, means = list(map(local_tensor, params)), list(map(local_tensor, means))
        if params[0].device.type != "cpu":
            try:
                copy_all(params, means)
                return
            except Exception:  # at the first that it cannot: one lazily negated, or of another shape by now
                pass
        call_all(partial(_become, param, mean) for param, mean in zip(params, means, strict=True))

    def _restored_by_address(self) -> bool:
        """By one kernel, where it can: PyTorch copies one tensor after another, the small ones by one thread."""
        if self.native is None or self.tables[0].device.type != "cpu" or not self.native.holds(self.params):
            return False
        return bool(backends.native_op("restore_means")(self.tables[0].table))


def _become(param: Tensor, mean: Tensor) -> None:
    for what, tensor in (("a parameter", param), ("the mean of a parameter", mean)):
        check_storage(f"sampled_params: {what} of shape {tuple(tensor.shape)}", tensor)
    param.copy_(mean)


@dataclass(eq=False)
class SinceLastStep:
    """The draws of training contexts since the last step. (What a compiled step sets of an optimizer itself is lost.)

    Attributes:
        drawn: gradients of the last one, by group, where they are in no sum. They get there as late as they can, so
            that what clips them after backward counts.
        samples: how many are in the sums.
        summed: the parameters whose sums are of these draws; dicts of tensors torch.compile can read, sets it cannot.
    """

    drawn: list[list[Tensor | None]] | None = None
    samples: int = 0
    summed: dict[Tensor, None] = field(default_factory=dict)

    def forget(self) -> None:
        self.drawn, self.samples, self.summed = None, 0, {}


class WeightDraws(TableOptimizer):
    """An optimizer of a Gaussian over the weights, without its step."""

    _purpose = WEIGHT_SAMPLE
    _unfit_for_zero = (
        "params must be all that are drawn; got the part of one rank of ZeroRedundancyOptimizer, so that each rank "
        "would draw other weights before a forward pass (take DistributedDataParallel, or "
        "torch.distributed.fsdp.fully_shard, which shards the states too)"
    )
    _mc_samples: int
    _sync: bool
    _draw_caches: dict[tuple[int, bool], DrawTable]
    _kept_draws: dict[int, KeptSettings]
    _restored: list[DrawTable]  # whose parameters the context that is open has drawn
    _inside: str  # of which context: "training", "evaluation", or none
    _since: SinceLastStep
    _sums: dict[Tensor, tuple[Tensor, Tensor]]  # of the gradient, and of its product with the draw's normal

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mc_samples": self._mc_samples, "_sync": self._sync}

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._draw_caches, self._kept_draws = {}, {}
        self._inside, self._restored = "", []
        self._sums, self._since = {}, SinceLastStep()

    # Subclasses say what their states hold.

    def _spread(self, state: dict[str, Any]) -> tuple[Tensor, bool]:
        """What draws take the standard deviation from, and whether it is that itself."""
        raise NotImplementedError

    def _always_sums(self) -> bool:
        """Whether each step goes by the sums, also of one draw."""
        return False

    # Contexts.

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Inside, the parameters are a draw from their Gaussian; outside, its mean, to the bit.

        Args:
            train: whether ``backward`` inside gives the gradients of the next ``step``, which averages over the
                training contexts since the last. Entering takes what gradients the draw before has left, so that
                backward adds to none that are counted already. Other contexts have noise of their own: however often a
                model is evaluated, training goes on with the same.

        What FSDP2 has gathered of older weights, or autocast has cast, is dropped at both ends.

        Raises:
            TypeError: train is no bool. RuntimeError: inside another context.

        Warns:
            UserWarning: once, of shards of a torch that does not tell what FSDP2 has gathered.
        """
        # Of a wrapper that takes on its optimizer's class (Lightning's): what is set on it, its step would not see.
        self = self.__dict__.get("_optimizer", self)
        boolean("sampled_params", "train", train)
        if self._inside:
            raise RuntimeError(
                "sampled_params: must not be entered inside another context, whose draw would be taken for the mean"
            )
        with torch.no_grad():
            if train:
                self._fold()
                if self._since.samples:
                    self._let_go_of_gradients()
            self._draw(train)
        if not train:
            self._warn_of_start(EARLY, 0.9)
        self._inside = "training" if train else "evaluation"
        try:
            yield
        finally:
            self._inside = ""
            with torch.no_grad():
                self._restore()
        if not train:
            return
        self._since.drawn = self._gradients()

    def _warn_of_start(self, steps: int, share: float) -> None:
        """Where, after so many steps or more, the deviations still are by more than ``share`` those of the start."""
        raise NotImplementedError

    def _gradients(self) -> list[list[Tensor | None]]:
        return [
            [param.grad if param.requires_grad else None for param in group["params"]]
            for group in self.param_groups
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for every torch optimizer; the gradients of a draw since the last step are summed before."""
        with torch.no_grad():
            self._fold()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``fe.LangevinAdam.load_state_dict``; draws since the last step are forgotten."""
        if self._inside:
            raise RuntimeError(f"{self._name}: load_state_dict must be called outside of sampled_params")
        super().load_state_dict(state_dict)

    @never_traced
    def _restore(self) -> None:
        caches, self._restored = self._restored, []
        call_all(
            [
                *(cache.restore for cache in caches),
                partial(self._written, [param for cache in caches for param in cache.live]),
            ]
        )

    @never_traced
    def _written(self, params: list[Tensor]) -> None:
        """What a forward pass reads next are ``params`` as they are now."""
        if not drop_copies(params):
            self._warn_once(
                f"torch {torch.__version__} does not tell what fully_shard has gathered, and forward passes may go on "
                "with weights from before a draw or a step: call reshard() of every sharded module inside and after "
                "each context, and after each step"
            )

    # Draws.

    @never_traced
    def _draw(self, train: bool) -> None:
        """Every parameter that is not frozen becomes a draw, and its state's ``mean`` what it was."""
        if self._drawn_seed is not None:
            self._agree_on_seed()
        work: list[tuple[dict[str, Any], str, DrawTable, StepSettings]] = []
        snapshot = self._snapshot is not None and self._snapshot.holds(self.state)
        for index, group in enumerate(self.param_groups):
            kept = self._kept_draws.get(index)
            if kept is None or not kept.hold(group):
                kept = None
                self._check_group(group)
            if not group["params"]:
                continue
            if len(group["streams"]) != len(group["params"]):
                self._add_streams(group)
            backend = backends.choose(group["params"][0].device.type, group["backend"])
            by_rows = backends.takes_rows(backend)
            cache = self._draw_caches.get((index, train))
            if cache is not None and (by_rows or cache.streams != group["streams"]):
                cache = None
            if cache is None or not cache.point_to_gradients(group["params"], self.state, snapshot):
                self._check_params(group)
                rows = self._draw_rows(group, train)
                states = [self.state[param] for param in group["params"] if param.requires_grad]
                cache = DrawTable(group, states, rows, by_rows, None if by_rows else host())
                cache.means = [state["mean"] for state in states]
                cache.sharded = any(map(is_sharded, cache.live))
            self._keep(self._draw_caches, (index, train), cache)
            if not cache.live:
                continue
            if kept is None:
                kept = KeptSettings(group, self.defaults, self._draw_settings(group, cache.live[0]))
                if not self._sync:  # else the seed is the rank's, of a process group that may come and go
                    self._kept_draws[index] = kept
            work.append((group, backend, cache, kept.settings))
        name = f"draws[{0 if train else 1}]"
        if len(work) > 1:  # of one group, the kernel itself refuses a draw too many before anything moves
            self._check_steps([each[:3] for each in work], name, partial(_draws_of, train))
        self._restored = []
        try:
            for group, backend, cache, settings in work:
                operation = variational_draw.OPERATION
                try:
                    if cache.rows:
                        operation.step_rows(cache.rows, settings, backend)
                    elif cache.tables:
                        operation.step_tables(cache.tables, settings, backend)
                except RuntimeError:
                    self._name_last_step(group, cache, name, partial(_draws_of, train))
                    raise
                self._restored.append(cache)
                cache.count_write()
            self._written([param for cache in self._restored for param in cache.live])
        except BaseException:
            self._restore()  # those groups that are drawn: nobody enters the context whose end would do it
            raise

    def _draw_rows(self, group: dict[str, Any], train: bool) -> list[Row]:
        rows = []
        for i, (param, stream) in enumerate(zip(group["params"], group["streams"], strict=True)):
            if not param.requires_grad:
                continue
            state = self._state_of(group, param, i)
            local = local_tensor(param)
            row = Row(
                local,
                local,
                _draws_of(train, state),
                stream if train else stream ^ EVALUATION,
                local_tensor(state["mean"]),
                local_tensor(self._spread(state)[0]),
            )
            check_row(self._name, f"params[{i}]", row, variational_draw.OPERATION.names)
            rows += sharded_rows(self._name, param, row)
        return rows

    def _draw_settings(self, group: dict[str, Any], drawn: Tensor) -> VariationalDrawSettings:
        temperature, tensor = self._scalar(group, "temperature")
        deviations = self._spread(self.state[drawn])[1]
        return VariationalDrawSettings(
            temperature=temperature,
            temperature_tensor=tensor,
            weight_decay=group["weight_decay"],
            ess=group["ess"],
            deviations=float(deviations),
            seed=self._rank_seed(group),
        )

    def _rank_seed(self, group: dict[str, Any]) -> int:
        """The seed of this process' draws: every rank its own with ``sync``."""
        seed: int = group["seed"]
        if not self._is_replica():
            return seed
        mixed = (seed + dist.get_rank() * GOLDEN) % (2 * LAST_SEED)
        return mixed - 2 * LAST_SEED if mixed >= LAST_SEED else mixed

    # Sums over draws.

    @never_traced
    def _fold(self) -> None:
        """Add the gradients of the last training context to the sums, unless they are in them."""
        if self._since.drawn is None:
            return
        grads, self._since.drawn = self._since.drawn, None
        work = []
        for group, group_grads in zip(self.param_groups, grads, strict=True):
            backend = backends.choose(group["params"][0].device.type, group["backend"])
            rows = [
                (param, row)
                for i, (param, grad) in enumerate(zip(group["params"], group_grads, strict=True))
                if grad is not None
                for row in self._sum_rows(group, i, grad)
            ]
            for samples in (0, 1):  # the first of a step overwrites what is left of the last
                mine = [row for param, row in rows if (param in self._since.summed) == bool(samples)]
                settings = VariationalAccumulateSettings(float(samples), self._rank_seed(group), None)
                work.append((mine, settings, backend))
        for mine, settings, backend in work:
            run_rows(variational_accumulate.OPERATION, mine, settings, backend)
        for group, group_grads in zip(self.param_groups, grads, strict=True):
            self._since.summed.update(
                (p, None) for p, grad in zip(group["params"], group_grads, strict=True) if grad is not None
            )
        self._since.samples += 1

    def _let_go_of_gradients(self) -> None:
        """Of what is in the sums: where gradients are cleared once a step, they would count twice."""
        for param in self._since.summed:
            param.grad = None

    def _gradients_are_gone(self) -> bool:
        """Whether those at hand are not the last draw's: ``model.zero_grad()`` drops some, the frozen keep old ones."""
        assert self._since.drawn is not None
        params = [param for group in self.param_groups for param in group["params"]]
        present = [param.grad is not None for param in params]
        drawn = [grad is not None for grads in self._since.drawn for grad in grads]
        if present != drawn:
            return True
        learns = [param.requires_grad for param in params]
        return not all(learns) and any(had and not own for had, own in zip(present, learns, strict=True))

    def _sum_rows(self, group: dict[str, Any], i: int, grad: Tensor) -> list[Row]:
        param, state = group["params"][i], self.state[group["params"][i]]
        local = local_tensor(param)
        total, product = self._sums_of(group, param)
        row = Row(
            local, local_gradient(self._name, grad, param), state["step"], group["streams"][i], total, product,
            noise_unit=state["draws"][:1],
        )  # fmt: skip
        check_row(self._name, f"params[{i}]", row, variational_accumulate.OPERATION.names)
        return sharded_rows(self._name, param, row)

    def _sums_of(self, group: dict[str, Any], param: Tensor) -> tuple[Tensor, Tensor]:
        if param not in self._sums:
            local, dtype = local_tensor(param), self._state_dtype(group, param)
            self._sums[param] = (
                zero_state(local, dtype, group["backend"]),
                zero_state(local, dtype, group["backend"]),
            )
        return self._sums[param]

    def _is_replica(self) -> bool:
        """Whether the step is of what several ranks have drawn."""
        return self._sync and has_ranks()


def run_rows(operation: StepOperation, rows: Sequence[Row], settings: StepSettings, backend: str) -> None:
    """One call of the operation over rows whose tensors are new at every step, or nearly so."""
    if not rows:
        return
    fitted = [readable(row) for row in rows]
    if backends.takes_rows(backend) or None in fitted:
        operation.step_rows(rows, settings, backend)
        return
    tables = [PointerTable(part) for part in group_rows([row for row in fitted if row is not None])]
    operation.step_tables(tables, settings, backend)


def call_all(calls: Iterable[Callable[[], object]]) -> None:
    """Every one of them, also after one that raises; the first error comes at the end."""
    first: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


def each(groups: Sequence[dict[str, Any]], call: Callable[[dict[str, Any], Tensor], Any]) -> list[Any]:
    """``call(group, parameter)`` of every parameter."""
    return [call(group, param) for group in groups for param in group["params"]]
