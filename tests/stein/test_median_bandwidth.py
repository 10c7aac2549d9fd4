"""Median bandwidths: the four conventions against brute force, few particles, hints, compilation."""

import math

import pytest
import torch

import fekernels as fe
from fekernels import stein

CONVENTIONS = ("liu_wang", "pairs", "blackjax", "numpyro")


def middle(values):
    """The mean of the two middle ones of an even count."""
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def brute(x, convention):
    """In float64 from the particles' own differences."""
    n = len(x)
    every = (x.double()[:, None] - x.double()[None]).square().sum(-1)
    i, j = torch.triu_indices(n, n, 1)
    pairs = every[i, j]
    if convention == "liu_wang":
        return middle(every.flatten()) / math.log(n + 1)
    if convention == "pairs":
        return pairs.median() / math.log(n + 1)
    distances = pairs.sqrt() if convention == "blackjax" else every.flatten().sqrt()
    return middle(distances) ** 2 / math.log(n)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 20, 33, 800])
def test_is_the_median_by_brute_force(n, convention, backend):
    for d in (1, 3, 40) if n < 100 else (3,):
        x = torch.randn(2, n, d)
        got = stein.median_bandwidth(x.to(backend.device), convention)
        assert got.shape == (2,) and got.dtype == torch.float32
        for i in range(2):
            assert math.isclose(got[i].item(), brute(x[i], convention).item(), rel_tol=1e-6), (n, d)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_tell_even_counts_apart(convention, backend):
    """Four points on a line: distances 1, 1, 1, 2, 2, 3 and four zeros."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], device=backend.device)
    wanted = {
        "liu_wang": 1.0 / math.log(5),  # of sixteen: 0 x 4, 1 x 6, 4 x 4, 9 x 2: the 8th and 9th are 1
        "pairs": 1.0 / math.log(5),  # the third of six, 1; the fourth is 4
        "blackjax": 1.5**2 / math.log(4),
        "numpyro": 1.0 / math.log(4),
    }
    assert math.isclose(stein.median_bandwidth(x, convention).item(), wanted[convention], rel_tol=1e-6)
    two = torch.tensor([[0.0], [4.0]], device=backend.device)
    wanted = {
        "liu_wang": 8.0 / math.log(3),
        "pairs": 16.0 / math.log(3),
        "blackjax": 16.0 / math.log(2),
        "numpyro": 4.0 / math.log(2),
    }
    assert math.isclose(stein.median_bandwidth(two, convention).item(), wanted[convention], rel_tol=1e-6)


def test_median_of_squared_distances(backend):
    for n in (2, 3, 4, 5, 32, 33):
        x = torch.randn(n, 3)
        every = (x.double()[:, None] - x.double()[None]).square().sum(-1)
        i, j = torch.triu_indices(n, n, 1)
        for diagonal, values in ((True, every.flatten()), (False, every[i, j])):
            got = stein.pairwise_sq_dist_median(x.to(backend.device), diagonal)
            assert math.isclose(got.item(), middle(values).item(), rel_tol=1e-6), (n, diagonal)


def test_one_particle():
    x = torch.zeros(3, 1, 2)
    assert torch.equal(stein.median_bandwidth(x), torch.zeros(3))
    assert torch.equal(stein.pairwise_sq_dist_median(x), torch.zeros(3))
    for convention in CONVENTIONS[1:]:
        with pytest.raises(
            ValueError, match=f"median_bandwidth: particles must be at least 2 .*'{convention}'.*; got 1"
        ):
            stein.median_bandwidth(x, convention)
    with pytest.raises(ValueError, match="particles must be at least 2 .*; got 1"):
        stein.pairwise_sq_dist_median(x, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, backend):
    x = torch.randn(40, 5).to(dtype)
    got = stein.median_bandwidth(x.to(backend.device))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert math.isclose(got.item(), brute(x, "liu_wang").item(), rel_tol=1e-6)


def test_coincident_particles_have_no_bandwidth(backend):
    x = torch.randn(30, 40, device=backend.device)
    x[:25] = x[0]
    for convention in CONVENTIONS:
        assert stein.median_bandwidth(x, convention).item() == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("n", [5, 900])
def test_a_hint_changes_nothing(n, convention, backend):
    x = torch.randn(2, n, 3, device=backend.device)
    wanted = stein.median_bandwidth(x, convention)
    for hint in (wanted, 1.01 * wanted, 100 * wanted, 0 * wanted, torch.nan * wanted, torch.inf * wanted):
        assert torch.equal(stein.median_bandwidth(x, convention, hint=hint), wanted)
    for diagonal in (True, False):
        value = stein.pairwise_sq_dist_median(x, diagonal)
        assert torch.equal(stein.pairwise_sq_dist_median(x, diagonal, hint=value / 2), value)


def test_no_gradient_flows(backend):
    x = torch.randn(10, 3, device=backend.device, requires_grad=True)
    assert not stein.median_bandwidth(x).requires_grad
    assert not stein.pairwise_sq_dist_median(x).requires_grad
    _, tangent = torch.func.jvp(stein.median_bandwidth, (x.detach(),), (torch.randn_like(x),))
    assert not tangent.any()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_vmap(convention, backend):
    x = torch.randn(4, 9, 3, device=backend.device)
    got = torch.func.vmap(lambda x: stein.median_bandwidth(x, convention))(x)
    assert torch.allclose(got, stein.median_bandwidth(x, convention), rtol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_compiles_whole_and_once(convention, backend):
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: stein.median_bandwidth(x, convention), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for batch, n, d in ((2, 5, 3), (3, 6, 4), (5, 17, 7), (4, 40, 6)):
        x = torch.randn(batch, n, d, device=backend.device)
        with torch._dynamo.config.patch(error_on_recompile=n != 5):
            got = function(x)
        assert torch.allclose(got, stein.median_bandwidth(x, convention), rtol=1e-6)
    torch._dynamo.reset()


EXPORTED = {
    **{c: lambda x, c=c: stein.median_bandwidth(x, c, hint=x[0, 0].abs()) for c in CONVENTIONS},
    "with diagonal": stein.pairwise_sq_dist_median,
    "pairs alone": lambda x: stein.pairwise_sq_dist_median(x, False),
    "direction": lambda x: fe.svgd_direction(x, x.sin()),
    "discrepancy": lambda x: fe.kernel_stein_discrepancy(x, x.sin()),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_for_any_number_of_particles(name, backend):
    class Module(torch.nn.Module):
        def forward(self, x):
            return EXPORTED[name](x)

    x = torch.randn(7, 3, device=backend.device)
    sizes = ({0: torch.export.Dim("n")},)
    function = torch.export.export(Module(), (x,), dynamic_shapes=sizes).module()
    for n in (2, 3, 4, 9):
        x = torch.randn(n, 3, device=backend.device)
        torch.testing.assert_close(function(x), EXPORTED[name](x), rtol=1e-6, atol=1e-6)


def test_opcheck_of_ranks(backend):
    x = torch.randn(2, 6, 3)
    for arguments in ((x, [0, 14, 7, 7], None), (x, [], None), (x.bfloat16(), [3], torch.ones(2, 1))):
        result = torch.library.opcheck(torch.ops.fekernels.sq_dist_rank.default, arguments)
        assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(6, 3), [0], None), r"particles must have shape \(B, n, d\); got \(6, 3\)"),
        ((torch.zeros(2, 6, 3), [15], None), r"ranks must be in \[0, 15\), the pairs of 6; got 15"),
        ((torch.zeros(2, 6, 3), [-1], None), r"ranks must be in \[0, 15\), the pairs of 6; got -1"),
        ((torch.zeros(2, 6, 3), [0], torch.zeros(2)), r"hint must have shape \(2, 1\); got \(2,\)"),
    ],
)
def test_operator_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=f"sq_dist_rank: {message}"):
        torch.ops.fekernels.sq_dist_rank(*arguments)
