"""The Triton Stein kernels alone, without a GPU: in parts and portions, by precision, and as machine code.

What they have in common with the other backends: tests/contract, which runs them interpreted. What runs them on a GPU:
`pytest -m gpu tests/contract` and `tests/gpu/stein.py`. The interpreter does not round as tensor cores do: what it
shows of the precisions is the splitting of operands.
"""

import re

import pytest
import torch
from torch import Tensor

from fekernels._catalogue.stein import CODES, PRECISION_NAMES
from fekernels.reference.stein import svgd_direction as reference
from tests.support.stein import APART, BETA, EMPTY_SIZES, ORDINARY, TEMPERATURE, C, Row, Size
from tests.support.stein_exact import assert_close, gradients_of, weighted_sums
from tests.support.stein_kernels import by_fma
from tests.support.stein_ranks import RankRow, some_ranks
from tests.support.tensors import bits_equal

pytest.importorskip("triton", reason="triton is not installed")

from tests.support.triton import stein_machine_code as aot  # noqa: E402

RBF, IMQ, LINEAR = (CODES[name] for name in ("rbf", "imq", "linear"))
FLOAT32, TF32 = (PRECISION_NAMES.index(name) for name in ("fp32", "tf32"))
# Of a direction in 20 dimensions: the least error of one product of rounded operands, and the most.
ERRORS = {"fp32": (0, 1e-6), "tf32": (2e-5, 2e-3), "bf16x3": (0, 5e-5)}


def problem(batch: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(Row(Size(batch, n, d), ORDINARY, "rbf").case.make().leaves())  # type: ignore[return-value]


def direction(x: Tensor, s: Tensor, h: Tensor, kernel: int) -> Tensor:
    return reference.svgd_direction(x.double(), s.double(), h.double(), kernel, BETA, C, TEMPERATURE)


def assert_near(got: Tensor, exact: Tensor, tolerance: float) -> None:
    error, scale = (got.double() - exact).abs().max(), exact.abs().max()
    assert got.shape == exact.shape and error <= tolerance * scale, (
        f"off by {error / scale:.1e} of the largest"
    )


@pytest.mark.parametrize(("d", "stretch"), [(2, 4096), (2, 64), (16, 4096)])
def test_sums_in_parts(interpret, d, stretch):
    """Few blocks of rows: the sums over 300 particles are made by several programs each."""
    x, s, h = problem(1, 300, d)
    call = ("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
    got = interpret("patched", "stein.svgd_direction", {"STRETCH": stretch}, *call)
    assert_near(got, direction(x, s, h, RBF), 1.5e-6)


ROWS_OF = [
    (Size(2, 75, 3), "rbf", False), (Size(1, 140, 20), "rbf", False), (Size(1, 140, 20), "imq", False),
    (Size(1, 140, 37), "laplace", True), (Size(1, 70, 130), "rbf", True), (Size(1, 20, 5), "linear", False),
]  # fmt: skip


@pytest.mark.parametrize(("size", "kernel", "small"), ROWS_OF, ids=str)
def test_some_rows_have_the_bits_of_all(interpret, size, kernel, small):
    """Those that one of several processes holds: from within a block, to a whole one's end, the last, and none."""
    x, s, h = problem(*size)
    n = size.n
    parts = [(n // 3 + 1, n), (64, min(n, 128)), (5, 7), (3, 3)]
    parts = [(begin, end) for begin, end in parts if begin <= end]
    call = (x, s, h, CODES[kernel], BETA, C, TEMPERATURE, FLOAT32)
    whole, *rows = interpret("svgd_direction_rows", small, parts, *call)
    for (begin, end), some in zip(parts, rows, strict=True):
        assert bits_equal(some, whole[:, begin:end])


@pytest.mark.parametrize("sharp", [False, True])
def test_some_rows_of_a_sharp_bandwidth(interpret, sharp):
    x, s, h = problem(1, 100, 20)
    call = (x, s, h * (1e-6 if sharp else 1.0), RBF, BETA, C, TEMPERATURE, FLOAT32)
    whole, some = interpret("svgd_direction_rows", False, [(40, 90)], *call)
    assert bits_equal(some, whole[:, 40:90])


@pytest.mark.parametrize(
    "row", [Row(Size(1, 70, 20), ORDINARY, "imq"), Row(Size(1, 70, 37), APART, "laplace")], ids=str
)
def test_gradients_by_several_strips(interpret, row):
    """And inner products in parts of 32 coordinates."""
    case, upstream, exact, scales = gradients_of(row)
    call = (upstream, *case.leaves(), CODES[row.kernel], BETA, C, TEMPERATURE, FLOAT32, 7)
    found = interpret("svgd_direction_backward", True, *call)
    for got, wanted, scale in zip(found, exact, scales, strict=True):
        assert_close(got, wanted, scale, str(row))


def test_a_discrepancy_by_several_strips(interpret):
    case, weights = Row(Size(1, 70, 37), ORDINARY, "imq").case.make(), torch.randn(1, 70, 70)
    got = interpret("kernel_stein_discrepancy", True, *case.leaves(), weights, IMQ, BETA, C)
    assert_close(got.float(), *weighted_sums(case, "imq", weights))


def test_precisions(interpret):
    x, s, h = problem(1, 40, 20)
    exact = direction(x, s, h, IMQ)
    for precision, name in enumerate(PRECISION_NAMES):
        least, most = ERRORS[name]
        got = interpret("svgd_direction", x, s, h, IMQ, BETA, C, TEMPERATURE, precision)
        assert_near(got, exact, most)
        # One product of rounded operands does lose digits.
        assert (got.double() - exact).abs().max() >= least * exact.abs().max()
    grad = torch.randn_like(s)
    call = (grad, x, s, h, IMQ, BETA, C, TEMPERATURE, TF32, 1)
    (got, *_) = interpret("svgd_direction_backward", False, *call)
    wide = (t.double() for t in call[:4])
    assert_near(got, reference.svgd_direction_backward(*wide, *call[4:])[0], 1e-2)


def test_one_particle_far_away(interpret):
    """Halves of float16, scaled for the farthest, keep the others' digits when one is 10^4 times as far."""
    x, s, h = problem(1, 60, 20)
    x[0, 7] = 1e4
    s[0, 7, 3] = 1e5
    got = interpret("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32)
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


def test_a_problem_without_a_bandwidth_beside_one_with(interpret):
    """h = 0 is a way of its own: particles at one place share their scores, others nothing."""
    for d, kernel in ((3, RBF), (20, IMQ)):
        x, s, h = problem(2, 20, d)
        x[0, 10:] = x[0, :10]
        h[0] = 0
        got = interpret("svgd_direction", x, s, h, kernel, BETA, C, TEMPERATURE, FLOAT32)
        for one, wanted in zip(got, direction(x, s, h, kernel), strict=True):
            assert_near(one, wanted, 1.5e-6)


def test_more_problems_than_a_grid_has_room_for(interpret):
    x, s, h = problem(3, 5, 3)
    constants = (RBF, BETA, C)
    calls = [
        ("svgd_direction", x, s, h, *constants, TEMPERATURE, FLOAT32),
        ("svgd_direction_backward", False, s, x, s, h, *constants, TEMPERATURE, FLOAT32, 7),
        ("kernel_stein_discrepancy", False, x, s, h, torch.randn(1, 5, 2), *constants),
        ("sq_dist_rank", 0, x, [3, 4], torch.rand(3, 2)),
    ]
    for call in calls:
        whole = interpret(*call)
        portions = interpret("patched", "stein.kernels", {"MOST_PROBLEMS": 2}, *call)
        for a, b in zip(*((r if isinstance(r, list) else [r]) for r in (whole, portions)), strict=True):
            assert bits_equal(a, b), call[0]


def test_empty_linear_and_float64(interpret):
    for size in EMPTY_SIZES:
        x, s, h = problem(*size)
        assert interpret("svgd_direction", x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32).shape == size
        call = (False, s, x, s, h, RBF, BETA, C, TEMPERATURE, FLOAT32, 5)
        gradients = interpret("svgd_direction_backward", *call)
        assert [g.shape for g in gradients] == [x.shape, (0,), h.shape] and not gradients[2].any()
        weights = torch.ones(1, size.n, 2)
        sums = interpret("kernel_stein_discrepancy", False, x, s, h, weights, RBF, BETA, C)
        assert sums.shape == (size.batch, 2) and not sums.any()
    x, s, h = problem(1, 9, 4)
    for arguments in ((x, s, h, LINEAR), (x.double(), s.double(), h.double(), RBF)):
        got = interpret("svgd_direction", *arguments, BETA, C, TEMPERATURE, FLOAT32)
        assert bits_equal(got, reference.svgd_direction(*arguments, BETA, C, TEMPERATURE))


@pytest.mark.parametrize("sample", [None, 256])
def test_ranks_by_a_sort_and_from_a_sample(interpret, sample):
    """A sample of so few pairs misses some ranks."""
    for kind in ("normal", "clusters", "nan"):
        x = RankRow(kind, Size(1, 40, 3), torch.float32, "none").make()
        ranks = some_ranks(40 * 39 // 2)
        above = torch.triu_indices(40, 40, 1)
        wanted = by_fma(x)[:, above[0], above[1]].sort(1).values[:, ranks]
        assert bits_equal(interpret("sq_dist_rank", sample, x, ranks).nan_to_num(-1), wanted.nan_to_num(-1))


def test_ranks_of_few_particles_in_many_dimensions(interpret):
    x = torch.randn(2, 30, 600)
    got = interpret("sq_dist_rank", None, x, [0, 100, 434])
    exact = torch.stack([torch.pdist(p.double()).square().sort().values for p in x])
    torch.testing.assert_close(got.double(), exact[:, [0, 100, 434]], rtol=1e-6, atol=0)


def test_no_ranks(interpret):
    assert interpret("sq_dist_rank", 0, torch.randn(2, 5, 3), []).shape == (2, 0)


# Machine code.


def assert_tidy(code) -> None:
    assert code.spills == 0 and code.local == 0
    # Sums of floats have an order.
    assert not [a for a in code.atomics if re.search(r"F32|F16|F64|FTZ", a)]


# Instructions of six products of 64 x 64 x 64 a program of 128 (sm_80: 64) rows. Some versions of Triton peel a part
# of the loop off for Blackwell, whose products then stand there twice.
TENSOR = {80: 96, 90: 24, 100: 48}


VARIANTS = [(RBF, 128, True, "k"), (RBF, 64, False, "k"), (IMQ, 64, True, "kg"), (IMQ, 128, True, "g")]
OTHERS = ("inner", "product", "quadratic", "pairs", "count", "direct3", "direct8")


@pytest.fixture(scope="module")
def all_compiled():
    """The first whose instructions are counted has all disassembled."""
    for capability in TENSOR:
        aot.tile(RBF, 64, capability)
    for kernel, width, split, sums in VARIANTS:
        aot.tile(kernel, width, 90, split, sums)
    for name in OTHERS:
        aot.other(name, 90)


@pytest.mark.usefixtures("all_compiled")
@pytest.mark.parametrize("capability", TENSOR)
def test_compiled_tiles_use_tensor_cores_and_whole_vectors(capability):
    code = aot.tile(RBF, 64, capability)
    assert_tidy(code)
    assert code.tensor >= TENSOR[capability]
    # Halves of 128 rows by 8 warps are four vectors a thread, by 4 warps of 64 rows too, and two of the others.
    assert code.loads_128 >= 16 and code.stores_128 == 8
    assert code.shared <= (99 if capability == 80 else 227) * 1024


@pytest.mark.usefixtures("all_compiled")
@pytest.mark.parametrize(("kernel", "width", "split", "sums"), VARIANTS)
def test_compiled_variants_keep_to_registers(kernel, width, split, sums):
    code = aot.tile(kernel, width, 90, split, sums)
    assert_tidy(code)
    assert code.tensor > 0 and code.shared <= 227 * 1024
    if not split:
        assert code.registers <= 128  # two programs a multiprocessor


@pytest.mark.usefixtures("all_compiled")
@pytest.mark.parametrize("name", OTHERS)
def test_other_compiled_kernels_keep_to_registers(name):
    code = aot.other(name, 90)
    assert_tidy(code)
    assert (code.tensor > 0) == (name in ("inner", "product", "quadratic"))
    if name in ("inner", "product", "pairs"):
        assert code.loads_128 > 0
    assert bool(code.atomics) == (name == "count")


def test_compiled_for_older_gpus():
    codes = [aot.tile(IMQ, 64, 80), aot.tile(RBF, 128, 80), aot.other("inner", 80)]
    for code in codes:
        assert_tidy(code)
        assert code.tensor > 0 and code.shared <= 99 * 1024
