"""Contexts that are encoded once and scored against query after query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fekernels._checks import integer
from fekernels._runtime.torch_internals import version
from fekernels.models.inference import evaluating
from fekernels.models.relevance_score import TENSORS, Relevance

if TYPE_CHECKING:
    from fekernels.models.relevance import RelevanceModel

__all__ = ["ContextIndex", "Encoded"]

Weights = list[tuple[Tensor, tuple[Any, ...]]]  # each parameter, its version and where its numbers lie

# Numbers of one block's pairs times latents: 1 MB in float32, which a core's own cache holds and the allocator gives
# again. Blocks of 4 MB, fresh pages each time, take twice as long, those of a quarter half as long again.
BLOCK = 1 << 18


@dataclass
class Encoded:
    """Queries or contexts: their vectors [N, H], and what each says of the intent, a Gaussian's natural parameters.

    Attributes:
        vector: [N, H], of the encoder.
        precision: [N, Z], > 0. shift: [N, Z], precision times mean.
    """

    vector: Tensor
    precision: Tensor
    shift: Tensor

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, rows: Any) -> Encoded:
        return Encoded(self.vector[rows], self.precision[rows], self.shift[rows])


class ContextIndex:
    """What ``RelevanceModel.encode_contexts`` gives: C contexts, encoded. Scores take no gradient.

    All of it runs the model in evaluation (no dropout), and leaves it in the mode that it had.

    A query costs its own encoding and C Z operations, whatever contexts cost to encode: the history of a dialogue is
    encoded as it grows (``append``), never again at each utterance. Pairs are scored in blocks, so that no tensor
    of [Q, C, Z] exists; results are [Q, C].

    An index is of the weights that its contexts were encoded with: once a training step, ``load_state_dict`` or
    anything else has written them, it raises ValueError.
    """

    def __init__(self, model: RelevanceModel, contexts: Encoded) -> None:
        self._model, self._contexts, self._steps = model, contexts, model.steps
        self._weights: Weights | None = _weights(model)

    def __len__(self) -> int:
        return len(self._contexts)

    def __repr__(self) -> str:
        return f"ContextIndex({len(self)} contexts, encoded after {self._steps} training steps)"

    def __getstate__(self) -> dict[str, Any]:
        # A copy has tensors of its own, which count their versions anew.
        return {**self.__dict__, "_weights": None, "_current": self._is_current()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = state.pop("_current")
        self.__dict__.update(state)
        self._weights = _weights(self._model) if current else None

    def _is_current(self) -> bool:
        now = _weights(self._model)
        if self._weights is None or len(now) != len(self._weights):
            return False
        return all(
            old is new and before == after
            for (old, before), (new, after) in zip(self._weights, now, strict=True)
        )

    @torch.no_grad()
    def append(self, contexts: Any) -> None:
        """Encode further contexts, behind those that are here."""
        self._check("append")
        with evaluating(self._model):
            new = self._model.encode("context", contexts)
        old = self._contexts
        self._contexts = Encoded(
            torch.cat([old.vector, new.vector]),
            torch.cat([old.precision, new.precision]),
            torch.cat([old.shift, new.shift]),
        )

    @torch.no_grad()
    def score(self, query: Any) -> Relevance:
        """Every query against every context: tensors [Q, C]."""
        self._check("score")
        with evaluating(self._model):
            return self._score(query)

    def _score(self, query: Any) -> Relevance:
        model, contexts = self._model, self._contexts
        queries = model.encode("query", query)
        latents = queries.shift.shape[1] * model.numbers_per_latent
        columns = max(1, min(len(contexts), BLOCK // latents))
        rows = max(1, BLOCK // (latents * columns))
        shape = len(queries), len(contexts)
        dtype = torch.promote_types(queries.shift.dtype, torch.float32)
        found = {kind: queries.shift.new_empty(shape, dtype=dtype) for kind in TENSORS}
        for top in range(0, shape[0], rows):
            for left in range(0, shape[1], columns):
                here = slice(top, top + rows), slice(left, left + columns)
                block = model.score_encoded(queries[here[0]], contexts[here[1]], every_pair=True)
                for kind in TENSORS:
                    found[kind][here] = getattr(block, kind)
        return Relevance(**found, sharpness=model.calibration.sharpness)

    def top(self, query: Any, k: int) -> tuple[Tensor, Relevance]:
        """The k contexts of highest score: their indices [Q, k], best first, and their relevance, of the same shape.

        Equal scores come in the contexts' order.
        """
        k = integer("ContextIndex.top", "k", k, 1, len(self) + 1)
        every = self.score(query)
        places = every.score.argsort(dim=1, descending=True, stable=True)[:, :k]
        return places, every.map(lambda t: t.gather(1, places))

    def _check(self, method: str) -> None:
        if not self._is_current():
            raise ValueError(
                f"ContextIndex.{method}: the index must be of the model as it is; got one from {self._steps} training "
                "steps, whose weights have changed since: encode_contexts again"
            )


def _weights(model: RelevanceModel) -> Weights:
    # Not buffers: those of a batch norm change with every training loss, a step or none behind it.
    return [
        (weight, (version(weight), weight.data_ptr(), weight.dtype))
        for module in model.context_side
        for weight in module.parameters()
    ]
