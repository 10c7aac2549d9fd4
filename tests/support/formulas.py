"""The optimizers' steps transcribed line by line, in whatever precision, and how close to them a kernel must come."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import fekernels as fe
from tests.support.optimizer_rows import Row
from tests.support.optimizers import Options, noise_unit


def langevin_noise(row: Row, options: Options) -> Tensor:
    """xi as the contract names it: purpose 0, the stream, the step after its increment; of a shard its part."""
    return noise(row, options.seed, options.t, 0)


def noise(row: Row, seed: int, counter: int, purpose: int) -> Tensor:
    shape = row.param.shape
    offset, run, pitch = row.shard or (0, max(shape.numel(), 1), max(shape.numel(), 1))
    i = torch.arange(shape.numel())
    index = i // run * pitch + i % run
    count = int(index.max()) + 1 if len(index) else 0
    return _drawn(count, seed, row.stream, counter, offset, purpose)[index].view(shape)


@functools.lru_cache(64)
def _drawn(count: int, seed: int, stream: int, counter: int, offset: int, purpose: int) -> Tensor:
    """Of a step that is computed in two precisions, and of those that follow it in a table."""
    with fe.use_backend("reference"):
        return fe.random.normal(count, seed=seed, stream=stream, step=counter, offset=offset, purpose=purpose)


def langevin_adam_formula(
    row: Row, options: Options, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The step, transcribed line by line in ``dtype``; nothing is rounded to what the tensors are stored in."""
    o, t = options, options.t
    theta, g, m, v, largest, anchor = (
        getattr(row, name).detach().cpu().to(dtype)
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor")
    )
    xi = langevin_noise(row, o).to(dtype)
    temperature = o.temperature if o.lr > 0 else 0.0

    g = g / (o.grad_scale or 1.0)
    if o.maximize:
        g = -g
    if o.decoupled_weight_decay:
        theta = theta * (1 - o.lr * o.weight_decay)
    else:
        g = g + o.weight_decay * theta
    if not o.frozen:
        v = o.beta2 * v + (1 - o.beta2) * g * g
    g_hat = g + o.prior_precision * (theta - (anchor if o.anchor else 0.0))
    bc1, bc2 = (1 - o.beta1**t, 1 - o.beta2**t) if o.bias_correction else (1.0, 1.0)
    bc2 = 1.0 if o.frozen else bc2
    largest = torch.maximum(largest, v) if o.amsgrad and not o.frozen else largest
    second = largest if o.amsgrad else v
    bound = torch.full((), o.lr * o.prior_precision, dtype=dtype)
    D = torch.maximum((second / bc2).sqrt() + o.eps, bound)

    if o.noise == "momentum":
        if o.lr > 0 and o.noise_unit > 0:
            m = m * math.sqrt(o.noise_unit / noise_unit(o.lr, o.beta1))
        if temperature > 0:
            g_hat = (
                g_hat + noise_start(o.beta1, t, o.bias_correction) * (2 * temperature * D / o.lr).sqrt() * xi
            )
    m = o.beta1 * m + (1 - o.beta1) * g_hat
    theta = theta - o.lr * (m / bc1) / D
    if o.noise == "preconditioned":
        theta = theta + (2 * temperature * o.lr / D).sqrt() * xi
    if o.noise == "isotropic":
        theta = theta + math.sqrt(2 * temperature * o.lr) * xi
    return {"param": theta, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": largest}


@functools.cache
def noise_start(beta1: float, t: int, bias_correction: bool = True) -> float:
    """c_t of MATH: 1/c_t = sum_j beta1^(t j) (1 - beta1) / (1 - beta1^(j+1))."""
    if not bias_correction or beta1 == 0:
        return 1.0
    return 1 / math.fsum(beta1 ** (t * j) * (1 - beta1) / (1 - beta1 ** (j + 1)) for j in range(2000))


def sgld_formula(row: Row, options: Options, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """theta <- theta - h g_hat + sqrt(2 T h) xi, in ``dtype``."""
    o = options
    theta, g, anchor = (getattr(row, name).cpu().to(dtype) for name in ("param", "grad", "anchor"))
    xi = langevin_noise(row, o).to(dtype)
    g = g / (o.grad_scale or 1.0)
    g = (-g if o.maximize else g) + o.weight_decay * theta
    g_hat = g + o.prior_precision * (theta - (anchor if o.anchor else 0.0))
    return {"param": theta - o.lr * g_hat + math.sqrt(2 * o.temperature * o.lr) * xi}


def assert_close_to_formula(
    got: Tensor, exact: Tensor, eager: Tensor, what: str, stochastic: bool = False
) -> None:
    """Within a rounding to the stored dtype and four times the error that eager float32 makes of the same formula.

    A rounding is half a unit of the last place, or where bfloat16 is rounded to stochastically a whole one.

    Where ``eager`` is float64, 1e-10: no better reference is at hand, and the kernels end c_t's series there.
    """
    if not got.numel():
        return
    got, unit = got.detach().cpu(), torch.finfo(got.dtype).eps / 2
    unit *= 2 if stochastic and got.dtype == torch.bfloat16 else 1
    scale = exact.abs().max()
    computed = 1e-10 * scale
    if eager.dtype == torch.float32:
        computed = 4 * (eager.double() - exact).abs().max() + 2 * 2.0**-24 * scale
    smallest = torch.finfo(got.dtype).smallest_normal * 2 * unit  # half the distance of subnormals, or so
    bound = unit * exact.abs() + computed + smallest
    error = (got.double() - exact).abs()
    worst = int((error / bound).flatten().argmax())
    assert bool((error <= bound).all()), (
        f"{what}: element {worst} is {got.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, "
        f"error {error.flatten()[worst]:.3g} > {bound.flatten()[worst]:.3g}"
    )


def variational_draw_formula(
    row: Row, options: Options, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """theta = mean + xi s, in ``dtype``; the mean is what rounds to the parameter, or that itself."""
    o, param, mean = options, row.param.cpu(), row.exp_avg.cpu()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[param.element_size()]
    known = mean.to(param.dtype).view(bits) == param.view(bits)
    mean = (
        torch.where(known, mean.to(dtype), param.to(dtype)) if param.element_size() == 2 else param.to(dtype)
    )
    spread = row.exp_avg_sq.cpu().to(dtype)
    deviation = spread if o.deviations else (o.temperature / o.ess / (spread + o.prior_decay)).sqrt()
    xi = noise(row, o.seed, o.t, 2).to(dtype)
    return {"param": mean + deviation * xi if o.temperature > 0 else mean, "exp_avg": mean}


def variational_accumulate_formula(
    row: Row, options: Options, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The sums of g and g xi, in ``dtype``."""
    assert row.noise_unit is not None
    g, total, product = (getattr(row, name).cpu().to(dtype) for name in ("grad", "exp_avg", "exp_avg_sq"))
    xi = noise(row, options.seed, int(row.noise_unit), 2).to(dtype)
    if options.samples == 0:
        total, product = torch.zeros_like(total), torch.zeros_like(product)
    return {"exp_avg": total + g, "exp_avg_sq": product + g * xi}


def variational_adam_formula(
    row: Row, options: Options, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """MATH: IVON's rule at a temperature, line by line in ``dtype``."""
    o, delta, ess = options, options.prior_decay, options.ess
    rounded = row.param.element_size() == 2 and not o.samples
    names = ("max_exp_avg_sq" if rounded else "param", "grad", "exp_avg", "exp_avg_sq", "anchor")
    mean, g, gm, h, product = (getattr(row, name).cpu().to(dtype) for name in names)
    scale = (o.grad_scale or 1.0) * (o.samples or 1.0)
    g = g / scale
    gm = o.beta1 * gm + (1 - o.beta1) * g
    if o.temperature > 0:
        assert row.noise_unit is not None
        product = product / scale if o.samples else g * noise(row, o.seed, int(row.noise_unit), 2).to(dtype)
        s = (o.temperature / (ess * (h + delta))).sqrt()
        h_hat = product / s
        h = o.beta2 * h + (1 - o.beta2) * h_hat + 0.5 * (1 - o.beta2) ** 2 * (h - h_hat) ** 2 / (h + delta)
    move = (gm / (1 - o.beta1**o.t) + delta * mean) / (h + delta)
    mean = mean - o.lr * o.lr_scale * move.clamp(-o.clip_radius, o.clip_radius)
    outputs = {"param": mean, "exp_avg": gm, "exp_avg_sq": h}
    return outputs | ({"max_exp_avg_sq": mean} if rounded else {})


FORMULAS = {
    "langevin_adam_": langevin_adam_formula,
    "sgld_": sgld_formula,
    "variational_draw_": variational_draw_formula,
    "variational_accumulate_": variational_accumulate_formula,
    "variational_adam_": variational_adam_formula,
}
