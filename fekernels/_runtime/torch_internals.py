"""What fekernels takes from torch beyond its public API, in this file alone, and what the public one lacks.

Every name was seen in torch 2.10, 2.11, 2.13 and 2.14. Torch's functions are bound here once: a caller pays no more for
one than for a name of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

# torch.compile goes around what this decorates; torch.compiler.disable imports torch._dynamo, a second of import time.
from torch._compile import _disable_dynamo as never_traced
from torch.autograd import forward_ad

# The bases of every batch norm, and of every batch or instance norm, users' own included: torch.nn lists only classes.
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as AnyNorm
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizer

__all__ = [
    "CHUNKED_VMAP",
    "AnyBatchNorm",
    "AnyNorm",
    "apply_directly",
    "argument_names",
    "compiles_backward",
    "copy_all",
    "differentiates_forward",
    "dispatch_modes",
    "dtensor_parts",
    "gathering_groups",
    "has_forward_hooks",
    "has_step_hooks",
    "in_backward",
    "is_batched",
    "is_flat_shard",
    "is_legacy_batched",
    "is_of_transform",
    "is_unwritten_zeros",
    "never_traced",
    "own_parts",
    "profiles",
    "registered_operators",
    "reshard",
    "saves_by_hooks",
    "shares_storage",
    "split_factor",
    "standard_gamma",
    "transforms_active",
    "uncompiled",
    "view_as_result",
    "viewed_tensor",
    "version",
]

# The function that loops over the chunks of torch.vmap(chunk_size=...), which tells nobody inside.
CHUNKED_VMAP = "_chunked_vmap"
# Whether a transform of torch.func surrounds the call: torch.func tells it to no one.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_traced_by_jit: Callable[[], bool] = torch._C._is_tracing
# The names of all operators: torch.ops, which is public, knows only names that it is asked for.
registered_operators: Callable[[], list[str]] = torch._C._dispatch_get_all_op_names
# Whether a tensor belongs to a transform of torch.func, which may have ended; torch.func has no question of this kind.
is_of_transform: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
# Whether a gradient is a batch of them, as under torch.autograd.grad(is_grads_batched=True): nothing public says so.
is_legacy_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
# Whether autograd left a tensor of zeros without memory; its data_ptr(), 0, says that of freed storage too.
is_unwritten_zeros: Callable[[Tensor], bool] = Tensor._is_zerotensor
# Whether a profiler takes records in this thread; nothing public asks.
profiles: Callable[[], bool] = torch._C._autograd._profiler_enabled
# Many copies in one call; torch has no public name for any of its operators over lists.
copy_all: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
# Gamma(shape, 1) from a generator, which torch.distributions.Gamma does not take.
standard_gamma: Callable[..., Tensor] = torch._standard_gamma


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for several: of ``torch.func.vmap``, or of ``torch.autograd.grad(is_grads_batched=True)``."""
    return is_legacy_batched(gradient) or is_of_transform(gradient)


def dispatch_modes() -> bool:
    """Whether a mode (FakeTensorMode, make_fx) is to see operators, or torch.jit.trace; no public module says both."""
    return _modes() > 0 or _is_traced_by_jit()


def differentiates_forward() -> bool:
    """Whether a level of forward-mode differentiation is open; ``torch.autograd.forward_ad`` shows only a tensor's."""
    return forward_ad._current_level >= 0


def compiles_backward() -> bool:
    """Whether a backward pass may be compiled: its tracer knows functions of Python and PyTorch's own, no others."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.config.compiled_autograd)


def saves_by_hooks() -> bool:
    """Whether someone is shown what is saved for backward, as ``torch.utils.checkpoint`` is; no public name asks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether someone is shown its outputs; a module has no public list of its hooks."""
    return bool(module._forward_hooks)


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether someone is called before or after its steps, or those of all optimizers; torch has no public list."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
    )


def own_parts(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, nn.Module | None]]:
    """Its own parameters and children; ``parameters()`` and ``children()`` make names and sets of them first."""
    return module._parameters, module._modules


def in_backward() -> bool:
    """Whether a backward pass runs in this thread, as where a checkpoint computes forward again; no public name."""
    return torch._C._current_graph_task_id() != -1


def viewed_tensor(tensor: Tensor) -> Tensor | None:
    """What ``tensor`` is a view of, or None; the public API leads from no view to its base."""
    return tensor._base


def apply_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for tensors of no transform: the public one asks for transforms on every call, once more."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def view_as_result(tensor: Tensor) -> Tensor:
    """A view that autograd takes for no view, as it does a linear layer's output; ``Tensor.view`` makes none."""
    result: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return result


def argument_names(overload: Any) -> list[str]:
    """Of an operator such as ``torch.ops.fekernels.draw.default``; torch.library shows no schema."""
    return [argument.name for argument in overload._schema.arguments]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` made ``model`` from, or ``model``; no public attribute leads back to it."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


# What lives here of a DTensor, and its placements, by slots: ``to_local()`` makes a view first, and both it and
# ``placements`` are functions of Python, which of hundreds of gradients a step cost more than stepping them.
_LOCAL_PART, _PLACEMENTS = attrgetter("_local_tensor"), attrgetter("_spec.placements")


def dtensor_parts(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Any]]:
    """The local tensors and the placements of DTensors; AttributeError where one is none."""
    tensors = list(tensors)
    return list(map(_LOCAL_PART, tensors)), list(map(_PLACEMENTS, tensors))


def is_flat_shard(param: Tensor) -> bool:
    """Whether ``FullyShardedDataParallel`` (FSDP1) has made it part of a flat tensor; it has no public mark."""
    return bool(getattr(param, "_fsdp_flattened", False))


def gathering_groups(params: Iterable[Tensor]) -> list[Any] | None:
    """The groups in which FSDP2 gathers what any of ``params`` is the shard of; None where this torch hides them.

    Forward passes read what was gathered, and a group may keep that: the root's, until a backward pass ends. A
    parameter does not know its module, so all are asked that are sharded; torch has a table of them.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    found = {}
    try:
        table = sys.modules["torch.distributed._composable_state"]._module_state_mapping
        sharded = [module for module in list(table) if isinstance(module, fsdp.FSDPModule)]
        mine = set(map(id, params)) if sharded else set()
        for module in sharded:
            state = module._get_fsdp_state()
            if hasattr(state, "_fsdp_param_groups"):  # torch 2.13 on
                groups = state._fsdp_param_groups
            else:
                groups = [state._fsdp_param_group]
            for group in groups:
                if group is not None and any(id(part.sharded_param) in mine for part in group.fsdp_params):
                    found[id(group)] = group
    except (AttributeError, KeyError):
        return None
    return list(found.values())


def reshard(group: Any) -> None:
    """Let go of what a group of ``gathering_groups`` has gathered, or is gathering, before its shards were written.

    ``FSDPModule.reshard`` forgets neither an all-gather that nobody has waited for nor, where a forward pass ended by
    an exception, anything.
    """
    if group._all_gather_result is not None:
        group.wait_for_unshard()
    group._to_sharded()


def split_factor(placement: Any) -> int | None:
    """Into how many parts a placement takes a dimension to be split before it splits each of them: 1 for ``Shard``.

    More where FSDP2 shards the dimension that tensor parallel has sharded already, for which torch has a class without
    a public name; None for what is no shard.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, _StridedShard):
        return int(placement.split_factor)
    return 1 if type(placement) is Shard else None


def shares_storage(tensor: Tensor) -> bool:
    """Whether another tensor than this one has the same memory; no public name counts them."""
    storage = tensor.untyped_storage()  # itself the second that holds it
    return bool(torch._C._storage_Use_Count(storage._cdata) > 2)


def version(tensor: Tensor) -> int:
    """How often it has been written."""
    try:
        return tensor._version
    except RuntimeError:  # of a tensor made under torch.inference_mode, which counts none
        return 0
