"""The Langevin-Adam step over a pointer table, by Triton: one launch, whatever the number of parameters.

csrc/formulas/langevin_adam.h operation for operation, so the bits agree with the C++ and CUDA kernels; the formulas and
their sources are in fekernels.reference.optimizers.langevin_adam.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fekernels.triton import numerics
from fekernels.triton.optimizers import codes
from fekernels.triton.optimizers import table_rows as rows_of


@triton.jit
def momentum_noise_start(beta1, beta1_power_t):
    """c_t: see csrc/formulas/langevin_adam.h."""
    total = tl.full((), 0.0, tl.float64)
    weight = tl.full((), 1.0, tl.float64)
    power = beta1
    while weight > 1e-10:
        total += weight * (1.0 - beta1) / (1.0 - power)
        weight *= beta1_power_t
        power *= beta1
    return 1.0 / total


@triton.jit
def coefficients(
    t, h, temperature, beta1, beta2, eps, weight_decay, prior_precision, row,
    NOISE: tl.constexpr, FLAGS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What one step of one parameter shares, computed in float64 and rounded once to REAL."""
    beta1_t = tl.full((), 0.0, tl.float64)
    beta2_t = tl.full((), 0.0, tl.float64)
    if codes.BIAS_CORRECTION & FLAGS:
        beta1_t = numerics.integer_power(beta1, t)
        if not codes.FROZEN & FLAGS:
            beta2_t = numerics.integer_power(beta2, t)
    inverse_root_bias2 = 1.0 / tl.sqrt(1.0 - beta2_t)
    step_size = h / (1.0 - beta1_t)

    noise_scale = tl.full((), 0.0, tl.float64)
    if NOISE != codes.NONE:
        if (temperature > 0.0) & (h > 0.0):
            if NOISE == codes.MOMENTUM:
                start = tl.full((), 1.0, tl.float64)
                if codes.BIAS_CORRECTION & FLAGS:
                    start = momentum_noise_start(beta1, beta1_t)
                noise_scale = (1.0 - beta1) * start * tl.sqrt(2.0 * temperature / h)
            else:
                noise_scale = tl.sqrt(2.0 * temperature * h)

    momentum_scale = tl.full((), 1.0, tl.float64)
    if codes.RESCALE & FLAGS:
        at = tl.load(row + codes.NOISE_UNIT)
        if at != 0:
            unit = h * (1.0 + beta1) / (1.0 - beta1)
            previous = tl.load(at.to(tl.pointer_type(tl.float64)))
            if (h > 0.0) & (previous > 0.0) & (previous != unit):
                momentum_scale = tl.sqrt(previous / unit)

    return (
        (1.0 - beta1).to(REAL), beta2.to(REAL), (1.0 - beta2).to(REAL), inverse_root_bias2.to(REAL), eps.to(REAL),
        step_size.to(REAL), noise_scale.to(REAL), momentum_scale.to(REAL), weight_decay.to(REAL),
        (1.0 - h * weight_decay).to(REAL), prior_precision.to(REAL), (h * prior_precision).to(REAL),
    )  # fmt: skip


@triton.jit
def update(
    param, grad, exp_avg, exp_avg_sq, largest, anchor, normal, noisy, grad_scale, shared,
    NOISE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`langevin_adam` of csrc/formulas/langevin_adam.h; `shared`: the coefficients.

    `exp_avg_sq` is the maximum where that is frozen, and what is frozen stays as it is.
    Where not `noisy` the normal is not even multiplied by 0, as D may be infinite.
    """
    (
        one_minus_beta1, beta2, one_minus_beta2, inverse_root_bias2, eps, step_size, noise_scale, momentum_scale,
        weight_decay, decay_factor, prior_precision, smallest_denominator,
    ) = shared  # fmt: skip
    if codes.SCALED & FLAGS:
        grad = numerics.divide(grad, grad_scale)
    if codes.MAXIMIZE & FLAGS:
        grad = grad * -1.0  # older Tritons make 0 - grad of -grad, which differs in the sign of 0
    if codes.DECAY & FLAGS:
        if codes.DECOUPLED & FLAGS:
            param = param * decay_factor
        else:
            grad = tl.fma(param, weight_decay, grad)
    drift = grad
    if codes.PRIOR & FLAGS:
        drift = tl.fma(param - anchor, prior_precision, grad)
    if codes.RESCALE & FLAGS:
        exp_avg = exp_avg * momentum_scale
    exp_avg = tl.fma(drift - exp_avg, one_minus_beta1, exp_avg)
    quiet = numerics.flushed(exp_avg, codes.ABOVE_OF_MOMENTUM)
    second_moment = exp_avg_sq
    if not codes.FROZEN & FLAGS:
        exp_avg_sq = numerics.flushed(tl.fma(grad * one_minus_beta2, grad, exp_avg_sq * beta2), 0)
        second_moment = exp_avg_sq
        if codes.AMSGRAD & FLAGS:
            largest = tl.where(exp_avg_sq <= largest, largest, exp_avg_sq)
            second_moment = largest

    denominator = tl.fma(numerics.square_root(second_moment), inverse_root_bias2, eps)
    if codes.PRIOR & FLAGS:
        denominator = tl.where(denominator < smallest_denominator, smallest_denominator, denominator)

    if NOISE == codes.MOMENTUM:
        stirred = tl.fma(numerics.square_root(denominator) * noise_scale, normal, exp_avg)
        exp_avg = tl.where(noisy, stirred, quiet)
    else:
        exp_avg = quiet
    move = exp_avg * step_size
    if NOISE == codes.PRECONDITIONED:
        stirred = tl.fma(numerics.square_root(denominator) * (noise_scale * -1.0), normal, move)
        move = tl.where(noisy, stirred, move)
    param = param - numerics.divide(move, denominator)
    if NOISE == codes.ISOTROPIC:
        param = tl.where(noisy, tl.fma(normal, noise_scale, param), param)
    return param, exp_avg, exp_avg_sq, largest


@triton.jit
def span(
    begin, left, addresses, layouts, layout, order, key, noisy, grad_scale, shared,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    NOISE: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
):  # fmt: skip
    """Elements begin .. begin + left - 1 of one row. VECTOR: contiguous, aligned, in order, and whole groups only."""
    PARAM: tl.constexpr = DTYPES & 255
    GRAD: tl.constexpr = DTYPES >> 8 & 255
    STATE: tl.constexpr = DTYPES >> 16 & 255
    ANCHOR: tl.constexpr = DTYPES >> 24 & 255
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    ROUND: tl.constexpr = codes.STOCHASTIC & FLAGS != 0
    FROZEN: tl.constexpr = codes.FROZEN & FLAGS != 0
    MAXIMUM_ALONE: tl.constexpr = FROZEN and codes.AMSGRAD & FLAGS != 0
    param_at, grad_at, exp_avg_at, exp_avg_sq_at, largest_at, anchor_at = addresses
    for at in range(0, left, BLOCK):
        mask, first, offsets = rows_of.offsets(begin, at, left, layouts, layout, BLOCK, VECTOR, GROUP)
        param = rows_of.read(param_at, first, offsets[0], mask, PARAM, VECTOR).to(REAL)
        grad = rows_of.read(grad_at, first, offsets[1], mask, GRAD, VECTOR).to(REAL)
        exp_avg = rows_of.read(exp_avg_at, first, offsets[2], mask, STATE, VECTOR).to(REAL)
        if MAXIMUM_ALONE:
            exp_avg_sq = rows_of.read(largest_at, first, offsets[4], mask, STATE, VECTOR).to(REAL)
        else:
            exp_avg_sq = rows_of.read(exp_avg_sq_at, first, offsets[3], mask, STATE, VECTOR).to(REAL)
        largest = exp_avg_sq
        if (codes.AMSGRAD & FLAGS) and not FROZEN:
            largest = rows_of.read(largest_at, first, offsets[4], mask, STATE, VECTOR).to(REAL)
        anchor = tl.zeros((BLOCK,), REAL)
        if codes.PRIOR & FLAGS:
            if anchor_at != 0:
                anchor = rows_of.read(anchor_at, first, offsets[5], mask, ANCHOR, VECTOR).to(REAL)

        here = begin + at
        normal = tl.zeros((BLOCK,), tl.float32)
        if NOISE != codes.NONE:
            if codes.MAYBE_QUIET & FLAGS:
                if noisy:
                    normal = rows_of.normals(here, order, key, BLOCK, VECTOR, GROUP)
            else:
                normal = rows_of.normals(here, order, key, BLOCK, VECTOR, GROUP)
        normal = normal.to(REAL)
        param, exp_avg, exp_avg_sq, largest = update(
            param, grad, exp_avg, exp_avg_sq, largest, anchor, normal, noisy, grad_scale, shared, NOISE, FLAGS
        )

        word = tl.zeros((BLOCK,), tl.uint32)
        half = word
        if ROUND and (PARAM == codes.BFLOAT16 or STATE == codes.BFLOAT16):
            word = rows_of.rounding_words(here, order, key, BLOCK, VECTOR, GROUP)
            if STATE == codes.BFLOAT16 and not FROZEN:
                half = rows_of.rounding_halves(here, order, key, BLOCK, VECTOR)
        rows_of.write(param_at, first, offsets[0], param, word & 0xFFFF, mask, PARAM, VECTOR, ROUND)
        rows_of.write(exp_avg_at, first, offsets[2], exp_avg, word >> 16, mask, STATE, VECTOR, ROUND)
        if not FROZEN:
            rows_of.write(exp_avg_sq_at, first, offsets[3], exp_avg_sq, half, mask, STATE, VECTOR, ROUND)
            if codes.AMSGRAD & FLAGS:
                rows_of.write(largest_at, first, offsets[4], largest, half, mask, STATE, VECTOR, ROUND)


@triton.jit(
    do_not_specialize=["rows", "blocks", "seed"],
    do_not_specialize_on_alignment=[
        "table", "layouts", "chunks", "scratch", "lr_tensor", "temperature_tensor", "grad_scale", "found_inf",
    ],
)  # fmt: skip
def langevin_adam_kernel(
    table, rows: tl.int32, layouts, chunks, blocks: tl.int32, scratch,
    lr: tl.float64, lr_tensor, temperature: tl.float64, temperature_tensor, beta1: tl.float64, beta2: tl.float64,
    eps: tl.float64, weight_decay: tl.float64, prior_precision: tl.float64, seed: tl.int64, grad_scale, found_inf,
    NOISE: tl.constexpr, FLAGS: tl.constexpr, DTYPES: tl.constexpr,
    BLOCK: tl.constexpr, SLOW_BLOCK: tl.constexpr, GROUP: tl.constexpr, VERSION: tl.constexpr,
):  # fmt: skip
    """One step of all rows; program b does the chunk that chunks[b] names."""
    REAL: tl.constexpr = tl.float64 if DTYPES & 255 == codes.FLOAT64 else tl.float32
    moves = True
    if found_inf is not None:
        moves = tl.load(found_inf) == 0.0
    if moves:
        h = rows_of.scalar(lr, lr_tensor)
        heat = rows_of.scalar(temperature, temperature_tensor)
        block = tl.program_id(0)
        if block < blocks:
            begin, left, at, layout, order, t, stream, vector = rows_of.chunk_of(table, chunks, block, GROUP)
            key = (tl.cast(seed, tl.int64), t, stream)
            noisy = (heat > 0.0) & (h > 0.0)
            scale = tl.full((), 1.0, REAL)
            if codes.SCALED & FLAGS:
                scale = tl.load(grad_scale).to(REAL)
            row = table + tl.load(chunks + 2 * block).to(tl.int64) * codes.COLUMNS
            shared = coefficients(
                t, h, heat, rows_of.scalar(beta1, None), rows_of.scalar(beta2, None), rows_of.scalar(eps, None),
                rows_of.scalar(weight_decay, None), rows_of.scalar(prior_precision, None), row, NOISE, FLAGS, REAL,
            )  # fmt: skip
            if vector:
                span(
                    begin, left, at, layouts, layout, order, key, noisy, scale, shared,
                    True, BLOCK, GROUP, NOISE, FLAGS, DTYPES,
                )  # fmt: skip
            else:
                span(
                    begin, left, at, layouts, layout, order, key, noisy, scale, shared,
                    False, SLOW_BLOCK, GROUP, NOISE, FLAGS, DTYPES,
                )  # fmt: skip
        if rows_of.finish(scratch):
            rows_of.advance_steps(table, rows)
            if h > 0.0:
                unit = tl.full((), 0.0, tl.float64)
                if codes.RESCALE & FLAGS:
                    if heat > 0.0:
                        unit = h * (1.0 + rows_of.scalar(beta1, None)) / (1.0 - rows_of.scalar(beta1, None))
                rows_of.set_noise_units(table, rows, unit)


def langevin_adam_(
    table: torch.Tensor,
    layouts: torch.Tensor,
    chunks: torch.Tensor,
    scratch: torch.Tensor,
    settings: Sequence[float],
    lr_tensor: torch.Tensor | None,
    temperature_tensor: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    seed: int,
    dtypes: int,
) -> None:
    """The operator of the same name in fekernels.ops.optimizers. dtypes: the table's column 12, one for all rows."""
    lr, temperature, weight_decay, prior_precision, bits, beta1, beta2, eps, noise = settings
    # A kernel is compiled for what is in use, never for a value: a new lr compiles nothing.
    from_tensors = lr_tensor is not None or temperature_tensor is not None
    kind = int(noise) if from_tensors or (temperature > 0 and lr > 0) else codes.NONE.value
    flags = int(bits) | rows_of.features(weight_decay, prior_precision, grad_scale, from_tensors)
    if int(noise) == codes.MOMENTUM.value:
        flags |= codes.RESCALE.value
    values = (
        lr, lr_tensor, temperature, temperature_tensor, beta1, beta2, eps, weight_decay, prior_precision, seed,
        grad_scale, found_inf,
    )  # fmt: skip
    rows_of.launch(langevin_adam_kernel, table, layouts, chunks, scratch, values, kind, flags, dtypes)
