"""The document's relevance: how well an intent explains that a context is relevant, less what the intent costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from fekernels._checks import integer
from fekernels.models.noise_counter import NoiseCounter
from fekernels.models.relevance_score import relevance_of
from fekernels.unified.visible_weights import visible_weights

__all__ = ["RelevanceAsUnifiedObjective"]


class RelevanceAsUnifiedObjective(nn.Module):
    """Relevance = -F = E_q[log sigmoid(l)] - KL(q(z | utterance, context), N(0, I)), over the user's own networks.

    ``fe.models.RelevanceModel`` has networks of its own, scores many contexts at once and knows how sure it is.

    Args:
        dialogue_model: ``score_relevance(z, context)`` -> logit l, [B] or [B, 1]; for ``optimize_relevance`` also
            ``generate(utterance, context)`` -> a response.
        context_model: ``infer_intent(utterance, context)`` -> (mean, logvar) of z, [B, Z] each. Either may be None, as
            in the document, until it is called.
        samples: of z over which log sigmoid(l) is averaged.
        seed: of the noise; None draws one from torch's default generator.

    An utterance has the same noise until weights change, and fresh noise after every training step.
    """

    def __init__(
        self, dialogue_model: Any, context_model: Any, *, samples: int = 1, seed: int | None = None
    ) -> None:
        super().__init__()
        self.dialogue, self.context = dialogue_model, context_model
        self.samples = integer("RelevanceAsUnifiedObjective", "samples", samples, 1)
        self.noise_counter = NoiseCounter(seed, "RelevanceAsUnifiedObjective")

    def compute_relevance(self, utterance: Tensor, context: Tensor) -> Tensor:
        """The score of each pair, [B], in nats and below 0: higher is more relevant.

        Raises:
            ValueError: a model is None; a logit that is not [B] or [B, 1].
        """
        infer_intent = _method(self.context, "context_model", "infer_intent")
        score_relevance = _method(self.dialogue, "dialogue_model", "score_relevance")
        mean, logvar = infer_intent(utterance, context)

        def logit(samples: Tensor) -> Tensor:
            found = [score_relevance(z, context) for z in samples]
            # [B, 1] less a KL of [B] would be [B, B].
            return torch.stack([each.squeeze(-1) if each.dim() == 2 else each for each in found])

        seed, step = self.noise_counter.next(utterance, visible_weights(self.dialogue, self.context))
        return relevance_of(logit, mean, logvar, seed=seed, step=step, samples=self.samples).score

    def optimize_relevance(self, dialogue_batch: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """The loss of a batch of (utterance, context, response): the mean of -relevance + the response's squared error.

        Each of the three has a batch dimension; a scalar comes back, to be called ``backward`` on.
        """
        generate = _method(self.dialogue, "dialogue_model", "generate")
        losses = [
            mse_loss(generate(utterance, context), response)
            - self.compute_relevance(utterance, context).mean()
            for utterance, context, response in dialogue_batch
        ]
        if not losses:
            raise ValueError("optimize_relevance: dialogue_batch must have a triple or more; got none")
        return torch.stack(losses).mean()


def _method(model: Any, name: str, method: str) -> Any:
    if not callable(found := getattr(model, method, None)):
        raise ValueError(
            f"RelevanceAsUnifiedObjective: {name} must have {method}; got {type(model).__name__}"
        )
    return found
