"""The local learning coefficient: how flat the well is that trained weights lie in (Lau et al. 2023)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fekernels._checks import boolean, integer, number, one_of
from fekernels._loader_batches import check_batches
from fekernels._runtime.parts import check_unsharded
from fekernels._runtime.ranks import draw_seed
from fekernels._runtime.torch_internals import uncompiled
from fekernels.diagnostics.mean_check import judge, measure
from fekernels.posterior.chains import LossFunction
from fekernels.posterior.learning_coefficient_estimate import LearningCoefficient, estimate_of
from fekernels.posterior.localized import SAMPLERS, Localized, Masks
from fekernels.posterior.pilot import Data
from fekernels.posterior.progress import Bar

if TYPE_CHECKING:
    pass

__all__ = ["local_learning_coefficient"]

OWNER = "local_learning_coefficient"


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
    result = estimate_of(walk, beta * rises, held, h, length, noise, settings, [no_mean] if no_mean else [])
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
    check_unsharded(OWNER, model)
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
