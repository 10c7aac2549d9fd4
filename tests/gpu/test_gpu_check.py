"""What only a GPU can show: `tests/gpu/checks.py` as tests, for each backend that a GPU can have.

Without a GPU, that the checks run at all and can fail.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import free_energy_times, stein_times, step_times, worker
from fekernels._runtime import backends, extension
from tests.gpu import checks, free_energy, stein, steps, systems
from tests.gpu.checks import Check, Comparison, NotPossible, Target
from tests.support.free_energy import CATEGORICAL, Call, Case
from tests.support.free_energy_kernels import Kernels
from tests.support.optimizers import VARIANTS
from tests.support.stein import Size

CHECKS = checks.all_checks()
HERE = Target("reference", torch.device("cpu"), "reference")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_on_gpu(check: Check, backend: str) -> None:
    for name, device in ((backend, "cuda"), ("cpp", "cpu")):
        if (obstacle := backends._obstacle(name, device)) is not None:
            pytest.skip(f"{name}: {obstacle}")
    try:
        check.run(Target(backend, torch.device("cuda")))
    except NotPossible as reason:
        pytest.skip(str(reason))


def test_names_are_different() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names) > 60


def test_layouts_keep_the_values() -> None:
    cpu = torch.device("cpu")
    for shape in ((5,), (3, 4), (2, 3, 4, 5), (3, 0)):
        values = torch.randn(shape)
        assert torch.equal(steps.arrange(values, "contiguous", cpu), values)
        for layout in ("strided", "misaligned"):
            assert torch.equal(steps.arrange(values, layout, cpu), values)
    assert steps.arrange(torch.randn(5), "misaligned", cpu).data_ptr() % 16 == 4
    for shape in ((5,), (3, 4), (2, 3, 4, 5)):
        assert not steps.arrange(torch.randn(shape), "strided", cpu).is_contiguous()
        assert set(steps.arrange(torch.randn(shape), "expanded", cpu).stride()) == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.0])
def test_one_ulp_is_found(dtype: torch.dtype, value: float) -> None:
    want = torch.full((7,), value, dtype=dtype)
    got = want.clone()
    got[3] = torch.nextafter(got[3], torch.tensor(2.0, dtype=dtype))
    comparison = Comparison(exact=True)
    comparison.add("same", want, want.clone())
    assert comparison.result() == {"tensors": 1, "unequal": 0, "max_ulp": 0}
    comparison.add("other", got, want)
    assert comparison.max_ulp == 1
    with pytest.raises(AssertionError, match=r"other: 1 of 7 differ, at most 1 ulp; element 3 is"):
        comparison.result()


def test_only_a_difference_of_rounding_passes_for_the_reference() -> None:
    want = torch.randn(10_000)
    for change, passes in ((1e-7, True), (1e-2, False), (float("nan"), False)):
        comparison = Comparison(exact=False)
        comparison.add("values", want + change, want)
        assert (not comparison.differences) == passes


def test_steps_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = steps.StepCase("T > 0", steps.HOT, shapes=((5,), (3, 4), (0,)))
    assert steps.check_steps(case, HERE)["unequal"] == 0
    run_steps = steps.run_steps

    def wrong(*arguments: object) -> list[tuple[str, torch.Tensor]]:
        results = run_steps(*arguments)  # type: ignore[arg-type]
        results[0][1][0] += 0.01 * len(calls)
        calls.append(1)
        return results

    calls: list[int] = []
    monkeypatch.setattr(steps, "run_steps", wrong)
    with pytest.raises(AssertionError, match="parameter 0"):
        steps.check_steps(case, HERE)


@pytest.mark.parametrize(
    "check",
    [
        systems.check_checkpoint,
        systems.check_scaler,
        partial(steps.check_table, "sgld_", VARIANTS["sgld_"][:2]),
        free_energy.check_autograd,
        free_energy.check_reparameterize,
        partial(free_energy.check_kernel, CATEGORICAL),
    ],
)
def test_checks_run_on_a_cpu(check) -> None:  # type: ignore[no-untyped-def]
    assert check(HERE)["unequal"] == 0


def test_free_energies_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_energy, "cases", lambda likelihood: [Case(likelihood, (5, 130, 7))])
    monkeypatch.setattr(free_energy, "LARGE", ())
    assert free_energy.check_kernel(0, HERE)["unequal"] == 0
    run = Call.run
    calls: list[int] = []

    def wrong(call: Call, kernels: Kernels) -> list[torch.Tensor]:
        results = run(call, kernels)
        calls.append(1)
        if len(calls) % 2 == 0:
            results[-1].view(-1)[-1] += 0.01
        return results

    monkeypatch.setattr(Call, "run", wrong)
    with pytest.raises(AssertionError, match="result 5"):
        free_energy.check_kernel(0, HERE)


def test_times_of_the_free_energy_and_their_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # not of interest here
    rows = free_energy_times.measure(["reference"], torch.device("cpu"), (8, 16, 2), rounds=1)
    ours = [row for row in rows if row.get("contestant", "").startswith("reference: ")]
    assert [row["contestant"] for row in ours] == ["reference: free_energy", "reference: inplace"] * 2
    assert all(row["of_copy"] > 0 and row["of_peer"] > 0 for row in ours)
    verdicts = free_energy_times.verdicts(rows)
    shares = [v for v in verdicts if v["goal"].endswith("copy's bandwidth")]
    assert len(shares) == 4 and all(v["met"] == (v["worst"] >= 0.9) for v in shares)
    over = [v for v in verdicts if v["goal"].endswith("torch.compile")]
    assert len(over) == 4 and all(v["met"] == (v["worst"] <= 1 / 1.4) for v in over)
    assert step_times.table(rows).count("reference: ") == 4


@pytest.mark.parametrize(
    "check",
    [
        stein.check_batches,
        partial(stein.check_backward, "imq"),
        stein.check_discrepancy,
    ],
)
def test_checks_of_stein_kernels_run_on_a_cpu(check) -> None:  # type: ignore[no-untyped-def]
    found = check(HERE)
    assert found.get("problems", 0) > 10 or found["results"] >= 42 and found["of_tolerance"] < 1


def test_stein_directions_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stein, "SHAPES", [Size(2, 30, 3), Size(0, 4, 3)])
    monkeypatch.setattr(stein, "DIRECTION_ROWS", stein.DIRECTION_ROWS[:3])
    monkeypatch.setattr(stein, "DTYPE_SIZES", stein.DTYPE_SIZES[:1])
    stein.check_direction("rbf", HERE)
    implementation = stein.implementation

    def wrong(name: str, target: Target) -> object:
        run = implementation(name, target)
        return lambda *arguments: run(*arguments) * (1 + 1e-4)

    monkeypatch.setattr(stein, "implementation", wrong)
    with pytest.raises(AssertionError, match="2x30x3, fp32: off by"):
        stein.check_direction("rbf", HERE)


def test_ranks_that_are_not_those_of_the_distances_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = stein.implementation("sq_dist_rank", HERE)
    assert stein.check_ranks(HERE)["results"] > 12
    monkeypatch.setattr(
        stein, "implementation", lambda name, target: lambda x, ranks, hint: run(x, [0] * len(ranks))
    )
    with pytest.raises(AssertionError, match="37x3-.*: off by"):
        stein.check_ranks(HERE)


def test_times_of_the_stein_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)  # its time is not of interest here
    monkeypatch.setitem(stein_times.GOALS, (64, 4, "fp32"), 0.0)
    monkeypatch.setitem(stein_times.GOALS, (64, 4, "tf32"), 1e6)
    rows = stein_times.measure(["reference", "cuda"], torch.device("cpu"), [(32, 4), (64, 4)], 1, 32)
    names = [row["contestant"] for row in rows]
    ours = [f"reference: {precision}" for precision in stein.PRECISIONS]
    assert names == [stein_times.EAGER, stein_times.COMPILED, *ours, *ours]
    assert all(row["ms"] > 0 for row in rows)
    assert [v["met"] for v in stein_times.verdicts(rows)] == [True, False]
    assert stein_times.table(rows).count("reference: ") == 6
    pytest.importorskip("matplotlib")
    stein_times.plot(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_how_parts_end() -> None:
    def fail(error: Exception) -> None:
        raise error

    endings = [
        worker.run_part("part", lambda error=error: fail(error))
        for error in (ValueError("x"), NotPossible("y"))
    ]  # type: ignore[misc]
    assert [(part["status"], part["detail"].split(" at ")[0]) for part in endings] == [
        ("FAILED", "ValueError: x"),
        ("not possible", "y"),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_tried_out_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEKERNELS_CACHE_DIR", str(extension.cache_directory()))  # no new build
    out = tmp_path / "report.json"
    assert gpu_check.main(["--device", "cpu", "--only", "SGLD, T = 0", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["failed"] == []
    names = [part["name"] for part in report["parts"]]
    assert names[:2] == ["environment", "build"]
    assert names[2:] == [f"{backend}: steps: SGLD, T = 0" for backend in report["backends"]["checked"]]
    assert report["parts"][0]["result"]["torch"] == torch.__version__


def test_a_worker_that_dies_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that end in the middle of their second part: the parts behind it are run by further ones."""
    script = (
        "import json, sys\n"
        "first = int(sys.argv[-1])\n"
        "for i in range(first, 4):\n"
        "    print('@@gpu_check', json.dumps({'begun': f'part {i}', 'index': i}), flush=True)\n"
        "    if i == 1: print('a last word', flush=True); sys.exit(7)\n"
        "    part = {'name': f'part {i}', 'status': 'passed', 'seconds': 0, 'detail': '', 'result': None}\n"
        "    print('@@gpu_check', json.dumps({'part': part}), flush=True)\n"
    )
    monkeypatch.setattr(gpu_check, "WORKER", ["-c", script])
    report = gpu_check.Report(None)
    gpu_check.work(report, [], 4)
    assert [(part["name"], part["status"]) for part in report.data["parts"]] == [
        ("part 0", "passed"),
        ("part 1", "FAILED"),
        ("part 2", "passed"),
        ("part 3", "passed"),
    ]
    assert report.data["parts"][1]["detail"] == "the process ended with code 7: a last word"


def test_a_worker_that_never_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "WORKER", ["-c", "raise SystemExit('broken')"])
    report = gpu_check.Report(None)
    gpu_check.work(report, ["check"], 4)
    assert [(part["name"], part["status"]) for part in report.data["parts"]] == [("check", "FAILED")]
    assert "broken" in report.data["parts"][0]["detail"]
