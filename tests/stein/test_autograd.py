"""Gradients of the Stein direction of every order, and what PyTorch asks of an operator."""

import pytest
import torch

from fekernels import stein
from fekernels._catalogue.stein import CODES
from tests.support.stein import EMPTY, FINITE, KERNELS, LAYOUTS, RADIAL, TEMPERATURE, Case, Problem
from tests.support.stein_exact import assert_close, exact_direction, gradient_scales

NAMES = pytest.mark.parametrize("name", KERNELS)
RADIALS = pytest.mark.parametrize("name", RADIAL)


def gradients(value, leaves, upstream=None, **keywords):
    keywords = {"allow_unused": True, "materialize_grads": True, **keywords}
    return torch.autograd.grad(value, leaves, upstream, **keywords)


@NAMES
@pytest.mark.parametrize("case", [*LAYOUTS, Case(200, 20), Case(50, 3, h=0.0, coincident=30)], ids=str)
def test_gradients_are_those_of_the_formula(case, name, backend):
    problem = case.make()
    upstream = torch.randn_like(problem.x)
    leaves = problem.to(backend.device).requiring()
    got = gradients(leaves.direction(name), leaves.leaves(), upstream.to(backend.device))
    wide = problem.double().requiring()
    exact = gradients(exact_direction(wide, name), wide.leaves(), upstream.double())
    scales = gradient_scales(problem, upstream, name)
    for what, one, other, scale in zip(("particles", "scores", "bandwidth"), got, exact, scales, strict=True):
        if case.h == 0 and what == "bandwidth":  # one-sided, and 0 by convention
            assert not one.any()
            continue
        assert_close(one, other, scale, f"{case} {name} {what}")


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_have_the_dtypes_of_the_operands(dtype, name, backend):
    problem = Case(20, 9, (2,)).make()
    for dtypes in ((dtype, torch.float32), (torch.float32, dtype), (dtype, dtype)):
        mixed = Problem(problem.x.to(dtypes[0]), problem.s.to(dtypes[1]), problem.h)
        upstream = torch.randn_like(mixed.x)
        leaves = mixed.to(backend.device).requiring()
        got = gradients(leaves.direction(name), leaves.leaves(), upstream.to(backend.device))
        assert [g.dtype for g in got] == [*dtypes, torch.float32]
        wide = mixed.double().requiring()
        exact = gradients(exact_direction(wide, name), wide.leaves(), upstream.double())
        for one, other, scale in zip(got, exact, gradient_scales(mixed, upstream, name), strict=True):
            assert_close(one, other, scale, f"{dtypes} {name}")


@NAMES
def test_only_what_is_wanted(name, backend):
    problem = Case(30, 5, (2,)).make().to(backend.device)
    every = problem.requiring()
    upstream = torch.randn_like(problem.x)
    full = gradients(every.direction(name), every.leaves(), upstream)
    for wanted in range(1, 8):
        leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(problem.leaves())]
        phi = Problem(*leaves).direction(name)
        got = gradients(phi, [leaf for leaf in leaves if leaf.requires_grad], upstream)
        for one, other in zip(got, (g for i, g in enumerate(full) if wanted >> i & 1), strict=True):
            assert torch.equal(one, other)
    with torch.no_grad():
        assert not every.direction(name).requires_grad


@NAMES
def test_backward_runs_again_and_inputs_stay(name, backend):
    leaves = Case(30, 5).make().to(backend.device).requiring()
    before = [leaf.detach().clone() for leaf in leaves.leaves()]
    phi = leaves.direction(name)
    upstream = torch.randn_like(phi)
    kept = upstream.clone()
    first = gradients(phi, leaves.leaves(), upstream, retain_graph=True)
    copies = [g.clone() for g in first]
    for g in first:
        g.zero_()  # the receiver owns it
    again = gradients(phi, leaves.leaves(), upstream)
    assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves.leaves(), before, strict=True))
    assert torch.equal(upstream, kept)


@NAMES
def test_empty_gradients(name, backend):
    for case in EMPTY:
        leaves = case.make().to(backend.device).requiring()
        got = gradients(leaves.direction(name), leaves.leaves(), torch.zeros_like(leaves.x))
        assert all(
            g.shape == leaf.shape and not g.any() for g, leaf in zip(got, leaves.leaves(), strict=True)
        )


def test_the_median_is_not_differentiated(backend):
    leaves = Case(12, 3).make().to(backend.device).requiring()
    h = stein.median_bandwidth(leaves.x)
    assert not h.requires_grad
    upstream = torch.randn_like(leaves.x)
    one, other = (
        gradients(leaves.direction("rbf", bandwidth=b), [leaves.x], upstream)[0] for b in ("median", h)
    )
    assert torch.equal(one, other)


@NAMES
def test_gradcheck(name):
    leaves = Case(5, 3, (2,), h=1.0).make().double().requiring()

    def function(*operands):
        return Problem(*operands).direction(name)

    assert torch.autograd.gradcheck(function, leaves.leaves())
    assert torch.autograd.gradgradcheck(function, leaves.leaves())


@NAMES
def test_second_derivatives(name, backend):
    """Also where operands depend on each other: scores and a bandwidth that are functions of the particles."""
    start = Case(9, 4, (2,)).make()  # three dimensions: the operators take the very tensors
    results = []
    for dtype, device in ((torch.float32, backend.device), (torch.float64, "cpu")):
        x = start.x.to(device, dtype).requires_grad_()
        scores, h = -x * x.detach().sin(), x.square().mean()
        problem = Problem(x, scores, h)
        phi = problem.direction(name) if dtype == torch.float32 else exact_direction(problem, name)
        (first,) = torch.autograd.grad(phi.square().sum(), x, create_graph=True)
        results.append([first, *torch.autograd.grad(first.square().sum(), x)])
    for one, other in zip(*results, strict=True):
        assert (one.cpu().double() - other).abs().max() < 1e-5 * other.abs().max()


def test_second_derivatives_at_coincident_particles():
    """The repulsion of a smooth kernel is linear in a small distance, so its derivative does not vanish at 0."""
    x = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    phi = stein.svgd_direction(x, torch.zeros_like(x), bandwidth=0.5)
    (first,) = torch.autograd.grad(phi[0, 0], x, create_graph=True)
    # phi_0 = (1/2)(2/h)(x_0 - x_1) near 0
    assert torch.allclose(first.flatten(), torch.tensor([2.0, -2.0], dtype=torch.float64))
    x = torch.tensor([[0.1], [0.1]], dtype=torch.float64, requires_grad=True)
    phi = stein.svgd_direction(x, torch.tensor([[3.0], [5.0]], dtype=torch.float64), bandwidth=0.5)
    (first,) = torch.autograd.grad(phi[0, 0], x, create_graph=True)
    second = torch.stack([torch.autograd.grad(f, x, retain_graph=True)[0].flatten() for f in first.flatten()])
    # the attraction's: (1/2) k'' S_1, k'' = -2/h
    curve = 0.5 * 5.0 * -4.0
    wanted = torch.tensor([[curve, -curve], [-curve, curve]], dtype=torch.float64)
    assert torch.allclose(second, wanted)


# Transforms.


@NAMES
def test_vmap(name, backend):
    problem = Case(11, 3, (4,)).make().to(backend.device)
    for bandwidth in (problem.h, "median"):
        wanted = problem.direction(name, bandwidth=bandwidth)
        if isinstance(bandwidth, str):
            got = torch.func.vmap(
                lambda x, s: stein.svgd_direction(x, s, kernel=KERNELS[name], temperature=TEMPERATURE)
            )(problem.x, problem.s)
        else:
            got = torch.func.vmap(lambda *operands: Problem(*operands).direction(name))(*problem.leaves())
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@NAMES
@pytest.mark.parametrize("bandwidth", [1.5, "median"])
def test_forward_mode_is_the_transpose_of_reverse_mode(bandwidth, name, backend):
    problem = Case(9, 3).make().to(backend.device)
    tangent, cotangent = torch.randn_like(problem.x), torch.randn_like(problem.x)

    def function(x):
        return Problem(x, problem.s, problem.h).direction(name, bandwidth=bandwidth)

    x = problem.x.clone().requires_grad_()
    wanted = (gradients(function(x), [x], cotangent)[0] * tangent).sum()
    _, by_func = torch.func.jvp(function, (problem.x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.x, tangent)
        by_dual = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    for got in (by_func, by_dual):
        assert torch.allclose((got * cotangent).sum(), wanted, rtol=1e-4, atol=1e-4)


def test_jacobian_by_func_is_that_by_autograd(backend):
    problem = Case(4, 2).make().to(backend.device)

    def function(x):
        return Problem(x, problem.s, problem.h).direction("imq")

    ours = torch.autograd.functional.jacobian(function, problem.x)
    assert torch.allclose(torch.func.jacrev(function)(problem.x), ours, atol=1e-5)
    assert torch.allclose(torch.func.jacfwd(function)(problem.x), ours, atol=1e-5)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [3, 12])
def test_batches_of_gradients(d, dtype, name, backend):
    """Those of is_grads_batched, jacobian(vectorize=True) and torch.vmap: of a loop over single ones."""
    problem = Case(7, d, (2,)).make().to(backend.device)
    leaves = Problem(*(t.to(dtype) for t in problem.leaves())).requiring()
    raw = torch.ops.fekernels.svgd_direction(*leaves.leaves(), CODES[name], -0.5, 1.0, 0.7, 0)
    values = [leaves.direction(name), raw]
    if name in FINITE:
        options = {"kernel": KERNELS[name], "bandwidth": leaves.h}
        values += [stein.kernel_stein_discrepancy(leaves.x, leaves.s, statistic=u, **options) for u in "uv"]
    for value in values:
        upstream = torch.randn(3, *value.shape, dtype=value.dtype, device=value.device)

        def single(each, value=value):
            return gradients(value, leaves.leaves(), each, retain_graph=True)

        expected = [torch.stack(found) for found in zip(*map(single, upstream), strict=True)]
        legacy = gradients(value, leaves.leaves(), upstream, is_grads_batched=True, retain_graph=True)
        assert not any(gradient.requires_grad for gradient in legacy)
        twice = gradients(value, leaves.leaves(), upstream, is_grads_batched=True, create_graph=True)
        for found in (legacy, torch.vmap(single)(upstream), twice):
            for got, wanted in zip(found, expected, strict=True):
                bound = 1e-5 if dtype == torch.float32 else 1e-12
                assert (got - wanted).abs().max() <= bound * wanted.abs().max()


# The operators.


def operator_arguments(name, dtype=torch.float32, grad=False):
    problem = Case(7, 3, (2,)).make(dtype)
    leaves = problem.requiring().leaves() if grad else problem.leaves()
    kernel = KERNELS[name]
    beta, c = (kernel.beta, kernel.c) if name == "imq" else (-0.5, 1.0)
    return (*leaves, CODES[name], beta, c, TEMPERATURE, 0)


@pytest.mark.parametrize("name", ["rbf", "linear"])  # operators of one schema
def test_opcheck(name, backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for grad in (False, True):
            result = torch.library.opcheck(
                torch.ops.fekernels.svgd_direction.default, operator_arguments(name, dtype, grad)
            )
            assert set(result.values()) == {"SUCCESS"} and len(result) >= 4
        arguments = operator_arguments(name, dtype)
        upstream = torch.randn_like(arguments[0])
        for needs in (7, 2, 5):
            result = torch.library.opcheck(
                torch.ops.fekernels.svgd_direction_backward.default, (upstream, *arguments, needs)
            )
            assert set(result.values()) == {"SUCCESS"}


@NAMES
def test_operator_is_the_function(name, backend):
    *leaves, code, beta, c, temperature, precision = operator_arguments(name, grad=True)
    phi = torch.ops.fekernels.svgd_direction(*leaves, code, beta, c, temperature, precision)
    ours = Problem(*leaves).direction(name)
    assert torch.equal(phi, ours)
    upstream = torch.randn_like(phi)
    both = [gradients(value, leaves, upstream, create_graph=True) for value in (phi, ours)]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)
    seconds = [gradients(sum(g.square().sum() for g in each), leaves) for each in both]
    for one, other in zip(*seconds, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "bandwidth"), [("rbf", "median"), ("imq", 0.8), ("linear", "median")])
def test_compiles_whole_and_once(name, bandwidth, backend):
    torch._dynamo.reset()

    def function(x, s):
        return stein.svgd_direction(x, s, kernel=KERNELS[name], bandwidth=bandwidth, temperature=TEMPERATURE)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, n, d in ((2, 5, 3), (3, 6, 4), (5, 17, 7), (4, 64, 6)):
        once = torch._dynamo.config.patch(error_on_recompile=n != 5)
        x, s = torch.randn(batch, n, d).to(backend.device), torch.randn(batch, n, d).to(backend.device)
        leaves = [x.requires_grad_(), s.requires_grad_()]
        with once:
            got = compiled(*leaves)
        wanted = function(*leaves)
        assert torch.allclose(got, wanted, rtol=1e-6, atol=1e-7)
        upstream = torch.randn_like(x)
        for one, other in zip(
            gradients(got, leaves, upstream), gradients(wanted, leaves, upstream), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


BAD_OPERANDS = {
    "flat": (lambda x, s, h: (x[0], s[0], h), r"particles must have shape \(B, n, d\); got \(7, 3\)"),
    "scores": (
        lambda x, s, h: (x, s[:1], h),
        r"scores must have shape \(2, 7, 3\) like particles; got \(1, 7, 3\)",
    ),
    "bandwidth": (lambda x, s, h: (x, s, h[:1]), r"bandwidth must have shape \(2,\); got \(1,\)"),
}


@pytest.mark.parametrize("what", BAD_OPERANDS)
def test_operators_refuse_what_does_not_fit(what, backend):
    change, message = BAD_OPERANDS[what]
    *operands, code, beta, c, temperature, precision = operator_arguments("rbf")
    call = (*change(*operands), code, beta, c, temperature, precision)
    with pytest.raises(ValueError, match=f"svgd_direction: {message}"):
        torch.ops.fekernels.svgd_direction(*call)
    with pytest.raises(ValueError, match=f"svgd_direction_backward: {message}"):
        torch.ops.fekernels.svgd_direction_backward(call[0], *call, 7)
