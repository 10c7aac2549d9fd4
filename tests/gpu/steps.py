"""Steps of the optimizers on a device against the same steps on the CPU, bit for bit, in every variety."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fekernels as fe
from tests.gpu.checks import Check, Comparison, Numbers, Target

SHAPES = (
    (1,),
    (3,),
    (4,),
    (5,),
    (8,),
    (63,),
    (3, 0),
    (1000,),
    (4096,),
    (4097,),
    (129, 67),
    (2, 3, 5, 7),
    (20_001,),
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

HOT: dict[str, Any] = {"temperature": 0.5, "eps": 1e-5}
EVERYTHING: dict[str, Any] = {
    "temperature": 0.5,
    "eps": 1e-5,
    "amsgrad": True,
    "maximize": True,
    "weight_decay": 0.1,
    "prior_precision": 0.3,
}
CHANGING = ((1e-2, 0.5), (1e-3, 0.5), (0.0, 0.5), (5e-3, 0.25), (5e-3, 0.0), (2e-2, 0.5), (1e-2, 0.5))


@dataclass(frozen=True)
class StepCase:
    """A few steps of one optimizer from given tensors, gradients and hyperparameters."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "LangevinAdam"
    dtypes: tuple[torch.dtype, ...] = (F32,)  # the parameters take them in turn
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    layout: str = "plain"
    grad_layout: str = "plain"
    schedule: tuple[tuple[float, float], ...] | None = None  # (lr, temperature) of each step
    scalars: torch.dtype | None = None  # lr and temperature are tensors of this dtype on the device
    scaled: bool = False  # as under GradScaler: grad_scale at every step, found_inf at the second
    grad_size: float = 1.0
    anchors: bool = False  # a list of anchors
    steps: int = 3


def arrange(values: Tensor, layout: str, device: torch.device) -> Tensor:
    """``values`` on ``device`` with the strides that ``layout`` names."""
    values = values.to(device)
    if layout == "misaligned":
        whole = torch.empty(values.numel() + 1, dtype=values.dtype, device=device)
        return whole[1:].view(values.shape).copy_(values)
    if layout == "strided" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "strided" and values.dim() == 2:
        return values.t().contiguous().t()
    if layout == "strided":  # every other element of something larger
        whole = torch.empty((*values.shape, 2), dtype=values.dtype, device=device)
        return whole[..., 0].copy_(values)
    if layout == "expanded":  # as of a sum: one number everywhere
        return values.flatten()[:1].expand(values.shape) if values.numel() else values
    return values


def run_steps(case: StepCase, backend: str, device: torch.device) -> list[tuple[str, Tensor]]:
    """Everything that the steps change, by name."""
    generator = torch.Generator().manual_seed(20)
    drawn = [
        (torch.randn(shape, generator=generator, dtype=F64), case.dtypes[i % len(case.dtypes)])
        for i, shape in enumerate(case.shapes)
    ]
    params = [torch.nn.Parameter(arrange(values.to(dtype), case.layout, device)) for values, dtype in drawn]
    options: dict[str, Any] = {"lr": 1e-2, "seed": 0x1234_5678_9ABC_DEF0, "backend": backend} | case.options
    if case.anchors:
        # Also of other dtypes than their parameters.
        options["anchor"] = [
            arrange(
                torch.randn(p.shape, generator=generator).to(p.dtype if i % 3 else F32), case.layout, device
            )
            for i, p in enumerate(params)
        ]
    optimizer = getattr(fe, case.optimizer)(params, **options)
    group = optimizer.param_groups[0]
    for step in range(case.steps if case.schedule is None else len(case.schedule)):
        if case.schedule is not None:
            group["lr"], group["temperature"] = case.schedule[step]
        if case.scalars is not None:
            for key in ("lr", "temperature"):
                group[key] = torch.tensor(float(group[key]), dtype=case.scalars, device=device)
        for i, param in enumerate(params):
            grad = case.grad_size * torch.randn(param.shape, generator=generator, dtype=F64)
            if case.scaled:
                grad = grad * 128
            # Every third parameter has no gradient at the first step, hence fewer steps than the others.
            param.grad = (
                None if step == 0 and i % 3 == 1 else arrange(grad.to(param.dtype), case.grad_layout, device)
            )
        if case.scaled:
            optimizer.grad_scale = torch.tensor(128.0 if step != 1 else 96.0, device=device)
            optimizer.found_inf = torch.tensor(float(step == 1), device=device)
        optimizer.step()
    results = [(f"parameter {i}", param.detach()) for i, param in enumerate(params)]
    for i, param in enumerate(params):
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "noise_unit"):
            if key in optimizer.state[param]:
                results.append((f"{key} of parameter {i}", optimizer.state[param][key]))
    return results


def check_steps(case: StepCase, target: Target) -> Numbers:
    """Parameters and states after the steps of ``case``, and the numbers of steps."""
    comparison = Comparison(target.exact)
    got = run_steps(case, target.backend, target.device)
    want = run_steps(case, target.truth, torch.device("cpu"))
    assert [name for name, _ in got] == [name for name, _ in want], "the states differ"
    for (name, tensor), (_, other) in zip(got, want, strict=True):
        comparison.add(name, tensor, other)
    return comparison.result()


def step_cases() -> list[StepCase]:
    """Every placement of the noise, dtype, switch and layout; each combination is a kernel to compile for Triton."""
    names = {F32: "float32", F64: "float64", BF16: "bfloat16", F16: "float16"}
    cases = [
        StepCase("T = 0"),
        *(StepCase(f"T > 0, {n}", {**HOT, "noise": n}) for n in ("momentum", "preconditioned", "isotropic")),
    ]
    for dtype, states in ((F64, None), (BF16, None), (F16, None), (BF16, F32), (F16, F32), (F32, BF16)):
        name = names[dtype] + (f" with {names[states]} states" if states else "")
        cases.append(StepCase(name, {**HOT, "state_dtype": states}, dtypes=(dtype,)))
        if BF16 in (dtype, states):
            rounding = {"state_dtype": states, "stochastic_rounding": True}
            cases.append(StepCase(f"{name}, stochastic rounding, T = 0", rounding, dtypes=(dtype,)))
            cases.append(
                StepCase(f"{name}, stochastic rounding, T > 0", {**HOT, **rounding}, dtypes=(dtype,))
            )
    cases += [
        StepCase("amsgrad", {**HOT, "amsgrad": True}),
        StepCase("maximize", {**HOT, "maximize": True}),
        StepCase("weight decay", {**HOT, "weight_decay": 0.1}),
        StepCase("decoupled weight decay", {**HOT, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        StepCase("no bias correction", {**HOT, "bias_correction": False}),
        StepCase("prior around 0", {**HOT, "prior_precision": 0.3}),
        StepCase("prior around the start", {**HOT, "prior_precision": 0.3, "anchor": "init"}),
        StepCase("prior around given anchors", {**HOT, "prior_precision": 0.3}, anchors=True),
        StepCase(
            "prior that bounds the denominator", {"temperature": 0.0, "prior_precision": 50.0}, grad_size=1e-3
        ),
        StepCase("betas 0 and 0.5", {**HOT, "betas": (0.0, 0.5), "noise": "preconditioned"}),
        *(
            StepCase(f"everything, {n}", {**EVERYTHING, "noise": n})
            for n in ("momentum", "preconditioned", "isotropic")
        ),
        StepCase("everything, T = 0", {**EVERYTHING, "temperature": 0.0}),
        StepCase(
            "everything, bfloat16, stochastic rounding",
            {**EVERYTHING, "stochastic_rounding": True},
            dtypes=(BF16,),
            anchors=True,
        ),
        StepCase("lr and temperature that change", HOT, schedule=CHANGING),
        StepCase("tensor lr and temperature, float32", HOT, scalars=F32, schedule=CHANGING),
        StepCase("tensor lr and temperature, float64", {**HOT, "noise": "isotropic"}, scalars=F64),
        StepCase("grad_scale and found_inf", HOT, scaled=True),
        StepCase("mixed dtypes in a group", HOT, dtypes=(F32, BF16, F64, F16), schedule=CHANGING[:4]),
        StepCase("parameters and gradients unaligned", HOT, layout="misaligned", grad_layout="misaligned"),
        StepCase("gradients alone unaligned", HOT, grad_layout="misaligned"),
        StepCase("strided parameters", HOT, layout="strided"),
        StepCase("strided gradients", HOT, grad_layout="strided"),
        StepCase("expanded gradients", HOT, grad_layout="expanded"),
        StepCase("strided, everything", EVERYTHING, layout="strided", grad_layout="strided", anchors=True),
        StepCase("gradients near the smallest numbers", HOT, grad_size=1e-21),
        StepCase("gradients of 0", HOT, grad_size=0.0),
        StepCase("no elements at all", HOT, shapes=((0,), (3, 0))),
        StepCase("five million elements", HOT, shapes=((5_000_003,),), steps=2),
        StepCase("a thousand tensors", HOT, shapes=tuple((n % 97 + 1,) for n in range(1000)), steps=2),
        StepCase("a thousand steps", HOT, shapes=((1000,),), steps=1000),
    ]
    sgld = partial(StepCase, optimizer="SGLD")
    hot = {"temperature": 0.5}
    cases += [
        sgld("SGLD, T = 0", {"temperature": 0.0}),
        *(sgld(f"SGLD, {names[dtype]}", hot, dtypes=(dtype,)) for dtype in (F32, F64, BF16, F16)),
        sgld(
            "SGLD, everything",
            {**hot, "weight_decay": 0.1, "prior_precision": 0.3, "maximize": True},
            anchors=True,
        ),
        sgld("SGLD, tensor lr and temperature", hot, scalars=F32, schedule=CHANGING),
        sgld("SGLD, grad_scale and found_inf", hot, scaled=True),
        sgld("SGLD, strided", hot, layout="strided", grad_layout="strided"),
        sgld("SGLD, mixed dtypes", hot, dtypes=(F32, BF16, F64, F16)),
    ]
    return cases


SLOW = {"five million elements", "a thousand tensors", "a thousand steps"}


def check_shards(target: Target) -> Numbers:
    """Rows and columns of a matrix, each stepped as a shard, get what the whole matrix gets."""
    generator = torch.Generator().manual_seed(21)
    shape = (150, 70)
    whole = {name: torch.randn(shape, generator=generator) for name in ("param", "grad", "exp_avg")}
    whole["exp_avg_sq"] = torch.rand(shape, generator=generator)

    def step(part: tuple[slice, slice], backend: str, device: torch.device) -> dict[str, Tensor]:
        tensors = {
            name: values[part].clone(memory_format=torch.contiguous_format).to(device)
            for name, values in whole.items()
        }
        rows, columns = (range(*s.indices(n)) for s, n in zip(part, shape, strict=True))
        run = len(columns) if len(columns) < shape[1] else len(rows) * shape[1]
        pitch = shape[1] if len(columns) < shape[1] else run
        torch.ops.fekernels.langevin_adam_(
            [tensors["param"]], [tensors["grad"]], [tensors["exp_avg"]], [tensors["exp_avg_sq"]], [],
            [torch.full((), 3.0, device=device)], [], [], [9],
            [rows.start * shape[1] + columns.start, run, pitch],
            1e-2, None, 0.5, None, 0.9, 0.99, 1e-5, 0.0, 0.0, "momentum", False, False, False, True, False, 77,
            None, None, backend,
        )  # fmt: skip
        return tensors

    everything = (slice(None), slice(None))
    want = step(everything, target.truth, torch.device("cpu"))
    comparison = Comparison(target.exact)
    parts = [
        everything,
        (slice(0, 75), slice(None)),
        (slice(75, 150), slice(None)),
        (slice(31, 44), slice(None)),
    ]
    parts += [(slice(None), slice(0, 32)), (slice(None), slice(32, 70)), (slice(None), slice(5, 6))]
    for part in parts:
        got = step(part, target.backend, target.device)
        for name in ("param", "exp_avg", "exp_avg_sq"):
            comparison.add(f"{name} of {part}", got[name], want[name][part])
    return comparison.result()


def step_checks() -> list[Check]:
    """The cases, and shards."""
    checks = [
        Check(f"steps: {case.name}", partial(check_steps, case), slow=case.name in SLOW)
        for case in step_cases()
    ]
    return [*checks, Check("steps: shards", check_shards)]
