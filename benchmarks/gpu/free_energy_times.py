"""Times of the free energy on a device, forward + backward: every backend beside a copy, eager and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fekernels as fe
from benchmarks.gpu.step_times import Times, copy_of
from benchmarks.harness import Contestant, device_interleave
from fekernels.bench import free_energy as cases
from fekernels.bench.case import Shape
from fekernels.bench.floors import COPY
from fekernels.bench.peers import ENERGIES

__all__ = ["measure", "verdicts"]

COPY_SHARE, OVER_COMPILED = 0.90, 1 / 1.4


def on_device(likelihood: str, shape: Shape, device: torch.device) -> cases.Problem:
    """The CPU benchmark's problem, its values made on the GPU."""
    given = cases.problem(likelihood, shape)
    params = tuple(p.detach().to(device).requires_grad_() for p in given.params)
    mean, logvar = (t.detach().to(device).requires_grad_() for t in (given.mean, given.logvar))
    return cases.Problem(likelihood, params, given.target.to(device), mean, logvar)


def with_backend(run: Callable[[], None], backend: str) -> Callable[[], None]:
    def chosen() -> None:
        with fe.use_backend(backend):
            run()

    return chosen


def measure(
    backends: Sequence[str],
    device: torch.device,
    shape: Shape,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Times:
    """One dict per contestant, as ``step_times.measure``; ``of_compiled`` is the ratio to torch.compile."""
    rows: Times = []
    elements = shape[0] * shape[1]
    for likelihood in ("mse", "bernoulli"):
        case = f"{likelihood} {shape[0]} x {shape[1]}"
        progress(case)
        given = on_device(likelihood, shape, device)
        torch.compiler.reset()
        run, missing = cases.compiled(given)
        floor = int(cases.cost(likelihood).bytes)
        contestants = [
            copy_of(floor * elements, device),
            Contestant(cases.EAGER, cases.step(given, ENERGIES[likelihood])),
        ]
        if run is None:
            rows.append({"case": case, "missing": missing})
        else:
            contestants.append(Contestant(cases.COMPILED, run))
        for backend in backends:
            overwritten, restore = cases.own_prediction(given)
            ours, inplace = cases.step(given), cases.step(overwritten, inplace=True)
            contestants += [
                Contestant(f"{backend}: free_energy", with_backend(ours, backend)),
                # Within a turn the gradient serves as the next prediction: no time depends on the values.
                Contestant(f"{backend}: inplace", with_backend(inplace, backend), prepare=restore),
            ]
        times = device_interleave(contestants, device, rounds=rounds)
        peer = times[cases.EAGER]
        for name, timing in times.items():
            seconds = timing.device_median
            row: dict[str, Any] = {
                "case": case,
                "contestant": name,
                **timing.milliseconds(),
                "bytes_per_element": floor,
                "gb_per_s": elements * floor / seconds / 1e9,
                "of_peer": seconds / peer.device_median,
                "called_of_peer": timing.called_median / peer.called_median,
                "of_copy": times[COPY].device_median / seconds,
            }
            if cases.COMPILED in times:
                row["of_compiled"] = seconds / times[cases.COMPILED].device_median
            rows.append(row)
    return rows


def verdicts(rows: Times) -> list[dict[str, Any]]:
    """The goals of each case and backend, as ``step_times.verdicts``."""
    results = []
    for row in rows:
        if "missing" in row or ": " not in row["contestant"]:
            continue
        for goal, key, reach, below in (
            ("free energy, share of the copy's bandwidth", "of_copy", COPY_SHARE, False),
            ("free energy over torch.compile", "of_compiled", OVER_COMPILED, True),
        ):
            if key in row:
                met = row[key] <= reach if below else row[key] >= reach
                backend = row["contestant"].split(":")[0]
                results.append(
                    {"case": row["case"], "backend": backend, "goal": goal, "reach": reach, "worst": row[key],
                     "contestant": row["contestant"], "met": met}
                )  # fmt: skip
    return results
