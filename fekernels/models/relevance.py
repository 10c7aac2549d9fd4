"""Relevance of contexts to queries as a negative free energy, learned from pairs that belong together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fekernels._checks import floating, integer
from fekernels._runtime.ranks import draw_seed
from fekernels.losses import gaussian_kl, monte_carlo_kl, reparameterize
from fekernels.models.inference import evaluating
from fekernels.models.relevance_calibration import fitted
from fekernels.models.relevance_index import ContextIndex, Encoded
from fekernels.models.relevance_score import (
    Calibration,
    LinearLogit,
    Relevance,
    check_bound,
    checked_logits,
    combine,
    draw,
    free_energy_of,
    gaussian_nodes,
)
from fekernels.models.relevance_training import Temperature, train
from fekernels.models.text_encoder import HashedTextEncoder, check_codes
from fekernels.models.training import warn_of_own_training
from fekernels.ops.noise_key import COUNTERS, signed_seed

__all__ = ["RelevanceModel"]

TRAINING, SCORING = 0, 1 << 31  # streams of the noise
# Of a query's intent as training starts, for a vector of length 1. Where it points to a context with a cosine of .4, it
# moves the logit by 5 of its standard deviations, and costs 70 nats. Training finds what T allows.
LENGTH = 12.0


class _Evidence(nn.Module):
    """What a vector [N, H] says of the intent: a Gaussian of precision t > 0 and shift s, t times its mean; [N, Z]."""

    def __init__(self, width: int, latents: int, gain: float) -> None:
        super().__init__()
        self.map: nn.Module = nn.Identity() if width == latents else nn.Linear(width, latents, bias=False)
        self.gain = nn.Parameter(torch.tensor(float(gain)))
        self.precision = nn.Linear(width, latents)
        # Little is known of an intent at first: a precision of .05 beside the prior's 1.
        nn.init.zeros_(self.precision.weight)
        nn.init.constant_(self.precision.bias, math.log(math.expm1(0.05)))

    def forward(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.softplus(self.precision(vector)), LENGTH * self.gain * self.map(vector)


class RelevanceModel(nn.Module):
    """Scores contexts against queries by -F = E_q[log sigmoid(l)] - T KL(q(z | query, context) || p(z)).

    z is the intent behind a query, p(z) = N(0, I) what is held of it before, and l(z, context) the logit that the
    context is relevant to it. q is the product of the prior and of two Gaussians that query and context give
    (product of experts: Hinton 2002; Wu & Goodman 2018, arXiv:1802.05335): precision 1 + t_q + t_c, mean
    (s_q + s_c) / precision. So each side is encoded once, whatever it meets::

        model = fe.models.RelevanceModel(seed=0)                # or your own encoders
        model.fit(batches, epochs=10)                           # of (queries, contexts) that belong together
        model.calibrate(held_out_queries, held_out_contexts)
        index = model.encode_contexts(documents)
        indices, relevance = index.top(["how do I open a file"], 10)

    The loss is the free energy of the answers to "is this context relevant to this query", the variational information
    bottleneck of Alemi et al. 2017 (arXiv:1612.00410), and score is minus that of the answer yes: at T = 1 a lower
    bound of its log evidence log E_p[sigmoid(l)].

    Args:
        query_encoder: a Module from a batch of queries, whatever that is, to vectors [B, H]. Those longer than 1 are
            shortened to 1: scales are the model's to learn, and a short vector means that little is known. None: a
            ``HashedTextEncoder`` of lists of str.
        context_encoder: the same for contexts; None takes the queries' (and shares its parameters).
        latent_dim: Z; None is the queries' width.
        query_dim, context_dim: H of each; None asks the encoder for its ``dim``.
        logit: a Module from (z [K, B, Z], contexts' vectors [B, H]) to l [K, B]; None is ``LinearLogit``. One with a
            method ``moments`` like LinearLogit's is Gaussian under q: scores are then quadrature, without noise.
        samples: K, in training.
        scoring_samples: K of a score where it is sampled. All pairs share the noise, so that a score is a function of
            its pair, and the same again.
        temperature: T, of the KL. What ``fit`` anneals, and what scores use.
        importance_weighted: scores and losses are the K-sample bound (``relevance_of``).
        seed: of the noise; None draws one from torch's default generator. Seed, training steps, temperature and
            calibration go with ``state_dict``: a loaded model trains on bit for bit.

    Attributes:
        steps (int): training losses computed so far; each has noise of its own.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        query_encoder: nn.Module | None = None,
        context_encoder: nn.Module | None = None,
        latent_dim: int | None = None,
        *,
        query_dim: int | None = None,
        context_dim: int | None = None,
        logit: nn.Module | None = None,
        samples: int = 1,
        scoring_samples: int = 64,
        temperature: float = 1.0,
        importance_weighted: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        name = "RelevanceModel"
        for what, value in (
            ("query_encoder", query_encoder),
            ("context_encoder", context_encoder),
            ("logit", logit),
        ):
            if value is not None and not isinstance(value, nn.Module):
                raise TypeError(f"{name}: {what} must be a Module; got {type(value).__name__}")
        self.samples = integer(name, "samples", samples, 1)
        self.scoring_samples = integer(name, "scoring_samples", scoring_samples, 1)
        self._temperature, self.importance_weighted = check_bound(name, temperature, importance_weighted)
        self.seed = draw_seed() if seed is None else signed_seed(name, seed)
        self.steps = 0
        self.calibration = Calibration()
        self.query_encoder = HashedTextEncoder() if query_encoder is None else query_encoder
        self.context_encoder = self.query_encoder if context_encoder is None else context_encoder
        query_width = _width("query_dim", query_dim, self.query_encoder)
        context_width = _width("context_dim", context_dim, self.context_encoder)
        latents = query_width if latent_dim is None else integer(name, "latent_dim", latent_dim, 1)
        # The context has no say in the intent at first, as if none of its words had ever been asked for.
        self.query_evidence = _Evidence(query_width, latents, 1.0)
        self.context_evidence = _Evidence(context_width, latents, 0.0)
        self.logit = LinearLogit(latents, context_width) if logit is None else logit

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature, _ = check_bound("RelevanceModel", value, self.importance_weighted)

    def extra_repr(self) -> str:
        calibration = "uncalibrated" if self.calibration == Calibration() else repr(self.calibration)
        return f"samples={self.samples}, temperature={self.temperature:g}, steps={self.steps}, {calibration}"

    def get_extra_state(self) -> dict[str, Any]:
        calibration = list(dataclasses.astuple(self.calibration))
        settings = {"seed": self.seed, "steps": self.steps, "temperature": self.temperature}
        return {**settings, "calibration": calibration}

    def set_extra_state(self, state: Any) -> None:
        self.seed, self.steps, self.temperature = state["seed"], state["steps"], state["temperature"]
        self.calibration = Calibration(*state["calibration"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_codes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def numbers_per_latent(self) -> int:
        """How many numbers scoring a pair makes for each latent."""
        return 1 if self._is_gaussian else self.scoring_samples

    @property
    def _is_gaussian(self) -> bool:
        return hasattr(self.logit, "moments") and not self.importance_weighted

    def encode(self, side: str, batch: Any) -> Encoded:
        """Queries or contexts (``side`` "query" or "context") as what scores are made of; differentiable."""
        encoder, evidence = (
            (self.query_encoder, self.query_evidence)
            if side == "query"
            else (self.context_encoder, self.context_evidence)
        )
        vector = encoder(batch)
        floating("RelevanceModel", f"the {side} encoder's result", vector)
        width = evidence.precision.in_features
        if vector.dim() != 2 or vector.shape[1] != width:
            raise ValueError(
                f"RelevanceModel: the {side} encoder's result must have shape (batch, {width}); "
                f"got {tuple(vector.shape)}"
            )
        vector = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(1)
        return Encoded(vector, *evidence(vector))

    @torch.no_grad()
    def encode_contexts(self, context: Any) -> ContextIndex:
        """The contexts, encoded once in evaluation (no dropout), to be scored against any number of queries."""
        with evaluating(self):
            return ContextIndex(self, self.encode("context", context))

    @property
    def context_side(self) -> tuple[nn.Module, nn.Module]:
        """What contexts are encoded with."""
        return self.context_encoder, self.context_evidence

    def score(self, query: Any, context: Any) -> Relevance:
        """Query i against context i: tensors [B]; differentiable. For every pair of both, see ``encode_contexts``.

        Modules are in the mode that they have, as losses need it: with dropout, call ``eval()`` before.
        """
        queries, contexts = self.encode("query", query), self.encode("context", context)
        _check_rows("score", queries, contexts)
        return self.score_encoded(queries, contexts, every_pair=False)

    def score_encoded(self, queries: Encoded, contexts: Encoded, *, every_pair: bool) -> Relevance:
        """Row i against row i: [B]; or every query against every context: [Q, C]."""
        mean, logvar, vector = _posterior(queries, contexts, every_pair)
        logits, weights, z = self._nodes(mean, logvar, vector)
        flat = mean.flatten(0, -2), logvar.flatten(0, -2)
        ratio = None if z is None else monte_carlo_kl(*flat, z)
        found = combine(logits, weights, gaussian_kl(*flat), ratio, self.temperature, self.calibration)
        return found.map(lambda t: t.view(mean.shape[:-1]))

    def _nodes(self, mean: Tensor, logvar: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits [K, pairs] and weights [K] that stand for q, and the samples if the score needs them."""
        if self._is_gaussian:
            centre, variance = self.logit.moments(mean, logvar.exp(), vector)  # type: ignore[operator]
            return *gaussian_nodes(centre.flatten(), variance.flatten()), None
        z = draw(
            mean.flatten(0, -2), logvar.flatten(0, -2), self.scoring_samples, self.seed, 0, SCORING, 0, True
        )
        logits = self._logits("score", z, vector.expand(*mean.shape[:-1], -1).flatten(0, -2))
        return (
            logits,
            logits.new_full((len(logits),), 1 / len(logits)),
            z if self.importance_weighted else None,
        )

    def _logits(self, method: str, z: Tensor, vector: Tensor) -> Tensor:
        return checked_logits(f"RelevanceModel.{method}", self.logit(z, vector), z)

    def loss(self, query: Any, context: Any, *, relevant: Tensor | None = None, offset: int = 0) -> Tensor:
        """The training loss: the free energy of the answers for every pair of Q queries and C contexts, per query.

        A context is relevant to the query at its own index, and the others of the batch are its negatives: pass
        contexts behind the Q for harder ones. In training mode each call draws fresh noise (step ``steps``, which it
        counts on), in evaluation mode always the same.

        Args:
            relevant: bool [Q, C], which context is relevant to which query; None is the identity, and needs C >= Q.
            offset: global number of the batch's first query, where several processes share a batch.

        Returns:
            Per query, the C answers' E_q[-log p] and T times the mean of their KLs, since one intent is behind all
            answers of a query; a scalar, in nats. (So each pair's F is at the temperature T/C.)
        """
        queries, contexts = self.encode("query", query), self.encode("context", context)
        shape = len(queries), len(contexts)
        relevant = _answers("loss", relevant, shape, queries.shift.device)
        mean, logvar, vector = _posterior(queries, contexts, True)
        mean, logvar = mean.flatten(0, 1), logvar.flatten(0, 1)
        step = self.steps
        if self.training:
            if step + 1 >= COUNTERS:
                raise ValueError(f"RelevanceModel.loss: steps must be below {COUNTERS}; got {step}")
            self.steps = step = step + 1
        z = reparameterize(
            mean,
            logvar,
            seed=self.seed,
            step=step,
            stream=TRAINING,
            offset=offset * shape[1],
            samples=self.samples,
        )
        logits = self._logits("loss", z, vector.expand(*shape, -1).flatten(0, 1))
        ratio = monte_carlo_kl(mean, logvar, z) if self.importance_weighted else None
        kl = gaussian_kl(mean, logvar)
        if not shape[0]:
            return logits.sum()
        found = free_energy_of(logits, relevant.flatten(), kl, ratio, self.temperature / shape[1])
        return found.sum() / shape[0]

    forward = loss  # what DistributedDataParallel wraps

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int = 10,
        *,
        lr: float = 1e-3,
        optimizer: torch.optim.Optimizer | None = None,
        temperature: Temperature | None = 0.03,
        progress: bool = True,
    ) -> list[float]:
        """Minimise the loss over ``loader``, an iterable of (queries, contexts) that starts anew in every epoch.

        The batch's other contexts are negatives, but for those equal, bit by bit, to one that the query is paired with.

        Args:
            lr: of ``LangevinAdam`` at temperature 0, which is Adam, where no ``optimizer`` is given.
            temperature: T of the KL by the training step, counted over all calls and restarts: a number, a function of
                the step (0 for the first) or one of ``fe.optim``'s schedules, whose first group it takes. A high T
                keeps intents wide and explores which contexts they might mean; lowered, it lets each query commit
                to what it has found. The model keeps the last one, for scores. None leaves the model's. At T = 1 an
                intent costs more nats than the answers of a batch of 32 are worth: q falls back to the prior, and
                scores rank by their KL. Hence .03 (information bottlenecks take 1e-3 to 1e-1).

        Returns:
            The mean loss of every epoch. The model is in training meanwhile, and afterwards in the mode that it had.

        Raises:
            FloatingPointError: a loss is not finite; on a CPU before the step, which is not made.

        Warns: UserWarning, once: inputs that cannot be compared; over a tenth of the batches without a negative.
        """
        warn_of_own_training("RelevanceModel.fit", "loss(queries, contexts)")
        return train(self, loader, epochs, lr, optimizer, temperature, progress)

    def calibrate(self, query: Any, context: Any, relevant: Tensor | None = None) -> Calibration:
        """Make ``probability`` that of held-out pairs: Platt's scale and shift of the logit, before the sigmoid's mean.

        Training sees a batch's negatives, one use of the model has a thousand contexts per query and another two: the
        log-odds differ by a shift. Pass held-out queries, and behind their own contexts those that will be searched
        among them. Scores, and the order by them, stay as they are; epistemic and aleatoric are those of the calibrated
        logit. Where queries have one relevant context each, the sharpness of ``Relevance.choice`` is fitted too: what
        raises all logits of a query, and spoils its pairs' probabilities, does not matter to the choice.

        Args:
            query: Q of them, none of the training's.
            context: C of them.
            relevant: bool [Q, C]; None: each query's own index, and needs C >= Q.

        Returns:
            What it has set ``calibration`` to, in evaluation (no dropout). Keeps K numbers a pair, K = 32 where the
            logit is linear.

        Raises:
            ValueError: a pair's logit is not finite (the first is named), or no calibration is; no query, no pair of a
                kind. ``calibration`` is then what it was.

        Source: Platt 1999, with his targets (N+ + 1)/(N+ + 2) and 1/(N- + 2), which keep the scale finite; temperature
        scaling is its case of no shift (Guo et al. 2017, arXiv:1706.04599).
        """
        with torch.no_grad(), evaluating(self):
            queries, contexts = self.encode("query", query), self.encode("context", context)
            shape = len(queries), len(contexts)
            if not shape[0]:
                raise ValueError("RelevanceModel.calibrate: query must hold a query; got none")
            relevant = _answers("calibrate", relevant, shape, queries.shift.device)
            rows = []
            for row in range(shape[0]):
                logits, weights, _ = self._nodes(*_posterior(queries[row : row + 1], contexts, True))
                rows.append(logits)
        self.calibration = fitted("RelevanceModel.calibrate", torch.stack(rows, 1), weights, relevant)
        return self.calibration


def _posterior(queries: Encoded, contexts: Encoded, every_pair: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log-variance of q for row i with row i, or for all pairs, and the contexts' vectors to broadcast."""
    here, there = (slice(None), None) if every_pair else slice(None), slice(None)
    precision = 1 + queries.precision[here] + contexts.precision[there]
    variance = precision.reciprocal()
    mean = (queries.shift[here] + contexts.shift[there]) * variance
    return mean, -precision.log(), contexts.vector[None] if every_pair else contexts.vector


def _width(name: str, given: int | None, encoder: nn.Module) -> int:
    width = getattr(encoder, "dim", None) if given is None else given
    if width is None:
        raise ValueError(
            f"RelevanceModel: {name} must be the width of {type(encoder).__name__}'s vectors, which have none; got None"
        )
    return integer("RelevanceModel", name, width, 1)


def _check_rows(method: str, queries: Encoded, contexts: Encoded) -> None:
    if len(queries) != len(contexts):
        raise ValueError(
            f"RelevanceModel.{method}: context must be as many as query, {len(queries)}; got {len(contexts)} "
            "(every query against every context: encode_contexts(context).score(query))"
        )


def _answers(method: str, relevant: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Which context is relevant to which query, by itself or, None, each query's own index."""
    if relevant is None:
        if shape[1] < shape[0]:
            raise ValueError(
                f"RelevanceModel.{method}: context must hold at least the {shape[0]} contexts of query; got {shape[1]}"
            )
        return torch.eye(*shape, dtype=torch.bool, device=device)
    if not isinstance(relevant, Tensor) or relevant.dtype != torch.bool:
        came = relevant.dtype if isinstance(relevant, Tensor) else type(relevant).__name__
        raise TypeError(f"RelevanceModel.{method}: relevant must be a bool tensor; got {came}")
    if tuple(relevant.shape) != shape:
        raise ValueError(
            f"RelevanceModel.{method}: relevant must have shape {shape}, queries by contexts; "
            f"got {tuple(relevant.shape)}"
        )
    return relevant.to(device)
