"""The free energy's part of `python -m fekernels bench`: every case, and the same work on both sides."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from fekernels import _extension, bench
from fekernels.bench import free_energy, layouts, memory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`, which is not installed

from benchmarks import bench_free_energy, peers  # noqa: E402

TINY_ENERGIES = free_energy.Sizes(
    large=(64, 96, 4),
    middle=(16, 33, 3),
    small=(4, 33, 3),
    counts=(8, 50, 3),
    images=((4, 3, 5, 6),),
    sweep_elements=4096,
    sweep_widths=(256, 512),
    rounds=2,
    seconds=0.0,
    turn_seconds=1e-4,
)
EAGER, COMPILED = "eager PyTorch", "torch.compile"


@pytest.fixture
def compiled() -> None:
    if (reason := _extension.unavailable_reason()) is not None:
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile runs the function as it is: what the compiler makes of it is its own affair, and takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("uncompiled")
def test_every_case_of_the_free_energy_is_measured() -> None:
    rows = bench.measure(TINY_ENERGIES)
    copy = "copy"
    expected = []
    for likelihood in ("mse", "bernoulli"):
        case = f"{likelihood} 64 x 96"
        expected += [
            (case, EAGER, 0.15),
            (f"{case}, inplace_backward", EAGER, 0.09),
            (case, COMPILED, 0.25),
            (f"{case}, inplace_backward", COMPILED, 0.15),
        ]
        if likelihood == "mse":
            expected.append((f"{case}, inplace_backward", copy, 1.3))
    expected += [
        ("mse 16 x 33", EAGER, 0.25),
        ("mse 16 x 33", COMPILED, 0.6),
        ("bernoulli 16 x 33", EAGER, 0.25),
        ("bernoulli 16 x 33", COMPILED, 0.6),
        ("mse 4 x 33", EAGER, 0.7),
        ("mse 4 x 33", COMPILED, 0.7),
        ("bernoulli 4 x 33", EAGER, 0.4),
        ("bernoulli 4 x 33", COMPILED, 0.7),
        ("gaussian, learned variance, 16 x 33", EAGER, 0.12),
        ("gaussian, learned variance, 16 x 33", COMPILED, 0.6),
        ("negative_binomial 8 x 50", EAGER, 0.08),
        ("negative_binomial 8 x 50", COMPILED, 0.25),
        ("bernoulli 4 x 3 x 5 x 6, channels_last", "contiguous", 1.15),
        ("gaussian 4 x 3 x 5 x 6, one a channel", "one value", 1.3),
        ("negative_binomial 8 x 50, one a gene", "one value", 1.3),
    ]
    assert [(row["case"], row["peer"], row["reach"]) for row in rows] == expected
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["peer_ms"])
        assert ("of_copy" in row) == ("64 x 96" in row["case"])
        # The copy reads and writes three times the data's bytes in all, which is what "mse" in place has to move.
        if row["peer"] == copy:
            assert row["bytes_per_element"] == 12
            assert row["ratio"] == pytest.approx(1 / row["of_copy"])
    assert rows[0]["rounds"] == 2


def test_contestants_of_the_layouts_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[list[torch.Tensor]] = []

    def keep(given: free_energy.Problem) -> None:
        gradients.append([leaf.grad for leaf in given.leaves])  # type: ignore[misc]
        for leaf in given.leaves:
            leaf.grad = None

    monkeypatch.setattr(free_energy.Problem, "clear", keep)
    for make in layouts.groups(TINY_ENERGIES):
        gradients.clear()
        for contestant in make().contestants:
            contestant.run()
        peer, ours = gradients
        for got, want in zip(ours, peer, strict=True):
            torch.testing.assert_close(got.sum_to_size(want.shape), want)
        assert ours[0].stride() != peer[0].stride() or ours[1].numel() > peer[1].numel() == 1


@pytest.mark.usefixtures("uncompiled")
def test_contestants_of_the_free_energy_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All contestants of a group leave the same gradients, the gradient in place on a prediction of its own."""
    gradients: dict[int, list[torch.Tensor]] = {}

    def keep(given: free_energy.Problem) -> None:
        gradients[len(gradients)] = [leaf.grad for leaf in given.leaves]  # type: ignore[misc]
        for leaf in given.leaves:
            leaf.grad = None

    monkeypatch.setattr(free_energy.Problem, "clear", keep)
    for make in free_energy.groups(TINY_ENERGIES):
        group = make()
        gradients.clear()
        names = [c.name for c in group.contestants if c.name != "copy"]
        for contestant in group.contestants:
            if contestant.prepare is not None:
                contestant.run()  # leaves the gradient where the prediction was
                gradients.popitem()
                contestant.prepare()
            contestant.run()
        assert len(gradients) == len(names) >= 3
        for name, found in zip(names, gradients.values(), strict=True):
            for got, want in zip(found, gradients[0], strict=True):
                # The peers are float32: of a negative binomial's lgamma(x + th) - lgamma(th) four digits are sure.
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("likelihood", sorted(peers.ENERGIES))
def test_peers_are_the_same_functions(likelihood: str) -> None:
    """The formulas that users write have the gradients of ours, and our value where they keep the constants."""
    given = free_energy.problem(likelihood, (6, 40, 3))
    params = given.params if len(given.params) > 1 else given.params[0]
    ours = bench.free_energy.free_energy(
        params, given.target, given.mean, given.logvar, likelihood=likelihood
    ).free_energy
    peer = peers.ENERGIES[likelihood](*given.params, given.target, given.mean, given.logvar)
    if likelihood in ("mse", "bernoulli", "categorical", "negative_binomial", "student_t"):
        # The peer adds up in float32.
        torch.testing.assert_close(ours, peer, rtol=2e-6, atol=0)
    wanted = torch.autograd.grad(peer, given.leaves)
    for got, want in zip(torch.autograd.grad(ours, given.leaves), wanted, strict=True):
        # torch's continuous Bernoulli is off by 2e-5 near a logit of 0.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)


def test_a_compiler_that_is_missing_is_a_missing_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **_: object) -> object:
        def fail(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    rows = bench.measure(TINY_ENERGIES)
    missing = [row for row in rows if "missing" in row]
    assert {row["peer"] for row in missing} == {COMPILED} and len(missing) == 10
    assert missing[0]["missing"] == "torch.compile: no C++ compiler"
    assert "not measured: torch.compile: no C++ compiler" in bench.table(rows)


def test_no_width_is_left_out() -> None:
    rows = free_energy.sweep(TINY_ENERGIES)
    shapes = [(row["likelihood"], row["batch"], row["width"]) for row in rows]
    assert shapes == [(name, 4096 // w, w) for name in ("mse", "bernoulli") for w in (256, 512)]
    for likelihood in ("mse", "bernoulli"):
        ratios = [row["of_best_width"] for row in rows if row["likelihood"] == likelihood]
        assert min(ratios) == 1.0
    assert "16 x 256" in free_energy.sweep_table(rows)


@pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason="no clear_refs")
@pytest.mark.usefixtures("compiled")
def test_peak_memory_is_that_of_the_gradients() -> None:
    """Of 16 MiB of data, so that the noise of the process does not count."""
    shape = (1024, 4096, 16)
    data = 4 * shape[0] * shape[1]
    grown = {
        contestant: memory._in_process("bernoulli", contestant, shape, 1) / data
        for contestant in (EAGER, free_energy.OURS, free_energy.INPLACE)
    }
    assert grown[EAGER] > 1.5
    assert 0.9 < grown[free_energy.OURS] < 1.2
    assert grown[free_energy.INPLACE] < 0.2


def test_a_process_that_cannot_measure_is_told() -> None:
    with pytest.raises(RuntimeError, match="pears"):
        memory._in_process("pears", EAGER, (2, 2, 2), 1)


@pytest.mark.usefixtures("compiled", "uncompiled")
def test_command_measures_the_free_energy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    peak = {
        "case": "mse 64 x 96",
        "contestant": "free_energy",
        "growth_mb": 1.0,
        "of_data": 1.0,
        "reach": 1.02,
    }
    monkeypatch.setattr(memory, "measure", lambda *_: [peak | {"met": True}])
    monkeypatch.setattr(bench, "FREE_ENERGY_QUICK", TINY_ENERGIES)
    path, figure = tmp_path / "bench.json", tmp_path / "new" / "widths.png"
    assert bench.main(["--quick", "--only", "free_energy", "--json", str(path), "--plot", str(figure)]) == 0
    report = json.loads(path.read_text())
    assert len(report["free_energy"]) == 24 and "rows" not in report and "once" not in report
    assert report["free_energy_memory"] == [peak | {"met": True}]
    assert len(report["free_energy_widths"]) == 4
    printed = capsys.readouterr().out
    assert "gaussian, learned variance, 16 x 33" in printed and "peak of forward + backward" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
    bench_free_energy.markdown(path)
    assert capsys.readouterr().out.count("\n| ") == 24
    again = tmp_path / "again.png"
    bench_free_energy.plot(path, again)
    assert again.read_bytes().startswith(b"\x89PNG")
