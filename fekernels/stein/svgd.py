"""`fe.SVGD`: particles transported by the Stein variational gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fekernels._catalogue.stein import KERNELS, PRECISION_NAMES
from fekernels._checks import integer, number, one_of
from fekernels._runtime.agreement import NOTHING, Agreement, BatchDigest
from fekernels._runtime.parts import begin_at
from fekernels._runtime.ranks import draw_seed, group_of, has_ranks, seed_of_rank_0
from fekernels.ops.noise_key import signed_seed
from fekernels.ops.stein.particles import which_kernel
from fekernels.stein._doubts import Flight, warn_of_coincidence, warn_of_equality
from fekernels.stein._langevin_noise import make_noise
from fekernels.stein._state import load_whole_state, whole_state
from fekernels.stein.annealing import annealing
from fekernels.stein.checks import (
    checked_bandwidth,
    checked_kernel_batch,
    checked_particles,
    make_optimizer,
    positive,
    settings_of,
)
from fekernels.stein.particle_groups import random_groups
from fekernels.stein.population import EXCHANGES, population
from fekernels.stein.svgd_run import SVGDResult, discrepancy_kernel, endless
from fekernels.stein.target import LogDensity, ScoreFunction, Target, make_target

if TYPE_CHECKING:
    from fekernels.stein.ensemble import SVGDEnsemble

__all__ = ["SVGD"]

BATCH = "batch (of all the data: particles are split over ranks, data are not; minibatches by one seed)"
# What ranks must have alike, by the constructor's names.
AGREED = (
    "d", "the particles' dtype", "kernel", "bandwidth", "bandwidth_scale", "temperature", "kernel_batch", "noise",
    "precision", "exchange", "seed", "optimizer", "log_prob or scores",
)  # fmt: skip


class SVGD:
    """Stein variational gradient descent (Liu & Wang 2016, arXiv:1608.04471): n particles that sample exp(log_prob).

    A step moves every particle along phi = `fe.svgd_direction`, the direction in the unit ball of the kernel's space
    along which KL(particles || target) falls fastest. The optimizer is handed -phi as the gradient.

    Args:
        log_prob: unnormalised log-density (of data, minus the summed loss plus the log of the prior) by which autograd
            makes the scores: batched, [n, d] -> [n], or of one particle, [d] -> scalar, then vmapped. Called once per
            step, as log_prob(particles, *batch) with the arguments of `step`, so it may draw minibatches or keep
            state. Finite at every particle. None with `scores`.
        particles: [n, d], n >= 1, of float32, float64, bfloat16 or float16. Copied.
        scores: in place of log_prob: its gradient as a function, [n, d] -> [n, d].
        batched: whether log_prob is batched. None finds out at the first step: three more backward passes, and for a
            function that is not batched a second call. [n] numbers that depend on other particles than their own are
            then an error; True and False are not checked.
        optimizer: None is Adam(lr=0.1); "adam", "adagrad", "sgd"; a torch.optim class; or a factory, called with
            [particles] (or with the tensor, where that is a TypeError). It holds the particles and nothing else. For
            float16 particles a torch optimizer whose eps is 0 in float16, as the default's 1e-8, is refused.
        lr: of a named optimizer (default 0.1) or a class (default the class's own).
        kernel: a name or an instance of `fe.kernels`, as `fe.svgd_direction`.
        bandwidth: h in exp(-t/h): a number, "median" (of the particles at each step), or a schedule, called with the
            number of steps made so far and returning one of these.
        bandwidth_scale: factor of h, > 0. Above 1 the median loses less variance in many dimensions, and detail.
        temperature: factor of the repulsion, >= 0. With a log_prob that is a mean over N data points, 1/N is Bayes.
        anneal: gamma(step), a factor of the scores: None (1); a callable of the number of steps made so far;
            "cyclical" or "tanh" over `anneal_steps` steps: `fe.stein.CyclicalAnnealing`, `fe.stein.TanhAnnealing`.
        kernel_batch: m >= 2: each step deals the particles at random into groups of at most m, and a particle is moved
            by its own group alone, weighted so that the mean over all deals is the full direction (Li et al. 2020,
            arXiv:1902.03394): n m d operations. "median" is then the mean over the groups of their pairs' medians,
            over log(n + 1). Radial kernels only.
        noise: None; "kernel", stochastic SVGD (Gallego & Insua 2018, arXiv:1812.00071); or "independent". See below.
        noise_rate: a of the noise, >= 0; default 0 for "kernel", 1 for "independent".
        precision: as `fe.svgd_direction`.
        seed: of noise, groups and (`from_model`) initial weights; None draws one from torch's default generator.
            Ranks of a `torch.distributed` process group then take rank 0's at the first step that draws noise or
            groups, by a broadcast that every rank has to make. Initial weights are made before. With `process_group`
            they agree at construction, on initial weights too.
        process_group: a `torch.distributed.ProcessGroup` or a DeviceMesh of one dimension, whose ranks hold some of the
            particles each. None: all of them are here. See below.
        exchange: "auto", "all_gather" or "ring", as `fe.distributed.svgd_direction`; of ranks.

    **Noise.** With e = lr, temperature T and K the kernel matrix, to e phi a step adds

    * "kernel": e a s_i + sqrt(2 e T) (K/n + a I)^(1/2) xi. The drift is then D s + T div D for D = K/n + a I (phi's
      repulsion is the divergence of K/n), and the step Euler's for the Langevin diffusion of all n particles with
      that matrix (Ma et al. 2015, arXiv:1506.04696). It leaves n independent draws from target^(1/T) invariant at any
      n and a, up to an error of order e. For that h must not follow the particles: "median" leaves a term of
      order 1/n out. n^3/3 operations and 16 n^2 bytes, in float64.
    * "independent": e a s_i + sqrt(2 e T a) xi, Langevin dynamics of each particle beside SVGD. The target is invariant
      as n -> infinity, where phi vanishes on it; at finite n a bias remains that falls as a grows.

    Both need plain descent, x - lr grad (`optimizer="sgd"`): momentum and preconditioners change the law.

    **Ranks.** With a `process_group`, `particles` are this rank's own, none of them too: number 0 is rank 0's first and
    so on. All ranks construct the sampler with the same settings and call `step`, `run` and `state_dict` together.
    Bandwidth, direction, noise and groups are those of one process to the bit on any number of ranks; log_prob is
    called with own particles, and not where there are none. So the steps are the same to the bit where the scores are
    and where the optimizer works element by element, as Adam, SGD and fe.LangevinAdam do (one whose states show that it
    does not, as Adafactor's, raises at the first step). What fails on one rank, such as a NaN score, raises on all.
    noise="kernel" needs one process. Data are not split: every rank gives `step` the same batch, which is compared. A
    log_prob that holds data itself must hold the same on every rank: with rows of its own (of a DistributedSampler,
    say) a rank's particles go to another posterior than those of the others, and nothing tells.

    Attributes:
        particles: [n, d] where they are now, the tensor itself: it changes with each step.
        optimizer (torch.optim.Optimizer): for learning-rate schedulers.
        iteration (int): steps made.
        seed (int): as given, loaded or drawn.
        bandwidth: h of the last step, one element; None before the first.
        log_prob: [n] what log_prob returned in the last step; None before the first, and with `scores`. Of ranks, all
            of these are this rank's.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; nothing has changed then.

    Warns:
        UserWarning: once, from step 256 on, of particles that run away, as from a loss in place of a log-density. A
            mean loss for a sum is a density too, and is not told: see `temperature`.
    """

    def __init__(
        self,
        log_prob: Callable[..., Tensor] | Target | None,
        particles: Tensor,
        *,
        scores: Callable[..., Tensor] | None = None,
        batched: bool | None = None,
        optimizer: str | Callable[..., Optimizer] | None = None,
        lr: float | None = None,
        kernel: object = "rbf",
        bandwidth: float | Tensor | str | Callable[[int], Any] = "median",
        bandwidth_scale: float = 1.0,
        temperature: float = 1.0,
        anneal: str | Callable[[int], float] | None = None,
        anneal_steps: int | None = None,
        kernel_batch: int | None = None,
        noise: Literal["independent", "kernel"] | None = None,
        noise_rate: float | None = None,
        precision: str = "fp32",
        seed: int | None = None,
        process_group: Any = None,
        exchange: Literal["auto", "all_gather", "ring"] = "auto",
    ) -> None:
        name = type(self).__name__
        group = group_of(name, process_group)
        with Agreement(name, group, AGREED) as agreement:
            self._target = make_target(name, log_prob, scores, batched)
            self._particles = checked_particles(name, particles, 1 if group is None else 0)
            self._kernel, self._code = kernel, which_kernel(name, kernel)
            self._row = KERNELS[self._code.code]
            self._bandwidth = bandwidth
            if not callable(bandwidth):
                checked_bandwidth(name, bandwidth, self._row, self._particles)
            self._scale = positive(name, "bandwidth_scale", bandwidth_scale)
            self._temperature = number(name, "temperature", temperature)
            self._anneal = annealing(name, anneal, anneal_steps)
            kernel_batch = checked_kernel_batch(name, kernel_batch, self._row)
            self._noise = make_noise(name, noise, noise_rate, self._code, kernel_batch, group is None)
            self._precision = one_of(name, "precision", precision, PRECISION_NAMES)
            one_of(name, "exchange", exchange, EXCHANGES)
            if seed is not None:
                signed_seed(name, seed)
            self.optimizer = make_optimizer(name, optimizer, lr, self._particles)
            if self._noise is not None:
                self._noise.check(name, self.optimizer)
            drawn = draw_seed() if seed is None else 0
            x = self._particles
            fixed = "a schedule" if callable(bandwidth) else str(bandwidth)
            settings = (
                x.shape[1], x.dtype, tuple(self._code), fixed, self._scale, self._temperature, kernel_batch,
                self._noise, self._precision, exchange, seed, settings_of(self.optimizer, self.optimizer.defaults),
                type(self._target).__name__,
            )  # fmt: skip
            agreement.tell(len(x), settings, drawn)
        self._all, self._batch_digest = population(name, group, exchange, agreement, x), BatchDigest()
        begin_at(x, self._all.begin * x.shape[1])
        # One group is the full direction, and nothing is dealt.
        self._kernel_batch = kernel_batch if kernel_batch and kernel_batch < self._all.n else None
        self.seed = seed if seed is not None else agreement.number
        # Until ranks that hold copies have agreed on one.
        self._drawn_seed = self.seed if seed is None and group is None else None
        self.iteration = 0
        self.bandwidth: Tensor | None = None
        self.log_prob: Tensor | None = None
        # An ensemble takes a loss, and turns the sign itself.
        self._flight = Flight() if isinstance(self._target, LogDensity | ScoreFunction) else None
        # Noise parts them, by random draws or by scores of random functions; the latter are not known here.
        self._warned = group is None and self._noise is None and len(x) > 1 and bool((x == x[0]).all())
        if self._warned:
            warn_of_equality(name)

    @classmethod
    def from_model(
        cls,
        model: nn.Module | Callable[[], nn.Module] | Sequence[nn.Module],
        loss: Callable[..., Tensor],
        *,
        size: int | None = None,
        prior_precision: float = 0.0,
        chunk_size: int | None = None,
        **options: Any,
    ) -> SVGDEnsemble:
        """A repulsive ensemble of networks: `fe.stein.SVGDEnsemble` with these arguments."""
        from fekernels.stein.ensemble import SVGDEnsemble

        return SVGDEnsemble(
            model, loss, size=size, prior_precision=prior_precision, chunk_size=chunk_size, **options
        )

    @property
    def particles(self) -> Tensor:
        return self._particles

    def __repr__(self) -> str:
        n, d = self._all.n, self._particles.shape[1]
        return (
            f"{type(self).__name__}(n={n}, d={d}, kernel={self._row.name!r}, "
            f"optimizer={type(self.optimizer).__name__}, iteration={self.iteration})"
        )

    def step(self, *batch: Any) -> None:
        """Move the particles once.

        Args:
            batch: handed on to log_prob or scores, behind the particles; of ranks, the same on all.

        Raises:
            ValueError: a score or a log_prob that is NaN or infinite; names the step and the first such particle. Of
                ranks, on all of them, tensors or arrays of the batch that differ between two that have particles.
                Particles, optimizer and step count are then as they were before the call, and so they are after an
                exception from log_prob.
        """
        self._advance(batch, None)

    def run(
        self,
        steps: int,
        *,
        batches: Iterable[Any] | None = None,
        progress: bool = True,
        every: int | None = None,
        discrepancy: object = None,
        callback: Callable[[SVGD], Any] | None = None,
    ) -> SVGDResult:
        """Take steps, and measure the kernel Stein discrepancy now and then.

        Args:
            steps: how many, >= 0.
            batches: one item per step for `step` (of a tuple or list its items), begun again when they end: say,
                a DataLoader. None: nothing.
            progress: a tqdm bar with the last discrepancy; of ranks, on the first.
            every: steps between measurements. What enters a step is measured, with that step's scores and
                bandwidth; always what enters the last. None is a fiftieth of the steps, 0 is never. A measurement
                costs about as much as a direction, n^2 d operations with `kernel_batch` too.
            discrepancy: its kernel. None is the sampler's own (IMQ for Laplace, whose discrepancy is infinite): then
                the V-statistic is |phi|^2 in the kernel's space, the rate at which KL falls for many particles. With
                few it stays above 0 where they come to rest.
            callback: called with the sampler after each step: to step a learning-rate scheduler, to keep particles.

        Raises:
            ValueError: as `step`; batches without an item.
        """
        name = f"{type(self).__name__}.run"
        steps = integer(name, "steps", steps, 0, 1 << 32)
        interval = max(1, steps // 50) if every is None else integer(name, "every", every, 0, 1 << 62)
        kernel = discrepancy_kernel(name, discrepancy, self._kernel)
        if batches is not None and not isinstance(batches, Iterable):
            raise TypeError(f"{name}: batches must be iterable; got {type(batches).__name__}")
        from tqdm import tqdm  # a tenth of this package's import time

        arguments = endless(name, batches)
        taken: list[int] = []
        rows: list[Tensor] = []
        progress = progress and self._all.first
        bar = tqdm(range(steps), desc=type(self).__name__, disable=not progress)
        for i in bar:
            due = interval > 0 and (i % interval == 0 or i == steps - 1)
            measured = self._advance(next(arguments), kernel if due else None)
            if measured is not None:
                taken.append(self.iteration - 1)
                rows.append(measured)
                if progress:
                    bar.set_postfix(discrepancy=f"{float(measured[0]):.3g}", refresh=False)
            if callback is not None:
                callback(self)
        return SVGDResult.of(self._particles, taken, rows)

    @torch.no_grad()
    def _advance(self, batch: tuple[Any, ...], kernel: object) -> Tensor | None:
        """One step; with `kernel`, the discrepancy, the bandwidth and the mean log_prob of what enters it."""
        x, held = self._particles, self._target.state()
        try:
            phi, kick, h, log_prob, measured = self._direction(batch, kernel)
        except BaseException:
            self._target.load(held)
            raise
        finally:
            self._all.forget()
        x.grad = phi.neg_()
        try:
            self._all.move(self.optimizer, x)
        finally:
            x.grad = None  # as large as the particles, and of no further use
        if kick is not None:
            x.add_(kick)
        self.iteration, self.bandwidth, self.log_prob = self.iteration + 1, h, log_prob
        return measured

    def _agree_on_seed(self) -> None:
        """Before the first noise or groups, ranks of a process group take the seed that rank 0 drew.

        Not at construction, which is no collective. A seed that was given, set or loaded stays.
        """
        noisy = self._noise is not None and self._temperature > 0
        if (noisy or self._kernel_batch is not None) and self.seed == self._drawn_seed and has_ranks():
            self.seed, self._drawn_seed = seed_of_rank_0(self.seed), None

    def _direction(
        self, batch: tuple[Any, ...], kernel: object
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """All of a step that may fail, which changes nothing here: phi, noise, h, log_prob and what was measured."""
        name, x, step, everyone = type(self).__name__, self._particles, self.iteration + 1, self._all
        self._agree_on_seed()
        agreement = everyone.together(
            ("iteration", "seed", "optimizer", "bandwidth", "anneal", "what is measured", BATCH), (BATCH,)
        )
        with agreement:
            if self._noise is not None:
                self._noise.check(name, self.optimizer)  # its groups may have been changed
            gamma = 1.0 if self._anneal is None else number(name, "anneal", self._anneal(self.iteration))
            asked = self._bandwidth(self.iteration) if callable(self._bandwidth) else self._bandwidth
            h = checked_bandwidth(name, asked, self._row, x)
            scores, log_prob = everyone.evaluate(self._target, x, batch, step)
            told = "median" if h is None else h.item() if everyone.group is not None else 0.0
            rates = "" if everyone.group is None else settings_of(self.optimizer)
            measured_by = None if kernel is None else tuple(which_kernel(name, kernel))
            data = self._batch_digest(batch) if everyone.group is not None and len(x) else NOTHING
            agreement.tell(len(x), (self.iteration, self.seed, rates, told, gamma, measured_by, data))
        groups = None
        if self._kernel_batch is not None:
            groups = random_groups(everyone.n, self._kernel_batch, self.seed, step, x.device)
        if h is None and groups is not None:
            h = everyone.group_bandwidth(x, groups)
        elif h is None:
            # The last one is a hint where to look, and changes nothing.
            h = everyone.median(x, None if self.bandwidth is None else self.bandwidth / self._scale)
            if not self._warned and everyone.n > 1 and not float(h) > 0:  # half of all pairs coincide
                self._warned = True
                warn_of_coincidence(name, step)
        if self._scale != 1:
            h = h * self._scale
        drift = scores if gamma == 1 else gamma * scores
        settings: dict[str, Any] = {
            "bandwidth": h,
            "temperature": self._temperature,
            "precision": self._precision,
        }
        if groups is None:
            phi = everyone.direction(x, drift, self._kernel, **settings)
        else:
            phi = everyone.group_direction(x, drift, groups, self._kernel, **settings)
        kick = None
        if self._noise is not None:
            phi.add_(drift, alpha=self._noise.rate)
            rate = float(self.optimizer.param_groups[0]["lr"])
            kick = self._noise.kick(
                x, self._code, h, self._temperature, rate, self.seed, step, everyone.begin
            )
        with everyone.together() as agreement:
            everyone.check_finite("the direction", phi, step)
            agreement.tell(len(x))
        if self._flight is not None and self._flight.due(self.iteration):
            self._flight.look(name, self.iteration, x, scores, log_prob, self._temperature, everyone.mean)
        measured = None if kernel is None else everyone.measure(kernel, x, scores, h, log_prob)
        return phi, kick, h, log_prob, measured

    def state_dict(self) -> dict[str, Any]:
        """Copies of particles, optimizer state, step count and seed: all that the further path depends on, apart from
        what log_prob and schedules of the user's keep themselves. Tensors, numbers and dicts only; the seed is None
        where nobody gave one and ranks have not agreed on theirs yet, which is before the first noise or groups.

        Of ranks a collective: all particles on every rank, so that any number of ranks, one too, can go on from it.
        """
        return whole_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state_dict` of a sampler with the same settings: the same path, bit for bit.

        Of ranks a collective, in which each takes its own part of the state.

        Raises:
            TypeError, ValueError: a state that does not fit; nothing has changed then.
        """
        load_whole_state(self, state)
