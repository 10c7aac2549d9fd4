"""What ``RelevanceModel.fit`` takes as negatives, and what it says of batches that have none."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fekernels as fe
from fekernels.models.relevance_pairs import equal_rows, relevant_pairs

PLACES = [0, 1, 0, 2, 1, 3]
SAME = torch.tensor([[i == j for j in PLACES] for i in PLACES])
TOPICS = fe.random.normal((4, 6), seed=1)
IDS = torch.randint(9, (4, 3), generator=torch.Generator().manual_seed(0))


def model() -> fe.models.RelevanceModel:
    torch.manual_seed(0)
    return fe.models.RelevanceModel(nn.Linear(6, 5), nn.Linear(6, 5), query_dim=5, context_dim=5, seed=1)


def fitted(of: Any, loader: Any, epochs: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        of.fit(loader, epochs, progress=False)
    return [str(found.message) for found in caught]


@pytest.mark.parametrize(
    "batch",
    [
        TOPICS[PLACES],
        TOPICS[PLACES].bfloat16(),
        TOPICS[PLACES].double().view(6, 3, 2).transpose(1, 2),
        torch.complex(TOPICS, -TOPICS)[PLACES],
        torch.tensor(PLACES),
        torch.eye(4, dtype=torch.bool)[PLACES],
        {"ids": IDS[PLACES], "mask": torch.ones(6, 3, dtype=torch.bool)},
        {"same": torch.ones(6, 2), "apart": TOPICS[PLACES]},
        [f"context {place}" for place in PLACES],
        tuple((place, "context") for place in PLACES),
        [[place, [7]] for place in PLACES],
        TOPICS[PLACES].numpy(),
        np.array([f"context {place}" for place in PLACES]),
    ],
)
def test_equal_rows(batch: Any) -> None:
    assert torch.equal(equal_rows(batch), SAME)  # type: ignore[arg-type]


def test_equal_is_equal_in_every_bit() -> None:
    rows = torch.zeros(4, 1000)
    rows[1, 999] = torch.finfo(torch.float32).tiny
    rows[2, 3] = -0.0
    rows[3, 3] = torch.nan
    assert torch.equal(equal_rows(rows), torch.eye(4, dtype=torch.bool))  # type: ignore[arg-type]
    assert bool(equal_rows(rows[[3, 3]]).all())  # type: ignore[union-attr]
    assert equal_rows(rows[:0]).shape == (0, 0) and equal_rows([]).shape == (0, 0)  # type: ignore[union-attr]
    swapped = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 0.0]])
    assert torch.equal(equal_rows(swapped), torch.eye(3, dtype=torch.bool))  # type: ignore[arg-type]


def test_a_query_belongs_to_all_that_it_is_paired_with() -> None:
    found = relevant_pairs(["a", "b", "a", "c"], ["1", "2", "3", "2", "1", "4"])
    wanted = [[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0]]
    assert torch.equal(found, torch.tensor(wanted).bool())  # type: ignore[arg-type]


def test_equal_contexts_are_no_negatives() -> None:
    queries, contexts = TOPICS[PLACES] + 0.1 * fe.random.normal((6, 6), seed=2), TOPICS[PLACES]
    ours, theirs = model(), model()
    optimizer = fe.LangevinAdam(theirs.parameters(), lr=1e-3, seed=1)
    assert not fitted(ours, [(queries, contexts)], 3)
    theirs.temperature = 0.03
    for _ in range(3):
        optimizer.zero_grad()
        theirs.loss(queries, contexts, relevant=SAME).backward()
        optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    # What is learned: each topic is its queries' own, at twice in a batch.
    learned = model()
    learned.fit([(queries, contexts)], 400, lr=1e-2, progress=False)
    found = learned.eval().encode_contexts(TOPICS).score(queries)
    assert found.probability.gather(1, torch.tensor(PLACES)[:, None]).mean() > 0.8


def test_distinct_contexts_train_as_before() -> None:
    batches = [(TOPICS + k, TOPICS - k) for k in range(3)]
    ours, theirs = model(), model()
    theirs_loss, given = theirs.loss, []
    theirs.loss = lambda *pair, **rest: given.append(rest) or theirs_loss(*pair)  # type: ignore
    assert not fitted(ours, batches, 2) and not fitted(theirs, batches, 2)
    assert given == [{}] * 6
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


class Listed(nn.Module):
    """Of a list of tensors, or of [time, batch, width]."""

    def __init__(self, time: bool = False) -> None:
        super().__init__()
        self.map, self.time, self.dim = nn.Linear(6, 5), time, 5

    def forward(self, batch: Any) -> Tensor:
        return self.map(batch.mean(0) if self.time else torch.stack(list(batch)))


@pytest.mark.parametrize("time", [False, True])
def test_what_cannot_be_compared_is_warned_of_once(time: bool) -> None:
    contexts = TOPICS[PLACES]
    batch = torch.stack([contexts, contexts]) if time else list(contexts)
    of = fe.models.RelevanceModel(Listed(time), seed=1)
    plain = copy.deepcopy(of)
    (text,) = fitted(of, [(batch, batch)] * 2, 2)
    kind = "Tensor" if time else "a list of Tensor"
    assert f"RelevanceModel.fit: queries and contexts that are {kind} and {kind} cannot be compared" in text
    plain.temperature = 0.03
    optimizer = fe.LangevinAdam(plain.parameters(), lr=1e-3, seed=1)
    for _ in range(4):
        optimizer.zero_grad()
        plain.loss(batch, batch).backward()
        optimizer.step()
    assert all(map(torch.equal, of.parameters(), plain.parameters()))


def test_batches_without_a_negative_are_warned_of() -> None:
    single = [(row[None], row[None]) for row in TOPICS]
    (text,) = fitted(model(), single, 3)
    assert "RelevanceModel.fit: 4 of 4 batches hold no negative" in text and "drop_last" in text
    (text,) = fitted(model(), [(TOPICS[[1, 1]], TOPICS[[1, 1]])], 2)
    assert "1 of 1 batches" in text
    # The last of ten, harder contexts behind a single pair, an empty batch: nothing to say.
    whole = [(TOPICS, TOPICS)]
    for fine in (whole * 9 + single[:1], [(TOPICS[:1], TOPICS)], [*whole, (TOPICS[:0], TOPICS[:0])]):
        assert not fitted(model(), fine, 2)
    texts = fe.models.RelevanceModel(fe.models.HashedTextEncoder(8, 64), seed=0)
    assert not fitted(texts, [(["a", "b"], ["c", "d"])], 2)
