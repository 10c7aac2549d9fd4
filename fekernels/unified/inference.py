"""The document's inference over weights: q(theta) fitted step by step, or to the end; gradient descent seen as one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.optim import LBFGS, SGD
from tqdm import trange

from fekernels._checks import integer, number
from fekernels.diagnostics.trajectory import TrajectoryKL
from fekernels.losses import gaussian_kl, natural_step, reparameterize
from fekernels.optim import VariationalAdam

__all__ = ["BayesianOptimizer", "GradientDescentAsVI", "VariationalFit", "optimization_as_inference"]


class BayesianOptimizer:
    """An optimizer that infers: each step moves a Gaussian q over the weights to the posterior (Bayes by backprop).

        optimizer = fe.unified.BayesianOptimizer(model, data_size=len(x))
        for batch in batches:
            free_energy = optimizer.step(lambda batch: loss(model(batch.x), batch.y), batch)

    Over ``fe.VariationalAdam(estimator="reparam")``: mean and standard deviation both get gradients, and the deviation
    stays positive. Outside of a step the model's weights are q's mean.

    Args:
        model: whose parameters are inferred; they are q's first mean.
        prior_std: standard deviation of the prior N(0, prior_std^2) of every weight, > 0.
        lr: Adam's, of means and deviations.
        data_size: number of data points of which ``loss_fn`` gives the mean. 1, the default, is for a ``loss_fn``
            that gives the sum over all data: with the mean of N points and 1, the posterior is that of a single point.
        init_std: q's first deviation. None is a tenth of prior_std: from prior_std itself a network sees mostly noise.
        seed: of q's noise, 64 bits; None draws one from torch's default generator.

    Raises:
        TypeError: model is no module. ValueError: a number out of its range.

    Source: Blundell et al. 2015, arXiv:1505.05424.
    """

    def __init__(
        self,
        model: nn.Module,
        prior_std: float = 1.0,
        *,
        lr: float = 0.01,
        data_size: float = 1.0,
        init_std: float | None = None,
        seed: int | None = None,
    ) -> None:
        function = "BayesianOptimizer"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{function}: model must be a torch.nn.Module; got {type(model).__name__}")
        prior_std = number(function, "prior_std", prior_std, above=0.0)
        data_size = number(function, "data_size", data_size, above=0.0)
        init_std = prior_std / 10 if init_std is None else number(function, "init_std", init_std, above=0.0)
        self.model = model
        self.prior = Normal(0.0, prior_std)
        self.data_size = data_size
        precision = 1 / (data_size * prior_std**2)
        if (curvature := 1 / (data_size * init_std**2) - precision) <= 0:
            raise ValueError(
                f"{function}: init_std must be below prior_std, which no data would leave; got {init_std:g} and "
                f"{prior_std:g}"
            )
        self.optimizer = VariationalAdam(
            model.named_parameters(), lr, data_size, hess_init=curvature, weight_decay=precision,
            betas=(0.9, 0.999), estimator="reparam", seed=seed,
        )  # fmt: skip

    @property
    def q_mean(self) -> dict[str, Tensor]:
        """q's means by the parameters' names."""
        return {name: found.mean for name, found in self._posterior()}

    @property
    def q_std(self) -> dict[str, Tensor]:
        """q's standard deviations by the parameters' names."""
        return {name: found.std for name, found in self._posterior()}

    def _posterior(self) -> Any:
        names = (name for name, _ in self.model.named_parameters())
        return zip(names, self.optimizer.posterior(), strict=True)

    def step(self, loss_fn: Callable[[Any], Tensor], data: Any) -> float:
        """One step by the free energy's gradient at one draw of the weights.

        Args:
            loss_fn: data -> a scalar, minus the log-likelihood of ``data`` under the model's present weights: summed
                over all data, or its mean where ``data_size`` says of how many.

        Returns:
            The free energy in nats before the step, data_size loss + KL(q || prior), with the loss at the draw.

        Raises:
            TypeError: loss_fn is not callable or gives no tensor. ValueError: its loss is no scalar, or without a
                gradient. FloatingPointError: a loss that is not finite. q has not changed then.
        """
        self.optimizer.zero_grad()
        with self.optimizer.sampled_params(train=True):
            loss = _loss("BayesianOptimizer.step", loss_fn, data)
            loss.backward()
        free_energy = self.data_size * float(loss.detach()) + float(self.optimizer.kl())
        self.optimizer.step()
        return free_energy


def _loss(function: str, loss_fn: Callable[[Any], Tensor], data: Any) -> Tensor:
    """One finite number with a gradient."""
    if not callable(loss_fn):
        raise TypeError(
            f"{function}: loss_fn must be callable, data -> a scalar tensor; got {type(loss_fn).__name__}"
        )
    loss = loss_fn(data)
    if not isinstance(loss, Tensor):
        raise TypeError(f"{function}: loss_fn must return a scalar tensor; got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{function}: loss_fn must return a scalar tensor; got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            f"{function}: loss_fn must return a loss with a gradient in the model's weights; got one without"
        )
    if not bool(loss.detach().isfinite()):
        raise FloatingPointError(f"{function}: loss_fn must give a finite loss; got {loss.item()}")
    return loss


class VariationalFit(NamedTuple):
    """What ``optimization_as_inference`` found.

    Attributes:
        q: the Gaussian over theta, independent in every element.
        elbo: E_q[log p(data | theta)] - KL(q || prior) in nats, over draws that the fit has not seen: a lower bound of
            log p(data), but for the standard error.
        standard_error: of elbo.
        converged: whether these draws would move q: a mean by .2 of its deviation, a precision by .2 of itself.
        history: [steps], the estimates of the bound on the way.
    """

    q: Normal
    elbo: float
    standard_error: float
    converged: bool
    history: Tensor


def optimization_as_inference(
    data: Any,
    model: Callable[[Tensor], Any],
    prior: Normal,
    *,
    log_likelihood: Callable[[Any, Any], Tensor] | None = None,
    steps: int = 500,
    samples: int = 8,
    lr: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> VariationalFit:
    """Maximise the evidence's lower bound over a Gaussian q(theta): fitting parameters, done as inference.

    q begins narrow at a mode of the log joint and takes natural-gradient steps. L-BFGS looks for that mode from the
    prior's mean and from four draws of the prior, and once more beside the highest that it found, as a saddle is left
    there. Draws at which the model has no value are no starts. There may be other and higher modes that no start leads
    to: the bound is then that about the one that was found, and ``converged`` does not tell. Another seed draws others.

    Args:
        data: whatever ``log_likelihood`` takes.
        model: theta -> a ``torch.distributions.Distribution`` of the data, or anything with ``log_likelihood``.
        prior: ``Normal`` over theta, whose shape is theta's.
        log_likelihood: (data, model(theta)) -> scalar, log p(data | theta); None sums the distribution's log_prob.
        steps: of the natural gradient (``fe.losses.natural_step``).
        lr: their size in the first half, in (0, 1]; then it falls as 1 / step, which averages the draws' noise out.
        samples: draws of theta per step, half of them the others mirrored at the mean: of a quadratic log-likelihood
            the mean's gradient is then exact.
        seed: of the draws, those of the prior too.
        progress: show a bar.

    Warns:
        Where q has not settled (``converged``): its moments and the bound are then not those of the best Gaussian. It
        says by how much it would still move, and what to do.

    Raises:
        TypeError: prior is no Normal; model gives no distribution and there is no log_likelihood.
        ValueError: a number out of its range; a log-likelihood that is no scalar, or not finite at the prior's mean.

    Source: Khan & Lin 2017, arXiv:1703.04265, equation 11; log p(data) >= E_q[log p(data | theta)] - KL(q || prior).
    """
    function = "optimization_as_inference"
    if not isinstance(prior, Normal):
        raise TypeError(f"{function}: prior must be a torch.distributions.Normal; got {type(prior).__name__}")
    steps, samples = integer(function, "steps", steps, 1), integer(function, "samples", samples, 2)
    if number(function, "lr", lr, above=0.0) > 1:
        raise ValueError(f"{function}: lr must be in (0, 1]; got {lr}")

    def fit_to_data(theta: Tensor) -> Tensor:
        predicted = model(theta.reshape(prior.batch_shape))
        if log_likelihood is not None:
            found = log_likelihood(data, predicted)
            if not isinstance(found, Tensor) or found.numel() != 1:
                came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"{function}: log_likelihood must give one number, a sum over data; got {came}"
                )
            return found.reshape(())
        if not isinstance(predicted, Distribution):
            raise TypeError(
                f"{function}: model(theta) must be a torch.distributions.Distribution where log_likelihood is None; "
                f"got {type(predicted).__name__}"
            )
        return predicted.log_prob(data).sum()

    wide = prior.loc.detach().reshape(1, -1), 2 * prior.scale.detach().log().reshape(1, -1)

    def bound(mean: Tensor, logvar: Tensor, step: int, stream: int) -> Tensor:
        drawn = reparameterize(mean, logvar, seed=seed, step=step, stream=stream, samples=(samples + 1) // 2)
        thetas = torch.cat([drawn, 2 * mean - drawn])[:samples]
        expected = torch.stack([fit_to_data(theta) for theta in thetas]).mean()
        return expected - gaussian_kl(mean, logvar, *wide, reduction="sum")

    mean = _mode(
        lambda theta: fit_to_data(theta) + prior.log_prob(theta.reshape(prior.batch_shape)).sum(),
        *wide,
        seed,
    )
    logvar = wide[1] + 2 * math.log(NARROW)
    history = []
    for step in trange(steps, desc=function, leave=False, disable=not progress):
        mean, logvar = mean.requires_grad_(), logvar.requires_grad_()
        value = bound(mean, logvar, step, FITTING)
        of_mean, of_logvar = torch.autograd.grad(-value, (mean, logvar))
        # Where q began is forgotten at once; the second half is averaged.
        rho = max(1 / (1 / lr + max(0, step - steps // 2)), 1 / (step + 1) if step < 1 / lr else 0.0)
        # No precision falls below half of the prior's, where the curvature along the draws is negative, none more than
        # doubles in a step, and no mean moves by more than its deviation.
        least = (0.5 * (logvar.detach() - wide[1]).exp() - 1) / 2
        moved = natural_step(mean, logvar, of_mean, of_logvar.clamp(min=least).clamp(max=0.5 / rho), rho)
        reach = (moved.logvar / 2).exp()
        mean = mean.detach() + (moved.mean - mean.detach()).clamp(-reach, reach)
        logvar = moved.logvar
        history.append(value.detach())
    fresh = [_judge(mean, logvar, bound, step) for step in range(JUDGES)]
    values, moves = (torch.stack(column) for column in zip(*fresh, strict=True))
    noise = moves.std(0) / JUDGES**0.5
    worst = float((moves.mean(0).abs() - 3 * noise).max())
    settled = worst < SETTLED and bool(values.isfinite().all())
    if not settled:
        warnings.warn(
            f"{function}: q has not settled after {steps} steps: a mean would move by {worst:.2g} of its deviation, or "
            f"a precision by as much of itself, where {SETTLED} is the most: its moments and the bound are not those "
            "of the best Gaussian. Take more steps, or more samples; where neither changes it, q lies between modes or "
            "on a ridge: another seed begins from other draws of the prior, another prior.loc from there.",
            stacklevel=2,
        )
    q = Normal(mean.reshape(prior.batch_shape), (logvar / 2).exp().reshape(prior.batch_shape))
    error = float(values.std() / JUDGES**0.5)
    return VariationalFit(q, float(values.mean()), error, settled, torch.stack(history))


# q's first deviation over the prior's; how many independent estimates judge the result; draws of the prior from which
# its mode is looked for, too; what another mode must be higher by, in nats; a push off a saddle over the prior's
# deviation; streams of the noise.
NARROW, JUDGES, DRAWS, HIGHER, PUSH = 1e-3, 32, 4, 0.01, 0.01
SETTLED = 0.2  # the most that the judges' draws may move q, in its deviations
FITTING, JUDGING, STARTING = 0, 1 << 20, 2 << 20


def _mode(log_joint: Callable[[Tensor], Tensor], mean: Tensor, logvar: Tensor, seed: int) -> Tensor:
    """The highest mode that L-BFGS finds from the prior's mean and from draws of the prior, pushed off a saddle."""
    draws = reparameterize(mean, logvar, seed=seed, step=0, stream=STARTING, samples=DRAWS + 1)
    best, value = _climb(log_joint, mean)
    push = draws[0] - mean
    # By symmetry a gradient can be exactly 0 at the mean, or stay 0 on the way: what was found need be no maximum.
    for start in (*draws[1:], None):
        try:
            found, height = _climb(log_joint, best + PUSH * push if start is None else start)
        except (ValueError, RuntimeError, ArithmeticError):  # a theta that the model has no value for
            continue
        if height > value + HIGHER:
            best, value = found, height
    return best


def _climb(log_joint: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    """Where L-BFGS ends, and the log joint there."""
    theta = start.clone().requires_grad_()
    search = LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = -log_joint(theta)
        if not loss.isfinite():
            raise ValueError(
                "optimization_as_inference: the log-likelihood must be finite from the prior's mean to the mode; got "
                f"{-loss.item()}"
            )
        loss.backward()
        return loss

    search.step(closure)
    found = theta.detach()
    with torch.no_grad():
        return found, float(log_joint(found))


def _judge(
    mean: Tensor, logvar: Tensor, bound: Callable[[Tensor, Tensor, int, int], Tensor], step: int
) -> tuple[Tensor, Tensor]:
    """A fresh estimate of the bound, and of how far it would move means, in deviations, and precisions, relatively."""
    mean, logvar = mean.clone().requires_grad_(), logvar.clone().requires_grad_()
    value = bound(mean, logvar, step, JUDGING)
    of_mean, of_logvar = torch.autograd.grad(value, (mean, logvar))
    return value.detach(), torch.cat([(logvar.detach() / 2).exp() * of_mean, 2 * of_logvar], -1)[0]


class GradientDescentAsVI:
    """Plain gradient descent, which keeps its way and tells the KL of its consecutive beliefs.

    A point has no KL to another: it is infinite. What is measured is a belief N(theta, std^2 I) that moves with the
    weights: |theta' - theta|^2 / (2 std^2) of each step (``fe.diagnostics.TrajectoryKL``).

    Args:
        model: whose parameters descend.
        std: of the belief about every weight, > 0. The document's |theta' - theta|^2 is that of sqrt(1/2).

    Raises:
        TypeError: model is no module. ValueError: std out of its range.
    """

    def __init__(self, model: nn.Module, std: float = 1.0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"GradientDescentAsVI: model must be a torch.nn.Module; got {type(model).__name__}"
            )
        self.model = model
        self.param_history: list[dict[str, Tensor]] = []
        self._optimizer = SGD(model.parameters(), lr=0.0)
        self._std = number("GradientDescentAsVI", "std", std, above=0.0)
        self._kl: list[float] = []

    def step(self, loss_fn: Callable[[Any], Tensor], data: Any, lr: float = 0.01) -> float:
        """theta <- theta - lr grad loss_fn(data); the weights before it join ``param_history``. Returns the loss.

        Raises:
            TypeError, ValueError, FloatingPointError: as `BayesianOptimizer.step`, before anything has moved.
        """
        lr = number("GradientDescentAsVI.step", "lr", lr)
        self._optimizer.zero_grad()
        loss = _loss("GradientDescentAsVI.step", loss_fn, data)
        loss.backward()
        self.param_history.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        self._optimizer.param_groups[0]["lr"] = lr
        followed = TrajectoryKL(self._optimizer, self._std)
        self._optimizer.step()
        followed.remove()
        self._kl.append(followed.total)
        self._optimizer.zero_grad()
        return float(loss.detach())

    def visualize_as_inference(self) -> list[float]:
        """KL of every step's belief to the one before, in nats."""
        return list(self._kl)
