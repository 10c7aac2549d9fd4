"""Three ways to find the context of a query: BM25, a dot product of learned vectors, ``fe.models.RelevanceModel``.

The last two learn with the same encoder on the same batches. Each gives a score for every pair, and says of each query
how sure it is of its first context.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from retrieval_parts.docstrings import Pair, batches, columns
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe

try:
    from rank_bm25 import BM25Okapi
except ImportError:
    BM25Okapi = None

BM25, DOT, RELEVANCE = "BM25", "dot product", "RelevanceModel"


@dataclass(frozen=True)
class Settings:
    files: int | None = None  # None: all
    seeds: int = 3
    epochs: int = 8
    batch: int = 32
    dim: int = 512
    lr: float = 3e-3
    hot: float = 0.1  # the KL's temperature at the first step
    cold: float = 0.01  # and from the last epoch on


QUICK = Settings(files=60, seeds=1, epochs=2, dim=128)


class Found(NamedTuple):
    scores: Tensor  # [Q, C]
    sure: Tensor  # [Q], of each query's first


def bm25(test: list[Pair]) -> Found:
    def words(text: str) -> list[str]:
        return re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text).lower())

    queries, contexts = columns(test)
    index = BM25Okapi([words(context) for context in contexts])
    scores = torch.tensor([index.get_scores(words(query)).tolist() for query in tqdm(queries, desc=BM25)])
    best = scores.topk(2).values
    return Found(scores, best[:, 0] - best[:, 1])


class DotProduct(nn.Module):
    """The scaled inner product of both vectors, trained to choose its own context among the batch's."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.log_scale = encoder, nn.Parameter(torch.tensor(3.0))

    def forward(self, queries: list[str], contexts: list[str]) -> Tensor:
        return self.log_scale.exp() * self.encoder(queries) @ self.encoder(contexts).T


def dot_product(train: list[Pair], test: list[Pair], settings: Settings, seed: int) -> Found:
    model = DotProduct(encoder(train, settings))
    optimizer = adam(model, model.encoder, settings)
    for epoch in tqdm(batches(train, settings.batch, settings.epochs, seed), desc=DOT, unit="epoch"):
        for queries, contexts in epoch:
            optimizer.zero_grad()
            F.cross_entropy(model(queries, contexts), torch.arange(len(queries))).backward()
            optimizer.step()
    with torch.no_grad():
        scores = model(*columns(test))
    return Found(scores, scores.softmax(1).amax(1))


def relevance(
    train: list[Pair], held: list[Pair], test: list[Pair], settings: Settings, seed: int
) -> tuple[Found, fe.models.Relevance]:
    """Also all that the model says of every pair."""
    model = fe.models.RelevanceModel(encoder(train, settings), seed=seed)
    optimizer = adam(model, model.query_encoder, settings)
    epochs = batches(train, settings.batch, settings.epochs, seed)
    steps = (len(epochs) - 1) * len(epochs[0])

    def temperature(step: int) -> float:  # from exploration to exploitation
        return settings.hot * (settings.cold / settings.hot) ** min(1.0, step / steps)

    for epoch in tqdm(epochs, desc=RELEVANCE, unit="epoch"):
        model.fit(epoch, 1, optimizer=optimizer, temperature=temperature, progress=False)
    queries, contexts = columns(test)
    # Held-out queries, among as many contexts as there will be. Nothing of a test query is known.
    model.calibrate([pair.query for pair in held], [pair.context for pair in held] + contexts)
    found = model.encode_contexts(contexts).score(queries)
    return Found(found.score, found.choice.amax(1)), found


def encoder(pairs: list[Pair], settings: Settings) -> nn.Module:
    return fe.models.HashedTextEncoder(settings.dim).weigh_by_frequency(sum(columns(pairs), []))


def adam(model: nn.Module, encoder: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The few numbers outside the encoder move ten times as fast as its weights of words."""
    words = list(encoder.parameters())
    others = [p for p in model.parameters() if not any(p is word for word in words)]
    groups = [{"params": words}, {"params": others, "lr": 10 * settings.lr}]
    return torch.optim.Adam(groups, lr=settings.lr)
