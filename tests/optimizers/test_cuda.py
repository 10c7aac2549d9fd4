"""The CUDA sources, run on the CPU, give the C++ kernels' bits.

Every comparison is over whole buffers, guards around the tensors included, bit by bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fekernels._catalogue.optimizers import NOISES
from fekernels._runtime.pointer_table import PointerTable
from tests.support.cuda_on_cpu import FLAGS, INVALID_VALUE, SUCCESS, Kernels
from tests.support.cuda_on_cpu.rows import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    GUARD,
    ROWS,
    Arena,
    assert_same,
    bits,
    make_rows,
)
from tests.support.optimizers import noise_unit

SEED = -0x123456789ABCDEF


@pytest.fixture(scope="module")
def kernels(cuda_steps: Kernels) -> Kernels:
    return cuda_steps


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def both_orders(request: pytest.FixtureRequest, kernels: Kernels):
    kernels.run_backwards(request.param)
    yield
    kernels.run_backwards(False)


LANGEVIN = {
    "lr": 0.01,
    "lr_tensor": None,
    "temperature": 0.5,
    "temperature_tensor": None,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-6,
    "weight_decay": 0.0,
    "prior_precision": 0.0,
    "noise": "momentum",
    "flags": FLAGS["bias_correction"],
    "seed": SEED,
    "grad_scale": None,
    "found_inf": None,
}
UNIT = noise_unit(LANGEVIN["lr"], LANGEVIN["beta1"])
SGLD = {key: LANGEVIN[key] for key in LANGEVIN if key not in ("beta1", "beta2", "eps", "noise")} | {
    "flags": 0
}


def native_langevin_adam(native, table: PointerTable, **s) -> None:
    head = [s[name] for name in ("lr", "temperature", "weight_decay", "prior_precision", "flags")]
    row = [*head, s["beta1"], s["beta2"], s["eps"], NOISES[s["noise"]]]
    native.langevin_adam_(
        table.table, table.layouts, table.chunks, table.scratch, row, s["lr_tensor"], s["temperature_tensor"],
        s["grad_scale"], s["found_inf"], s["seed"], table.dtypes,
    )  # fmt: skip


def check_langevin_adam(
    kernels,
    native,
    param_type,
    state_type,
    *,
    replays=1,
    units=(0.0,),
    anchor_type=None,
    which=ROWS,
    **changes,
) -> list[Tensor]:
    """Both backends step the same rows; returns the buffers, the last of each row its noise unit."""
    settings = LANGEVIN | changes
    results = []
    for backend in ("shim", "native"):
        arena = Arena()
        amsgrad = bool(settings["flags"] & FLAGS["amsgrad"])
        rows = make_rows(
            arena, param_type, state_type, anchor_type=anchor_type, amsgrad=amsgrad, which=which, units=units
        )
        table = PointerTable(rows)
        for _ in range(replays):
            if backend == "shim":
                assert kernels.langevin_adam(table, **settings) == SUCCESS
                assert table.scratch.item() == 0
            else:
                native_langevin_adam(native, table, **settings)
        results.append(arena.buffers)
    assert_same(*results)
    return results[0]


def initial(param_type, state_type, **choices) -> list[Tensor]:
    arena = Arena()
    make_rows(arena, param_type, state_type, **choices)
    return arena.buffers


EXTRAS: dict[str, dict] = {
    "plain": {},
    "l2, amsgrad, maximize": {
        "weight_decay": 0.1,
        "flags": LANGEVIN["flags"] | FLAGS["amsgrad"] | FLAGS["maximize"],
    },
    "decoupled, prior, anchor": {
        "weight_decay": 0.1,
        "prior_precision": 2.0,
        "anchor_type": "same",
        "flags": FLAGS["decoupled_weight_decay"],
    },
    "prior at 0, lr changed": {"prior_precision": 2.0, "units": (0.76, 0.0, UNIT, 0.01)},
}


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize("param_type, state_type", DTYPES)
def test_langevin_adam_gives_the_cpu_kernels_bits(kernels, native, param_type, state_type, noise, extras):
    choice = dict(EXTRAS[extras])
    if choice.get("anchor_type") == "same":
        choice["anchor_type"] = param_type
    if noise == "none":
        choice |= {"temperature": 0.0}
    else:
        choice |= {"noise": noise}
    before = initial(
        param_type, state_type, anchor_type=choice.get("anchor_type"), amsgrad="amsgrad" in extras
    )
    after = check_langevin_adam(kernels, native, param_type, state_type, **choice)
    assert not torch.equal(bits(after[0]), bits(before[0]))


@pytest.mark.parametrize("noise", ["momentum", "isotropic"])
@pytest.mark.parametrize("flags", [0, FLAGS["amsgrad"]], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("param_type, state_type", [(BF16, BF16), (BF16, F32), (F32, BF16), (F16, F16)])
def test_stochastic_rounding_gives_the_cpu_kernels_bits(
    kernels, native, param_type, state_type, flags, noise
):
    choice = {"noise": noise, "flags": LANGEVIN["flags"] | flags}
    nearest = check_langevin_adam(kernels, native, param_type, state_type, **choice)
    choice["flags"] |= FLAGS["stochastic_rounding"]
    stochastic = check_langevin_adam(kernels, native, param_type, state_type, **choice)
    rounds = BF16 in (param_type, state_type)
    assert rounds != all(torch.equal(bits(a), bits(b)) for a, b in zip(nearest, stochastic, strict=True))


@pytest.mark.parametrize("anchor_type", [F32, F64, BF16, F16])
@pytest.mark.parametrize("param_type", [F32, F64, BF16])
def test_an_anchor_may_have_any_dtype(kernels, native, param_type, anchor_type):
    check_langevin_adam(
        kernels, native, param_type, param_type, prior_precision=3.0, anchor_type=anchor_type, which=ROWS[:8]
    )


@pytest.mark.parametrize("dtype", [F32, F64])
def test_scalars_may_be_tensors(kernels, native, dtype):
    tensors = {
        "lr_tensor": torch.tensor(0.02, dtype=dtype),
        "temperature_tensor": torch.tensor(0.3, dtype=dtype),
        "grad_scale": torch.tensor(512.0),
        "found_inf": torch.tensor(0.0),
    }
    with_tensors = check_langevin_adam(
        kernels, native, F32, F32, lr=7.0, temperature=7.0, which=ROWS[:6], **tensors
    )
    assert with_tensors[-1].item() == noise_unit(tensors["lr_tensor"].item(), LANGEVIN["beta1"])
    plain = check_langevin_adam(kernels, native, F32, F32, which=ROWS[:6])
    assert not torch.equal(bits(with_tensors[0]), bits(plain[0]))


def test_steps_advance_once_a_launch_and_launches_can_be_replayed(kernels, native, both_orders):
    replays = 3
    after = check_langevin_adam(kernels, native, F32, F32, replays=replays)
    before = initial(F32, F32, units=(-1.0,))
    ones = [(a.item(), b.item()) for a, b in zip(after, before, strict=True) if b.numel() == 1]
    assert len(ones) == 2 * len(ROWS)
    assert all(now == (UNIT if then == -1.0 else then + replays) for now, then in ones)


def test_many_rows_take_one_launch(kernels, native, both_orders):
    check_langevin_adam(kernels, native, F32, F32, replays=2, which=[{"shape": (n % 9,)} for n in range(300)])


def test_a_call_without_elements_advances_steps(kernels, native):
    after = check_langevin_adam(kernels, native, F32, F32, which=[{"shape": (0,)}, {"shape": (3, 0)}])
    assert [b.item() for b in after if b.numel() == 1] == [1.0, UNIT, 10.0, UNIT]


def test_rows_without_a_noise_unit_are_not_rescaled(kernels, native):
    after = check_langevin_adam(kernels, native, F32, F32, units=(), which=ROWS[:2])
    fresh = check_langevin_adam(kernels, native, F32, F32, units=(0.0,), which=ROWS[:2])
    assert torch.equal(bits(after[0]), bits(fresh[0]))


def test_at_lr_zero_nothing_moves_and_the_noise_unit_is_kept(kernels, native):
    after = check_langevin_adam(kernels, native, F32, F32, lr=0.0, units=(0.5,), which=ROWS[:1])
    assert torch.equal(bits(after[0]), bits(initial(F32, F32, which=ROWS[:1])[0]))
    assert after[-1].item() == 0.5


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {"noise": "isotropic"}], ids=str)
def test_a_step_without_momentum_noise_leaves_the_unit_0(kernels, native, changes):
    after = check_langevin_adam(kernels, native, F32, F32, units=(0.5,), which=ROWS[:3], **changes)
    assert [b.item() for b in after if b.dtype == F64 and b.numel() == 1][-1] == 0.0


@pytest.mark.parametrize("optimizer", ["langevin_adam", "sgld"])
def test_found_inf_skips_everything(kernels, both_orders, optimizer):
    arena, untouched = Arena(), Arena()
    for each in (arena, untouched):
        rows = make_rows(each, F32, F32, units=(0.5,))
        if each is arena:
            table = PointerTable(rows)
    if optimizer == "sgld":
        code = kernels.sgld(table, **SGLD | {"found_inf": torch.tensor(1.0)})
    else:
        code = kernels.langevin_adam(table, **LANGEVIN | {"found_inf": torch.tensor(1.0)})
    assert code == SUCCESS
    assert_same(arena.buffers, untouched.buffers)
    assert table.scratch.item() == 0


def test_infinities_and_nans_stay_where_they_are(kernels, native):
    results = []
    for backend in ("shim", "native"):
        arena = Arena()
        rows = make_rows(arena, BF16, BF16, which=[{"shape": (1000,)}])
        rows[0].grad[5], rows[0].grad[600], rows[0].param[7] = float("nan"), float("inf"), float("-inf")
        table = PointerTable(rows)
        settings = LANGEVIN | {"flags": LANGEVIN["flags"] | FLAGS["stochastic_rounding"]}
        if backend == "shim":
            assert kernels.langevin_adam(table, **settings) == SUCCESS
        else:
            native_langevin_adam(native, table, **settings)
        results.append(arena.buffers)
        assert rows[0].param.isnan().nonzero().flatten().tolist() == [5, 600]
        assert rows[0].param[7] == float("-inf")
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def native_sgld(native, table: PointerTable, **s) -> None:
    row = [s[name] for name in ("lr", "temperature", "weight_decay", "prior_precision", "flags")]
    native.sgld_(
        table.table, table.layouts, table.chunks, table.scratch, row, s["lr_tensor"], s["temperature_tensor"],
        s["grad_scale"], s["found_inf"], s["seed"], table.dtypes,
    )  # fmt: skip


SGLD_CASES: dict[str, dict] = {
    "plain": {},
    "cold": {"temperature": 0.0},
    "everything": {"weight_decay": 0.1, "prior_precision": 2.0, "flags": FLAGS["maximize"]},
    "scaled, cold": {"temperature": 0.0, "grad_scale": torch.tensor(3.0)},
    "tensors, rounding": {
        "lr_tensor": torch.tensor(0.02, dtype=F64),
        "temperature_tensor": torch.tensor(0.3),
        "flags": FLAGS["stochastic_rounding"],
    },
}


@pytest.mark.parametrize("case", SGLD_CASES)
@pytest.mark.parametrize("param_type", [F32, F64, BF16, F16])
def test_sgld_gives_the_cpu_kernels_bits(kernels, native, param_type, case, both_orders):
    anchor_type = param_type if case == "everything" else None
    results = []
    for backend in ("shim", "native"):
        arena = Arena()
        table = PointerTable(make_rows(arena, param_type, anchor_type=anchor_type))
        for _ in range(2):
            if backend == "shim":
                assert kernels.sgld(table, **SGLD | SGLD_CASES[case]) == SUCCESS
                assert table.scratch.item() == 0
            else:
                native_sgld(native, table, **SGLD | SGLD_CASES[case])
        results.append(arena.buffers)
    assert_same(*results)
    before = Arena()
    make_rows(before, param_type, anchor_type=anchor_type)
    assert not torch.equal(bits(results[0][0]), bits(before.buffers[0]))


@pytest.mark.parametrize(
    "optimizer, dtypes",
    [
        ("langevin_adam", (F32, F32, F64)),
        ("langevin_adam", (F64, F64, F32)),
        ("langevin_adam", (BF16, BF16, F16)),
        ("langevin_adam", (F32, BF16, F32)),
        ("sgld", (F32, BF16)),
    ],
)
def test_other_dtypes_are_refused_with_nothing_launched(kernels, optimizer, dtypes):
    assert not kernels.supports(optimizer, *dtypes)
    (row,) = make_rows(Arena(), F32, F32, which=ROWS[:1])
    table = PointerTable([row])
    table.dtypes = sum({F32: 0, F64: 1, BF16: 2, F16: 3}[dtype] << 8 * i for i, dtype in enumerate(dtypes))
    before = row.param.clone()
    if optimizer == "sgld":
        assert kernels.sgld(table, **SGLD) == INVALID_VALUE
    else:
        assert kernels.langevin_adam(table, **LANGEVIN) == INVALID_VALUE
    assert torch.equal(row.param, before)
    assert row.step.item() == 0


def test_supported_dtypes_are_those_that_are_tested(kernels):
    every = (F32, F64, BF16, F16)
    assert {(p, s) for p in every for s in every if kernels.supports("langevin_adam", p, p, s)} == set(DTYPES)
    assert all(kernels.supports("sgld", dtype, dtype) for dtype in every)


# Salmon et al. 2011, known answers of Philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def fill(
    kernels: Kernels, draw: str, count: int, *, seed=SEED, stream=5, step=17, offset=0, purpose=4, shift=0
) -> Tensor:
    """``count`` numbers, written ``shift`` elements beyond a 16-byte boundary, with the guards checked."""
    buffer = torch.full((count + 2 * GUARD,), -1234567, dtype=torch.int32)
    out = buffer[GUARD + shift :]
    assert kernels.philox(draw, out, count, seed, stream, step, offset, purpose) == SUCCESS
    assert (buffer[: GUARD + shift] == -1234567).all()
    assert (buffer[GUARD + shift + count :] == -1234567).all()
    return out[:count]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_words_are_the_known_answers(kernels, counter, key, words):
    seed = key[0] | key[1] << 32
    block = counter[0] | (counter[1] & 0xFFFF) << 32
    got = fill(
        kernels,
        "bits",
        4,
        seed=seed - 2**64 if seed >= 2**63 else seed,
        offset=4 * block,
        purpose=counter[1] >> 16,
        step=counter[2],
        stream=counter[3],
    )
    assert [word & 0xFFFFFFFF for word in got.tolist()] == list(words)


@pytest.mark.parametrize("offset", [0, 1, 6, 2**34 - 20, 2**34 - 7])
@pytest.mark.parametrize("draw", ["bits", "uniform", "normal"])
def test_draws_give_the_cpu_kernels_bits(kernels, native, draw, offset, both_orders):
    for count, shift in ((0, 0), (1, 0), (3, 1), (4, 0), (4001, 0), (4001, 2)):
        want = torch.empty(count, dtype=torch.int32 if draw == "bits" else F32)
        getattr(native, f"philox_{draw}")(want, SEED, 5, 17, offset, 4)
        got = fill(kernels, draw, count, offset=offset, shift=shift)
        assert torch.equal(got, want.view(torch.int32))


def test_the_largest_draw_loops_over_its_blocks(kernels):
    count = 2048 * 1024 + 77
    whole = fill(kernels, "bits", count)
    assert torch.equal(whole[-4000:], fill(kernels, "bits", 4000, offset=count - 4000))
