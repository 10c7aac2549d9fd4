"""What a sampler's further path depends on, of all its particles whoever holds them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fekernels._checks import integer
from fekernels._runtime.ranks import has_ranks
from fekernels.ops.noise_key import signed_seed
from fekernels.stein.checks import checked_particles

if TYPE_CHECKING:
    from fekernels.stein.svgd import SVGD

__all__ = ["load_whole_state", "whole_state"]

STATE = ("particles", "optimizer", "iteration", "seed", "target")


def whole_state(sampler: SVGD) -> dict[str, Any]:
    everyone, x = sampler._all, sampler._particles
    # Each rank has drawn another, until its first noise.
    undecided = sampler.seed == sampler._drawn_seed and has_ranks()
    return {
        "particles": everyone.gather(x),
        "optimizer": copy.deepcopy(everyone.whole_state(sampler.optimizer.state_dict(), x)),
        "iteration": sampler.iteration,
        "seed": None if undecided else sampler.seed,
        "target": {key: everyone.gather(value) for key, value in sampler._target.state().items()},
    }


def load_whole_state(sampler: SVGD, state: Any) -> None:
    name, mine, everyone = f"{type(sampler).__name__}.load_state_dict", sampler._particles, sampler._all
    with everyone.together(("iteration", "seed", "particles")) as agreement:
        if not isinstance(state, dict):
            raise TypeError(f"{name}: state must be a dict; got {type(state).__name__}")
        for key in STATE:
            if key not in state:
                raise ValueError(f"{name}: state must hold {key!r}; got {sorted(map(str, state))}")
        particles = checked_particles(name, state["particles"])
        shape = (everyone.n, *mine.shape[1:])
        if particles.shape != shape or particles.dtype != mine.dtype:
            raise ValueError(
                f"{name}: particles must be {mine.dtype} of shape {shape}; "
                f"got {particles.dtype} of {tuple(particles.shape)}"
            )
        iteration = integer(name, "iteration", state["iteration"], 0, 1 << 32)
        seed = sampler.seed if state["seed"] is None else state["seed"]
        signed_seed(name, seed)
        if not isinstance(state["optimizer"], dict):
            raise TypeError(f"{name}: optimizer must be a dict; got {type(state['optimizer']).__name__}")
        everyone.check_loaded(name, sampler.optimizer, state["optimizer"], shape)
        target = state["target"]
        if isinstance(target, dict):
            target = {
                key: everyone.part(value) if isinstance(value, Tensor) and value.dim() else value
                for key, value in target.items()
            }
        sampler._target.check(name, target)
        sums = (float(particles.double().sum()), float(particles.double().abs().sum()))
        agreement.tell(len(mine), (iteration, seed, sums))
    sampler.optimizer.load_state_dict(everyone.own_state(copy.deepcopy(state["optimizer"]), mine))
    sampler._target.load(target)
    mine.copy_(everyone.part(particles))
    sampler.iteration, sampler.seed = iteration, seed
    if state["seed"] is not None:
        sampler._drawn_seed = None
    sampler.bandwidth = sampler.log_prob = None
    if sampler._flight is not None:
        sampler._flight.forget()
