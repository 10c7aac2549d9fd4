"""Which of a batch's contexts belong to which of its queries: those that the batch pairs, and what is equal to them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fekernels.models.inference import evaluating

if TYPE_CHECKING:
    from fekernels.models.relevance import RelevanceModel

__all__ = ["Negatives", "equal_rows", "relevant_pairs"]

SHARE = 0.1  # of an epoch's batches that may be without a negative: the last of many is often of one pair
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def equal_rows(batch: Any) -> Tensor | None:
    """Bool [N, N], which of a batch's N inputs are equal, tensors bit by bit; None where that cannot be told.

    Of tensors and arrays [N, ...], mappings of tensors, and lists or tuples of what can be hashed, such as texts, or of
    lists of it. A list of tensors may be one tensor for each input or several of all inputs.
    """
    if isinstance(batch, np.ndarray):
        batch = (
            torch.from_numpy(np.ascontiguousarray(batch)) if batch.dtype.kind in "biuf" else batch.tolist()
        )
    if isinstance(batch, Tensor):
        return _equal_rows_of(batch)
    if isinstance(batch, Mapping):
        parts = [_equal_rows_of(part) if isinstance(part, Tensor) else None for part in batch.values()]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts) or len({part.shape for part in known}) > 1:
            return None
        return torch.stack([part.to(known[0].device) for part in known]).all(0)
    if not isinstance(batch, (list, tuple)) or any(isinstance(item, Tensor) for item in batch):
        return None
    try:
        places: dict[Any, int] = {}
        first = torch.tensor(
            [places.setdefault(_key(item), i) for i, item in enumerate(batch)], dtype=torch.long
        )
    except TypeError:  # not to be hashed
        return None
    return first[:, None] == first


def _key(item: Any) -> Any:
    return tuple(map(_key, item)) if isinstance(item, list) else item


def _equal_rows_of(tensor: Tensor) -> Tensor | None:
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.dim():
        return None
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if tensor.element_size() not in INTEGERS:
        return None
    rows = tensor.contiguous().view(INTEGERS[tensor.element_size()]).unsqueeze(-1).flatten(1)
    if not rows.numel():
        return rows.new_ones(len(rows), len(rows), dtype=torch.bool)
    # By a hash, without pairs of whole rows: a polynomial in an odd number, modulo 2^64.
    words = rows.long()
    factors = torch.full((rows.shape[1],), 0x5851F42D4C957F2D, device=rows.device).cumprod(0)
    mixed = words * 0x2545F4914F6CDD1D
    hashes = ((mixed ^ (mixed >> 29)) * factors).sum(1)
    same = hashes[:, None] == hashes
    # Which decides nothing alone: each row is compared with the first of its hash.
    right = (rows == rows[same.int().argmax(1)]).all(1)
    return (same & right & right[:, None]) | torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def relevant_pairs(queries: Any, contexts: Any) -> Tensor | None:
    """Bool [Q, C]: query i's own context, and those equal to a context that an equal query is paired with.

    None where inputs cannot be compared.
    """
    of_queries, of_contexts = equal_rows(queries), equal_rows(contexts)
    if of_queries is None or of_contexts is None or len(of_contexts) < len(of_queries):
        return None
    own = of_contexts[: len(of_queries)].to(of_queries.device)
    return (of_queries.float() @ own.float()) > 0


class Negatives:
    """What a training run tells of its batches' negatives, once."""

    def __init__(self, function: str, model: RelevanceModel) -> None:
        self._function, self._model = function, model
        self._batches, self._compares = 0, True
        self._shapes_fit: bool | None = None
        self._without: Tensor | int = 0

    def relevant(self, queries: Any, contexts: Any) -> Tensor | None:
        """``relevant_pairs`` where it is more than each query's own index."""
        self._batches += 1
        found = relevant_pairs(queries, contexts) if self._compares else None
        if found is not None and found.numel() and self._shapes_fit is None:
            self._shapes_fit = found.shape == self._shape(queries, contexts)
        if found is None or self._shapes_fit is False:
            if self._compares:
                self._compares = False
                warnings.warn(
                    f"{self._function}: queries and contexts that are {_kind(queries)} and {_kind(contexts)} cannot be "
                    "compared: contexts that are equal in a batch count as each other's negatives. Let each batch hold "
                    "a context once, or give tensors (batch, ...), mappings of them or lists of str",
                    stacklevel=4,
                )
            return None
        if found.numel():
            self._without = self._without + found.all()
        # On a GPU looking would wait for it.
        return None if found.is_cpu and int(found.sum()) == len(found) else found

    def _shape(self, queries: Any, contexts: Any) -> tuple[int, int]:
        # As encoded: a tensor's first dimension may be another, such as time.
        with torch.no_grad(), evaluating(self._model):
            return len(self._model.encode("query", queries)), len(self._model.encode("context", contexts))

    def end_epoch(self) -> None:
        """Warn, after the first epoch, of batches in which every context is relevant to every query."""
        without, batches = int(self._without), self._batches
        self._without, self._batches = 0, -(1 << 62)
        if without > SHARE * batches > 0:
            warnings.warn(
                f"{self._function}: {without} of {batches} batches hold no negative, as batches of one pair do: their "
                "steps teach that every context is relevant. Let batches hold several pairs (a DataLoader's "
                "drop_last=True), or further contexts behind the queries' own",
                stacklevel=4,
            )


def _kind(batch: Any) -> str:
    if isinstance(batch, (list, tuple)) and batch:
        return f"a {type(batch).__name__} of {type(batch[0]).__name__}"
    return type(batch).__name__
