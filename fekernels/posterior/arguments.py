"""What ``sample_posterior`` is given: checked, compared over the ranks that share its chains, and with a run before."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from fekernels._checks import boolean, integer, number
from fekernels._loader_batches import check_batches
from fekernels._runtime.agreement import Agreement, agree, tensors_digest
from fekernels._runtime.parts import check_unsharded
from fekernels._runtime.ranks import gathered_numbers, group_of, has_ranks, processes_without_group
from fekernels.posterior.pilot import Data
from fekernels.posterior.samples import PosteriorSamples

__all__ = ["OWNER", "agree_on", "check", "check_directory", "data_of", "run_of", "which_group"]

OWNER = "sample_posterior"


def which_group(process_group: Any) -> Any:
    if not isinstance(process_group, str):
        return group_of(OWNER, process_group)
    if process_group != "auto":
        raise ValueError(
            f"{OWNER}: process_group must be a ProcessGroup, 'auto' or None; got {process_group!r}"
        )
    if has_ranks():
        import torch.distributed as dist

        return dist.group.WORLD
    if unknown := processes_without_group():
        warnings.warn(
            f"{OWNER}: torchrun started {unknown} processes, and each now samples everything for itself: call "
            "torch.distributed.init_process_group() first, and they split the chains",
            stacklevel=3,
        )
    return None


def agree_on(group: Any, model: nn.Module, loader: Any, **arguments: Any) -> None:
    """ValueError on every rank where they were not given the same."""
    if group is None:
        return
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "num_replicas"):  # torch's DistributedSampler, and its likes
        raise ValueError(
            f"{OWNER}: loader must give all the data on every rank: chains are split over ranks, data are not; got one "
            f"with a {type(sampler).__name__}"
        )
    # Not their values: all take rank 0's.
    form = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    what = "what model has of parameters"
    plain = {name: _plain(value) for name, value in arguments.items()}
    agree(OWNER, {**plain, what: form}, group, digests=[what])


def _plain(value: Any) -> Any:
    """Without the kind of number, numpy's say, that a rank may have and another not."""
    if isinstance(value, (bool, str, type(None))):
        return value
    return int(value) if int(value) == value else float(value)


def data_of(loader: Any, data_size: int, seed: int, group: Any) -> Data:
    """ValueError on every rank where they were not given the same data."""
    if group is None:
        return Data(OWNER, loader, int(data_size), seed, prints=True)
    problem: Exception | None = None
    try:
        data = Data(OWNER, loader, int(data_size), seed, prints=True)
    except Exception as error:  # that the others do not wait for this rank
        problem = error
    failed = [
        rank for rank, (bad,) in enumerate(gathered_numbers(OWNER, [int(problem is not None)], group)) if bad
    ]
    if problem is not None:
        raise problem
    if failed:
        raise ValueError(
            f"{OWNER}: loader must give batches on every rank; rank {failed[0]} could not read it"
        )
    agree(
        OWNER,
        {"the number of points of loader": data.points, "the number of batches of loader": data.batches},
        group,
    )
    first, second = data.fingerprints
    comes_again = min(same for (same,) in gathered_numbers(OWNER, [int(first == second)], group))
    if comes_again:  # other than data that are made anew in every pass, by random crops say
        what = "what loader gives (all the data: chains are split over ranks, data are not)"
        agree(OWNER, {what: first}, group, digests=[what])
    return data


def run_of(model: nn.Module, data: Data, **arguments: Any) -> dict[str, Any]:
    """All that decides a run's samples, as JSON keeps it; but for the loss, of which nothing can be compared."""
    tensors = [(f"{name} {p.requires_grad}", p) for name, p in model.named_parameters()]
    first, second = data.fingerprints
    return {
        **{name: _plain(value) for name, value in arguments.items()},
        "model": tensors_digest([*tensors, *model.named_buffers()]),
        "the number of points of loader": data.points,
        "the number of batches of loader": data.batches,
        # Of data that are made anew in every pass, by random crops say, nothing comes again.
        "what loader gives": f"{first:016x}" if first == second else None,
    }


def check_directory(samples: PosteriorSamples, directory: Any, run: dict[str, Any], group: Any) -> None:
    """ValueError on every rank where there are samples of anything but this run, which makes those again."""
    with Agreement(OWNER, group) as agreement:
        if held := len(samples):
            told = f"{OWNER}: directory must hold no samples but those of this very run"
            told = f"{told}; got {directory} with {held} that"
            if samples.run is None:
                raise ValueError(f"{told} were collected otherwise")
            for name in {**run, **samples.run}:
                here, there = run.get(name), samples.run.get(name)
                if here != there:
                    raise ValueError(f"{told} have another {name}: {there!r} there, {here!r} here")
        agreement.tell()


def check(
    model: Any, loss_fn: Any, loader: Any, data_size: Any, prior_precision: Any, chains: Any, samples: Any, lr: Any,
    thinning: Any, burn_in: Any, control_variates: Any, freeze: Any, seed: Any, progress: Any,
) -> None:  # fmt: skip
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OWNER}: model must be a torch.nn.Module; got {type(model).__name__}")
    check_unsharded(OWNER, model)
    if not callable(loss_fn):
        raise TypeError(f"{OWNER}: loss_fn must be callable; got {type(loss_fn).__name__}")
    check_batches(OWNER, loader)
    integer(OWNER, "data_size", data_size, 1)
    number(OWNER, "prior_precision", prior_precision)
    integer(OWNER, "chains", chains, 2)
    integer(OWNER, "samples", samples, 4)
    if lr is not None:
        number(OWNER, "lr", lr, above=0.0)
    for name, value, least in (("thinning", thinning, 1), ("burn_in", burn_in, 0)):
        if value is not None:
            integer(OWNER, name, value, least)
    if control_variates != "auto" and not isinstance(control_variates, bool):
        raise ValueError(f"{OWNER}: control_variates must be 'auto', True or False; got {control_variates!r}")
    boolean(OWNER, "freeze", freeze)
    boolean(OWNER, "progress", progress)
    if seed is not None:
        integer(OWNER, "seed", seed, -(1 << 62), 1 << 62)
