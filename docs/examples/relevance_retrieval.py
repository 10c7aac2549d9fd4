"""Docstrings found by their first line: ``python docs/examples/relevance_retrieval.py [--quick] [--out PATH]``.

The first line of a docstring of Python's standard library is a query, the rest of it the context that it should find
among those of modules that no training saw. ``fe.models.RelevanceModel`` stands beside BM25, which needs no training,
and a plain dot product of the same encoder's vectors, trained on the same batches (retrieval_parts/retrievers.py).
Mean reciprocal rank, recall, and what is left of the error where each leaves out what it is least sure of; then
whether the model's variances know which of its answers are wrong. Whoever wins, wins. Needs the extra "demo".
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from retrieval_parts import retrievers
from retrieval_parts.docstrings import by_module, docstrings
from retrieval_parts.retrievers import BM25, DOT, QUICK, RELEVANCE, Found, Settings
from torch import Tensor

import fekernels as fe
from fekernels import plots

COVERAGE = torch.linspace(0.1, 1, 19)
ALL, HALF, FIFTH = 18, 8, 2  # places of 1, .5 and .2 there
MEASURES = ("total variance", "epistemic", "chance")


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
    figure, ((first, second),) = plots.panels(1, 2, (10, 4))
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
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("relevance.png"), help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="few files and epochs")
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    started = time.perf_counter()
    torch.set_num_threads(1)
    pairs = docstrings(settings.files)
    print(
        f"{len(pairs)} docstrings of Python {sys.version.split()[0]}, {len({p.module for p in pairs})} modules"
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in (BM25, DOT, RELEVANCE)}
    if retrievers.BM25Okapi is None:
        del results[BM25]
        print("no row of BM25: pip install rank-bm25")
    told = []
    for seed in range(1, settings.seeds + 1):  # all settings were chosen on the split of seed 0
        train, held, test = by_module(pairs, seed)
        print(f"seed {seed}: {len(train)} to train, {len(held)} to calibrate, {len(test)} to test")
        if BM25 in results:
            results[BM25].append(judge(retrievers.bm25(test)))
        results[DOT].append(judge(retrievers.dot_product(train, test, settings, seed)))
        found, every = retrievers.relevance(train, held, test, settings, seed)
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
