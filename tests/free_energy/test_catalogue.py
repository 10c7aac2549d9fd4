"""C++, Triton, reference, means, samples and the page list what the catalogue of the likelihoods does, in its order."""

import inspect
import re

import pytest
import torch

import fekernels as fe
from fekernels._catalogue.free_energy import CATEGORICAL, CODES, LIKELIHOODS, NAMES, REDUCTIONS
from fekernels._runtime import extension
from fekernels.reference.free_energy import free_energy as reference
from fekernels.reference.free_energy import likelihoods as formulas
from tests.support import ROOT
from tests.support.free_energy import GROUPS, KINDS, KL, LARGE, SMALL, cases
from tests.support.implementations import Place

CPP = pytest.mark.skipif(
    Place("cpp", "cpu").obstacle() is not None, reason=f"no C++ kernels: {Place('cpp', 'cpu').obstacle()}"
)


def test_codes_are_positions():
    assert [CODES[row.name][len(row.parameters)] for row in LIKELIHOODS] == list(range(len(LIKELIHOODS)))
    assert [row.classes for row in LIKELIHOODS].index(True) == CATEGORICAL
    assert len({row.term for row in LIKELIHOODS}) == len(LIKELIHOODS)


def test_the_list_of_the_cpp_sources():
    text = "".join((ROOT / f"csrc/formulas/{name}likelihoods.h").read_text() for name in ("count_", ""))
    (listed,) = re.findall(r"using Likelihoods = LikelihoodList<([^>]+)>;", text)
    names = re.split(r",\s+", listed)
    assert [re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in names] == [
        row.term for row in LIKELIHOODS
    ]
    structs = dict(re.findall(r"struct (\w+) : LikelihoodTraits \{(.*?)\n\};", text, re.S))
    assert set(structs) == set(names), "a formula without a code, or a code without a formula"
    for name, row in zip(names, LIKELIHOODS, strict=True):
        assert f"kParams = {len(row.parameters)};" in structs[name], name
        assert ("kClasses = true" in structs[name]) == row.classes, name


def call(run, code: int, count: int) -> list[torch.Tensor]:
    """Energies and gradients at one element, whose operands no two formulas or parameters share a result at."""
    if code == CATEGORICAL:
        params, target = [torch.tensor([[[0.3, -0.8, 1.1]]])] * count, torch.tensor([[2]])
    else:
        params = [torch.full((1, 1), value) for value in (0.7, 1.3, 2.9, 4.1)[:count]]
        target = torch.full((1, 1), 1.0)
    return run(
        params, target, None, [], None, [], code, REDUCTIONS.index("sum"), 1.0, (1 << count) - 1, False
    )


@CPP
@pytest.mark.parametrize("code", range(len(LIKELIHOODS)), ids=[row.term for row in LIKELIHOODS])
def test_a_code_is_the_same_formula_in_cpp(code):
    extension.load()
    native, count = torch.ops.fekernels_native.free_energy, len(LIKELIHOODS[code].parameters)
    exact = call(reference.free_energy, code, count)
    for got, expected in zip(call(native, code, count), exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for other in {1, 2, 3, 4} - {count}:
        with pytest.raises(RuntimeError, match=f"the likelihood has {count} parameters; got {other}"):
            call(native, code, other)


@CPP
@pytest.mark.parametrize("code", [-1, len(LIKELIHOODS), 1 << 16])
def test_there_are_no_other_codes_in_cpp(code):
    extension.load()
    with pytest.raises(RuntimeError, match="the likelihood has 0 parameters; got 1"):
        call(torch.ops.fekernels_native.free_energy, code, 1)


def test_a_reduction_is_the_same_in_cpp_and_the_reference():
    if Place("cpp", "cpu").obstacle() is None:
        extension.load()
        runs = (torch.ops.fekernels_native.free_energy, reference.free_energy)
    else:
        runs = (reference.free_energy,)
    params, target = [torch.tensor([[1.0], [2.0]])], torch.zeros(2, 1)
    for run in runs:
        found = [run(params, target, None, [], None, [], 0, how, 1.0, 0, False)[1] for how in range(3)]
        by_name = dict(zip(REDUCTIONS, found, strict=True))
        assert by_name["none"].tolist() == [1.0, 4.0] and (by_name["mean"], by_name["sum"]) == (2.5, 5.0)


def test_the_formulas_of_the_reference_take_these_parameters():
    for row, energy, gradient in zip(LIKELIHOODS, formulas.ENERGIES, formulas.GRADIENTS, strict=True):
        for formula in (energy, gradient):
            inspect.signature(formula).bind(*range(1 + len(row.parameters)))


def test_the_terms_of_triton():
    pytest.importorskip("triton", reason="triton is not installed")
    from fekernels.triton.free_energy import free_energy
    from fekernels.triton.free_energy import likelihoods as terms

    assert tuple(row.term for row in LIKELIHOODS) == free_energy.TERMS
    for row in LIKELIHOODS:
        if not row.classes:
            assert len(getattr(terms, row.term).arg_names) == len(row.parameters) + 1, row.term


def test_means_and_samples_of_all_names():
    assert NAMES == fe.likelihoods.NAMES == tuple(fe.likelihoods.PARAMETERS) == tuple(formulas.MEANS)
    for name in NAMES:
        given = fe.likelihoods.PARAMETERS[name]
        inspect.signature(formulas.MEANS[name]).bind(*given)
        inspect.signature(formulas.SAMPLES[name]).bind(None, *given)
    assert fe.likelihoods.OPTIONAL == {"gaussian": ("log_variance",)}


def test_the_page_has_a_row_for_each():
    text = (ROOT / "docs/likelihoods.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text.split("## Formulas")[0], re.M)
    assert [(name, params.count("> 0")) for name, params in rows] == [
        (row.name, sum(parameter.not_negative for parameter in row.parameters)) for row in LIKELIHOODS
    ]


def test_the_contract_has_cases_of_each():
    assert list(GROUPS.values()) == [*range(len(LIKELIHOODS)), KL]
    for code in range(len(LIKELIHOODS)):
        assert len(cases(code)) >= 20 and len(cases(code, small=True)) >= 8
        assert code == CATEGORICAL or {case.shape for case in cases(code)} >= {*SMALL, *LARGE}
        kinds = {case.kinds[: len(LIKELIHOODS[code].parameters)] for case in cases(code)}
        assert all(
            {kind[i] for kind in kinds} == set(KINDS) for i in range(len(LIKELIHOODS[code].parameters))
        ) or (code == CATEGORICAL)
