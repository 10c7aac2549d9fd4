"""What counts as a number, and the one format of messages."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

import fekernels as fe
from fekernels import diagnostics
from fekernels._checks import boolean, floating, integer, number, one_of, same_device

HALF = [
    0.5,
    np.float64(0.5),
    np.float32(0.5),
    np.float16(0.5),
    np.longdouble(0.5),
    np.array(0.5),
    Fraction(1, 2),
]
THREE = [3, np.int64(3), np.int8(3), np.uint64(3), np.array(3), np.array(3, dtype=np.int16)]


@pytest.mark.parametrize("value", HALF, ids=lambda v: type(v).__name__)
def test_whatever_carries_a_number_is_one(value):
    found = number("f", "x", value)
    assert found == 0.5 and type(found) is float


@pytest.mark.parametrize("value", THREE, ids=lambda v: type(v).__name__)
def test_whole_numbers(value):
    found = integer("f", "n", value, 0, 4)
    assert found == 3 and type(found) is int
    assert number("f", "n", value) == 3.0


@pytest.mark.parametrize("value", [True, np.False_, np.array(True)], ids=repr)
def test_bools(value):
    assert boolean("f", "b", value) is bool(value)
    for check in (number, integer):
        with pytest.raises(TypeError, match="f: b must be"):
            check("f", "b", value)


RANGES = [
    ({}, [0.0, 5.0], [-1e-9, math.inf, math.nan, 10**400, -(10**400)], "finite and >= 0"),
    ({"infinite": True}, [0.0, math.inf], [-1.0, -math.inf, math.nan, 10**400], ">= 0"),
    ({"above": 0.0}, [1e-300], [0.0, -1.0, math.inf, math.nan], "finite and > 0"),
    ({"below": 1.0}, [0.0, 0.999], [1.0, -0.1, math.inf, math.nan], "in [0, 1)"),
    ({"least": -1.0, "above": -1.0, "below": 0.0}, [-0.5], [-1.0, 0.0, math.nan], "in (-1, 0)"),
    ({"least": -math.inf}, [-1e300], [math.inf, -math.inf, math.nan], "finite"),
    ({"least": -math.inf, "infinite": True}, [-math.inf, math.inf, 0.0], [math.nan], "a number"),
]


@pytest.mark.parametrize(("bounds", "good", "bad", "expected"), RANGES, ids=lambda v: str(v)[:30])
def test_ranges(bounds, good, bad, expected):
    assert [number("f", "x", value, **bounds) for value in good] == good
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"f: x must be {expected}; got ")):
            number("f", "x", value, **bounds)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: number("f", "x", "1"), TypeError, "f: x must be a number; got str"),
        (lambda: number("f", "x", 1j), TypeError, "f: x must be a number; got complex"),
        (lambda: number("f", "x", np.zeros(1)), TypeError, "f: x must be a number; got ndarray"),
        (lambda: number("f", "x", torch.ones(())), TypeError, "f: x must be a number; got Tensor"),
        (lambda: number("f", "x", None), TypeError, "f: x must be a number; got NoneType"),
        (lambda: number("f", "x", 10**400), ValueError, "got an int that no float can hold"),
        (lambda: integer("f", "n", 3.0), TypeError, "f: n must be an int; got float"),
        (lambda: integer("f", "n", np.float64(3)), TypeError, "f: n must be an int; got float64"),
        (lambda: integer("f", "n", 4, 0, 4), ValueError, "f: n must be in [0, 4); got 4"),
        (lambda: integer("f", "n", 0, 1), ValueError, "f: n must be at least 1; got 0"),
        (lambda: boolean("f", "b", 1), TypeError, "f: b must be a bool; got int"),
        (lambda: boolean("f", "b", torch.zeros(2)), TypeError, "f: b must be a bool; got Tensor"),
        (lambda: one_of("f", "o", "c", ("a", "b")), ValueError, "f: o must be one of a, b; got 'c'"),
        (lambda: one_of("f", "o", ["a"], ("a", "b")), TypeError, "f: o must be one of a, b; got list"),
        (lambda: one_of("f", "o", np.zeros(2), ("a",)), TypeError, "f: o must be one of a; got ndarray"),
        (lambda: floating("f", "t", 1.0), TypeError, "f: t must be a tensor; got float"),
        (
            lambda: same_device("f", "t", torch.zeros(1), torch.device("meta")),
            ValueError,
            "f: t must be on meta like the others; got cpu",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def parameters():
    return [torch.nn.Parameter(torch.full((3,), 0.5))]


def stepped(optimizer):
    for i in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 1.0 + i)
        optimizer.step()
    return optimizer.param_groups[0]["params"][0].detach()


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.array])
def test_optimizers_take_them(kind):
    # Halves and quarters, which every format holds.
    langevin = dict(
        lr=0.25, betas=(0.5, 0.75), eps=0.5, weight_decay=0.25, temperature=0.5, prior_precision=0.5
    )
    sgld = dict(lr=0.25, weight_decay=0.25, temperature=0.5, prior_precision=0.5)
    for cls, switches in ((fe.LangevinAdam, langevin), (fe.SGLD, sgld)):
        given = {k: tuple(map(kind, v)) if k == "betas" else kind(v) for k, v in switches.items()}
        optimizer = cls(parameters(), **given, seed=np.int64(7), maximize=np.True_)
        plain = cls(parameters(), **switches, seed=7, maximize=True)
        assert torch.equal(stepped(optimizer), stepped(plain))
        # Plain numbers are kept, so that a checkpoint loads with weights_only=True.
        kept = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        assert all(kept[k] == v for k, v in plain.param_groups[0].items() if k in switches)
        assert not any(isinstance(v, np.generic | np.ndarray) for v in kept.values())


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_schedulers_may_return_them(kind):
    ends = []
    for convert in (float, kind):
        optimizer = fe.LangevinAdam(parameters(), lr=0.5, temperature=0.25, eps=0.5, seed=1)
        schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e, c=convert: c(1 / (1 + e))),
            fe.optim.LambdaTemperature(optimizer, lambda e, c=convert: c(0.5**e)),
        ]
        for _ in range(4):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        assert type(optimizer.param_groups[0]["temperature"]) is float
        ends.append(optimizer.param_groups[0]["params"][0].detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)  # 1/3 in float32


def test_everything_else_takes_them():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    half, three = np.float32(0.5), np.int64(3)
    pairs = [
        lambda h, n: fe.free_energy(x, x + 1, x, x, beta=h, free_bits=h).free_energy,
        lambda h, n: fe.reparameterize(x, x, seed=n, step=n, stream=n, offset=n),
        lambda h, n: fe.random.normal((n, 2), seed=n, stream=n, step=n, offset=n, purpose=n),
        lambda h, n: fe.svgd_direction(x, x, bandwidth=h, temperature=h, kernel=fe.kernels.IMQ(-h, h)),
        lambda h, n: fe.kernel_stein_discrepancy(x, x, bandwidth=h),
        lambda h, n: fe.importance_weighted_bound(x, dim=n - 3, estimator="renyi", alpha=h),
        lambda h, n: fe.likelihoods.sample("mse", x, seed=n),
        lambda h, n: (
            fe.SVGD(lambda z: -z.square().sum(-1), x, lr=h, bandwidth=h, temperature=h, seed=n)
            .run(n, every=n, progress=False)
            .particles
        ),
    ]
    for call in pairs:
        assert torch.equal(call(half, three), call(0.5, 3))
    table = diagnostics.calibration(
        torch.rand(9, 2).softmax(-1), torch.zeros(9, dtype=torch.int64), bins=three
    )
    assert len(table.count) == 3
