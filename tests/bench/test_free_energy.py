"""The free energy's part of `python -m fekernels bench`: the same work on both sides, widths, and peak memory."""

from __future__ import annotations

import os

import pytest
import torch

from fekernels import bench
from fekernels._runtime import extension
from fekernels.bench import free_energy, memory, peers, widths
from fekernels.bench.free_energy import COMPILED, EAGER, INPLACE, OURS, REFERENCE
from fekernels.bench.registry import FAMILIES, find
from tests.support.peak_memory import forked_growth

CASES = FAMILIES["free_energy"].cases


@pytest.fixture
def compiled() -> None:
    if (reason := extension.unavailable_reason()) is not None:
        pytest.skip(f"no compiled kernels: {reason}")


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """What every step leaves; torch.compile runs the function as it is, as its compiler takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    kept: list[list[torch.Tensor]] = []

    def keep(given: free_energy.Problem) -> None:
        kept.append([leaf.grad for leaf in given.leaves])  # type: ignore[misc]
        for leaf in given.leaves:
            leaf.grad = None

    monkeypatch.setattr(free_energy.Problem, "clear", keep)
    return kept


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contestants_of_a_case_compute_the_same(
    case: free_energy.Case, gradients: list[list[torch.Tensor]]
) -> None:
    """They leave the same gradients: in place too, and in another layout or with a scale that is not broadcast."""
    group = case.build(case.shape("tiny"))
    gradients.clear()
    for contestant in group.contestants:
        if contestant.prepare is not None:
            contestant.run()  # leaves the gradient where the prediction was
            gradients.pop()
            contestant.prepare()
        contestant.run()
    assert len(gradients) == len(group.contestants) >= 2 and not group.missing
    first, *others = gradients
    for contestant, found in zip(group.contestants[1:], others, strict=True):
        for got, want in zip(found, first, strict=True):
            # The peers are float32: of a negative binomial's lgamma(x + th) - lgamma(th) four digits are sure, and
            # torch's continuous Bernoulli is off by 2e-5 near a logit of 0.
            torch.testing.assert_close(
                got.sum_to_size(want.shape), want, rtol=1e-4, atol=5e-5, msg=contestant.name
            )


@pytest.mark.parametrize("name", ["channels_last_features", "scales_photos", "dispersions"])
def test_a_layout_differs_from_its_peer(name: str, gradients: list[list[torch.Tensor]]) -> None:
    case = find(f"free_energy/{name}")
    for contestant in case.build(case.shape("tiny")).contestants:
        contestant.run()
    peer, ours = gradients
    assert ours[0].stride() != peer[0].stride() or ours[1].numel() > peer[1].numel() == 1


@pytest.mark.parametrize("likelihood", sorted(peers.ENERGIES))
def test_peers_are_the_same_functions(likelihood: str) -> None:
    """The formulas that users write have our value where they keep the constants."""
    given = free_energy.problem(likelihood, (6, 40, 3))
    params = given.params if len(given.params) > 1 else given.params[0]
    ours = free_energy.free_energy(params, given.target, given.mean, given.logvar, likelihood=likelihood)
    peer = peers.ENERGIES[likelihood](*given.params, given.target, given.mean, given.logvar)
    if likelihood in ("mse", "bernoulli", "categorical", "negative_binomial", "student_t", "gamma"):
        # The peer adds up in float32.
        torch.testing.assert_close(ours.free_energy, peer, rtol=2e-6, atol=0)


def test_a_likelihood_that_nobody_wrote_stands_beside_the_reference(
    gradients: list[list[torch.Tensor]],
) -> None:
    group = free_energy._beside("laplace", (free_energy.Row(OURS, REFERENCE),), (6, 40, 3))
    assert [contestant.name for contestant in group.contestants] == [OURS, REFERENCE]
    for contestant in group.contestants:
        contestant.run()
    ours, reference = gradients
    for got, want in zip(ours, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_the_operands() -> None:
    """Read once, and gradients written once; a value a column is nothing."""
    given = {name: free_energy.cost(name).bytes for name in ("mse", "gaussian", "negative_binomial")}
    assert given == {"mse": 12, "gaussian": 20, "negative_binomial": 12}
    assert free_energy.cost("zero_inflated_negative_binomial").bytes == 20
    assert free_energy.cost("categorical").bytes == 8 * free_energy.CLASSES + 8  # classes are int64


def test_a_compiler_that_is_missing_is_a_missing_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **_: object) -> object:
        def fail(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    rows = bench.measure([find("free_energy/large_mse"), find("free_energy/laplace")], "tiny")
    assert all(("missing" in row) == (row["peer"] == COMPILED) for row in rows)
    assert [row["missing"] for row in rows if "missing" in row] == ["torch.compile: no C++ compiler"] * 2
    assert "not measured: torch.compile: no C++ compiler" in bench.table(rows)


def test_no_width_is_left_out() -> None:
    rows = widths.measure("tiny")
    shapes = [(row["likelihood"], row["batch"], row["width"]) for row in rows]
    assert shapes == [(name, 4096 // w, w) for name in ("mse", "bernoulli") for w in (256, 512)]
    for likelihood in ("mse", "bernoulli"):
        ratios = [row["of_best_width"] for row in rows if row["likelihood"] == likelihood]
        assert min(ratios) == 1.0
    assert "16 x 256" in widths.table(rows)


@pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason="no clear_refs")
@pytest.mark.usefixtures("compiled")
def test_peak_memory_is_that_of_the_gradients() -> None:
    """Of 16 MiB of data, so that the noise of the process does not count."""
    shape = (1024, 4096, 16)
    data = 4 * shape[0] * shape[1]
    grown = memory.in_process(f"free_energy/bernoulli/{OURS}", shape, 1)
    assert 0.9 < grown / data < 1.2
    # The others without importing torch once more.
    assert forked_growth(f"free_energy/bernoulli/{EAGER}", shape) > 1.5 * data
    assert forked_growth(f"free_energy/bernoulli/{INPLACE}", shape) < 0.2 * data


def test_the_aims_of_memory_are_the_gradients_that_are_returned() -> None:
    shape = (1000, 100, 10)
    aims = {
        name.split("/")[2]: each.aim(shape)
        for name, each in memory.PASSES.items()
        if name.startswith("free_energy/mse/") and each.aim is not None
    }
    data, latents = 4 * 1000 * 100, 2 * 4 * 1000 * 10
    assert aims == {OURS: pytest.approx(1.02 * data + latents), INPLACE: pytest.approx(0.02 * data + latents)}


def test_a_process_that_cannot_measure_is_told() -> None:
    with pytest.raises(RuntimeError, match="pears"):
        memory.in_process("free_energy/pears/ours", (2, 2, 2), 1)
