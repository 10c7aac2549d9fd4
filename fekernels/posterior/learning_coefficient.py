"""The local learning coefficient: how flat the well is that trained weights lie in (Lau et al. 2023)."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fekernels._checks import boolean, integer, number, one_of
from fekernels._runtime.ranks import draw_seed
from fekernels._runtime.torch_internals import uncompiled
from fekernels.diagnostics.chains import effective_sample_size, split_rhat
from fekernels.posterior.batches import check_batches
from fekernels.posterior.chains import LossFunction
from fekernels.posterior.localized import SAMPLERS, Localized, Masks
from fekernels.posterior.mean_check import judge, measure
from fekernels.posterior.pilot import Data, flat
from fekernels.posterior.progress import Bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LearningCoefficient", "LearningCoefficientDiagnostics", "local_learning_coefficient"]

OWNER = "local_learning_coefficient"
RHAT = 1.1  # of losses, of a few hundred draws with long memory; their error is told besides
DRIFT = 0.1  # of the estimate, by which the halves may differ, and
STANDARD_ERRORS = 3  # of the chains' own differences, by which they may besides
HELD_ERRORS = 2  # a covariance of few draws is known less well than a mean
MOST = 1.2  # d/2, with what noise and step may add
MOST_NOISE = 0.1  # r
ROUNDINGS = 4  # of the loss, which its spread must be more than
MOST_BIAS = 0.1  # of the estimate


@dataclass(frozen=True)
class LearningCoefficientDiagnostics:
    """Whether an estimate of `local_learning_coefficient` can be believed; ``str`` is its text.

    Attributes:
        rhat: split R-hat of the losses over the chains.
        ess: effective sample size of the losses of all chains together.
        error: standard error of the mean, from ess: what more draws would change.
        drift: the estimate of the second half of the draws less that of the first.
        noise_ratio: r = h s2 / (2 T D), the median over the weights that moved: what the noise of minibatch gradients
            adds to a variance, in units of what the temperature asks for (docs/langevin_adam.md).
        noise_bias: what that noise adds to the estimate, in all: the sum of r / 2 over the weights. Exact for a loss
            that is quadratic, and an upper bound where the localisation is stronger than the curvature.
        step_bias: what the finite step adds to the estimate, likewise.
        localization_bias: what the localization takes from the estimate, at least: how fast the estimate falls with the
            logarithm of the localization, which is the covariance of n_beta L and localization / 2 |w - w0|^2. For
            curvature k it is c g / (2 (c + g)^2), c = n_beta k and g the localization, of the g / (2 (c + g)) that are
            missing. Directions without curvature have no part in it.
        settings: n_beta, localization, lr (epsilon) and how it was chosen, and the rest.
        warnings: what speaks against the estimate, in sentences.
    """

    rhat: float
    ess: float
    error: float
    drift: float
    noise_ratio: float
    noise_bias: float
    step_bias: float
    localization_bias: float
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"standard error {self.error:.3g}, R-hat {self.rhat:.3f}, effective sample size {self.ess:.0f}; drift "
            f"{self.drift:.3g}; of the estimate {self.noise_bias:.3g} are gradient noise (r = {self.noise_ratio:.3f}) "
            f"and {self.step_bias:.3g} the finite step",
            ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in self.settings.items()
            ),
            *(f"* {warning}" for warning in self.warnings),
        ]
        return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)


@dataclass(frozen=True)
class LearningCoefficient:
    """An estimate of the local learning coefficient.

    Attributes:
        mean: over the chains. NaN where a chain diverged.
        std: over the chains, with n - 1; NaN for one chain.
        per_chain: [chains], float64.
        trace: [chains, draws], the loss at each draw, float64 on the CPU: of the draw's batch, less that batch's at the
            model's weights, plus init_loss.
        init_loss: at the model's weights, of the whole loader.
        diagnostics: whether to believe it. ``diagnostics.warnings`` are empty where nothing speaks against it.
    """

    mean: float
    std: float
    per_chain: Tensor
    trace: Tensor = field(repr=False)
    init_loss: float
    diagnostics: LearningCoefficientDiagnostics = field(repr=False)

    def __str__(self) -> str:
        return (
            f"local learning coefficient {self.mean:.4g}, std {self.std:.2g} over chains\n{self.diagnostics}"
        )

    def plot(self) -> Figure:
        """Each chain's losses with that of the model's weights, and its estimate from the draws so far."""
        from fekernels.plots import learning_coefficient

        return learning_coefficient(
            self.trace, self.init_loss, self.diagnostics.settings["n_beta"], self.mean
        )


def local_learning_coefficient(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    *,
    data_size: int,
    n_beta: float | None = None,
    localization: float = 100.0,
    lr: float | None = None,
    chains: int = 4,
    draws: int = 200,
    burn_in: int = 0,
    masks: Mapping[str, Tensor | None] | Iterable[str] | None = None,
    sampler: str = "sgld",
    seed: int | None = None,
    vectorize: bool | None = None,
    progress: bool = True,
) -> LearningCoefficient:
    """Estimate the local learning coefficient of trained weights w0, and measure whether the estimate can be believed.

        estimate = fe.local_learning_coefficient(model, loss_fn, loader, data_size=len(data), burn_in=200)
        print(estimate)

    It is n_beta (E[L(w)] - L(w0)), with L the mean loss and w drawn from
    exp(-n_beta L(w) - localization / 2 |w - w0|^2) by steps of

        w <- w - lr/2 (n_beta g + localization (w - w0)) + sqrt(lr) xi

    with g a minibatch's gradient (`fe.SGLD` with h = lr n_beta / 2, T = 1 / n_beta). For a regular model of d weights
    it is d/2 for any n_beta; for a singular one it is less and depends weakly on n_beta. The localization holds what
    the loss does not: directions of curvature far below localization / n_beta count for nothing.

    All chains begin at w0, each with batches and noise of its own, in one call of the model; the copy is in the mode,
    training or evaluation, that the model is in.

    Args:
        model: a trained network. It is not written to.
        loss_fn: loss_fn(model, batch), the mean loss over the points of the batch; a sum is refused.
        loader: an iterable of batches that starts anew every time, such as a DataLoader or a list. For init_loss it is
            gone through once; of a DataLoader each batch is called with w0's weights as well (a forward pass).
        data_size: N, the number of points the mean loss stands for: the loader's, or their tokens.
        n_beta: the inverse temperature; None: N / log N (Watanabe 2013).
        localization: gamma, in units of 1 / weight^2. 0 leaves directions without curvature to walk away.
        lr: epsilon of the paper; None measures the largest curvature and the gradient's noise where the chains go, and
            takes the step with h k = 0.15 in the stiffest direction, or less where noise would exceed a tenth of the
            variance. ``diagnostics.settings`` tells it.
        chains: how many, >= 1.
        draws: how many of each chain, >= 4.
        burn_in: steps before the draws. The loss rises from that of w0 to that of the posterior: draws on the way make
            the estimate too small, which ``diagnostics.drift`` shows.
        masks: which weights move: names of parameters, or a mapping from names to boolean tensors of their shapes, True
            where weights move (None for all of a parameter). Everything else keeps its bits, and d and the estimate are
            those of the weights that move. None: all parameters that require a gradient; where an adapter (LoRA) was
            trained, its own.
        sampler: "sgld", or "rmsprop" for `fe.LangevinAdam` with beta1 = 0, beta2 = 0.99, eps = 0.1 (pSGLD), all forces
            and the noise divided by D = sqrt(v) + 0.1, to which lr is to be matched. D stands still after a burn-in;
            without one it adapts all along.
        seed: of the noise and of the order of a list's batches; None draws one from torch's default generator.
        vectorize: False calls the model chain by chain, for models that `torch.vmap` cannot take; as for `fe.Chains`.
        progress: a tqdm bar.

    Returns:
        estimate, losses and diagnostics; a UserWarning where these speak against it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Lau, Furman, Wang, Murfet & Wei 2023, "The local learning coefficient", arXiv:2308.12108; Watanabe 2013.
    """
    beta = _checked(
        model, loss_fn, loader, data_size, n_beta, localization, lr, chains, draws, burn_in, sampler, vectorize,
        progress,
    )  # fmt: skip
    network = uncompiled(model)
    moved = _moved(network, masks)
    seed = draw_seed() >> 1 if seed is None else integer(OWNER, "seed", seed, -(1 << 62), 1 << 62)
    data = Data(OWNER, loader, data_size, seed, joins=False)
    no_mean = judge(OWNER, measure(network, loss_fn, data.sample))
    with Bar(OWNER, data, progress) as tick:
        walk = Localized(
            network, loss_fn, data, chains, beta, localization, sampler, moved, seed, vectorize, tick
        )
        h = walk.choose() if lr is None else lr * beta / 2
        walk.follow(h)
        for _ in range(burn_in):
            walk.step("burn-in")
        if burn_in:
            walk.freeze()
        seen = [(walk.held(), *walk.step("draws")) for _ in range(draws)]
        noise = walk.noise()
    held, rises, lengths = (torch.stack(each, 1).cpu() for each in zip(*seen, strict=True))
    length = float(lengths.mean())
    settings = {
        "n_beta": beta, "localization": float(localization), "lr": 2 * h / beta,
        "lr from": "curvature and gradient noise" if lr is None else "the caller", "chains": chains, "draws": draws,
        "burn_in": burn_in, "sampler": sampler, "weights": walk.weights, "epochs": data.epochs, "seed": seed,
    }  # fmt: skip
    result = _result(walk, beta * rises, held, h, length, noise, settings, [no_mean] if no_mean else [])
    if result.diagnostics.warnings:
        warnings.warn(f"{OWNER}: {'; '.join(result.diagnostics.warnings)}", UserWarning, stacklevel=2)
    return result


def _checked(
    model: Any, loss_fn: Any, loader: Any, data_size: Any, n_beta: Any, localization: Any, lr: Any, chains: Any,
    draws: Any, burn_in: Any, sampler: Any, vectorize: Any, progress: Any,
) -> float:  # fmt: skip
    """n_beta, once everything is what it must be."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OWNER}: model must be a torch.nn.Module; got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"{OWNER}: loss_fn must be callable; got {type(loss_fn).__name__}")
    check_batches(OWNER, loader)
    size = integer(OWNER, "data_size", data_size, 2)
    beta = size / math.log(size) if n_beta is None else number(OWNER, "n_beta", n_beta, above=0.0)
    number(OWNER, "localization", localization)
    if lr is not None:
        number(OWNER, "lr", lr, above=0.0)
    integer(OWNER, "chains", chains, 1)
    integer(OWNER, "draws", draws, 4)
    integer(OWNER, "burn_in", burn_in, 0)
    one_of(OWNER, "sampler", sampler, SAMPLERS)
    if vectorize is not None:
        boolean(OWNER, "vectorize", vectorize)
    boolean(OWNER, "progress", progress)
    return beta


def _moved(model: nn.Module, masks: Any) -> Masks:
    """Of every parameter that moves, the mask, or None for all of it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(f"{OWNER}: model must have a parameter that requires a gradient; got none")
    if masks is None:
        return dict.fromkeys(trained)
    if isinstance(masks, (str, Tensor)) or not isinstance(masks, Iterable):
        raise TypeError(
            f"{OWNER}: masks must be a mapping from names of parameters to boolean tensors, or names; got "
            f"{type(masks).__name__}"
        )
    given: dict[Any, Any] = dict(masks) if isinstance(masks, Mapping) else dict.fromkeys(masks)
    moved: dict[str, Tensor | None] = {}
    for name, mask in given.items():
        if name not in trained:
            raise ValueError(
                f"{OWNER}: masks must name parameters of the model that require a gradient; got {name!r}"
            )
        if mask is None:
            moved[name] = None
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{OWNER}: masks[{name!r}] must be a boolean tensor or None; got {came}")
        if mask.shape != trained[name].shape:
            raise ValueError(
                f"{OWNER}: masks[{name!r}] must have shape {tuple(trained[name].shape)} like the parameter; got "
                f"{tuple(mask.shape)}"
            )
        if bool(mask.any()):
            moved[name] = None if bool(mask.all()) else mask
    if not moved:
        raise ValueError(f"{OWNER}: masks must let a weight move; got none")
    return moved


def _result(
    walk: Localized,
    rises: Tensor,
    held: Tensor,
    h: float,
    length: float,
    noise: list[Tensor],
    settings: dict[str, Any],
    notes: list[str],
) -> LearningCoefficient:
    """Of the draws' losses above that of the start, times n_beta, [chains, draws]."""
    chains, draws = rises.shape
    per_chain = rises.mean(1)
    mean, std = float(per_chain.mean()), float(per_chain.std()) if chains > 1 else math.nan
    if float(rises.max()) == float(rises.min()):
        rhat, ess, error = 1.0, float(rises.numel()), 0.0
    else:
        rhat, ess = float(split_rhat(rises)), float(effective_sample_size(rises))
        error = float(rises.std()) / math.sqrt(ess) if ess > 0 else math.nan
    differences = rises[:, -(draws // 2) :].mean(1) - rises[:, : draws // 2].mean(1)
    ratios = (flat(noise) / flat(walk.denominators()))[:, walk.moving] * (h / (2 * walk.temperature))
    noise_bias = float(ratios.double().sum(1).mean()) / 2
    # E[(w - w0) . dU] = T d + h/2 E[g^2 / D] of every stationary chain (from its second moment), and (w - w0) . dU is
    # twice U where U is quadratic: what U has above T d / 2 is h/4 E[g^2 / D], of noise and finite step together.
    step_bias = max(0.0, h / (4 * walk.temperature) * length - noise_bias)
    late = draws if settings["burn_in"] else draws // 2  # on the way out both grow
    taken, taken_error = _taken(rises[:, -late:], held[:, -late:])
    found = LearningCoefficientDiagnostics(
        rhat, ess, error, float(differences.mean()), float(ratios.median()), noise_bias, step_bias, taken, settings, ()
    )  # fmt: skip
    told = (*notes, *_doubts(found, per_chain, mean, differences, rises, walk, taken_error))
    diagnostics = LearningCoefficientDiagnostics(**{**vars(found), "warnings": told})
    trace = rises / settings["n_beta"] + walk.initial
    return LearningCoefficient(mean, std, per_chain, trace, walk.initial, diagnostics)


def _taken(rises: Tensor, held: Tensor) -> tuple[float, float]:
    """localization_bias and its standard error."""
    product = (rises - rises.mean()) * (held - held.mean())
    if (
        product.shape[1] < 4
        or not bool(product.isfinite().all())
        or float(product.max()) == float(product.min())
    ):
        return 0.0, 0.0
    size = float(effective_sample_size(product))
    return float(product.mean()), float(product.std()) / math.sqrt(size) if size > 0 else math.inf


def _doubts(
    found: LearningCoefficientDiagnostics,
    per_chain: Tensor,
    mean: float,
    differences: Tensor,
    rises: Tensor,
    walk: Localized,
    taken_error: float,
) -> list[str]:
    """What speaks against the estimate, with the numbers."""
    told = []
    if not walk.data.fits:
        told.append(
            f"the loader holds {walk.data.points:,} points, data_size says {walk.data.data_size:,}: which the estimate "
            "is of"
        )
    finite = rises.isfinite()
    if not bool(finite.all()):
        lost = [k for k, each in enumerate(finite.all(1).tolist()) if not each]
        first = int(finite.all(0).int().argmin())
        return [
            *told,
            f"chains {lost} diverged (first at draw {first}): there is no estimate; take a smaller lr than "
            f"{found.settings['lr']:.3g}, or a larger localization",
        ]
    if float(per_chain.min()) < 0:
        told.append(
            f"negative estimates, down to {float(per_chain.min()):.3g}: chains found a lower loss than the model's, "
            "which is not at a minimum of this loss. Train it further, or take a larger localization"
        )
    most = walk.weights / 2
    if mean > MOST * most + STANDARD_ERRORS * found.error:
        told.append(
            f"the estimate is above d/2 = {most:g}, the most that a minimum can have: chains left the well, or the "
            "step or the noise is too large"
        )
    loss = rises.double().std() / found.settings["n_beta"]
    if float(loss) < ROUNDINGS * torch.finfo(walk.parameters[0].dtype).eps * abs(walk.initial):
        told.append(
            f"the losses of the draws differ by their rounding alone ({float(loss):.1e} of {walk.initial:.3g}): take a "
            "larger lr, or float64"
        )
    if found.rhat > RHAT:
        told.append(f"chains disagree: R-hat is {found.rhat:.2f}, to be below {RHAT}. Draw more, or burn in")
    limit = (
        STANDARD_ERRORS * float(differences.std()) / math.sqrt(len(differences))
        if len(differences) > 1
        else 0
    )
    if abs(found.drift) > max(DRIFT * abs(mean), limit):
        told.append(
            f"the loss still drifts: the second half of the draws gives {found.drift:+.3g} over the first. Take a "
            "longer burn_in and more draws"
        )
    if found.noise_ratio > MOST_NOISE or found.noise_bias > MOST_BIAS * abs(mean):
        told.append(
            f"minibatch noise (r = {found.noise_ratio:.2f}) makes up to {found.noise_bias:.3g} of the estimate: take a "
            "smaller lr or larger batches"
        )
    if found.localization_bias > MOST_BIAS * abs(mean) + HELD_ERRORS * taken_error:
        told.append(
            f"the localization ({found.settings['localization']:.3g}) holds weights that the loss holds too: the "
            f"estimate is too small by {found.localization_bias:.2g} or more. Take a smaller localization"
        )
    if found.step_bias > MOST_BIAS * abs(mean):
        told.append(
            f"the step is coarse, and makes up to {found.step_bias:.3g} of the estimate: take a smaller lr"
        )
    return told
