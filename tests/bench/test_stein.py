"""The Stein part of `python -m fekernels bench`: peers that compute what ours does or are missing, and peak memory."""

from __future__ import annotations

import os
import sys
import types
from functools import partial

import pytest
import torch
from torch import Tensor

from fekernels._runtime import extension
from fekernels.bench import memory, packages, peers, stein
from fekernels.bench.packages import KEOPS, NUMPYRO, PACKAGES, PYRO
from fekernels.bench.registry import find
from fekernels.bench.stein import OURS, PLAIN, REFERENCE
from tests.support.peak_memory import forked_growth


@pytest.fixture
def compiled() -> None:
    if (reason := extension.unavailable_reason()) is not None:
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.mark.parametrize("name", [KEOPS, NUMPYRO, PYRO])
@pytest.mark.parametrize("h", [0.7, 6.0])
def test_packages_compute_what_ours_does(name: str, h: float) -> None:
    if missing := PACKAGES[name].missing():
        pytest.skip(missing)
    x, s, _ = stein.problem((30, 4))
    found = PACKAGES[name].direction(x, s, h)()
    torch.testing.assert_close(found, stein.ours(x, s, h), rtol=1e-5, atol=1e-6)


def test_numpyro_gets_its_median_back() -> None:
    """Only the function that is compiled is given h."""
    kernels = pytest.importorskip("numpyro.contrib.einstein.stein_kernels")
    before = kernels.median_bandwidth
    PACKAGES[NUMPYRO].direction(*stein.problem((5, 2)))
    assert kernels.median_bandwidth is before


@pytest.mark.parametrize("h", [0.7, 3.0])
@pytest.mark.parametrize("kernel", peers.DIRECTIONS)
def test_plain_formulas_compute_what_ours_does(kernel: str, h: float) -> None:
    """On particles near each other, so that no term is small."""
    for shape in ((30, 4), (4, 30)):
        x, s, _ = stein.problem(shape)
        x /= shape[1] ** 0.5  # squared distances of about 2
        expected = stein.ours(x, s, h, kernel)
        forms = [peers.DIRECTIONS[kernel], *([peers.written] if kernel == "rbf" else [])]
        for form in [*forms, partial(stein.on_the_reference, kernel=kernel)]:
            torch.testing.assert_close(form(x, s, h), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_nobody_wrote_stands_beside_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(peers.DIRECTIONS, "imq")
    case = stein._of_kernel("imq")
    assert [row.peer for row in case.rows] == [REFERENCE]
    group = case.build(case.shape("tiny"))
    assert not group.missing and [each.name for each in group.contestants] == [f"{OURS}, imq", REFERENCE]


def test_a_peer_that_computes_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table, with how far off it is, and not timed."""

    def wrong(x: Tensor, s: Tensor, h: float) -> Tensor:
        return 1.01 * stein.ours(x, s, h)

    def peer(x: Tensor, s: Tensor, h: float) -> object:
        return lambda: wrong(x, s, h)

    monkeypatch.setitem(PACKAGES, KEOPS, packages.Package("torch", "pykeops", peer))  # type: ignore[arg-type]
    for group, name in (
        (stein._against(OURS, stein.ours, {PLAIN: wrong}, (4, 16, 6)), PLAIN),
        (stein._packages((KEOPS,), (20, 6)), KEOPS),
    ):
        assert [contestant.name for contestant in group.contestants] == [OURS]
        assert group.missing == {name: "computes something else: 1.0e-02 off"}
    assert stein.differs(torch.full((2,), torch.nan), torch.ones(2)).startswith("computes something")


def test_peers_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = packages.Package("no_such_package_at_all", "name-for-pip", PACKAGES[KEOPS].direction)
    assert absent.missing() == "pip install name-for-pip"
    monkeypatch.setitem(sys.modules, "broken", types.ModuleType("broken"))

    def fail(*_: object) -> object:
        raise RuntimeError("\nno compiler\nand more")

    monkeypatch.setitem(PACKAGES, KEOPS, packages.Package("broken", "broken", fail))  # type: ignore[arg-type]
    group = stein._packages((KEOPS,), (20, 6))
    assert group.missing == {KEOPS: "no compiler"}
    assert [contestant.name for contestant in group.contestants] == [OURS]


def test_pyro_is_not_asked_for_more_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    infer = types.ModuleType("pyro.infer")
    infer.RBFSteinKernel = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyro", types.ModuleType("pyro"))
    monkeypatch.setitem(sys.modules, "pyro.infer", infer)
    x = torch.zeros(1, 1).expand(100_000, 64)
    with pytest.raises(MemoryError, match=r"\(n, n, d\) tensors take 10240 GB"):
        PACKAGES[PYRO].direction(x, x, 1.0)


def test_the_direction_costs_three_operations_a_pair_and_dimension() -> None:
    """3 n^2 d with symmetric tiles, a multiply-add being two, and an exponential for each unordered pair."""
    cost = find("stein/middle").cost((100, 7))[OURS]
    assert cost.bytes == 12 * 100 * 7
    assert cost.operations == {"multiply-add": 3 * 100**2 * 7 / 2, "exponential": 100**2 / 2}
    assert find("stein/batch").cost((3, 100, 7))[OURS].operations["exponential"] == 3 * 100**2 / 2


@pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason="no clear_refs")
@pytest.mark.usefixtures("compiled")
def test_peak_memory_is_that_of_the_particles() -> None:
    """The plain formula's n x n matrix shows; ours stays far below it."""
    shape = (4000, 8)
    matrix = 4 * shape[0] ** 2
    assert 0.9 < forked_growth(f"stein/particles/{PLAIN}", shape) / matrix < 2.5
    assert forked_growth(f"stein/particles/{OURS}", shape) / matrix < 0.2


def test_peaks_are_held_to_their_aims_or_told_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = {OURS: 250_000_000, PLAIN: 3_000_000}

    def process(name: str, *_: object) -> int:
        contestant = name.split("/")[2]
        if contestant not in grown:
            raise RuntimeError("this system has none")
        return grown[contestant]

    monkeypatch.setattr(memory, "in_process", process)
    rows = {row["contestant"]: row for row in memory.measure("stein", "tiny", 1)}
    assert [f"stein/particles/{name}" for name in rows] == [name for name in memory.PASSES if "stein" in name]
    assert rows[OURS] == {
        "case": "n = 500, d = 4",
        "contestant": OURS,
        "operands_mb": 0.016,
        "growth_mb": 250.0,
        "reach_mb": 200.0,
        "met": False,
    }
    assert "met" not in rows[PLAIN] and rows[PLAIN]["case"] == "n = 41, d = 6"
    printed = memory.table(list(rows.values())).splitlines()
    assert next(line for line in printed if OURS in line).endswith("  200.0   NO")
    assert sum("not measured: this system has none" in line for line in printed) == len(rows) - 2
