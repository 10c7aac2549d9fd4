"""The document's inference over weights: q(theta) fitted step by step, or to the end; gradient descent seen as one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from torch.optim import SGD
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
        """
        self.optimizer.zero_grad()
        with self.optimizer.sampled_params(train=True):
            loss = loss_fn(data)
            loss.backward()
        free_energy = self.data_size * float(loss.detach()) + float(self.optimizer.kl())
        self.optimizer.step()
        return free_energy


class VariationalFit(NamedTuple):
    """What ``optimization_as_inference`` found.

    Attributes:
        q: the Gaussian over theta, independent in every element.
        elbo: a lower bound of log p(data), in nats: the mean of the last tenth of the steps.
        history: [steps], the estimates of it.
    """

    q: Normal
    elbo: float
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

    Args:
        data: whatever ``log_likelihood`` takes.
        model: theta -> a ``torch.distributions.Distribution`` of the data, or anything with ``log_likelihood``.
        prior: ``Normal`` over theta, whose shape is theta's.
        log_likelihood: (data, model(theta)) -> scalar, log p(data | theta); None sums the distribution's log_prob.
        steps: of the natural gradient (``fe.losses.natural_step``).
        lr: size of the first, in (0, 1]; it falls to 0 by a cosine, so that the noise of the draws is averaged out.
        samples: draws of theta per step, half of them the others mirrored at the mean: of a quadratic log-likelihood
            the mean's gradient is then exact.
        seed: of the draws.
        progress: show a bar.

    Raises:
        TypeError: prior is no Normal; model gives no distribution and there is no log_likelihood. ValueError: a number
        out of its range.

    Source: Khan & Lin 2017, arXiv:1703.04265, equation 11; log p(data) >= E_q[log p(data | theta)] - KL(q || prior).
    """
    function = "optimization_as_inference"
    if not isinstance(prior, Normal):
        raise TypeError(f"{function}: prior must be a torch.distributions.Normal; got {type(prior).__name__}")
    steps, samples = integer(function, "steps", steps, 1), integer(function, "samples", samples, 2)
    if number(function, "lr", lr, above=0.0) > 1:
        raise ValueError(f"{function}: lr must be in (0, 1]; got {lr}")

    def fit_to_data(theta: Tensor) -> Tensor:
        predicted = model(theta)
        if log_likelihood is not None:
            return log_likelihood(data, predicted)
        if not isinstance(predicted, Distribution):
            raise TypeError(
                f"{function}: model(theta) must be a torch.distributions.Distribution where log_likelihood is None; "
                f"got {type(predicted).__name__}"
            )
        return predicted.log_prob(data).sum()

    shape = prior.batch_shape
    prior_mean, prior_logvar = prior.loc.reshape(1, -1), 2 * prior.scale.log().reshape(1, -1)
    mean, logvar = prior_mean.clone().requires_grad_(), prior_logvar.clone().requires_grad_()
    history = []
    for step in trange(steps, desc=function, leave=False, disable=not progress):
        drawn = reparameterize(mean, logvar, seed=seed, step=step, samples=(samples + 1) // 2)
        thetas = torch.cat([drawn, 2 * mean - drawn])[:samples]
        expected = torch.stack([fit_to_data(theta.reshape(shape)) for theta in thetas]).mean()
        elbo = expected - gaussian_kl(mean, logvar, prior_mean, prior_logvar, reduction="sum")
        of_mean, of_logvar = torch.autograd.grad(-elbo, (mean, logvar))
        rho = lr * (1 + math.cos(math.pi * step / steps)) / 2
        # No step takes more than half of a precision away, where the curvature along the draws is negative.
        moved = natural_step(mean, logvar, of_mean, of_logvar.clamp(min=-0.25 / rho), rho)
        mean, logvar = moved.mean.requires_grad_(), moved.logvar.requires_grad_()
        history.append(elbo.detach())
    q = Normal(mean.detach().reshape(shape), (logvar.detach() / 2).exp().reshape(shape))
    values = torch.stack(history)
    return VariationalFit(q, float(values[-max(1, steps // 10) :].mean()), values)


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
        self._kl = TrajectoryKL(self._optimizer, number("GradientDescentAsVI", "std", std, above=0.0))

    def step(self, loss_fn: Callable[[Any], Tensor], data: Any, lr: float = 0.01) -> float:
        """theta <- theta - lr grad loss_fn(data); the weights before it join ``param_history``. Returns the loss."""
        lr = number("GradientDescentAsVI.step", "lr", lr)
        self._optimizer.zero_grad()
        loss = loss_fn(data)
        loss.backward()
        self.param_history.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def visualize_as_inference(self) -> list[float]:
        """KL of every step's belief to the one before, in nats."""
        values: list[float] = self._kl.values.tolist()
        return values
