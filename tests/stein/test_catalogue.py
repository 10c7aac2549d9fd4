"""C++, Triton, reference, public classes and the page list what the catalogue of Stein kernels does, in its order."""

import ast
import re
from dataclasses import fields

import pytest
import torch

import fekernels as fe
from fekernels._catalogue.stein import CODES, KERNELS, LINEAR, NAMES, PRECISION_NAMES, Distance
from fekernels._runtime import extension
from fekernels.reference.stein import kernel_stein_discrepancy as discrepancy_reference
from fekernels.reference.stein import kernels as formulas
from fekernels.reference.stein import svgd_direction as direction_reference
from tests.support import ROOT
from tests.support.implementations import Place
from tests.support.stein_exact import PROFILES, profile

HEADER = (ROOT / "csrc/formulas/radial_kernels.h").read_text()
RADIAL = [row for row in KERNELS if row.distance is not None]
NATIVE = [row for row in KERNELS if row.native]
BETA, C = -0.3, 1.2
CPP = pytest.mark.skipif(
    Place("cpp", "cpu").obstacle() is not None, reason=f"no C++ kernels: {Place('cpp', 'cpu').obstacle()}"
)
EACH = pytest.mark.parametrize("row", NATIVE, ids=[row.name for row in NATIVE])


def test_codes_are_positions():
    assert [CODES[row.name] for row in KERNELS] == list(range(len(KERNELS))) and tuple(CODES) == NAMES
    assert KERNELS[: len(NATIVE)] == tuple(NATIVE), "those of C++ first, since position = code there too"
    assert [row.name for row in KERNELS if row.distance is None] == [KERNELS[LINEAR].name]


def test_the_list_of_the_cpp_sources():
    (listed,) = re.findall(r"using RadialKernels = KernelList<(.+)>;", HEADER)
    assert [f"{name}<F>" for name in structs()] == listed.split(", ")
    said = [re.search(r'kName = "(\w+)"', body) for body in structs().values()]
    assert [name and name[1] for name in said] == [row.name for row in NATIVE]
    for row, body in zip(NATIVE, structs().values(), strict=True):
        assert ("kNeedsDifferences = true" in body) == (row.distance is Distance.ROOT), row.name
        assert ("kHasDiscrepancy = false" in body) == (not row.discrepancy), row.name


def structs() -> dict[str, str]:
    return dict(re.findall(r"struct (\w+Kernel) : RadialKernel \{\n(.*?)\n\};", HEADER, re.S))


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A problem small enough for the form of few particles, one of tiles: no two kernels share a result at it."""
    generator = torch.Generator().manual_seed(0)
    x, s = (torch.randn(2, 70, 3, generator=generator) for _ in range(2))
    return x, s, torch.tensor([1.3, 2.1])


@CPP
@EACH
def test_a_code_is_the_same_formula_in_cpp(row):
    extension.load()
    native, code = torch.ops.fekernels_native, CODES[row.name]
    x, s, h = operands()
    wide = [t.double() for t in (x, s, h)]
    phi = native.svgd_direction(x, s, h, code, BETA, C, 0.7, 0)
    exact = direction_reference.svgd_direction(*wide, code, BETA, C, 0.7)
    torch.testing.assert_close(phi.double(), exact, rtol=1e-4, atol=1e-5)
    found = native.svgd_direction_backward(s, x, s, h, code, BETA, C, 0.7, 0, 7)
    exact = direction_reference.svgd_direction_backward(wide[1], *wide, code, BETA, C, 0.7, 0, 7)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    if row.discrepancy:
        weights = torch.ones(1, x.shape[1], 1)
        sums = native.kernel_stein_discrepancy(x, s, h, weights, code, BETA, C)
        exact = discrepancy_reference.kernel_stein_discrepancy(*wide, weights.double(), code, BETA, C)
        torch.testing.assert_close(sums, exact, rtol=1e-4, atol=1e-5)


def test_no_two_kernels_share_a_result():
    results = [
        direction_reference.svgd_direction(*operands(), code, BETA, C, 0.7) for code in range(len(KERNELS))
    ]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 1e-2 for other in results[:i]), NAMES[i]


@CPP
@pytest.mark.parametrize("code", sorted({-1, len(NATIVE), LINEAR, 1 << 32}))
def test_there_are_no_other_codes_in_cpp(code):
    extension.load()
    native, (x, s, h) = torch.ops.fekernels_native, operands()
    weights = torch.ones(1, x.shape[1], 1)

    def listed(rows) -> str:
        named = ", ".join(f"{CODES[row.name]} ({row.name})" for row in rows)
        return re.escape(f"kernel must be one of {named}; got ")

    finite = listed(row for row in NATIVE if row.discrepancy)
    with pytest.raises(RuntimeError, match=listed(NATIVE) + str(code)):
        native.svgd_direction(x, s, h, code, BETA, C, 1.0, 0)
    with pytest.raises(RuntimeError, match=listed(NATIVE) + str(code)):
        native.svgd_direction_backward(x, x, s, h, code, BETA, C, 1.0, 0, 7)
    for none in (code, *(CODES[row.name] for row in NATIVE if not row.discrepancy)):
        with pytest.raises(RuntimeError, match=finite + str(none)):
            native.kernel_stein_discrepancy(x, s, h, weights, none, BETA, C)


@pytest.mark.parametrize("row", RADIAL, ids=[row.name for row in RADIAL])
def test_the_formulas_of_the_reference_are_derivatives(row):
    """p_k = (-2)^k times the k-th derivative; at u = 0 what the catalogue says, far away nothing."""
    code, order = CODES[row.name], 3 if row.discrepancy else 2
    u = torch.tensor([1e-3, 0.4, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    found = formulas.radial(code, u, BETA, C, order)
    assert len(found) == order + 1
    for value, derivative in zip(found, found[1:], strict=False):
        (slope,) = torch.autograd.grad(value.sum(), u, retain_graph=True)
        torch.testing.assert_close(derivative, -2 * slope, rtol=1e-10, atol=1e-12)
    ends = torch.tensor([0.0, torch.inf], dtype=torch.float64)
    at_zero, far = torch.stack(formulas.radial(code, ends, BETA, C, 2)).unbind(1)
    assert at_zero[:2].tolist() == pytest.approx(row.at_zero(BETA, C), rel=1e-14) and not far.any()


@pytest.mark.parametrize("row", RADIAL, ids=[row.name for row in RADIAL])
def test_the_judges_profile_has_the_same_values_and_slope(row):
    u = torch.tensor([0.0, 1e-7, 1e-3, 0.4, 2.0, 30.0], dtype=torch.float64)
    values = profile(row.name, u)
    torch.testing.assert_close(values, formulas.radial(CODES[row.name], u, BETA, C, 0)[0], rtol=1e-12, atol=0)
    if row.discrepancy:  # else there is no slope at 0
        slope = (values[0] - values[1]) / u[1]
        assert slope.item() == pytest.approx(row.at_zero(BETA, C)[1] / 2, rel=1e-3)


def test_a_kernel_without_a_profile_has_no_judge():
    assert list(PROFILES) == [row.name for row in RADIAL]
    with pytest.raises(KeyError, match="'unknown' has no profile in tests/support/stein_exact.py"):
        profile("unknown", torch.zeros(()))


def test_the_formulas_of_triton():
    pytest.importorskip("triton", reason="triton is not installed")
    from fekernels.triton.stein import kernels as stein

    for row in NATIVE:
        assert getattr(stein, row.name.upper()).value == CODES[row.name]
        assert set(getattr(stein, row.name).arg_names) >= {"u", *row.domains}


def test_parameters_are_those_of_the_operators():
    for row in KERNELS:
        assert set(row.domains) <= {"beta", "c"}
        assert set(row.domains) == {field.name for field in fields(row)}, row.name


def test_the_classes_of_the_users():
    assert sorted(fe.kernels.__all__) == sorted(row.__name__ for row in KERNELS)
    for row in KERNELS:
        assert getattr(fe.kernels, row.__name__) is getattr(fe.stein, row.__name__) is row
        assert row.__name__ in fe.stein.__all__ and row.__name__.lower() == row.name


def test_the_page_has_a_row_for_each():
    text = (ROOT / "docs/svgd.md").read_text().split("## The direction")[1].split("**Cost.**")[0]
    rows = re.findall(r'^\| `"(\w+)"`[^|]*\|[^|]+\| (\w+) \|', text, re.M)
    assert rows == [(row.name, "finite" if row.discrepancy else "infinite") for row in KERNELS]


def test_precisions_are_listed_in_one_place():
    """A second list, or a number in place of a name, falls behind when there is another precision."""
    for path in (ROOT / "fekernels").rglob("*.py"):
        if path == ROOT / "fekernels/_catalogue/stein.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
                listed = node.keys if isinstance(node, ast.Dict) else node.elts
                names = {entry.value for entry in listed if isinstance(entry, ast.Constant)}
                assert not names & set(PRECISION_NAMES), f"{path}, line {node.lineno}"
            elif isinstance(node, ast.Compare) and ast.unparse(node.left) in ("precision", "self.precision"):
                (operator, *_), (number, *_) = node.ops, node.comparators
                by_number = isinstance(operator, (ast.Eq, ast.NotEq)) and isinstance(number, ast.Constant)
                assert not by_number, f"{path}, line {node.lineno}"


def test_systems_import_no_reference():
    for path in (ROOT / "fekernels/stein").glob("*.py"):
        assert "fekernels.reference" not in path.read_text(), path.name
