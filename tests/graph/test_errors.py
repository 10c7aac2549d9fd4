"""What belief propagation refuses, and what it says then."""

from __future__ import annotations

import pytest
import torch

from fekernels.graph import belief_propagation
from tests.support.graph import INF

U, E, P = torch.zeros(4, 3), torch.tensor([[0, 1], [1, 2]]), torch.zeros(2, 3, 3)
NAN = torch.zeros(4, 3).index_fill_(0, torch.tensor([2]), float("nan"))

CALLS = {
    "numpy": (dict(unary=U.numpy()), TypeError, "unary must be a tensor; got ndarray"),
    "integer potentials": (dict(unary=U.long()), TypeError, "unary must be float32, bfloat16, float16 or float64"),
    "two dtypes": (dict(pairwise=P.double()), TypeError, "pairwise must be float32 like unary; got float64"),
    "no variables": (dict(unary=U[0]), ValueError, r"unary must have shape \(\.\.\., V, S\) with S >= 1; got \(3,\)"),
    "no states": (dict(unary=U[:, :0]), ValueError, r"unary must have shape .* got \(4, 0\)"),
    "float edges": (dict(edges=E.float()), TypeError, "edges must be integers; got float32"),
    "bool edges": (dict(edges=E.bool()), TypeError, "edges must be integers; got bool"),
    "edges by rows": (dict(edges=E.new_zeros(2, 3)), ValueError, r"edges must have shape \(E, 2\); got \(2, 3\)"),
    "an end too far": (dict(edges=E + 2), ValueError, r"edges must be in \[0, 4\), the variables.*got \[3, 4\] at 1"),
    "a negative end": (dict(edges=E - 1), ValueError, r"edges must be in \[0, 4\).*got \[-1, 0\] at 0"),
    "a loop": (dict(edges=E * 0 + 1), ValueError, r"edges must join two variables; got \[1, 1\] at 0"),
    "too many tables": (dict(pairwise=P[:1].expand(3, 3, 3)), ValueError, r"pairwise must have shape \(2, 3, 3\) or"),
    "other states": (dict(pairwise=P[:, :2]), ValueError, r"pairwise must have shape \(2, 3, 3\).*got \(2, 2, 3\)"),
    "one row": (dict(pairwise=P[:, :1]), ValueError, r"pairwise must have shape \(2, 3, 3\).*got \(2, 1, 3\)"),
    "another batch": (dict(pairwise=P.expand(5, 2, 3, 3)), ValueError, r"pairwise must have shape \(2, 3, 3\)"),
    "NaN": (dict(unary=NAN), ValueError, r"unary must be finite or -inf; got NaN or \+inf"),
    "infinity": (dict(pairwise=P + INF), ValueError, r"pairwise must be finite or -inf; got NaN or \+inf"),
    "infinite table": (dict(pairwise=P[0] + INF), ValueError, "pairwise must be finite or -inf"),
    "messages": (dict(messages=torch.zeros(2, 3)), ValueError, r"messages must have shape \(2, 2, 3\); got \(2, 3\)"),
    "NaN messages": (dict(messages=torch.full((2, 2, 3), float("nan"))), ValueError, "messages must be finite or -inf"),
    "negative damping": (dict(damping=-0.1), ValueError, r"damping must be in \[0, 1\); got -0.1"),
    "all damping": (dict(damping=1.0), ValueError, r"damping must be in \[0, 1\); got 1.0"),
    "no number": (dict(damping="half"), TypeError, "damping must be a number; got str"),
    "tol": (dict(tol=-1e-3), ValueError, "tol must be finite and >= 0; got -0.001"),
    "no iterations": (dict(max_iters=0), ValueError, "max_iters must be at least 1; got 0"),
    "half an iteration": (dict(max_iters=1.5), TypeError, "max_iters must be an int; got float"),
    "product": (dict(product="min"), ValueError, "product must be one of sum, max; got 'min'"),
    "schedule": (dict(schedule="random"), ValueError, "schedule must be one of flooding, residual; got 'random'"),
    "device": (dict(edges=E.to("meta")), ValueError, "edges must be on cpu like the others; got meta"),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_bad_arguments(what: str) -> None:
    changes, error, message = CALLS[what]
    call = dict(unary=U, edges=E, pairwise=P)
    with pytest.raises(error, match=f"^belief_propagation: {message}"):
        belief_propagation(**(call | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", ["sum", "max"])
@pytest.mark.parametrize("schedule", ["flooding", "residual"])
def test_a_contradiction_is_told(schedule: str, product: str, dtype: torch.dtype) -> None:
    """A triangle of two colours, of which one variable has its own; and variables without any state."""
    triangle = torch.tensor([[0, 1], [1, 2], [2, 0]])
    differ = torch.zeros(2, 2, dtype=dtype).fill_diagonal_(-INF)
    unary = torch.zeros(3, 2, dtype=dtype)
    unary[0, 1] = -INF
    call = dict(product=product, schedule=schedule)
    with pytest.raises(
        ValueError, match="belief_propagation: the potentials contradict each other, no state is possible"
    ):
        belief_propagation(unary, triangle, differ, **call)
    unary[0, 0] = -INF
    with pytest.raises(ValueError, match="contradict.*variable 0 has none by its unary potential"):
        belief_propagation(unary, triangle[:1], torch.zeros(2, 2, dtype=dtype), **call)
    two = torch.stack([torch.zeros_like(unary), unary])
    with pytest.raises(ValueError, match="the potentials of problem 1 contradict each other"):
        belief_propagation(two, triangle[:1], torch.zeros(2, 2, dtype=dtype), **call)


def test_empty_graphs_are_fine() -> None:
    for unary, edges in ((torch.randn(4, 3), E[:0]), (torch.zeros(0, 3), E[:0]), (torch.randn(0, 4, 3), E)):
        found = belief_propagation(unary, edges, torch.zeros(3, 3))
        assert found.beliefs.shape == unary.shape and found.pair_beliefs.shape == (
            *unary.shape[:-2],
            len(edges),
            3,
            3,
        )
        torch.testing.assert_close(found.beliefs, unary.softmax(-1))
        torch.testing.assert_close(
            found.bethe_free_energy, -unary.double().logsumexp(-1).sum(-1), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    unary, pairwise = torch.randn(4, 3).to(dtype), torch.randn(2, 3, 3).to(dtype)
    found = belief_propagation(unary, E.int(), pairwise)
    wanted = belief_propagation(unary.float(), E, pairwise.float())
    assert found.beliefs.dtype == torch.float32 and torch.equal(found.beliefs, wanted.beliefs)
