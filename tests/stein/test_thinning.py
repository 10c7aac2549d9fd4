"""The Stein kernel as a matrix, and Stein thinning: against autograd and brute force, and against random thinning."""

import pytest
import torch

import fekernels as fe
from fekernels import stein
from fekernels._catalogue.stein import KERNELS as CATALOGUE
from tests.support.stein import KERNELS, ROOTS, Case
from tests.support.stein_exact import exact_terms

FINITE = [row.name for row in CATALOGUE if row.discrepancy]
SIZES = [
    (20, 3, ()),
    (13, 9, (2,)),
    (11, 20, ()),
]  # distances by differences, products by inner ones, both so


def exact_matrix(problem, name):
    kp, size = exact_terms(problem, name)
    return kp.detach(), size.max()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FINITE)
def test_the_matrix_is_the_kernels_definition(name, size, backend):
    problem = Case(*size).make().double()
    kp, largest = exact_matrix(problem, name)
    given = [t.to(backend.device) for t in (problem.x, problem.s)]
    h = problem.h.to(backend.device)
    found = stein.kernel_matrix(*given, kernel=KERNELS[name], bandwidth=h)
    assert found.dtype == torch.float64 and found.shape == kp.shape
    torch.testing.assert_close(found.cpu(), kp, rtol=0, atol=1e-11 * largest)
    some = slice(2, 7)
    part = stein.kernel_matrix(*given, *(t[..., some, :] for t in given), kernel=KERNELS[name], bandwidth=h)
    torch.testing.assert_close(part.cpu(), kp[..., some], rtol=0, atol=1e-11 * largest)
    single = stein.kernel_matrix(*(t.float() for t in given), kernel=KERNELS[name], bandwidth=h.float())
    assert single.dtype == torch.float32


def test_blocks_of_rows_are_the_whole(monkeypatch, backend):
    problem = Case(50, 20, (2,)).make().to(backend.device)
    whole = stein.kernel_matrix(problem.x, problem.s)
    monkeypatch.setattr("fekernels.reference.stein.kernel_matrix.PAIRS", 700)
    torch.testing.assert_close(stein.kernel_matrix(problem.x, problem.s), whole, rtol=1e-6, atol=1e-6)


def test_its_mean_is_the_discrepancy(backend):
    problem = Case(60, 3, (2,)).make().to(backend.device)
    for name in FINITE:
        kernel = KERNELS[name]
        mean = stein.kernel_matrix(problem.x, problem.s, kernel=kernel).mean((-1, -2))
        wanted = fe.kernel_stein_discrepancy(problem.x, problem.s, kernel=kernel, statistic="v")
        torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-5)


def test_its_gradients(backend):
    x, s, y, r = (torch.randn(n, 3, dtype=torch.float64, device=backend.device) for n in (4, 4, 5, 5))
    x[0] = y[1]
    operands = [t.requires_grad_() for t in (x, s, y, r)]
    for name in FINITE:
        if name not in ROOTS:  # whose third derivative may have no value where two coincide
            torch.autograd.gradcheck(
                lambda *o, k=name: stein.kernel_matrix(*o, kernel=k, bandwidth=2.0), operands
            )


@pytest.mark.parametrize("d", [3, 12, 20])
@pytest.mark.parametrize("name", FINITE)
def test_its_gradients_by_transforms(name, d, backend):
    """torch.func, forward mode and batches of gradients, which torch.cdist has wrong or no derivatives for."""
    x, s = (torch.randn(2, 5, d, dtype=torch.float64, device=backend.device) for _ in range(2))

    def function(x, s):
        return stein.kernel_matrix(x, s, kernel=KERNELS[name], bandwidth=2.0 * d)

    wanted = torch.autograd.functional.jacobian(function, (x, s))
    matrix = function(x.requires_grad_(), s.requires_grad_())
    units = torch.eye(matrix.numel(), dtype=x.dtype, device=x.device).view(-1, *matrix.shape)
    by_rows = torch.vmap(lambda g: torch.autograd.grad(matrix, (x, s), g, retain_graph=True))(units)
    x, s = x.detach(), s.detach()
    every = [
        torch.autograd.functional.jacobian(function, (x, s), vectorize=True),
        [gradient.view(*matrix.shape, *x.shape) for gradient in by_rows],
        torch.func.jacrev(function, (0, 1))(x, s),
        torch.func.jacfwd(function, (0, 1))(x, s),
    ]
    for found in every:
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_empty_matrices(backend):
    for n, m in ((0, 3), (3, 0), (0, 0)):
        x, y = (torch.ones(2, k, 4, device=backend.device) for k in (n, m))
        assert stein.kernel_matrix(x, x, y, y, bandwidth=1.0).shape == (2, n, m)


# Thinning.


def greedy(kp, m):
    """By the discrepancy of every candidate set itself."""
    picks = []
    for _ in range(m):
        values = [kp[picks + [i]][:, picks + [i]].mean().item() for i in range(len(kp))]
        picks.append(min(range(len(kp)), key=values.__getitem__))
    return picks


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FINITE)
def test_the_picks_are_those_of_brute_force(name, size, backend):
    problem = Case(*size).make()
    kp, _ = exact_matrix(problem, name)
    found = stein.thinning(
        problem.x.to(backend.device), problem.s.to(backend.device), 15, kernel=KERNELS[name],
        bandwidth=problem.h.to(backend.device),
    )  # fmt: skip
    assert found.dtype == torch.int64 and found.shape == (*size[2], 15)
    for picks, matrix in zip(found.cpu().reshape(-1, 15), kp.reshape(-1, *kp.shape[-2:]), strict=True):
        assert picks.tolist() == greedy(matrix, 15)
    fewer = stein.thinning(problem.x.to(backend.device), problem.s.to(backend.device), 4, kernel=KERNELS[name],
                           bandwidth=problem.h.to(backend.device))  # fmt: skip
    assert torch.equal(fewer, found[..., :4])


def test_a_biased_chain_is_put_right(backend):
    """Half of the draws are of a burn-in, three standard deviations off: random picks keep it, these do not."""
    torch.manual_seed(3)
    n, m, d = 2000, 60, 3
    draws = torch.randn(n, d, device=backend.device)
    draws[: n // 2, 0] += torch.linspace(3, 0, n // 2, device=backend.device)
    scores = -draws
    picks = stein.thinning(draws, scores, m)
    chosen = draws[picks]

    def discrepancy(x):
        return fe.kernel_stein_discrepancy(x, -x, kernel="imq", bandwidth=2.0, statistic="v").item()

    random = [draws[torch.randperm(n)[:m].to(draws.device)] for _ in range(200)]
    assert discrepancy(chosen) < 0.25 * min(map(discrepancy, random))
    # The mean of m independent draws has an error of 1/sqrt(m) = .13 a coordinate, of random picks .75 in the first.
    assert chosen.mean(0).abs().max() < 0.13 < 0.5 < torch.stack(random).mean((0, 1))[0]
    assert (chosen.var(0) - 1).abs().max() < 0.3


def test_no_matrix_of_all_pairs_is_made():
    n = 200_000
    x = torch.randn(n, 2)
    picks = stein.thinning(x, -x, 3, bandwidth=1.0)  # 40e9 pairs
    assert len(picks) == 3 and x[picks[0]].norm() < 0.05  # the mode: where kp(x, x) is least


def test_the_median_is_of_a_thousand(backend):
    torch.manual_seed(4)
    x = torch.randn(2500, 2, device=backend.device)
    h = stein.median_bandwidth(x[::3])
    assert torch.equal(stein.thinning(x, -x, 9), stein.thinning(x, -x, 9, bandwidth=h))
    assert stein.thinning(x[:1], -x[:1], 2).tolist() == [0, 0]
    assert stein.thinning(x[:3], -x[:3], 7).shape == (7,)  # more than there are
