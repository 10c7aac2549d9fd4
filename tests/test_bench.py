"""`python -m fekernels bench`: that every case is measured and reported, whatever the times are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fekernels import _backends, _extension, bench
from fekernels.bench import optimizers, timing
from fekernels.bench.timing import Contestant, Timing, interleave

TINY = optimizers.Sizes(
    large=4096, cached=512, tensors=2, small=(16, 10_000), rounds=2, seconds=0.0, turn_seconds=1e-4
)


@pytest.fixture
def compiled() -> None:
    if (reason := _extension.unavailable_reason()) is not None:
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.mark.usefixtures("compiled")
def test_every_case_is_measured() -> None:
    isa = _backends.native_op("isa")()
    rows = bench.measure(TINY)
    assert _backends.native_op("isa")() == isa
    adam = "Adam(fused=True)"
    expected = [
        ("4.096k float32, T = 0", adam, 0.72),
        ("4.096k float32, T > 0, momentum", adam, 1.05),
        ("4.096k float32, T > 0, preconditioned", adam, 1.05),
        ("4.096k float32, T > 0, isotropic", adam, 1.05),
        ("4.096k float32, T > 0, momentum", f"{adam} + randn_like + add_", 0.13),
        ("4.096k float32, avx2, T = 0", adam, 0.75),
        ("4.096k float32, avx2, T > 0", adam, 2.2),
        ("512 float32 in cache, T = 0", adam, 0.5),
        ("512 float32 in cache, T > 0", adam, 1.8),
        ("2 tensors of 16, T = 0", adam, 0.35),
        ("2 tensors of 16, T > 0", adam, 0.5),
        ("2 tensors of 10,000, T = 0", adam, 0.5),
        ("2 tensors of 10,000, T > 0", adam, 0.7),
        ("SGLD 4.096k float32", "add_(g).add_(randn_like)", 0.11),
        ("4.096k bfloat16, stochastic rounding, T = 0", "LangevinAdam, float32, T = 0", 0.75),
    ]
    assert [(row["case"], row["peer"], row["reach"]) for row in rows] == expected
    for row in rows:
        if "missing" in row:
            assert "avx2" in row["case"] and "avx2" in row["missing"]
            continue
        assert row["peer_ms"] > 0 and row["ours_ms"] > 0 and row["rounds"] == 2
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["peer_ms"])
        assert row["met"] == (row["ratio"] <= row["reach"])
        per_second = row["elements"] * row["bytes_per_element"] / row["ours_ms"] / 1e6
        assert row["gb_per_s"] == pytest.approx(per_second)
        assert ("of_copy" in row) == ("4.096k" in row["case"])


@pytest.mark.usefixtures("compiled")
def test_contestants_do_what_their_names_say() -> None:
    """Ours with T > 0 is not T = 0, and the peers move their parameters."""
    make = optimizers.groups(TINY)[0]
    group = make()
    contestants = {contestant.name: contestant for contestant in group.contestants}
    optimizer = contestants["T = 0"].run.__self__  # type: ignore[attr-defined]
    states = []
    for name in ("T = 0", "T > 0, momentum", "T > 0, preconditioned", "T > 0, isotropic"):
        contestants[name].prepare()  # type: ignore[misc]
        states.append((optimizer.param_groups[0]["temperature"], optimizer.param_groups[0]["noise"]))
    assert states == [(0.0, "momentum"), (1e-4, "momentum"), (1e-4, "preconditioned"), (1e-4, "isotropic")]
    if "avx2, T = 0" in contestants:
        before = _backends.native_op("isa")()
        contestants["avx2, T = 0"].prepare()  # type: ignore[misc]
        assert _backends.native_op("isa")() == "avx2"
        contestants["avx2, T = 0"].restore()  # type: ignore[misc]
        assert _backends.native_op("isa")() == before
    for name in ("Adam(fused=True)", "Adam(fused=True) + randn_like + add_"):
        run = contestants[name].run
        optimizer = getattr(run, "__self__", None) or run.__closure__[0].cell_contents  # type: ignore[attr-defined]
        params = contestants["Adam(fused=True)"].run.__self__.param_groups[0]["params"]  # type: ignore[attr-defined]
        before = params[0].detach().clone()
        run()
        assert not torch.equal(before, params[0])


@pytest.mark.usefixtures("compiled")
def test_command_writes_tables_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setattr(bench, "import_seconds", lambda times: 0.01)
    threads = torch.get_num_threads()
    path = tmp_path / "new" / "bench.json"
    assert bench.main(["--quick", "--json", str(path), "--threads", "1", "--only", "optimizers"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["quick"] is True
    assert report["machine"]["threads"] == 1
    keys = ("date", "cpu", "cores", "isa", "load", "compiled", "fekernels", "torch", "python", "system")
    assert set(report["machine"]) == {*keys, "threads"}
    assert len(report["rows"]) == 15
    for row in report["rows"]:
        assert f"{row['case']:51}{row['peer']}" in printed
    assert [row["case"] for row in report["once"]] == [
        "cold build of the kernels",
        "import fekernels, after torch",
    ]
    assert report["once"][0]["missing"] == "left out by --quick"
    assert report["once"][1] == {
        "case": "import fekernels, after torch",
        "reach_s": 0.05,
        "seconds": 0.01,
        "met": True,
    }


def test_lost_cases_are_told() -> None:
    timing = {"peer_ms": 1.0, "reach": 0.5, "gb_per_s": 1.0}
    lost = {"case": "a case", "peer": "a peer", "ours_ms": 2.0, "ratio": 2.0, "met": False, **timing}
    won = {"case": "another", "peer": "a peer", "ours_ms": 0.4, "ratio": 0.4, "met": True, **timing}
    missing = {"case": "a third", "peer": "a peer", "reach": 0.5, "missing": "no such thing"}
    lines = bench.table([lost, won, missing]).splitlines()[2:]
    assert " NO " in lines[0] and " 2.00 " in lines[0]
    assert " yes " in lines[1] and " NO " not in lines[1]
    assert lines[2].endswith("not measured: no such thing")


def test_contestants_take_turns() -> None:
    order: list[str] = []

    def contestant(name: str) -> Contestant:
        return Contestant(
            name,
            lambda: order.append(name),
            prepare=lambda: order.append(f"+{name}"),
            restore=lambda: order.append(f"-{name}"),
        )

    times = interleave([contestant("a"), contestant("b")], rounds=3)
    assert order[-18:] == ["+a", "a", "-a", "+b", "b", "-b"] * 3
    assert [len(timing.rounds) for timing in times.values()] == [3, 3]


def test_times_are_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run_for(seconds: float) -> None:
        clock[0] += seconds

    contestants = [
        Contestant("quick", lambda: run_for(0.125)),
        Contestant("slow", lambda: run_for(0.5), prepare=lambda: run_for(64.0)),
        Contestant("of four steps", lambda: run_for(1.0), steps=4),
    ]
    times = interleave(contestants, rounds=3, turn_seconds=1.0)
    assert {name: timing.median for name, timing in times.items()} == {
        "quick": 0.125,
        "slow": 0.5,
        "of four steps": 0.25,
    }
    assert {name: timing.steps_per_round for name, timing in times.items()} == {
        "quick": 8,
        "slow": 2,
        "of four steps": 4,
    }
    assert len(interleave(contestants[:1], rounds=3, seconds=10.0)["quick"].rounds) == 80


def test_median_and_quartiles() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0), 1)
    assert timing.median == 3.0
    assert timing.quartiles() == (1.5, 52.0)
    assert Timing((7.0,), 1).quartiles() == (7.0, 7.0)


def test_restore_follows_a_failure() -> None:
    restored: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave([Contestant("a", fail, restore=lambda: restored.append(1))])
    assert restored == [1]


def test_import_is_timed_in_a_process() -> None:
    assert 0 < bench.import_seconds(1) < 60


def test_a_process_that_fails_is_a_row_without_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "IMPORT_PROGRAM", "raise RuntimeError('no such package')")
    rows = bench.once(quick=True)
    assert rows[1] == {
        "case": "import fekernels, after torch",
        "reach_s": 0.05,
        "missing": "RuntimeError: no such package",
    }


def test_without_compiled_kernels_nothing_is_timed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fekernels", "bench", "--quick"],
        env={**os.environ, "FEKERNELS_BUILD": "none"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no compiled kernels to time: FEKERNELS_BUILD=none" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--threads", "0"], ["--only", "pears"], ["--only", "optimizers", "--plot", "a.png"]]
)
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
