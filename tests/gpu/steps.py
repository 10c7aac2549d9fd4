"""Steps of the optimizers on a device against the same steps on the CPU, bit for bit, in every variety."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fekernels as fe
from tests.gpu.checks import Check, Comparison, Numbers, Target
from tests.support.optimizer_rows import Row, call, row_of
from tests.support.optimizers import BF16, CASES, F16, F32, F64, VARIANTS, step_of
from tests.support.tensors import bits_equal, clone, lay_out, whole

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
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    schedule: tuple[tuple[float, float], ...] | None = None  # (lr, temperature) of each step
    scalars: torch.dtype | None = None  # lr and temperature are tensors of this dtype on the device
    scaled: bool = False  # as under GradScaler: grad_scale at every step, found_inf at the second
    grad_size: float = 1.0
    anchors: bool = False  # a list of anchors
    frozen: tuple[int, ...] = ()  # before which steps the preconditioner is frozen, then let go, and so on
    steps: int = 3


def arrange(values: Tensor, layout: str, device: torch.device) -> Tensor:
    """``values`` on ``device`` with the strides that ``layout`` names; "strided" is whatever the shape allows."""
    if layout == "expanded":  # as of a sum: one number everywhere
        return values.to(device).flatten()[:1].expand(values.shape) if values.numel() else values.to(device)
    if layout == "strided":
        layout = {2: "transposed", 4: "channels_last"}.get(values.dim(), "sliced")
    return clone(lay_out(values, layout), str(device))


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
        if step in case.frozen:
            optimizer.freeze_preconditioner(not group["frozen"])
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
    """What takes more than one step, or an optimizer: numbers that change, scaled gradients, groups of every size."""
    cases = [
        StepCase("T = 0"),
        StepCase("T > 0", HOT),
        StepCase(
            "everything, bfloat16, stochastic rounding",
            {**EVERYTHING, "stochastic_rounding": True},
            dtypes=(BF16,),
            anchors=True,
        ),
        StepCase("bfloat16 with float32 states", {**HOT, "state_dtype": F32}, dtypes=(BF16,)),
        StepCase("prior around the start", {**HOT, "prior_precision": 0.3, "anchor": "init"}),
        StepCase(
            "prior that bounds the denominator", {"temperature": 0.0, "prior_precision": 50.0}, grad_size=1e-3
        ),
        StepCase("lr and temperature that change", HOT, schedule=CHANGING),
        StepCase("tensor lr and temperature, float32", HOT, scalars=F32, schedule=CHANGING),
        StepCase("tensor lr and temperature, float64", {**HOT, "noise": "isotropic"}, scalars=F64),
        StepCase("grad_scale and found_inf", HOT, scaled=True),
        StepCase("mixed dtypes in a group", HOT, dtypes=(F32, BF16, F64, F16), schedule=CHANGING[:4]),
        StepCase("frozen, and let go", HOT, dtypes=(F32, BF16, F64, F16), steps=6, frozen=(2, 4)),
        StepCase(
            "frozen with its maximum",
            {**EVERYTHING, "stochastic_rounding": True},
            dtypes=(F32, BF16),
            frozen=(2,),
        ),
        StepCase("gradients alone unaligned", HOT, grad_layout="misaligned"),
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
    return cases + [
        sgld("SGLD, T = 0", {"temperature": 0.0}),
        sgld(
            "SGLD, everything",
            {**hot, "weight_decay": 0.1, "prior_precision": 0.3, "maximize": True},
            anchors=True,
        ),
        sgld("SGLD, tensor lr and temperature", hot, scalars=F32, schedule=CHANGING),
        sgld("SGLD, grad_scale and found_inf", hot, scaled=True),
        sgld("SGLD, mixed dtypes", hot, dtypes=(F32, BF16, F64, F16)),
    ]


SLOW = {"five million elements", "a thousand tensors", "a thousand steps"}


def check_table(op: str, variants: Sequence[Any], target: Target) -> Numbers:
    """Rows of the table of options, each with all shapes and layouts in one call."""
    comparison = Comparison(target.exact)
    for variant in variants:
        steps = [step_of(op, case, variant) for case in CASES]
        rows = [row_of(step) for step in steps]
        there = [row.clone(str(target.device)) for row in rows]
        call(op, rows, steps[0].options, target.truth)
        call(op, there, steps[0].options, target.backend)
        for step, row, other in zip(steps, rows, there, strict=True):
            for name in Row.WRITTEN:
                comparison.add(f"{name} of {step}", getattr(other, name), getattr(row, name))
                around, memory = clone(getattr(row, name)), clone(getattr(other, name), "cpu")
                for each in (around, memory):
                    each.zero_()
                assert bits_equal(whole(memory), whole(around)), f"written beside {name} of {step}"
    return comparison.result()


def step_checks() -> list[Check]:
    """The table, a check for each placement of the noise, and the cases."""
    checks = []
    for op, variants in VARIANTS.items():
        for noise in dict.fromkeys(variant.noise for variant in variants):
            chosen = [variant for variant in variants if variant.noise == noise]
            checks.append(Check(f"steps: {op}, {noise}", partial(check_table, op, chosen)))
    return checks + [
        Check(f"steps: {case.name}", partial(check_steps, case), slow=case.name in SLOW)
        for case in step_cases()
    ]
