"""``python -m fekernels unified``: everything runs, a table with the exact answers, one page of pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fekernels.__main__ import main
from fekernels.unified import command
from fekernels.unified.command import experiments, ising
from fekernels.unified.command.experiments import EXPERIMENTS, QUICK, Row, Settings


def test_quick_run_prints_every_number_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, numbers = tmp_path / "page.png", tmp_path / "numbers.json"
    threads = torch.get_num_threads()
    assert main(["unified", "--quick", "--out", str(page), "--json", str(numbers)]) == 0
    assert torch.get_num_threads() == threads and page.stat().st_size > 100_000
    printed, rows = capsys.readouterr().out, json.loads(numbers.read_text())
    assert len(rows) >= 2 * len(EXPERIMENTS)
    assert all(row["name"] in printed and row["quantity"] in printed for row in rows)
    assert all(math.isfinite(row["value"]) for row in rows)
    # What needs no long run agrees even here.
    exact = {row["quantity"]: row["holds"] for row in rows if row["exact"] is not None}
    for quantity in (
        "four views, largest relative difference, gradients too",
        "share of digits that refined latents explain no worse",
        "weights beside torch's SGD, largest difference",
        "-log Z of a chain of 200 spins",
        "Bethe F of the square lattice, largest error a spin",
        "F at the 2 saddles",
    ):
        assert exact[quantity], quantity
    assert "numbers with an exact answer agree with it" in printed.splitlines()[-1]


def test_a_number_that_is_wrong_is_told_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(settings: Settings, seed: int) -> experiments.Finding:
        rows = [
            Row("one", "right", 1.0, 1.0),
            Row("two", "wrong", 1.5, 1.0, 0.4),
            Row("three", "unknown", 2.0),
        ]
        return experiments.Finding(rows, lambda ax: None, {"work": torch.randn(10), "free_energy": 0.0})

    monkeypatch.setattr(command, "EXPERIMENTS", dict.fromkeys(EXPERIMENTS, wrong))
    assert main(["unified", "--out", str(tmp_path / "page.png")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("one")][0] == "yes"
    assert [line.split()[-1] for line in lines if line.startswith("two")][0] == "NO"
    half = len(EXPERIMENTS)
    assert lines[-1] == f"{half} of {2 * half} numbers with an exact answer agree with it"
    assert not Row("four", "nan", math.nan, 0.0, 1.0).holds


@pytest.mark.parametrize(
    ("option", "path", "said"),
    [
        ("--out", "nowhere/page.png", "must be in a directory that exists"),
        ("--json", "nowhere/rows.json", "must be in a directory that exists"),
        ("--json", ".", "must be a file; got the directory"),
        ("--out", "page.html", "must end in one of ."),
    ],
)
def test_paths_are_checked_first(
    option: str, path: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("unified", "demo"):
        with pytest.raises(SystemExit) as stopped:
            main([name, option, str(tmp_path / path)])
        assert stopped.value.code == 2
        assert f"{option} {said}" in capsys.readouterr().err


def test_onsagers_and_bethes_free_energies_have_their_known_limits() -> None:
    hot, cold = torch.tensor(0.01).double(), torch.tensor(2.0).double()
    # Free spins; then two ground states of two bonds a spin.
    assert abs(ising.minus_log_z_of_onsager(hot) + math.log(2)) < 2e-4
    assert abs(ising.minus_log_z_of_onsager(cold) + 4.0) < 1e-6
    # At the critical coupling: log 2 / 2 + 2 G / pi, G Catalan's constant.
    critical = torch.tensor(math.log(1 + 2**0.5) / 2).double()
    exact = math.log(2) / 2 + 2 * 0.915965594177219 / math.pi
    assert abs(ising.minus_log_z_of_onsager(critical) + exact) < 1e-8
    assert abs(ising.minus_log_z_of_bethe_lattice(cold, 0.0) + 4.0) < 1e-5
    assert QUICK.lattice < Settings().lattice
