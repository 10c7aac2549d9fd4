"""Docstrings found by their first line: ``python docs/examples/relevance_retrieval.py [--quick] [--out PATH]``.

Every machine with Python has the standard library's docstrings. The first line of each is a query, the rest of it the
context that it should find among those of modules that no training saw. ``fe.models.RelevanceModel`` stands beside
BM25, which needs no training, and a plain dot product of the same encoder's vectors, trained on the same batches.
Mean reciprocal rank, recall, and what is left of the error where each leaves out what it is least sure of; then
whether the model's variances know which of its answers are wrong. Whoever wins, wins. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fekernels as fe

try:
    from rank_bm25 import BM25Okapi
except ImportError:
    BM25Okapi = None

BM25, DOT, RELEVANCE = "BM25", "dot product", "RelevanceModel"
LEFT_OUT = {"tests", "test", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "ensurepip"}
COVERAGE = torch.linspace(0.1, 1, 19)
ALL, HALF, FIFTH = 18, 8, 2  # places of 1, .5 and .2 there
MEASURES = ("total variance", "epistemic", "chance")


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


class Pair(NamedTuple):
    module: str
    query: str
    context: str


def docstrings(settings: Settings) -> list[Pair]:
    """First lines and bodies. What would tell one from the other, or has two answers, is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    found: dict[str, Pair] = {}
    queries: set[str] = set()
    for path in tqdm(files[: settings.files], desc="parse"):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        for first, body in split_docstrings(path):
            known = body in found or first in queries or first.rstrip(".").lower() in body.lower()
            if not known and len(first.split()) >= 3 and len(body.split()) >= 8:
                found[body] = Pair(module, first, body)
                queries.add(first)
    return list(found.values())


def split_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # some are there to be wrong
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            yield " ".join(first.split()), " ".join(body.split())


def by_module(pairs: list[Pair], seed: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """To train on, to calibrate with, to test on: whole modules each, half, a tenth and the rest of them."""
    modules = sorted({pair.module for pair in pairs})
    random.Random(seed).shuffle(modules)
    cuts = len(modules) // 2, len(modules) * 6 // 10
    parts = set(modules[: cuts[0]]), set(modules[cuts[0] : cuts[1]]), set(modules[cuts[1] :])
    train, held, test = ([pair for pair in pairs if pair.module in part] for part in parts)
    return train, held, test


def columns(pairs: list[Pair]) -> tuple[list[str], list[str]]:
    return [pair.query for pair in pairs], [pair.context for pair in pairs]


def batches(pairs: list[Pair], settings: Settings, seed: int) -> list[list[tuple[list[str], list[str]]]]:
    """Those of every epoch, shuffled; the last few pairs of an epoch wait for the next."""
    order, every = random.Random(seed), []
    for _ in range(settings.epochs):
        shuffled = order.sample(pairs, len(pairs))
        size = settings.batch
        every.append([columns(shuffled[i : i + size]) for i in range(0, len(pairs) - size + 1, size)])
    return every


def encoder(pairs: list[Pair], settings: Settings) -> nn.Module:
    return fe.models.HashedTextEncoder(settings.dim).weigh_by_frequency(sum(columns(pairs), []))


class DotProduct(nn.Module):
    """The scaled inner product of both vectors, trained to choose its own context among the batch's."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.log_scale = encoder, nn.Parameter(torch.tensor(3.0))

    def forward(self, queries: list[str], contexts: list[str]) -> Tensor:
        return self.log_scale.exp() * self.encoder(queries) @ self.encoder(contexts).T


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


def dot_product(train: list[Pair], test: list[Pair], settings: Settings, seed: int) -> Found:
    model = DotProduct(encoder(train, settings))
    optimizer = adam(model, model.encoder, settings)
    for epoch in tqdm(batches(train, settings, seed), desc=DOT, unit="epoch"):
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
    model = fe.models.RelevanceModel(encoder(train, settings), seed=seed)
    optimizer = adam(model, model.query_encoder, settings)
    epochs = batches(train, settings, seed)
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


def adam(model: nn.Module, encoder: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The few numbers outside the encoder move ten times as fast as its weights of words."""
    words = list(encoder.parameters())
    others = [p for p in model.parameters() if not any(p is word for word in words)]
    groups = [{"params": words}, {"params": others, "lr": 10 * settings.lr}]
    return torch.optim.Adam(groups, lr=settings.lr)


def left(wrong: Tensor, sure: Tensor) -> Tensor:
    """Share of wrong answers among the surest, for every coverage."""
    ordered = wrong.double()[sure.argsort(descending=True)].cumsum(0)
    counts = (COVERAGE * len(wrong)).long().clamp_min(1)
    return ordered[counts - 1] / counts


def judge(found: Found) -> dict[str, Any]:
    """Mean reciprocal rank, recall, and the errors of the first context at every coverage."""
    # Of equal scores the answer's comes last: a score that says nothing finds nothing.
    rank = (found.scores >= found.scores.diagonal()[:, None]).sum(1).double()
    recall = (rank <= 10).double().mean().item()
    return {"mrr": (1 / rank).mean().item(), "recall": recall, "errors": left(rank > 1, found.sure)}


def answers(found: fe.models.Relevance) -> dict[str, Any]:
    """Whether each of a query's ten first contexts is relevant, by the calibrated probability: wrong if past 1/2."""
    ten = found.score.topk(10, 1).indices
    here = found.map(lambda t: t.gather(1, ten).flatten())
    relevant = (ten == torch.arange(len(ten))[:, None]).flatten()
    wrong = (here.probability > 0.5) != relevant
    p = torch.stack([1 - here.probability, here.probability], 1)
    return {
        "share relevant": relevant.double().mean().item(),
        "mean probability": here.probability.mean().item(),
        "calibration error": fe.diagnostics.calibration(p, relevant.long()).error,
        "wrong": wrong.double().mean().item(),
        "epistemic part of variance": (here.epistemic.sum() / here.total_variance.sum()).item(),
        "total variance": left(wrong, -here.total_variance),
        "epistemic": left(wrong, -here.epistemic),
        "chance": left(wrong, fe.random.uniform(len(wrong), seed=0)),
    }


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| | MRR | recall@10 | first is wrong | surest half | surest fifth |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in results.items():
        cells = [[s[key] for s in own] for key in ("mrr", "recall")]
        cells += [[float(s["errors"][k]) for s in own] for k in (ALL, HALF, FIFTH)]
        lines.append(f"| {name} | {' | '.join(map(spread, cells))} |")
    return "\n".join(lines)


def picture(results: dict[str, list[dict[str, Any]]], told: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    first, second = figure.subplots(1, 2)
    for k, (name, own) in enumerate(results.items()):
        for one in own:
            first.plot(COVERAGE, one["errors"], color=f"C{k}", lw=0.7, alpha=0.4)
        first.plot(COVERAGE, sum(one["errors"] for one in own) / len(own), color=f"C{k}", lw=2, label=name)
    first.set(title="Is the first context the right one?", ylabel="share that is not")
    for k, name in enumerate(MEASURES):
        curve = sum(one[name] for one in told) / len(told)
        second.plot(COVERAGE, curve, color=f"C{k + 3}", lw=2, label=f"left out by {name}")
    second.set(title="RelevanceModel: is this one of the ten relevant?", ylabel="share of wrong answers")
    for ax in (first, second):
        ax.set(xlabel="share of questions that are answered", ylim=(0, None))
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("relevance_retrieval.png"), help="where the picture goes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few files and epochs: shows that everything runs"
    )
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()
    torch.set_num_threads(1)
    pairs = docstrings(settings)
    print(
        f"{len(pairs)} docstrings of Python {sys.version.split()[0]}, {len({p.module for p in pairs})} modules"
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (BM25, DOT, RELEVANCE)}
    if BM25Okapi is None:
        del results[BM25]
        print("no row of BM25: pip install rank-bm25")
    told = []
    for seed in range(1, settings.seeds + 1):  # all settings were chosen on the split of seed 0
        train, held, test = by_module(pairs, seed)
        print(f"seed {seed}: {len(train)} to train, {len(held)} to calibrate, {len(test)} to test")
        if BM25Okapi is not None:
            results[BM25].append(judge(bm25(test)))
        results[DOT].append(judge(dot_product(train, test, settings, seed)))
        found, every = relevance(train, held, test, settings, seed)
        results[RELEVANCE].append(judge(found))
        told.append(answers(every))
    print(f"means over {settings.seeds} splits (smallest to largest)\n{table(results)}")
    print("of the ten first contexts of a query, by RelevanceModel:")
    for name in told[0]:
        values = [one[name] for one in told]
        if name in MEASURES:
            print(f"  wrong, half left out by {name}: {spread([float(curve[HALF]) for curve in values])}")
        else:
            print(f"  {name}: {spread(values)}")
    picture(results, told).savefig(arguments.out, dpi=110)
    print(f"{arguments.out.resolve()}   ({time.perf_counter() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
