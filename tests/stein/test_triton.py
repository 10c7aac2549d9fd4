"""The Triton Stein kernels without a GPU: interpreted, against the float64 reference; and compiled ahead of time.

What runs them on a GPU is `tests/gpu/stein.py`. The interpreter does not round as tensor cores do: what it shows of
the precisions is the splitting of operands.
"""

import re

import pytest
import torch
from torch import Tensor

from fekernels._catalogue.stein import CODES, KERNELS
from fekernels.reference.stein import kernel_stein_discrepancy as ksd_reference
from fekernels.reference.stein import svgd_direction as reference
from tests.support.tensors import bits_equal

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.triton import stein_machine_code as aot  # noqa: E402
from tests.support.triton.worker import interpreter  # noqa: E402

RBF, IMQ, LAPLACE, MATERN32, LINEAR = CODES.values()
NATIVE = [code for code, row in enumerate(KERNELS) if row.native]
FINITE = [code for code in NATIVE if KERNELS[code].discrepancy]
FLOAT32, TF32, BF16X3 = range(3)
BETA, C, TEMPERATURE = -0.4, 1.3, 0.7


@pytest.fixture(scope="module")
def run():
    with interpreter() as call:
        yield call


def problem(batch: int, n: int, d: int, offset: float = 5.0) -> tuple[Tensor, Tensor, Tensor]:
    """Particles, scores, and bandwidths from a tenth of the typical squared distance, 2 d, to half of it."""
    return (
        torch.randn(batch, n, d) + offset,
        3 * torch.randn(batch, n, d),
        d * (0.2 + 0.8 * torch.rand(batch)),
    )


def direction(x: Tensor, s: Tensor, h: Tensor, kernel: int) -> Tensor:
    return reference.svgd_direction(x.double(), s.double(), h.double(), kernel, BETA, C, TEMPERATURE)


def assert_near(got: Tensor, exact: Tensor, tolerance: float) -> None:
    assert got.shape == exact.shape
    error = (got.double() - exact).abs().max() if got.numel() else torch.tensor(0.0)
    scale = exact.abs().max() if got.numel() else torch.tensor(0.0)
    assert error <= tolerance * scale, f"off by {error / scale:.1e} of the largest"


SHAPES = [
    (2, 37, 1), (1, 70, 3), (1, 33, 8),  # differences, several tiles and not
    (1, 1, 20), (2, 37, 12), (1, 70, 37), (1, 70, 100),  # tiles, padded to 16, 64 and 128
    (1, 70, 130), (2, 5, 600),  # strips, the last with sums in parts
]  # fmt: skip


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_direction(run, kernel, shape):
    x, s, h = problem(*shape)
    got = run("svgd_direction", x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32)
    assert got.dtype == torch.float32
    assert_near(got, direction(x, s, h, kernel), 1.5e-6)


def test_sums_in_parts(run):
    """Few blocks of rows: the sums over 300 particles are made by several programs each."""
    for d, stretch in ((2, 4096), (2, 64), (16, 4096)):
        x, s, h = problem(1, 300, d)
        call = ("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
        got = run("patched", "stein.svgd_direction", {"STRETCH": stretch}, *call)
        assert_near(got, direction(x, s, h, RBF), 1.5e-6)


def test_precisions(run):
    x, s, h = problem(1, 40, 20)
    exact = direction(x, s, h, IMQ)
    for precision, least, most in ((FLOAT32, 0, 1e-6), (TF32, 2e-5, 2e-3), (BF16X3, 0, 5e-5)):
        got = run("svgd_direction", x, s, h, IMQ, BETA, C, TEMPERATURE, precision)
        assert_near(got, exact, most)
        # One product of rounded operands does lose digits.
        assert (got.double() - exact).abs().max() >= least * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_particles(run, dtype):
    for shape in ((1, 20, 3), (1, 40, 20), (1, 20, 130)):
        x, s, h = problem(*shape)
        x, s = x.to(dtype), s.to(dtype)
        got = run("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
        assert got.dtype == dtype
        assert_near(got, direction(x, s, h, RBF), 8e-3 if dtype == torch.bfloat16 else 1e-3)


def test_far_from_the_origin(run):
    for d in (3, 20, 130):
        x, s, h = problem(1, 50, d, offset=1e4)
        got = run("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
        assert_near(got, direction(x, s, h, RBF), 3e-6)


def test_one_particle_far_away(run):
    """Halves of float16, scaled for the farthest, keep the others' digits when one is 10^4 times as far."""
    x, s, h = problem(1, 60, 20, offset=0.0)
    x[0, 7] = 1e4
    s[0, 7, 3] = 1e5
    got = run("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
    others = [i for i in range(60) if i != 7]
    # Centring moves the others to 170 from the origin, of whose squares float32 keeps 2e-3: as much as the eager peer.
    eager = reference_in_float32(x, s, h)
    exact = direction(x, s, h, RBF)
    limit = 4 * (eager.double() - exact)[0, others].abs().max() + 1e-6 * exact[0, others].abs().max()
    assert (got.double() - exact)[0, others].abs().max() <= limit


def reference_in_float32(x: Tensor, s: Tensor, h: Tensor) -> Tensor:
    """rbf's direction as one writes it, of matrices."""
    x = x - x.mean(1, keepdim=True)
    squares = x.square().sum(2)
    t = (squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * x @ x.mT).clamp_min(0)
    k = torch.exp(-t / h.view(-1, 1, 1))
    k.diagonal(0, 1, 2).zero_()
    pull = 2 * TEMPERATURE / h.view(-1, 1, 1)
    return (s + k @ (s - pull * x) + pull * k.sum(2, keepdim=True) * x) / x.shape[1]


@pytest.mark.parametrize(
    ("kernel", "d"),
    [(RBF, 3), (RBF, 20), (RBF, 130), (IMQ, 3), (IMQ, 20), (LAPLACE, 20), (MATERN32, 3), (MATERN32, 20)],
)
def test_no_bandwidth(run, kernel, d):
    """h = 0: particles at the same place share their scores, others nothing. A problem beside it has a bandwidth."""
    x, s, h = problem(2, 20, d)
    x[0, 10:] = x[0, :10]
    h[0] = 0
    got = run("svgd_direction", x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32)
    assert_near(got, direction(x, s, h, kernel), 1.5e-6)
    grad = torch.randn_like(s)
    got = run("svgd_direction_backward", False, grad, x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32, 7)
    assert (got[0][0] == 0).all() and got[2][0] == 0
    for value, wanted in zip(got, backward(grad, x, s, h, kernel), strict=True):
        assert_near(value, wanted, 5e-6)


def test_problems_do_not_depend_on_each_other(run):
    for shape in ((3, 40, 2), (3, 40, 20), (3, 40, 130)):
        x, s, h = problem(*shape)
        whole = run("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
        alone = run("svgd_direction", x[1:2], s[1:2], h[1:2], RBF, BETA, C, TEMPERATURE, FLOAT32)
        assert bits_equal(whole[1:2], alone)


def test_more_problems_than_a_grid_has_room_for(run):
    x, s, h = problem(5, 9, 3)
    constants = (RBF, BETA, C)
    calls = [
        ("svgd_direction", x, s, h, *constants, TEMPERATURE, FLOAT32),
        ("svgd_direction_backward", False, s, x, s, h, *constants, TEMPERATURE, FLOAT32, 7),
        ("kernel_stein_discrepancy", False, x, s, h, torch.randn(1, 9, 2), *constants),
        ("sq_dist_rank", 0, x, [3, 4], torch.rand(5, 2)),
    ]
    for call in calls:
        whole, portions = run(*call), run("patched", "stein.kernels", {"MOST_PROBLEMS": 2}, *call)
        for a, b in zip(*((r if isinstance(r, list) else [r]) for r in (whole, portions)), strict=True):
            assert bits_equal(a, b), call[0]


def test_empty_linear_and_float64(run):
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        x, s, h = problem(*shape)
        assert run("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32).shape == shape
        gradients = run("svgd_direction_backward", False, s, x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32, 5)
        assert [g.shape for g in gradients] == [x.shape, (0,), h.shape] and not gradients[2].any()
        sums = run("kernel_stein_discrepancy", False, x, s, h, torch.ones(1, shape[1], 2), RBF, BETA, C)
        assert sums.shape == (shape[0], 2) and not sums.any()
    x, s, h = problem(1, 9, 4)
    for arguments in ((x, s, h, LINEAR), (x.double(), s.double(), h.double(), RBF)):
        got = run("svgd_direction", *arguments, BETA, C, TEMPERATURE, FLOAT32)
        assert bits_equal(got, reference.svgd_direction(*arguments, BETA, C, TEMPERATURE))


def backward(grad: Tensor, x: Tensor, s: Tensor, h: Tensor, kernel: int) -> list[Tensor]:
    operands = (t.double() for t in (grad, x, s, h))
    return reference.svgd_direction_backward(*operands, kernel, BETA, C, TEMPERATURE, FLOAT32, 7)


@pytest.mark.parametrize("kernel", NATIVE)
def test_backward(run, kernel):
    for shape, small in (((1, 1, 1), False), ((2, 37, 3), False), ((1, 130, 20), True), ((1, 40, 100), True)):
        x, s, h = problem(*shape)
        grad = torch.randn_like(x)
        got = run("svgd_direction_backward", small, grad, x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32, 7)
        for value, wanted in zip(got, backward(grad, x, s, h, kernel), strict=True):
            assert_near(value, wanted, 5e-6)


def test_backward_gives_what_is_needed(run):
    x, s, h = problem(2, 20, 5)
    x, s = x.bfloat16(), s.half()
    grad = torch.randn_like(x)
    exact = backward(grad, x, s, h, RBF)
    for needs in (0, 1, 2, 4):
        got = run("svgd_direction_backward", False, grad, x, s, h, RBF, BETA, C, TEMPERATURE, TF32, needs)
        for i, (value, wanted, operand) in enumerate(zip(got, exact, (x, s, h), strict=True)):
            assert value.dtype == operand.dtype
            if needs >> i & 1:
                assert_near(value, wanted, 1e-2)
            else:
                assert value.shape == (0,)


@pytest.mark.parametrize("kernel", FINITE)
def test_discrepancy(run, kernel):
    for (batch, n, d), m, small in (((1, 1, 2), 1, False), ((2, 37, 3), 1, False), ((1, 130, 20), 70, True)):
        x, s, h = problem(batch, n, d)
        for shared in (True, False):
            w = torch.randn(1 if shared else batch, n, m)
            got = run("kernel_stein_discrepancy", small, x, s, h, w, kernel, BETA, C)
            assert got.dtype == torch.float64
            operands = (t.double() for t in (x, s, h, w))
            exact = ksd_reference.kernel_stein_discrepancy(*operands, kernel, BETA, C)
            # The sum of n^2 terms of either sign.
            size = ksd_reference.kernel_stein_discrepancy(
                x.double(), s.double(), h.double(), torch.ones(1, n, 1).double(), kernel, BETA, C
            )
            scale = max(exact.abs().max(), size.abs().max() / n**0.5)
            assert (got - exact).abs().max() <= 3e-6 * scale


def distances(x: Tensor) -> Tensor:
    """The kernel's own, sorted: a chain of fma in float32."""
    t = torch.zeros(x.shape[0], x.shape[1], x.shape[1])
    for column in x.float().unbind(2):
        difference = (column.unsqueeze(2) - column.unsqueeze(1)).double()
        t = (difference * difference + t.double()).float()
    above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return t[:, above].sort(1).values


def clusters() -> Tensor:
    return torch.cat([torch.randn(1, 20, 3) * 1e-3, torch.randn(1, 20, 3) + 100], 1)


PARTICLES = {
    "pair": lambda: torch.randn(1, 2, 1),
    "problems": lambda: torch.randn(2, 37, 3),
    "wide": lambda: torch.randn(1, 66, 9),
    "lattice": lambda: torch.randint(0, 3, (1, 66, 2)).float(),
    "coincident": lambda: torch.ones(1, 20, 2),
    "clusters": clusters,
    "bf16": lambda: torch.randn(1, 40, 5).bfloat16(),
    "infinite": lambda: torch.cat(
        [torch.randn(1, 40, 2), torch.tensor([[[torch.inf, 0], [torch.nan, 0]]])], 1
    ),
}


@pytest.mark.parametrize("kind", PARTICLES)
def test_ranks_are_exact(run, kind):
    x = PARTICLES[kind]()
    expected = distances(x)
    count = expected.shape[1]
    ranks = sorted({0, count // 3, (count - 1) // 2, count // 2, count - 1, count * 19 // 20})
    expected = expected[:, ranks]
    hints = [None, expected * 1.01]
    if kind == "problems":
        hints += [expected * 100, torch.full_like(expected, torch.nan)]
    for hint in hints:
        assert bits_equal(run("sq_dist_rank", 0, x, ranks, hint).nan_to_num(-1), expected.nan_to_num(-1)), (
            hint
        )
    assert bits_equal(run("sq_dist_rank", None, x, ranks).nan_to_num(-1), expected.nan_to_num(-1))
    # A sample of so few pairs misses some ranks.
    assert bits_equal(run("sq_dist_rank", 256, x, ranks).nan_to_num(-1), expected.nan_to_num(-1))


def test_ranks_of_few_particles_in_many_dimensions(run):
    x = torch.randn(2, 30, 600)
    got = run("sq_dist_rank", None, x, [0, 100, 434])
    exact = torch.stack([torch.pdist(p.double()).square().sort().values for p in x])
    torch.testing.assert_close(got.double(), exact[:, [0, 100, 434]], rtol=1e-6, atol=0)


def test_no_ranks(run):
    assert run("sq_dist_rank", 0, torch.randn(2, 5, 3), []).shape == (2, 0)


# Machine code.


def assert_tidy(code) -> None:
    assert code.spills == 0 and code.local == 0
    # Sums of floats have an order.
    assert not [a for a in code.atomics if re.search(r"F32|F16|F64|FTZ", a)]


# Instructions of six products of 64 x 64 x 64 a program of 128 (sm_80: 64) rows. Some versions of Triton peel a part
# of the loop off for Blackwell, whose products then stand there twice.
TENSOR = {80: 96, 90: 24, 100: 48}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_tiles_use_tensor_cores_and_whole_vectors(capability):
    code = aot.tile(RBF, 64, capability)
    assert_tidy(code)
    assert code.tensor >= TENSOR[capability]
    # Halves of 128 rows by 8 warps are four vectors a thread, by 4 warps of 64 rows too, and two of the others.
    assert code.loads_128 >= 16 and code.stores_128 == 8
    assert code.shared <= (99 if capability == 80 else 227) * 1024


@pytest.mark.parametrize(
    ("kernel", "width", "split", "sums"),
    [
        (RBF, 128, True, "k"), (RBF, 64, False, "k"), (IMQ, 64, True, "kg"), (IMQ, 128, True, "g"),
    ],
)  # fmt: skip
def test_compiled_variants_keep_to_registers(kernel, width, split, sums):
    code = aot.tile(kernel, width, 90, split, sums)
    assert_tidy(code)
    assert code.tensor > 0 and code.shared <= 227 * 1024
    if not split:
        assert code.registers <= 128  # two programs a multiprocessor


@pytest.mark.parametrize("name", ["inner", "product", "quadratic", "pairs", "count", "direct3", "direct8"])
def test_other_compiled_kernels_keep_to_registers(name):
    code = aot.other(name, 90)
    assert_tidy(code)
    assert (code.tensor > 0) == (name in ("inner", "product", "quadratic"))
    if name in ("inner", "product", "pairs"):
        assert code.loads_128 > 0
    assert bool(code.atomics) == (name == "count")


def test_compiled_for_older_gpus():
    for code in (aot.tile(IMQ, 64, 80), aot.tile(RBF, 128, 80), aot.other("inner", 80)):
        assert_tidy(code)
        assert code.tensor > 0 and code.shared <= 99 * 1024


# Sums that cancel where they are folded: tests/stein/test_cancellation.py.


def clustered(n: int, d: int, h: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """A problem of two clusters of width 1, 10^4 apart, and beside it one with a bandwidth that is not sharp."""
    base = torch.randn(2, n, d)
    side = torch.stack([torch.arange(n) % 2 * 1e4, torch.zeros(n)]).unsqueeze(2)
    return base + side / d**0.5, -base, torch.tensor([h * d, d])


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("d", [1, 2, 8, 20, 130])
def test_clusters_far_apart(run, kernel, d):
    x, s, h = clustered(40, d)
    got = run("svgd_direction", x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32)
    exact = direction(x, s, h, kernel)
    for one, other in zip(got, exact, strict=True):
        assert_near(one, other, 2e-6)
    grad = torch.randn_like(s)
    found = run("svgd_direction_backward", True, grad, x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32, 7)
    for value, wanted in zip(found, backward(grad, x, s, h, kernel), strict=True):
        for one, other in zip(value, wanted, strict=True):
            assert_near(one, other, 1e-5)


@pytest.mark.parametrize("kernel", FINITE)
@pytest.mark.parametrize("d", [2, 20])
def test_discrepancy_of_clusters_far_apart(run, kernel, d):
    x, s, h = clustered(40, d)
    s = s + 10.0
    got = run("kernel_stein_discrepancy", True, x, s, h, torch.ones(1, 40, 1), kernel, BETA, C)
    exact = ksd_reference.kernel_stein_discrepancy(
        *(t.double() for t in (x, s, h, torch.ones(1, 40, 1))), kernel, BETA, C
    )
    assert ((got - exact).abs() < 3e-6 * exact.abs()).all()
