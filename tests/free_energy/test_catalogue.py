"""C++, Triton, reference, means, samples and the page list what the catalogue of the likelihoods does, in its order."""

import inspect
import re

import pytest
import torch

import fekernels as fe
from fekernels._catalogue.free_energy import CATEGORICAL, CODES, LIKELIHOODS, NAMES, REDUCTIONS, Target
from fekernels._runtime import extension
from fekernels.models.networks import Output
from fekernels.reference.free_energy import free_energy as reference
from fekernels.reference.free_energy import likelihoods as formulas
from tests.free_energy import test_likelihood_domains, test_losses, test_numerics
from tests.support import ROOT, oracle
from tests.support.free_energy import GROUPS, KINDS, KL, LARGE, SMALL, cases
from tests.support.free_energy_extremes import EXTREMES
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


@CPP
def test_the_reductions_of_the_cpp_sources():
    text = (ROOT / "csrc/formulas/free_energy_codes.h").read_text()
    (listed,) = re.findall(r"enum class Reduction : int32_t \{ ([^}]+) \};", text)
    assert [name.removeprefix("k").lower() for name in listed.split(", ")] == list(REDUCTIONS)
    extension.load()
    run, count = torch.ops.fekernels_native.free_energy, len(REDUCTIONS)
    for other in (-1, count):
        with pytest.raises(RuntimeError, match=rf"reduction must be in \[0, {count}\); got {other}"):
            run([torch.ones(2, 1)], torch.zeros(2, 1), None, [], None, [], 0, other, 1.0, 0, False)


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


def test_every_table_of_the_tests_has_a_row_for_each():
    """A test that goes through such a table says nothing of a likelihood that it lacks."""
    pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    from tests.fuzz import energies, free_energy_problems

    elementwise = [row for row in LIKELIHOODS if not row.classes]
    bounded = {row.name for row in LIKELIHOODS if any(parameter.not_negative for parameter in row.parameters)}
    tables = {
        "PARAMS of test_losses.py": (test_losses.PARAMS, {row.name for row in elementwise}),
        "INSIDE of test_likelihood_domains.py": (test_likelihood_domains.INSIDE, bounded),
        "KINDS of fuzz/free_energy_problems.py": (free_energy_problems.KINDS, set(NAMES)),
        "TERMS of fuzz/energies.py": (energies.TERMS, set(NAMES)),
        "EXACT of support/oracle.py": (
            oracle.EXACT,
            {row.name for row in elementwise} | {*test_numerics.KLS},
        ),
        "EXTREMES of support/free_energy_extremes.py": (
            EXTREMES,
            {row.term for row in elementwise} | {*test_numerics.KLS},
        ),
    }
    wrong = {where: wanted ^ set(table) for where, (table, wanted) in tables.items() if wanted != set(table)}
    assert not wrong, f"names that a table lacks, or that are no likelihood's: {wrong}"
    for table in (test_losses.PARAMS, test_likelihood_domains.INSIDE, free_energy_problems.KINDS):
        for name, values in table.items():
            assert len(values) == len(fe.likelihoods.PARAMETERS[name]), name
    for row in elementwise:
        assert len(test_numerics.drawn(row.term, 3)) == 1 + len(row.parameters), row.term


def paragraph(text, begin, end):
    """From the one to the other, in one line."""
    return " ".join(text[text.index(begin) :].split(end)[0].split())


def page(path, begin, end):
    return paragraph((ROOT / path).read_text(), begin, end)


def test_domains_are_said_in_full():
    """Where a text lists them: what a parameter, and what a target must be."""
    validated = {
        "free_energy's validate": paragraph(fe.free_energy.__doc__, " validate: ", " ignore_index: "),
        "docs/free_energy.md": page("docs/free_energy.md", "`validate=True` checks", "## "),
    }
    all_parameters = validated | {
        "fe.likelihoods": fe.likelihoods.__doc__.replace("_", " "),
        "docs/likelihoods.md": page("docs/likelihoods.md", "* Outside the domain", "\n* "),
    }
    further = all_parameters | {  # than the first
        "docs/vae.md": page("docs/vae.md", "**Likelihoods.**", "\n\n"),
        "models.networks.Output": " ".join(Output.__doc__.split()),
    }
    for row in LIKELIHOODS:
        for i, parameter in enumerate(row.parameters):
            if parameter.not_negative:
                name = parameter.name.replace("_", " ")
                lacking = [
                    where for where, text in (further if i else all_parameters).items() if name not in text
                ]
                assert not lacking, f"{row.name}: {name}"
        if row.target is not Target.REAL:
            lacking = [where for where, text in validated.items() if row.target.value.text not in text]
            assert not lacking, f"{row.name}: {row.target.value.text}"


def test_no_text_counts_the_likelihoods():
    """The number would be wrong from the next on."""
    counted = re.compile(
        r"\b(?:five|six|seven|eight|nine|ten|eleven|twelve|thirteen) (?:likelihoods|others|more)\b", re.I
    )
    pages = ROOT / "README.md", ROOT / "CONTRIBUTING.md"  # a changelog counts those of its release
    texts = [*pages, *(ROOT / "docs").rglob("*.md"), *(ROOT / "fekernels").rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in texts
        for line in path.read_text().splitlines()
        if "likelihood" in line and counted.search(line)
    ]
    assert not found


def test_the_contract_has_cases_of_each():
    assert list(GROUPS.values()) == [*range(len(LIKELIHOODS)), KL]
    for code in range(len(LIKELIHOODS)):
        assert len(cases(code)) >= 20 and len(cases(code, small=True)) >= 8
        assert code == CATEGORICAL or {case.shape for case in cases(code)} >= {*SMALL, *LARGE}
        kinds = {case.kinds[: len(LIKELIHOODS[code].parameters)] for case in cases(code)}
        assert all(
            {kind[i] for kind in kinds} == set(KINDS) for i in range(len(LIKELIHOODS[code].parameters))
        ) or (code == CATEGORICAL)
