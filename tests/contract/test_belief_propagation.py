"""Belief propagation: every implementation near float64's messages, and with the same bits everywhere on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fekernels import graph  # noqa: F401 (defines the operator)
from fekernels._runtime import backends
from tests.support.graph import ROWS, Row, in_float64
from tests.support.implementations import CPU_IMPLEMENTATIONS, ISAS, ON_GPU, Place, instruction_set, threads
from tests.support.tensors import bits_equal

OP = torch.ops.fekernels.belief_propagation
Kernel = Callable[..., tuple[Tensor, ...]]

IMPLEMENTATIONS = [
    *CPU_IMPLEMENTATIONS,
    *(place for place in ON_GPU if place.values[0].backend == "reference"),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """As the operator, from operands on the CPU to results on it."""
    place = (
        request.param if isinstance(request.param, Place) else Place(request.param.partition("-")[0], "cpu")
    )
    if (obstacle := place.obstacle()) is not None:
        pytest.skip(obstacle)
    function = backends.implementation("belief_propagation", place.backend)

    def run(*call: Any) -> tuple[Tensor, ...]:
        there = (each.to(place.device) if isinstance(each, Tensor) else each for each in call)
        return tuple(each.cpu() for each in function(*there))

    if place.backend == "cpp":
        with instruction_set(request.param.partition("-")[2]):
            yield run
    else:
        yield run


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_messages_and_beliefs(row: Row, kernel: Kernel, poisoned: None) -> None:
    got, wanted = kernel(*row.operands(), *row.settings), in_float64(row)
    # A message is a difference of sums of about ten logarithms of this size, each rounded to 6e-8 of it.
    scale = max(1.0, row.strength)
    for name, one, other, bound in zip(
        ("messages", "beliefs", "pair_beliefs", "free_energy", "residual"),
        got,
        wanted,
        (4e-6 * scale, 2e-6 * scale, 4e-6 * scale, 1e-5 * scale * max(1, row.edges / 100), 8e-6 * scale),
        strict=False,
    ):
        assert one.shape == other.shape and one.dtype == (
            torch.float64 if name == "free_energy" else torch.float32
        )
        torch.testing.assert_close(
            one.double(), other, rtol=1e-6, atol=bound, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Where float64 has come to rest exactly, float32 may still change its last digit.
    assert ((wanted[5] <= got[5]) & (got[5] <= row.sweeps)).all()


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("isa", ISAS[1:])
def test_bits_do_not_depend_on_the_instruction_set(row: Row, isa: str, native: object) -> None:
    first, second = ([], [])
    for name, found in ((ISAS[0], first), (isa, second)):
        with instruction_set(name):
            found.extend(backends.implementation("belief_propagation", "cpp")(*row.operands(), *row.settings))
    assert all(bits_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("row", [row for row in ROWS if row.edges > 9000 or row.problems > 1], ids=str)
def test_bits_do_not_depend_on_threads(row: Row, native: object) -> None:
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(backends.implementation("belief_propagation", "cpp")(*row.operands(), *row.settings))
    for other in found[1:]:
        assert all(bits_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("row", [row for row in ROWS if row.problems > 1], ids=str)
def test_a_batch_is_its_problems(row: Row, kernel: Kernel) -> None:
    unary, edges, pairwise, messages = row.operands()
    settings = (*row.settings[:3], 1e-4, 50)  # each stops at an iteration of its own
    whole = kernel(unary, edges, pairwise, messages, *settings)
    for k in range(row.problems):
        tables = pairwise[min(k, len(pairwise) - 1)][None]
        alone = kernel(unary[k : k + 1], edges, tables, messages[k : k + 1], *settings)
        assert all(bits_equal(a[k], b[0]) for a, b in zip(whole, alone, strict=True))


def test_no_messages_are_zeros(kernel: Kernel) -> None:
    for row in (Row("none", 19, 45, 4, problems=2), Row("none, 3 states", 19, 45, 3)):
        unary, edges, pairwise, messages = row.operands()
        for a, b in zip(
            kernel(unary, edges, pairwise, None, *row.settings),
            kernel(unary, edges, pairwise, messages, *row.settings),
            strict=True,
        ):
            assert bits_equal(a, b)


def test_opcheck(backend: Place) -> None:
    row = ROWS[3]
    operands = [each.to(backend.device) for each in row.operands()]
    result = torch.library.opcheck(OP.default, (*operands, *row.settings))
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


def test_compiles_whole_and_once(backend: Place) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *call: OP(*call), backend="aot_eager", fullgraph=True, dynamic=True)
    for row in (Row("first", 9, 21, 4), Row("second", 13, 31, 4)):
        operands = [each.to(backend.device) for each in row.operands()]
        for a, b in zip(compiled(*operands, *row.settings), OP(*operands, *row.settings), strict=True):
            assert bits_equal(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(unary=torch.zeros(9, 4)), ValueError, r"unary must have shape \(N, V, S\); got \(9, 4\)"),
        (dict(unary=torch.zeros(1, 9, 4).half()), TypeError, "unary must be float32 or float64"),
        (dict(edges=torch.zeros(21, 3).long()), ValueError, r"edges must have shape \(E, 2\); got \(21, 3\)"),
        (dict(edges=torch.zeros(21, 2).int()), TypeError, "edges must be int64; got torch.int32"),
        (dict(edges=torch.full((21, 2), 9)), ValueError, r"edges must be in \[0, 9\)"),
        (dict(pairwise=torch.zeros(1, 20, 4, 4)), ValueError, r"pairwise must have shape \(1, 21, 4, 4\)"),
        (dict(pairwise=torch.zeros(1, 21, 4, 4).double()), TypeError, "pairwise must be float32 or float64, all"),
        (dict(messages=torch.zeros(1, 21, 4)), ValueError, r"messages must have shape \(1, 21, 2, 4\)"),
        (dict(damping=1.0), ValueError, r"damping must be in \[0, 1\); got 1"),
        (dict(tol=-1.0), ValueError, "tol must be finite and >= 0"),
        (dict(max_iters=-1), ValueError, "max_iters must be at least 0"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit(changes: dict[str, object], error: type[Exception], message: str) -> None:
    unary, edges, pairwise, messages = Row("bad", 9, 21, 4).operands()
    call = dict(
        unary=unary, edges=edges, pairwise=pairwise, messages=messages, max_product=False, by_residual=False,
        damping=0.0, tol=0.0, max_iters=1,
    )  # fmt: skip
    with pytest.raises(error, match=f"belief_propagation: {message}"):
        OP(**(call | changes))


def test_the_native_operator_checks_too(native: object) -> None:
    unary, edges, pairwise, messages = Row("bad", 9, 21, 4).operands()
    run = backends.implementation("belief_propagation", "cpp")
    for operands in (
        (unary.double(), edges, pairwise, messages),
        (unary, edges + 9, pairwise, messages),
        (unary, edges.int(), pairwise, messages),
        (unary, edges, pairwise.mT, messages),
        (unary, edges, pairwise, messages[:, :20]),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            run(*operands, False, False, 0.0, 0.0, 1)
