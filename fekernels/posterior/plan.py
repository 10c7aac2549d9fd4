"""Which gradient a posterior run takes, with which preconditioner and step size: measured, not guessed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fekernels.posterior.chain_sampler import BETA1, CONTROL_VARIATES, FULL, MINIBATCHES, ChainSampler, Plan
from fekernels.posterior.pilot import batch_noise, flat, information

__all__ = ["INFORMED", "MOST_NOISE", "WORST_NOISE", "make_plan", "offset", "smaller"]

MOST_NOISE = 0.1  # r: the variance is then too large by a tenth at most
WORST_NOISE = 0.2  # of all but a hundredth of the weights; 16 batches of 4 chains measure it to a fifth
MOST_MOTION = 0.5  # x = h k / D of the median weight: half the way to the mode in a step
# Of the step that is unstable in the stiffest direction: the variance there is a quarter too large, that of no single
# weight is, whose share of it is small.
STIFFEST = 0.2
CALL = 1 << 15  # what a call of the model costs besides its rows, in rows times weights
PILOT_STEPS, PILOT_BATCHES = 30, 16
ATTEMPTS = 8
PLACES = 4  # of those visited, where D is measured again
FLOWN = 20  # times the potential of a sampler, and units of it beyond twice that
INFORMED = 0.1  # share of a weight's curvature that is the data's; below it noise is the prior's to judge
DEAD = 1e-6  # of the largest denominator, for weights without gradients


def offset(walk: ChainSampler) -> Tensor:
    """[n]: how far chains are from their mode, in standard deviations of the posterior (root mean square)."""
    losses, gradients = walk.energy.full_gradient()
    of_all = walk.ranks.gather(losses)
    if not bool(of_all.isfinite().all()):
        raise ValueError(
            f"sample_posterior: loss_fn must be finite at the model's weights; got {float(of_all[0])}"
        )
    slope = flat(gradients) + walk.prior * flat(walk.parameters)
    precision = flat(information(walk.energy)) + walk.prior
    squares = (slope.square() / precision.clamp_min(1e-30)).mean(1)
    return walk.ranks.gather(squares).mul(walk.data.data_size).sqrt()


def make_plan(
    walk: ChainSampler, control_variates: str | bool, lr: float | None, freeze: bool
) -> tuple[Plan, list[Tensor]]:
    """The plan, and the Fisher information of a data point where it was measured: at hot positions around the centres.

    At the centres itself the curvature of a network is that of its optimum, and differences of gradients are 0.
    """
    fisher = information(walk.energy)
    denominators = _denominators(walk, fisher, lr, freeze)
    h = _largest(walk, denominators, fisher, lr)
    cheap = _cost(walk, FULL) < 8 * _cost(walk, CONTROL_VARIATES)
    plans: list[Plan] = []
    walk.to_centre()
    ground = walk.ranks.gather(walk.potential(walk.energy.some_losses()))
    for _ in range(ATTEMPTS):
        walk.to_centre()
        pilot = Plan(FULL if cheap else CONTROL_VARIATES, denominators, h, [], 0.0, 0.0, True)
        walk.follow(pilot)
        walk.go(min(10 * PILOT_STEPS, max(PILOT_STEPS, math.ceil(5 / MOST_MOTION))), "pilot")
        # A sampler's potential lies half a unit a weight above its mode; far more, and it is on its way to infinity.
        climbed = walk.ranks.gather(walk.potential(walk.energy.some_losses())) - ground
        if not bool((climbed < FLOWN * (walk.weights + FLOWN)).all()):
            h /= 4
            continue
        fisher = information(walk.energy)
        denominators = _denominators(walk, fisher, lr, freeze)
        plans = _plans(walk, denominators, fisher, lr, freeze)
        used = [p for p in plans if p.way == pilot.way]
        # At positions that are too hot, differences are noisier than they are where the chains will be.
        if used and used[0].way == CONTROL_VARIATES and used[0].lr < h / 2:
            h = used[0].lr
            continue
        break
    if not plans:
        raise ValueError(
            f"sample_posterior: loss_fn must stay finite near the model's weights; it did not at lr = {h:.3g}"
        )
    allowed = {
        "auto": (FULL, MINIBATCHES, CONTROL_VARIATES),
        True: (CONTROL_VARIATES,),
        False: (MINIBATCHES,),
    }
    # One batch of all the data has no noise that control variates could take out.
    found = [p for p in plans if p.way in allowed[control_variates]] or [p for p in plans if p.way == FULL]
    if lr is None:
        return max(found, key=lambda p: p.lr / _cost(walk, p.way)), fisher
    quiet = [p for p in found if p.ratio <= MOST_NOISE and p.worst <= WORST_NOISE]
    if quiet:
        return min(quiet, key=lambda p: _cost(walk, p.way)), fisher
    return min(found, key=lambda p: p.ratio), fisher


def smaller(walk: ChainSampler, plan: Plan, visited: list[list[dict[str, Tensor]]]) -> Plan:
    """Half the step, and a preconditioner that knows the Fisher information of where chains went too.

    Where it was measured, a saturated unit has none; where it comes to life, D of that place is thousands of times too
    small. ``visited``: states of this rank's chains, of which some are looked at, but for those of chains that are far
    from all that is likely: gradients are large there.
    """
    denominators = plan.denominators
    if plan.frozen:
        walk.to_centre()
        ground = walk.potential(walk.energy.some_losses())
        places = torch.linspace(0, len(visited) - 1, min(len(visited), PLACES)).round().long().tolist()
        total = [torch.zeros_like(d) for d in denominators]
        for place in places:
            walk.to(visited[place])
            walk.to_centre(~(walk.potential(walk.energy.some_losses()) - ground < walk.weights + FLOWN))
            for t, f in zip(total, information(walk.energy), strict=True):
                t.add_(f + walk.prior, alpha=1 / len(places))
        denominators = [torch.maximum(d, t) for d, t in zip(denominators, total, strict=True)]
    return replace(
        plan, denominators=denominators, lr=plan.lr / 2, ratio=plan.ratio / 2, worst=plan.worst / 2
    )


def _denominators(walk: ChainSampler, fisher: list[Tensor], lr: float | None, freeze: bool) -> list[Tensor]:
    """The curvature, so that all weights relax alike; for a given lr, or where it is to adapt, what Adam has."""
    if lr is None and freeze:
        found = [f + walk.prior for f in fisher]
    else:
        found = [(f / (walk.data.batch * walk.data.terms)).sqrt() for f in fisher]
    largest = float(walk.ranks.gather(flat(found).amax(1)).max())
    if largest == 0:  # a loss that no batch tells from another: its curvature is all there is
        units = [torch.ones_like(f) for f in fisher]
        largest = max(walk.stiffest(units), 1e-30)
        found = [largest * unit for unit in units]
    # What no gradient reaches would be thrown about by its first noise.
    return [f.clamp_min(DEAD * largest) for f in found]


def _cost(walk: ChainSampler, way: str) -> float:
    """Of a step of one chain, in rows of data."""
    data, call = walk.data, CALL / walk.weights
    if way == FULL:
        return data.points + call * (1 if data.whole is not None else data.batches)
    return (data.batch + call) * (2 if way == CONTROL_VARIATES else 1)


def _largest(walk: ChainSampler, denominators: list[Tensor], fisher: list[Tensor], lr: float | None) -> float:
    """The step size that motion and stability allow."""
    if lr is not None:
        return lr
    stiffest = walk.stiffest(denominators)
    stiffest += walk.prior / float(walk.ranks.gather(flat(denominators).amin(1)).min())
    bound = STIFFEST * 2 * (1 + BETA1) / (1 - BETA1) / max(stiffest, 1e-30)
    motion = float(walk.ranks.gather((flat(fisher) + walk.prior) / flat(denominators)).median())
    known = walk.ranks.gather(flat(fisher)).any()
    if not bool(known):  # of data that are one row, say: no weight's curvature
        motion = max(motion, stiffest)
    return min(bound, MOST_MOTION / max(motion, 1e-30))


def _plans(
    walk: ChainSampler, denominators: list[Tensor], fisher: list[Tensor], lr: float | None, freeze: bool
) -> list[Plan]:
    h = _largest(walk, denominators, fisher, lr)
    rest = 1 - walk.data.batch / walk.data.points  # a batch of all the data has no noise
    noises = {
        MINIBATCHES: [f * (rest / (walk.data.batch * walk.data.terms)) for f in fisher],
        FULL: [torch.zeros_like(f) for f in fisher],
    }
    if rest > 0:
        noises[CONTROL_VARIATES] = batch_noise(walk.energy, PILOT_BATCHES, walk.centre)
    found = []
    shares = walk.ranks.gather(flat(fisher) / (flat(fisher) + walk.prior).clamp_min(1e-30))
    for way, noise in noises.items():
        of_lr = walk.ranks.gather(flat(noise) / flat(denominators)) / (2 * walk.temperature)
        mean, worst = _over_weights(of_lr.mean(0), shares.mean(0))
        most = max(mean / MOST_NOISE, worst / WORST_NOISE, 1e-30)
        own = h if lr is not None else min(h, 1 / most)
        found.append(Plan(way, denominators, own, noise, own * mean, own * worst, freeze))
    return found


def _over_weights(ratios: Tensor, shares: Tensor) -> tuple[float, float]:
    """r on average, as far as the data have a share in each weight, and of the noisiest but for a hundredth of them.

    By those shares the mean is that of predictions. What no gradient reaches has neither noise nor a part in them: a
    median over all weights would be 0 where more than half of them are so.
    """
    mean = float((ratios * shares).sum() / shares.sum().clamp_min(1e-30))
    known = ratios[shares > INFORMED]
    if not len(known):
        return mean, 0.0
    return mean, float(known.kthvalue(math.ceil(0.99 * len(known))).values)
