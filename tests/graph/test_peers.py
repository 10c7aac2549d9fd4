"""Belief propagation beside other packages', where they are installed."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch

from fekernels.graph import belief_propagation
from tests.support.graph import random_tree


def module(name: str) -> Any:
    """Skips where it is missing, or one of what it needs is."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def test_pgmpy_has_the_same_marginals_on_a_tree() -> None:
    """Its messages are factors of probabilities, in NumPy, and for trees."""
    models, inference = module("pgmpy.models"), module("pgmpy.inference")
    discrete = module("pgmpy.factors.discrete")
    logging.getLogger("pgmpy").setLevel(logging.ERROR)
    variables, states = 9, 3
    edges = random_tree(variables)
    unary = torch.randn(variables, states, dtype=torch.float64)
    pairwise = torch.randn(len(edges), states, states, dtype=torch.float64)
    factors = [discrete.DiscreteFactor([f"x{i}"], [states], unary[i].exp().numpy()) for i in range(variables)]
    for (i, j), table in zip(edges.tolist(), pairwise, strict=True):
        factors.append(
            discrete.DiscreteFactor([f"x{i}", f"x{j}"], [states, states], table.exp().flatten().numpy())
        )
    graph = models.FactorGraph()
    graph.add_nodes_from([f"x{i}" for i in range(variables)])
    graph.add_factors(*factors)
    graph.add_nodes_from(factors)
    for factor in factors:
        graph.add_edges_from([(name, factor) for name in factor.scope()])
    theirs = inference.BeliefPropagationWithMessagePassing(graph).query([f"x{i}" for i in range(variables)])
    ours = belief_propagation(unary, edges, pairwise).beliefs
    for i in range(variables):
        torch.testing.assert_close(torch.as_tensor(theirs[f"x{i}"].values), ours[i], atol=1e-12, rtol=0)
