"""Times on a device: every backend beside ``torch.optim.Adam(fused=True)`` and a copy, in the same rounds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fekernels as fe
from benchmarks.harness import Contestant, device_interleave, random_values
from fekernels._catalogue.optimizers import NOISES
from fekernels.bench.case import short
from fekernels.bench.floors import COPY
from fekernels.bench.optimizers import parameters
from fekernels.bench.peers import ADAM, LR, PLAIN_SGLD, TEMPERATURE, plain_sgld

__all__ = ["Times", "measure", "table", "verdicts"]

SETS = 4  # of the many small tensors, so that together they exceed the cache

Times = list[dict[str, Any]]
VARIATIONAL, ESS = "VariationalAdam", 1e4


def copy_of(nbytes: int, device: torch.device) -> Contestant:
    """A copy that reads and writes ``nbytes`` in all."""
    source = random_values(1, nbytes // 8, 2, device, torch.float32)[0]
    target = torch.empty_like(source)
    return Contestant(COPY, partial(target.copy_, source))


def variant(optimizers: Sequence[Any], name: str, steps: int, **values: Any) -> Contestant:
    """A setting of optimizers that other contestants use with other settings."""
    groups = [optimizer.param_groups[0] for optimizer in optimizers]

    def prepare() -> None:
        for group in groups:
            group.update(values)

    def run() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return Contestant(name, optimizers[0].step if len(optimizers) == 1 else run, prepare, steps=steps)


def draw_and_step(optimizer: fe.VariationalAdam, name: str, backend: str) -> Contestant:
    """A training context, whose gradients are there already, and its step."""

    def prepare() -> None:
        optimizer.param_groups[0]["backend"] = backend

    def run() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return Contestant(name, run, prepare)


def make_params(
    count: int, numel: int, device: torch.device, dtype: torch.dtype, grads: Sequence[Tensor]
) -> list[Parameter]:
    return parameters(random_values(count, numel, 0, device, dtype), grads)


def one_tensor(
    numel: int, backends: Sequence[str], device: torch.device
) -> tuple[list[Contestant], dict[str, int]]:
    """Contestants over one large tensor, and the bytes per element that each cannot avoid to move."""
    grads = random_values(1, numel, 1, device, torch.float32)
    half_grads = [grad.bfloat16() for grad in grads]
    adam = torch.optim.Adam(make_params(1, numel, device, torch.float32, grads), lr=LR, fused=True)
    ours = fe.LangevinAdam(make_params(1, numel, device, torch.float32, grads), lr=LR, seed=1)
    half = fe.LangevinAdam(
        make_params(1, numel, device, torch.bfloat16, half_grads), lr=LR, seed=1, stochastic_rounding=True
    )
    half_adam = torch.optim.Adam(make_params(1, numel, device, torch.bfloat16, half_grads), lr=LR, fused=True)
    sgld = fe.SGLD(
        make_params(1, numel, device, torch.float32, grads), lr=LR, temperature=TEMPERATURE, seed=1
    )
    gaussian = fe.VariationalAdam(make_params(1, numel, device, torch.float32, grads), LR, ESS, seed=1)
    plain = plain_sgld(make_params(1, numel, device, torch.float32, grads))

    contestants = [
        copy_of(28 * numel, device),
        Contestant(ADAM, adam.step),
        Contestant(f"{ADAM}, bf16", half_adam.step),
        plain,
    ]
    floors = {COPY: 28, ADAM: 28, f"{ADAM}, bf16": 14, PLAIN_SGLD: 12}
    for backend in backends:
        add = partial(variant, steps=1, backend=backend, frozen=False)
        contestants.append(add([ours], f"{backend}: T = 0", temperature=0.0))
        floors[f"{backend}: T = 0"] = 28
        for noise in NOISES:
            contestants.append(
                add([ours], f"{backend}: T > 0, {noise}", temperature=TEMPERATURE, noise=noise)
            )
            floors[f"{backend}: T > 0, {noise}"] = 28
        still = f"{backend}: T > 0, frozen"
        contestants.append(add([ours], still, temperature=TEMPERATURE, noise="momentum", frozen=True))
        floors[still] = 24
        for name, temperature in (("T = 0", 0.0), ("T > 0", TEMPERATURE)):
            contestants.append(
                add([half], f"{backend}: bf16 rounded, {name}", temperature=temperature, noise="momentum")
            )
            floors[f"{backend}: bf16 rounded, {name}"] = 14
        contestants.append(variant([sgld], f"{backend}: SGLD", steps=1, backend=backend))
        floors[f"{backend}: SGLD"] = 12
        contestants.append(draw_and_step(gaussian, f"{backend}: {VARIATIONAL}", backend))
        floors[f"{backend}: {VARIATIONAL}"] = 52  # a draw's 16, the mean's way back, a step's 28
    return contestants, floors


def many_tensors(
    count: int, numel: int, backends: Sequence[str], device: torch.device
) -> tuple[list[Contestant], dict[str, int]]:
    """The same over ``count`` tensors, SETS times over."""
    grads = [random_values(count, numel, s, device, torch.float32) for s in range(SETS)]
    adams = [
        torch.optim.Adam(make_params(count, numel, device, torch.float32, g), lr=LR, fused=True)
        for g in grads
    ]
    ours = [
        fe.LangevinAdam(make_params(count, numel, device, torch.float32, g), lr=LR, seed=1) for g in grads
    ]
    contestants, floors = [variant(adams, ADAM, SETS)], {ADAM: 28}
    for backend in backends:
        for name, temperature in (("T = 0", 0.0), ("T > 0, momentum", TEMPERATURE)):
            contestants.append(
                variant(ours, f"{backend}: {name}", SETS, temperature=temperature, backend=backend)
            )
            floors[f"{backend}: {name}"] = 28
    return contestants, floors


def measure(
    backends: Sequence[str],
    device: torch.device,
    *,
    sizes: Sequence[int],
    many: tuple[int, int],
    rounds: int,
    free_bytes: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Times:
    """Time the cases; one dict per contestant, in milliseconds, with ratios to Adam and to the copy of its own size."""
    rows: Times = []
    for numel in sizes:
        case = f"{short(numel)} in one tensor"
        needed = numel * 144  # the tensors of one_tensor and the temporaries of its eager peer
        if free_bytes is not None and needed + (2 << 30) > free_bytes:
            rows.append(
                {"case": case, "missing": f"needs {needed / 1e9:.0f} GB of {free_bytes / 1e9:.0f} GB"}
            )
            continue
        progress(case)
        rows += _measure(case, numel, *one_tensor(numel, backends, device), device, rounds)
        _free(device)
    count, numel = many
    case = f"{count} tensors of {numel:,}"
    progress(case)
    rows += _measure(case, count * numel, *many_tensors(count, numel, backends, device), device, rounds)
    _free(device)
    return rows


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(
    case: str,
    elements: int,
    contestants: list[Contestant],
    floors: dict[str, int],
    device: torch.device,
    rounds: int,
) -> Times:
    times = device_interleave(contestants, device, rounds=rounds)
    rows: Times = []
    for name, timing in times.items():
        seconds = timing.device_median
        peer = times[f"{ADAM}, bf16" if "bf16" in name else PLAIN_SGLD if "SGLD" in name else ADAM]
        row: dict[str, Any] = {
            "case": case,
            "contestant": name,
            **timing.milliseconds(),
            "bytes_per_element": floors[name],
            "gb_per_s": elements * floors[name] / seconds / 1e9,
            "of_peer": seconds / peer.device_median,
            "called_of_peer": timing.called_median / peer.called_median,
        }
        if COPY in times:
            row["of_copy"] = row["gb_per_s"] / (elements * 28 / times[COPY].device_median / 1e9)
        cold = f"{name.split(':')[0]}: T = 0"
        if "T > 0" in name and "bf16" not in name and cold in times:
            row["of_cold"] = seconds / times[cold].device_median
        if name.endswith("frozen"):
            adapting = name.replace("frozen", "momentum")
            row["of_adapting"] = seconds / times[adapting].device_median
        rows.append(row)
    return rows


# (what of, of which contestants, key, the goal, whether to stay below it)
GOALS = (
    ("float32, share of the copy's bandwidth", lambda n: ": T" in n, "of_copy", 0.90, False),
    ("bfloat16, share of the copy's bandwidth", lambda n: "bf16 rounded" in n, "of_copy", 0.80, False),
    ("T > 0 over T = 0", lambda n: "T > 0" in n and "bf16" not in n, "of_cold", 1.03, True),
    ("frozen over not frozen", lambda n: "frozen" in n, "of_adapting", 0.92, True),
    (
        "over fused Adam (SGLD: over tensor operations), device",
        lambda n: ": " in n and VARIATIONAL not in n,
        "of_peer",
        1.00,
        True,
    ),
    (
        "over fused Adam (SGLD: over tensor operations), as called",
        lambda n: ": " in n and VARIATIONAL not in n,
        "called_of_peer",
        1.00,
        True,
    ),
    ("draw and step over fused Adam", lambda n: VARIATIONAL in n, "of_peer", 1.90, True),
)


def verdicts(rows: Times) -> list[dict[str, Any]]:
    """Each goal for each case and backend: the worst contestant, and whether it meets the goal."""
    results = []
    measured = [row for row in rows if "missing" not in row]
    keys = dict.fromkeys(
        (row["case"], row["contestant"].split(":")[0]) for row in measured if ": " in row["contestant"]
    )
    for case, backend in keys:
        for what, concerns, key, goal, below in GOALS:
            found = [
                row
                for row in measured
                if row["case"] == case
                and row["contestant"].startswith(f"{backend}:")
                and concerns(row["contestant"])
                and key in row
            ]
            if found:
                worst = (max if below else min)(found, key=lambda row: row[key])
                met = worst[key] <= goal if below else worst[key] >= goal
                results.append(
                    {"case": case, "backend": backend, "goal": what, "reach": goal, "worst": worst[key],
                     "contestant": worst["contestant"], "met": met}
                )  # fmt: skip
    return results


def table(rows: Times) -> str:
    """The times as text."""
    header = (
        f"{'case':28}{'contestant':36}{'device ms':>10}{'host ms':>9}{'called ms':>10}"
        f"{'of peer':>9}{'GB/s':>8}{'of copy':>8}{'of T = 0':>9}"
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        if "missing" in row:
            lines.append(f"{row['case']:28}not measured: {row['missing']}")
            continue
        optional = "".join(
            f"{row[key]:{width}.2f}" if key in row else f"{'-':>{width}}"
            for key, width in (("of_copy", 8), ("of_cold", 9))
        )
        lines.append(
            f"{row['case']:28}{row['contestant']:36}{row['device_ms']:10.4f}{row['host_ms']:9.4f}{row['called_ms']:10.4f}"
            f"{row['of_peer']:9.2f}{row['gb_per_s']:8.0f}{optional}"
        )
    return "\n".join(lines)
