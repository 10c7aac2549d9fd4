"""Stochastic rounding: unbiased, by the named bits, apart for each tensor, and of bfloat16 only."""

import math

import pytest
import torch

import fekernels as fe
from tests.optimizers.test_bits import HOT, leaf
from tests.support.optimizer_rows import make_row
from tests.support.optimizers import Case, Options
from tests.support.tensors import bits_equal


def round_once(value, of, place, seed=0, stream=0, n=200_000):
    """A step that leaves ``value`` (float32) in a bfloat16 tensor: ``of`` is the tensor that is looked at."""
    zeros = torch.zeros(n, dtype=torch.bfloat16, device=place.device)
    p, m, v, g = (zeros.clone() for _ in range(4))
    lr, beta1, beta2 = 0.0, 0.0, 0.0
    if of == "param":
        p += 1.0
        decay = 1 - value
        lr = 1.0
        weight_decay = decay
    else:
        weight_decay = 0.0
        (m if of == "exp_avg" else v).add_(1.0)
        beta1, beta2 = (value, 0.0) if of == "exp_avg" else (0.0, value)
    step = torch.zeros((), device=place.device)
    torch.ops.fekernels.langevin_adam_(
        [p], [g], [m], [v], [], [step], [], [], [stream], [], lr, None, 0.0, None, beta1, beta2, 1.0,
        weight_decay, 0.0, "momentum", False, False, True, True, True, seed, None, None, place.backend,
    )  # fmt: skip
    return {"param": p, "exp_avg": m, "exp_avg_sq": v}[of].float().cpu()


@pytest.mark.parametrize("of", ["param", "exp_avg", "exp_avg_sq"])
def test_stochastic_rounding_is_unbiased(of, place):
    # Between 1 - 2^-8 and 1, the fraction of the way up is the probability of 1.
    for k, up in enumerate((0.03125, 0.5, 0.75)):
        results = [round_once(1 - (1 - up) * 2.0**-8, of, place, seed=k, stream=s) for s in (0, 1)]
        for rounded in results:
            assert set(rounded.unique().tolist()) <= {1 - 2.0**-8, 1.0}
            frequency = (rounded == 1).double().mean().item()
            assert abs(frequency - up) < 5 * math.sqrt(up * (1 - up) / rounded.numel())
        agreement = ((results[0] == 1) == (results[1] == 1)).double().mean().item()
        expected = up**2 + (1 - up) ** 2
        assert abs(agreement - expected) < 5 * math.sqrt(expected * (1 - expected) / results[0].numel())


def test_the_three_tensors_round_by_different_bits(place):
    half = 1 - 2.0**-9
    rounded = [round_once(half, of, place) == 1 for of in ("param", "exp_avg", "exp_avg_sq")]
    for i, a in enumerate(rounded):
        for b in rounded[i + 1 :]:
            agreement = (a == b).double().mean().item()
            assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(a.numel())


def test_stochastic_rounding_takes_the_named_bits(place):
    # purpose 1: the parameter the low half of its word, exp_avg the high half; exp_avg_sq halves of the turned stream.
    words = fe.random.bits(1000, seed=9, stream=5, step=1, purpose=1).long() & 0xFFFFFFFF
    turned = fe.random.bits(500, seed=9, stream=5 + 2**31, step=1, purpose=1).long() & 0xFFFFFFFF
    halves = {
        "param": words & 0xFFFF,
        "exp_avg": words >> 16,
        "exp_avg_sq": torch.stack((turned & 0xFFFF, turned >> 16), 1).flatten(),
    }
    for of, bits in halves.items():
        rounded = round_once(1 - 2.0**-10, of, place, seed=9, stream=5, n=1000)
        # 1 - 2^-10 is 3/4 of the way up: it gets there when the 16 bits added carry.
        assert torch.equal(rounded == 1, bits + 0xC000 >= 0x10000), of


def test_a_bfloat16_second_moment_decays_only_with_stochastic_rounding(place):
    means = {}
    for stochastic in (False, True):
        p = leaf(torch.zeros(20_000, dtype=torch.bfloat16), place)
        optimizer = fe.LangevinAdam([p], 1e-3, stochastic_rounding=stochastic, seed=1, backend=place.backend)
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[p]["exp_avg_sq"].fill_(1.0)
        p.grad = torch.zeros_like(p)
        for _ in range(100):
            optimizer.step()
        means[stochastic] = optimizer.state[p]["exp_avg_sq"].double().mean().item()
    assert means[False] == 1.0
    # One step moves by less than 2^-8 in the mean, and the steps' roundings are independent.
    assert abs(means[True] - 0.999**100) < 5 * math.sqrt(100) * 2.0**-9 / math.sqrt(20_000)


def test_small_steps_are_not_lost_with_stochastic_rounding(place):
    moved = {}
    for stochastic in (False, True):
        p = leaf(torch.ones(20_000, dtype=torch.bfloat16), place)
        optimizer = fe.LangevinAdam([p], 1e-4, stochastic_rounding=stochastic, seed=1, backend=place.backend)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = 1 - p.detach().double().mean().item()
    assert moved[False] == 0.0 and abs(moved[True] - 50 * 1e-4) < 5 * math.sqrt(50) * 2.0**-9 / math.sqrt(
        20_000
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_stochastic_rounding_concerns_bfloat16_only(dtype, place):
    rows = [make_row(Case((65,)), Options(), dtype).clone(place.device) for _ in range(2)]
    for row, stochastic in zip(rows, (False, True), strict=True):
        row.param.requires_grad_().grad = row.grad
        fe.LangevinAdam([row.param], **HOT, stochastic_rounding=stochastic, backend=place.backend).step()
    assert bits_equal(rows[0].param, rows[1].param)
