"""From a trained network to samples of its posterior, and an answer to whether they can be believed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._runtime.ranks import draw_seed, gathered_numbers
from fekernels.diagnostics.chain_statistics import unjudged_statistics
from fekernels.diagnostics.mean_check import judge, measure, of_rank_0
from fekernels.posterior.arguments import (
    OWNER,
    agree_on,
    check,
    check_directory,
    data_of,
    run_of,
    which_group,
)
from fekernels.posterior.chain_ranks import ChainRanks
from fekernels.posterior.chain_sampler import ChainSampler, Course, Plan
from fekernels.posterior.chains import LossFunction
from fekernels.posterior.convergence import LEAST, smaller_size
from fekernels.posterior.model_calls import bare
from fekernels.posterior.plan import make_plan, offset, smaller
from fekernels.posterior.progress import Bar
from fekernels.posterior.report import PosteriorReport
from fekernels.posterior.samples import PosteriorSamples
from fekernels.posterior.sixteen_bits import lost_in_rounding
from fekernels.posterior.store import place_of
from fekernels.posterior.verdict import INFLATION, NEEDED, RHAT, Drawn, verdict

__all__ = ["PosteriorRun", "sample_posterior"]

HALVINGS = 3  # of a step that makes chains hotter
HOPELESS = 1.5  # R-hat of chains in different regions, which a run four times as long will not mend
SPACING = 1.3  # autocorrelation times between samples
RECORDS = 4  # positions remembered of a sample's steps
LONGER = 4  # times as long a run may become
# By which it goes on at least where R-hat alone asks for it, and beyond what is lacking.
ON, MARGIN = 1.2, 1.1
MOST_STEPS = 1 << 15  # of sampling, where nobody says how many
TRAIN_STEPS, TRAIN_EPOCHS, TRAIN_LR = 500, 3, 0.02
UNTRAINED = 3.0  # standard deviations of the posterior, from which on the model counts as not trained


@dataclass(frozen=True)
class PosteriorRun:
    """What `sample_posterior` gives.

    Attributes:
        samples: a `PosteriorSamples` with the draws of all chains, one of each in turn.
        report: whether they can be believed, and how they came about.
    """

    samples: PosteriorSamples
    report: PosteriorReport


def sample_posterior(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    *,
    data_size: int,
    prior_precision: float,
    chains: int = 4,
    samples: int = 100,
    lr: float | None = None,
    thinning: int | None = None,
    burn_in: int | None = None,
    control_variates: str | bool = "auto",
    freeze: bool = True,
    seed: int | None = None,
    progress: bool = True,
    directory: str | Path | None = None,
    process_group: Any = "auto",
) -> PosteriorRun:
    """Sample the posterior of a network's weights, and measure whether the samples can be believed.

        run = fe.sample_posterior(model, loss_fn, loader, data_size=len(data), prior_precision=1.0)
        print(run.report)
        prediction = run.samples.predict(x)

    The posterior is that of N = ``data_size`` points, -log p = N mean loss + prior_precision / 2 |theta|^2. The steps:

    1. *Starts.* Chain 0 begins at the model's weights, the others are trained for a while from random weights of the
       same size, in pairs of opposite sign: R-hat only sees what lies between the starts.
    2. *Pilot.* A few hot steps; there the Fisher information F of a point, the largest curvature, and the variance of
       the gradient with and without control variates (`ControlVariate`) are measured.
    3. *Plan.* D = F + prior / N, frozen, so that all weights relax alike. For full gradients, minibatches and control
       variates each, the largest step h with noise r <= 0.1 (`gradient_noise_ratio`), x = h k / D <= 0.5 of the
       median weight, k its curvature, and a fifth of what would be unstable in the stiffest direction; of these the
       gradient whose chain moves furthest for its cost.
    4. *Burn-in* until the walk is 20 autocorrelation times long; samples 1.3 of these times apart. A run of which R-hat
       or effective sizes say that it was too short goes on, to four times the length at most, with the samples spread
       over all of it.
    5. *Temperature.* By the gradients that move them, the chains' own is measured (the virial theorem). Where it is too
       high, or a chain has flown away, 4. begins again from the centres with half the step, three times at most.

    Args:
        model: a trained network; one that is not is trained first, for at least 500 steps. It is not written to.
        loss_fn: loss_fn(model, batch), the mean of -log p over the points of the batch, which is checked on a few rows:
            a sum is refused. A squared error is that of a Gaussian only with its variance: mse / (2 sigma^2).
        loader: an iterable of batches that starts anew every time, such as a DataLoader or a list.
        data_size: N, the number of points the mean loss stands for: those of the loader, or, of a mean over the tokens
            of its sequences, the tokens: as many for each as a tensor of a batch has in a row.
        prior_precision: of the Gaussian prior itself, around 0, not divided by N.
        chains: how many run side by side, >= 2 (one cannot be compared), all in one call of the model.
        samples: kept of each chain.
        lr: step size of `LangevinAdam` with Adam's own D; None measures, with D as above.
        thinning: steps between samples. burn_in: steps before them. None measures both.
        control_variates: "auto" chooses, True and False allow only control variates or plain minibatches.
        freeze: False lets the preconditioner adapt, with what that does to the variance (docs/langevin_adam.md).
        seed: of starts and noise; None draws one from torch's default generator, rank 0's where there are ranks.
        progress: a tqdm bar, rank 0's where there are ranks.
        directory: None keeps the samples in memory, of every rank. A path keeps them there, as `PosteriorSamples` does:
            each rank writes those of its chains, and all read all. It must be one that all see, and hold no samples but
            those of the same run: started again with its seed, killed or finished, a run makes all its samples anew and
            puts them in the place of those. All arguments, weights and data are compared with theirs, not ``loss_fn``.
        process_group: over whose ranks the chains are split: a ``torch.distributed.ProcessGroup`` or a DeviceMesh of
            one dimension. "auto": the default group, where one is initialised. None: all chains here, whatever other
            processes do. Every rank of the group must call, with the same arguments and *all* the data, which are
            compared, and starts from rank 0's weights. Samples and report are then the same on all, and those of one
            process as far as its gradients are; a report counts every chain once.

    Returns:
        samples and report. With any arguments: look at ``report.converged`` before anything else.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Nothing was changed then.
            On every rank where ranks were given other arguments or other data.
        RuntimeError: a rank ended, or does not call.

    Warns:
        UserWarning: torchrun started several processes, of which none knows of the others: there is no process group.
    """
    group = which_group(process_group)
    check(
        model, loss_fn, loader, data_size, prior_precision, chains, samples, lr, thinning, burn_in,
        control_variates, freeze, seed, progress,
    )  # fmt: skip
    model = bare(model)
    given = {
        "data_size": data_size, "prior_precision": prior_precision, "chains": chains, "samples": samples, "lr": lr,
        "thinning": thinning, "burn_in": burn_in, "control_variates": control_variates, "freeze": freeze,
    }  # fmt: skip
    agree_on(group, model, loader, **given, seed=seed, directory=place_of(directory))
    seed = draw_seed() if seed is None else int(seed)
    if group is not None:  # the order of the data too is of the seed
        seed = int(gathered_numbers(OWNER, [seed], group)[0][0])
    walk_data = data_of(loader, data_size, seed, group)
    ranks = ChainRanks(OWNER, chains, group)
    own = ranks.of_rank_0(model)
    no_mean = judge(OWNER, of_rank_0(OWNER, measure(own, loss_fn, walk_data.sample), group))
    collected = PosteriorSamples(model, chains=chains, directory=directory, process_group=group)
    this_run = None
    if directory is not None:
        this_run = run_of(own, walk_data, **given, seed=seed)
        check_directory(collected, directory, this_run, group)
    notes: list[str] = []
    if ranks.idle:
        notes.append(
            f"{ranks.idle} of {ranks.ranks} ranks had nothing to do: take chains={ranks.ranks} or a multiple of it"
        )
    if walk_data.terms > 1:
        notes.append(
            f"data_size is {walk_data.terms:,} for each point of the loader, as of sequences that hold so many tokens"
        )
    elif walk_data.points != data_size:
        notes.append(
            f"the loader holds {walk_data.points:,} points, data_size says {data_size:,}: which the posterior is of"
        )
    if not walk_data.comes_again:
        notes.append(
            "the loader gives other rows in every pass, drawn with replacement or changed at random: which points the "
            "posterior is of is not known"
        )
    if no_mean:
        notes.append(no_mean)
    with Bar(OWNER, walk_data, progress and ranks.rank == 0) as tick:
        walk = ChainSampler(own, loss_fn, walk_data, prior_precision, chains, seed, tick, ranks)
        _start(walk, notes)
        walk.recentre()
        plan, fisher = make_plan(walk, control_variates, lr, freeze)
        drawn = _walk(walk, plan, samples, thinning, burn_in, HALVINGS if lr is None else 0, notes)
    plan = walk.plan
    lost = lost_in_rounding(walk, plan, drawn.trace)
    if lost:
        notes.append(lost)
    as_said = no_mean is None and lost is None and walk_data.fits and walk_data.comes_again
    if directory is None:
        for states in drawn.kept:
            for state in walk.states_of_all(states):
                collected.collect(state)
    else:
        collected.collect_shards(
            {
                i * chains + k: state
                for i, states in enumerate(drawn.kept)
                for k, state in enumerate(states, ranks.mine.start)
            },
            chains * samples,
            this_run,
        )
    walk_data.looked_at = ranks.total(walk_data.looked_at)
    settings = {
        "gradient": plan.way, "lr": plan.lr, "burn_in": drawn.burnt, "thinning": drawn.apart, "chains": chains,
        "samples": samples, "autocorrelation_time": drawn.time, "epochs": walk_data.epochs,
        "batches": walk_data.looked_at / walk_data.batch, "prior_precision": prior_precision, "seed": seed,
    }  # fmt: skip
    if group is not None:
        settings["ranks"] = ranks.ranks
    return PosteriorRun(
        collected,
        verdict(walk, plan, fisher, drawn, settings, notes, as_said),
    )


def _start(walk: ChainSampler, notes: list[str]) -> None:
    """Chain 0 where the model is, the others where they come to from random weights of the same size."""
    trained = float(offset(walk)[0]) <= UNTRAINED
    generator = torch.Generator().manual_seed(walk.seed & ((1 << 63) - 1))
    origin = [p.detach() for p in walk.model.parameters() if p.requires_grad]
    whole = float(torch.cat([p.flatten() for p in origin]).float().square().mean().sqrt())
    mine = walk.ranks.mine
    with torch.no_grad():
        for p, at in zip(walk.parameters, origin, strict=True):
            size = max(float(at.float().square().mean().sqrt()), 0.1 * whole, 1e-3)
            draw = torch.randn((walk.n // 2, *p.shape[1:]), generator=generator) * size
            others = torch.stack((draw, -draw), 1).flatten(0, 1)[: walk.n - 1].to(p)
            p.copy_(torch.cat((at[None], others))[mine])
    steps = max(TRAIN_STEPS, math.ceil(TRAIN_EPOCHS * walk.data.batches))
    adam = walk.adam(lr=TRAIN_LR, prior_precision=walk.prior, seed=walk.seed)
    for k in range(steps):
        for group in adam.param_groups:
            group["lr"] = TRAIN_LR * 0.5 * (1 + math.cos(math.pi * k / steps))
        walk.step(adam, walk.energy.gradients_of(walk.batches())[1], "starts")
    if trained and mine.start == 0:
        with torch.no_grad():
            for p, at in zip(walk.parameters, origin, strict=True):
                p[0] = at
    _gather_lost(walk, steps, notes)


@torch.no_grad()
def _gather_lost(walk: ChainSampler, steps: int, notes: list[str]) -> None:
    """Chains that came to no region of the posterior are put to the best one, and the report says so."""
    potential = walk.ranks.gather(walk.potential(walk.energy.full_gradient()[0]))
    # Ten standard deviations off in every weight: what the burn-in still brings back.
    lost = ~(potential - potential.nan_to_num(math.inf).min() <= 10.0 + 10.0 * walk.weights)
    if not bool(lost.any()):
        return
    best = int(potential.nan_to_num(math.inf).argmin())
    for p in walk.parameters:
        p[lost[walk.ranks.mine]] = walk.ranks.row(p, best)
    notes.append(
        f"{int(lost.sum())} of {walk.n} chains that started from random weights came to nowhere as likely in {steps} "
        f"steps and began with chain {best} instead: R-hat does not see modes far from it"
    )


def _walk(
    walk: ChainSampler,
    plan: Plan,
    samples: int,
    thinning: int | None,
    burn_in: int | None,
    halvings: int,
    notes: list[str],
) -> Drawn:
    """Burn-in and samples, again with half the step from the centres where that was too large for where chains went.

    A plan is made of curvatures around the centres, and those of a network are no quadratic's.
    """
    for left in reversed(range(halvings + 1)):
        walk.follow(plan)
        before = walk.steps
        time, course = walk.burn_in(burn_in)
        burnt, temperature, kept = walk.steps - before, walk.temperature_of(course), [walk.chains.states()]
        if not left or not temperature.above(INFLATION):
            every = thinning or max(1, min(MOST_STEPS // samples, math.ceil(SPACING * time)))
            kept, losses, places, course, apart = _draw(walk, samples, every, thinning is None)
            temperature = walk.temperature_of(course)
            if not left or not temperature.above(INFLATION):
                break
        plan = smaller(walk, plan, kept)
        walk.to_centre()
    if left < halvings:
        times = ("once", "twice", "three times")[halvings - left - 1]
        notes.append(
            f"the step was halved {times}, to {plan.lr:.3g}: with larger ones chains ran hot, or away"
        )
    trace = walk.positions_of(course)
    size = float(smaller_size(trace[:, places]).min()) if samples >= LEAST else 0.0
    return Drawn(kept, losses, size, trace, temperature, time, burnt, apart)


def _draw(
    walk: ChainSampler, samples: int, every: int, may_go_on: bool
) -> tuple[list[list[dict[str, Tensor]]], Tensor, list[int], Course, int]:
    """Samples, their losses [chains, samples] and places in the course, the course, and the steps between samples.

    A run that was too short goes on by what its effective sizes lack; the samples are then spread over all of it.
    """
    course = walk.course()
    kept: list[list[dict[str, Tensor]]] = []
    losses: list[Tensor] = []
    batch = walk.data.whole if walk.data.whole is not None else walk.data.next(1)[0][0]
    most = min(LONGER * samples, max(MOST_STEPS // every, samples)) if may_go_on else samples
    length, stride = samples, max(1, every // RECORDS)
    while True:
        while len(kept) < length:
            walk.go(every, "samples", course, stride)
            kept.append(walk.chains.states())
            with torch.no_grad():
                losses.append(walk.losses(batch).cpu())
        found = unjudged_statistics(walk.positions_of(course))
        rhat, size = float(found.rhat.nan_to_num(0.0).max()), float(found.size.min())
        enough = rhat < RHAT and size >= NEEDED * walk.n
        if enough or length >= most or rhat > HOPELESS or not math.isfinite(size):
            break
        lacking = max(NEEDED * walk.n / max(size, 1.0), ON)
        length = min(most, math.ceil(length * min(lacking * MARGIN, 2.0)))
    spread = torch.linspace(length / samples - 1, length - 1, samples).round().long().tolist()
    apart = round(every * length / samples)
    of_kept = walk.ranks.gather(torch.stack([losses[i] for i in spread], 1))
    remembered = every // stride
    places = [(i + 1) * remembered - 1 for i in spread]
    return [kept[i] for i in spread], of_kept, places, course, apart
