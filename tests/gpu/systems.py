"""Checks of an optimizer among PyTorch's systems on a device: Adam itself, checkpoints, scaler, compiler, graphs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import fekernels as fe
from tests.gpu.checks import Check, Comparison, NotPossible, Numbers, Target
from tests.gpu.steps import HOT

SHAPES = ((1000,), (33, 65), (7,), (20_000,))


def make_params(device: torch.device, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]


def make_grads(device: torch.device, step: int) -> list[Tensor]:
    """New tensors at every call, with the values of that step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]


def set_grads(params: list[torch.nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def compare_optimizers(
    comparison: Comparison, ours: torch.optim.Optimizer, others: torch.optim.Optimizer
) -> None:
    pairs = zip(ours.param_groups[0]["params"], others.param_groups[0]["params"], strict=True)
    for i, (a, b) in enumerate(pairs):
        comparison.add(f"parameter {i}", a, b)
        for key, value in others.state[b].items():
            comparison.add(f"{key} of parameter {i}", ours.state[a][key], value)


def ulps_of_adam(got: Tensor, want: Tensor, lr: float) -> float:
    """The largest difference in ulps of max(|theta|, lr)."""
    scale = want.detach().abs().clamp(min=lr).cpu()
    ulp = (torch.nextafter(scale, torch.full_like(scale, torch.inf)) - scale).double()
    return float(((got.detach().cpu().double() - want.detach().cpu().double()).abs() / ulp).max())


ADAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "AdamW": {"weight_decay": 0.1},
}


def check_adam(target: Target) -> Numbers:
    """At T = 0 each of 30 steps, from the same tensors, is within 4 ulp of ``torch.optim.Adam(fused=True)``."""
    lr, numbers = 1e-2, {}
    for name, options in ADAMS.items():
        theirs, ours = make_params(target.device), make_params(target.device)
        decoupled = name == "AdamW"
        adam_class = torch.optim.AdamW if decoupled else torch.optim.Adam
        adam = adam_class(theirs, lr=lr, fused=True, **options)
        langevin = fe.LangevinAdam(
            ours, lr=lr, backend=target.backend, decoupled_weight_decay=decoupled, **options
        )
        worst = 0.0
        for step in range(30):
            set_grads(theirs, make_grads(target.device, step))
            set_grads(ours, make_grads(target.device, step))
            adam.step()
            langevin.step()
            with torch.no_grad():
                for a, b in zip(ours, theirs, strict=True):
                    worst = max(worst, ulps_of_adam(a, b, lr))
                    a.copy_(b)
                    for key, value in adam.state[b].items():
                        langevin.state[a][key].copy_(value)
        numbers[name] = worst
    assert max(numbers.values()) <= 4, f"more than 4 ulp from Adam(fused=True): {numbers}"
    return {"max_ulp_of_max(theta, lr)": numbers}


def check_checkpoint(target: Target) -> Numbers:
    """Three steps on the device and three more on the CPU from its checkpoint are six steps on the CPU."""
    cpu = torch.device("cpu")

    def run(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            set_grads(params, make_grads(params[0].device, step))
            optimizer.step()

    options = {**HOT, "seed": 3}
    first = make_params(target.device)
    optimizer = fe.LangevinAdam(first, **options, backend=target.backend)
    run(first, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    moved = [torch.nn.Parameter(p.detach().cpu()) for p in first]
    continued = fe.LangevinAdam(moved, **options, backend=target.truth)
    continued.load_state_dict(saved)
    continued.param_groups[0]["backend"] = target.truth
    run(moved, continued, range(3, 6))

    straight = make_params(cpu)
    whole = fe.LangevinAdam(straight, **options, backend=target.truth)
    run(straight, whole, range(6))
    comparison = Comparison(target.exact)
    compare_optimizers(comparison, continued, whole)
    return comparison.result()


def check_scaler(target: Target) -> Numbers:
    """Under GradScaler: the steps of unscaled training, bit for bit; at an overflow nothing changes, nor the noise."""
    scaler = torch.amp.GradScaler(target.device.type, init_scale=1024.0, growth_interval=2)
    scaled, plain = make_params(target.device), make_params(target.device)
    first = fe.LangevinAdam(scaled, **HOT, seed=4, backend=target.backend)
    second = fe.LangevinAdam(plain, **HOT, seed=4, backend=target.backend)
    overflows = 0
    for step in range(7):
        weights = make_grads(target.device, step)
        size = torch.inf if step in (0, 3) else 1.0
        first.zero_grad()
        scale_before = scaler.get_scale()
        loss = torch.stack(
            [(param * weight).sum() for param, weight in zip(scaled, weights, strict=True)]
        ).sum()
        scaler.scale(loss * size).backward()
        scaler.step(first)
        scaler.update()
        overflows += scaler.get_scale() < scale_before
        if step not in (0, 3):
            set_grads(plain, weights)
            second.step()
    assert overflows == 2, f"the scale was lowered {overflows} times, not twice"
    comparison = Comparison(exact=True)
    compare_optimizers(comparison, first, second)
    return comparison.result()


def check_compile(target: Target) -> Numbers:
    """``torch.compile(optimizer.step)`` runs and gives eager's bits."""
    torch._dynamo.reset()
    eager, compiled = make_params(target.device), make_params(target.device)
    first = fe.LangevinAdam(eager, **HOT, seed=5, backend=target.backend)
    second = fe.LangevinAdam(compiled, **HOT, seed=5, backend=target.backend)
    step = torch.compile(second.step)
    for i in range(3):
        set_grads(eager, make_grads(target.device, i))
        set_grads(compiled, make_grads(target.device, i))
        first.step()
        step()
    comparison = Comparison(exact=True)
    compare_optimizers(comparison, second, first)
    return comparison.result()


def check_no_sync(target: Target) -> Numbers:
    """Steps never wait for the device: also with new gradients, tensor hyperparameters, GradScaler's tensors."""
    device = target.device

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    optimizers: list[tuple[list[torch.nn.Parameter], Any]] = []
    for make, options in (
        (fe.LangevinAdam, HOT),
        (fe.LangevinAdam, {**HOT, "lr": scalar(1e-2), "temperature": scalar(0.5)}),
        (fe.SGLD, {"lr": 1e-3}),
    ):
        params = make_params(device)
        optimizer = make(params, **{"backend": target.backend, "seed": 1, **options})
        for step in range(2):
            set_grads(params, make_grads(device, step))
            optimizer.step()
        optimizers.append((params, optimizer))
    grads = [make_grads(device, step) for step in range(2, 8)]
    scale, found = scalar(2.0), scalar(0.0)
    # The kernel that divides by grad_scale is compiled before nothing may wait any more.
    for amp in (True, False):
        for _, optimizer in optimizers:
            if amp:
                optimizer.grad_scale, optimizer.found_inf = scale, found
            optimizer.step()
            if amp:
                del optimizer.grad_scale, optimizer.found_inf
    torch.cuda.synchronize()
    steps = 0
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for params, optimizer in optimizers:
            for i, new in enumerate(grads):
                set_grads(params, new)
                if i >= 3:
                    optimizer.grad_scale, optimizer.found_inf = scale, found
                optimizer.step()
                if i >= 3:
                    del optimizer.grad_scale, optimizer.found_inf
                steps += 1
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return {"steps": steps}


def kernels_of(run: Any) -> list[str]:
    """Names of the kernels that ``run`` launches; copies and fills by the driver not counted."""
    canary = torch.ones(1000, device="cuda")
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        canary.cos_()
        torch.cuda.synchronize()
        run()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profile.events()
        if event.device_type.name == "CUDA"
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset", "Optimizer.", "ProfilerStep"))
    ]
    if not any("cos" in name for name in names):
        raise NotPossible(f"the profiler does not see the device's kernels here (it saw {names})")
    return [name for name in names if "cos" not in name]


def check_launches(target: Target) -> Numbers:
    """One kernel a step and group, whatever its tensors and switches; one more for each further set of dtypes."""
    numbers = {}
    for name, options, dtypes, expected in (
        ("T = 0", {}, (torch.float32,), 1),
        ("T > 0", HOT, (torch.float32,), 1),
        (
            "every switch",
            {**HOT, "amsgrad": True, "weight_decay": 0.1, "prior_precision": 0.1},
            (torch.float32,),
            1,
        ),
        ("two dtypes", HOT, (torch.float32, torch.bfloat16), 2),
    ):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(
                torch.randn(100 * i + 1, generator=generator).to(target.device, dtypes[i % len(dtypes)])
            )
            for i in range(30)
        ]
        optimizer = fe.LangevinAdam(params, backend=target.backend, seed=1, **options)
        for _ in range(2):
            set_grads(params, [torch.randn_like(param) for param in params])
            optimizer.step()
        launched = kernels_of(optimizer.step)
        numbers[name] = len(launched)
        assert len(launched) == expected, (
            f"{name}: {len(launched)} kernels a step, not {expected}: {launched}"
        )
    return {"kernels": numbers}


def check_graph(target: Target) -> Numbers:
    """Replays of a captured step, gradients and temperature changing in place, are eager steps, bit for bit."""
    device = target.device
    comparison = Comparison(exact=True)

    def make(kind: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer, Tensor]:
        params = make_params(device)
        temperature = torch.tensor(0.5, device=device)
        if kind == "SGLD":
            return (
                params,
                fe.SGLD(params, lr=1e-3, temperature=temperature, seed=6, backend=target.backend),
                temperature,
            )
        options = {**HOT, "temperature": temperature, "seed": 6, "backend": target.backend}
        return params, fe.LangevinAdam(params, capturable=kind == "capturable", **options), temperature

    for kind in ("capturable", "default", "SGLD"):
        params, optimizer, temperature = make(kind)
        fixed = make_grads(device, 0)
        set_grads(params, fixed)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()

        eager_params, eager, eager_temperature = make(kind)
        set_grads(eager_params, make_grads(device, 0))
        for _ in range(2):
            eager.step()
        for step in range(1, 6):
            for grad, new in zip(fixed, make_grads(device, step), strict=True):
                grad.copy_(new)
            temperature.fill_(0.1 * step)
            eager_temperature.fill_(0.1 * step)
            graph.replay()
            set_grads(eager_params, make_grads(device, step))
            eager.step()
        torch.cuda.synchronize()
        compare_optimizers(comparison, optimizer, eager)
    return comparison.result()


def check_graph_with_training(target: Target) -> Numbers:
    """Forward, backward and step in one graph, whose gradients live in its own memory."""
    device = target.device

    def make() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        params = make_params(device)
        return params, fe.LangevinAdam(params, capturable=True, seed=7, backend=target.backend, **HOT)

    def train(
        params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, weights: list[Tensor]
    ) -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = [(param * param * weight).sum() for param, weight in zip(params, weights, strict=True)]
        torch.stack(losses).sum().backward()
        optimizer.step()

    params, optimizer = make()
    weights = make_grads(device, 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(params, optimizer, weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(params, optimizer, weights)
    eager_params, eager = make()
    eager_weights = make_grads(device, 0)
    for _ in range(3):
        train(eager_params, eager, eager_weights)
    for step in range(1, 5):
        for weight, new in zip(weights, make_grads(device, step), strict=True):
            weight.copy_(new)
        graph.replay()
        train(eager_params, eager, make_grads(device, step))
    torch.cuda.synchronize()
    comparison = Comparison(exact=True)
    compare_optimizers(comparison, optimizer, eager)
    return comparison.result()


def system_checks() -> list[Check]:
    """In an order that leaves the device usable for as long as possible, should one of them fail."""
    return [
        Check("Adam: 4 ulp of torch.optim.Adam(fused=True)", check_adam),
        Check("checkpoint from the device to the CPU", check_checkpoint),
        Check("GradScaler", check_scaler),
        Check("no host synchronisation", check_no_sync, needs_gpu=True),
        Check("one launch a group", check_launches, needs_gpu=True),
        Check("torch.compile(step)", check_compile, slow=True),
        Check("CUDA graph: replay equals eager", check_graph, needs_gpu=True),
        Check("CUDA graph of a training step", check_graph_with_training, needs_gpu=True),
    ]
