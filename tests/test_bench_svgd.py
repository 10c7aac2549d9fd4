"""The Stein part of `python -m fekernels bench`: every case, and peers that compute what ours does or are missing."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fekernels import _extension, bench
from fekernels.bench import memory, packages, stein, stein_memory
from fekernels.bench.packages import KEOPS, NUMPYRO, PEERS, PYRO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, which is not installed

from benchmarks import bench_stein  # noqa: E402

TINY = stein.Sizes(
    middle=(41, 6),
    low=(50, 4),
    wide=(30, 9),
    odd=(30, 5),
    planar=(60, 2),
    small=(20, 6),
    few=(5, 300),
    batch=(4, 16, 6),
    memory=(500, 4),
    rounds=2,
    seconds=0.0,
    slow_rounds=3,
    turn_seconds=1e-4,
)
OURS, PLAIN, WRITTEN = stein.OURS, stein.PLAIN, stein.WRITTEN


@pytest.fixture
def compiled() -> None:
    if (reason := _extension.unavailable_reason()) is not None:
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No peer but PyTorch: installed packages take seconds to compile what they run."""
    monkeypatch.setattr(packages.Peer, "missing", lambda self: f"pip install {self.install}")


@pytest.mark.usefixtures("alone")
def test_every_case_is_measured() -> None:
    rows = bench.measure(TINY)
    middle, direction = "n = 41, d = 6", "direction, n = 41, d = 6"
    expected = [
        (direction, WRITTEN, 0.08),
        (direction, PLAIN, 0.08),
        (direction, stein.BARE, 0.5),
        ("direction, n = 50, d = 4", WRITTEN, 0.035),
        ("direction, n = 50, d = 4", PLAIN, 0.035),
        ("direction, n = 30, d = 9", stein.BARE, 0.6),
        ("direction, n = 30, d = 5", stein.BARE, 0.7),
        ("direction, n = 60, d = 2", KEOPS, 0.3),
        (direction, KEOPS, 0.2),
        (direction, NUMPYRO, 0.2),
        (direction, PYRO, 0.2),
        ("direction, n = 20, d = 6", PYRO, 0.2),
        ("direction, n = 5, d = 300", PLAIN, 0.5),
        ("direction, 4 of n = 16, d = 6", PLAIN, 0.5),
        (f"exact median, {middle}", OURS, 0.8),
        (f"exact median, hint, {middle}", OURS, None),
        (f"exact median, {middle}", stein.CDIST, None),
        (f"direction, imq, {middle}", f"{PLAIN}, imq", None),
        (f"direction, laplace, {middle}", f"{PLAIN}, laplace", None),
        (f"discrepancy, {middle}", PLAIN, None),
        (f"forward + backward, {middle}", f"{PLAIN}, autograd", None),
    ]
    assert [(row["case"], row["peer"], row["reach"]) for row in rows] == expected
    packages = [row for row in rows if "missing" in row]
    assert [row["missing"] for row in packages] == [
        "pip install pykeops",
        "pip install pykeops",
        "pip install numpyro",
        "pip install pyro-ppl",
        "pip install pyro-ppl",
    ]
    for row in rows:
        if "missing" in row:
            continue
        assert row["peer_ms"] > 0 and row["ours_ms"] > 0
        assert row["rounds"] == (3 if row["case"].startswith(("direction, n = 50", "forward")) else 2)
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["peer_ms"])
        assert row["met"] == (None if row["reach"] is None else row["ratio"] <= row["reach"])
        assert row["pairs_per_ns"] == pytest.approx(row["elements"] / row["ours_ms"] / 1e6)
        assert "gb_per_s" not in row
    elements = {row["case"]: row["elements"] for row in rows}
    assert elements[direction] == 1681 and elements["direction, 4 of n = 16, d = 6"] == 1024


@pytest.mark.parametrize("name", [KEOPS, NUMPYRO, PYRO])
@pytest.mark.parametrize("h", [0.7, 6.0])
def test_packages_compute_what_ours_does(name: str, h: float) -> None:
    if missing := PEERS[name].missing():
        pytest.skip(missing)
    x, s, _ = stein.problem((30, 4))
    found = PEERS[name].direction(x, s, h)()
    torch.testing.assert_close(found, stein.ours(x, s, h), rtol=1e-5, atol=1e-6)


def test_numpyro_gets_its_median_back() -> None:
    """Only the function that is compiled is given h."""
    kernels = pytest.importorskip("numpyro.contrib.einstein.stein_kernels")
    before = kernels.median_bandwidth
    PEERS[NUMPYRO].direction(*stein.problem((5, 2)))
    assert kernels.median_bandwidth is before


@pytest.mark.parametrize("h", [0.7, 3.0])
@pytest.mark.parametrize("kernel", ["rbf", "imq", "laplace"])
def test_plain_formulas_compute_what_ours_does(kernel: str, h: float) -> None:
    """On particles near each other, so that no term is small."""
    for shape in ((30, 4), (4, 30)):
        x, s, _ = stein.problem(shape)
        x /= shape[1] ** 0.5  # squared distances of about 2
        expected = stein.ours(x, s, h, kernel)
        forms = {
            "rbf": (stein.plain, stein.written),
            "imq": (stein.plain_imq,),
            "laplace": (stein.plain_laplace,),
        }
        for form in forms[kernel]:
            torch.testing.assert_close(form(x, s, h), expected, rtol=1e-4, atol=1e-5, msg=form.__name__)


def test_a_peer_that_computes_something_else_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the table, with how far off it is, and not timed."""

    def wrong(x: Tensor, s: Tensor, h: float) -> Tensor:
        return 1.01 * stein.ours(x, s, h)

    def peer(x: Tensor, s: Tensor, h: float) -> object:
        return lambda: wrong(x, s, h)

    monkeypatch.setattr(stein, "plain", wrong)
    monkeypatch.setitem(PEERS, KEOPS, packages.Peer("torch", "pykeops", peer))  # type: ignore[arg-type]
    for group in (
        stein._plain(TINY, TINY.batch, 0.5),
        stein._packages(TINY, TINY.small, {KEOPS: 0.2}),
    ):
        assert [contestant.name for contestant in group.contestants] == [OURS]
        assert [row.missing for row in group.rows] == ["computes something else: 1.0e-02 off"]
    assert stein.differs(torch.full((2,), torch.nan), torch.ones(2)).startswith("computes something")


def test_peers_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.Peer("no_such_package_at_all", "name-for-pip", PEERS[KEOPS].direction).missing() == (
        "pip install name-for-pip"
    )
    broken = types.ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", broken)

    def fail(*_: object) -> object:
        raise RuntimeError("\nno compiler\nand more")

    monkeypatch.setitem(PEERS, KEOPS, packages.Peer("broken", "broken", fail))  # type: ignore[arg-type]
    group = stein._packages(TINY, TINY.small, {KEOPS: 0.2})
    assert [row.missing for row in group.rows] == ["no compiler"]
    assert [contestant.name for contestant in group.contestants] == [OURS]


def test_pyro_is_not_asked_for_more_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    infer = types.ModuleType("pyro.infer")
    infer.RBFSteinKernel = types.SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyro", types.ModuleType("pyro"))
    monkeypatch.setitem(sys.modules, "pyro.infer", infer)
    x = torch.zeros(1, 1).expand(100_000, 64)
    with pytest.raises(MemoryError, match=r"\(n, n, d\) tensors take 10240 GB"):
        PEERS[PYRO].direction(x, x, 1.0)


@pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason="no clear_refs")
@pytest.mark.usefixtures("compiled")
def test_peak_memory_is_that_of_the_particles() -> None:
    """The plain formula's n x n matrix shows; ours stays far below it."""
    shape = (4000, 8)
    matrix = 4 * shape[0] ** 2
    grown = {
        name: memory.in_process("fekernels.bench.stein_memory", name, shape, 1) / matrix
        for name in (PLAIN, OURS)
    }
    assert 0.9 < grown[PLAIN] < 2.5
    assert grown[OURS] < 0.2


def test_a_pass_without_a_peak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("this system has none")

    monkeypatch.setattr(stein_memory, "in_process", fail)
    rows = stein_memory.measure(TINY, 1)
    assert [row["contestant"] for row in rows] == [*stein_memory.PASSES]
    assert {row["missing"] for row in rows} == {"this system has none"}
    assert stein_memory.table(rows).count("not measured: this system has none") == len(rows)


@pytest.mark.usefixtures("alone", "compiled")
def test_command_measures_the_stein_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "SVGD_QUICK", TINY)
    grown = {OURS: 250_000_000, PLAIN: 3_000_000}
    monkeypatch.setattr(stein_memory, "in_process", lambda _, name, *__: grown.get(name, 2_000_000))
    path = tmp_path / "bench.json"
    assert bench.main(["--quick", "--only", "svgd", "--threads", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert set(report) == {"machine", "quick", "svgd", "svgd_memory"}
    assert len(report["svgd"]) == sum(bench_stein.ROWS) == 21
    memory = {row["contestant"]: row for row in report["svgd_memory"]}
    assert memory[OURS] == {
        "case": "n = 500, d = 4",
        "contestant": OURS,
        "operands_mb": 0.016,
        "growth_mb": 250.0,
        "reach_mb": 200.0,
        "met": False,
    }
    assert "met" not in memory[PLAIN] and memory[PLAIN]["case"] == "n = 41, d = 6"
    printed = capsys.readouterr().out
    assert "pairs/ns" in printed and "GB/s" not in printed
    lines = printed.splitlines()
    goalless = next(line for line in lines if line.startswith("discrepancy"))
    assert goalless.split()[-2] == "-" and "NO" not in goalless
    assert next(line for line in lines if line.startswith("n = 500, d = 4")).endswith("  200   NO")
    bench_stein.markdown(path)
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 21 + 1 + len(stein_memory.PASSES)
    assert "| pip install numpyro | | | 0.2 |" in printed
    assert f"| n = 500, d = 4 | {OURS} | 250 | 200 |" in printed


@pytest.mark.usefixtures("alone")
def test_the_rows_of_the_suite_are_those_of_the_groups() -> None:
    assert tuple(len(make().rows) for make in stein.groups(TINY)) == bench_stein.ROWS
