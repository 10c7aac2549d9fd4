"""The short way of most calls gives what the long way gives, bit for bit, in every shape and every kind of backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fekernels as fe
from fekernels._runtime import backends, host
from fekernels.ops.free_energy import autograd, free_energy

LIKELIHOODS = ("mse", "gaussian", "bernoulli", "continuous_bernoulli", "poisson")
SHAPES = (((33, 49), (33, 20)), ((17, 3, 5, 7), (17, 2, 9)), ((5,), (5,)), ((40, 130), (40, 127)))


@pytest.fixture(autouse=True, params=["native", "python"])
def cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By csrc/torch/host, and where that cannot be had."""
    if backends.choose("cpu") != "cpp":
        pytest.skip("the short way is the C++ kernels'")
    if request.param == "python":
        monkeypatch.setattr(autograd, "_native", lambda: None)
    elif host.unavailable_reason() is not None:
        pytest.skip(f"no native module: {host.unavailable_reason()}")


def operands(event: tuple[int, ...], latent: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    target = torch.rand(event, generator=generator).round()
    leaves = [torch.randn(shape, generator=generator) for shape in (event, latent, latent)]
    return target, *(leaf.requires_grad_() for leaf in leaves)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call, whether it took the short way."""
    ways: list[bool] = []

    def chosen(prediction: object) -> object:
        kernel = autograd.plain_kernel(prediction)

        def counted(*args: object) -> object:
            terms = None if kernel is None else kernel(*args)
            ways.append(terms is not None)
            return terms

        return counted

    monkeypatch.setattr(free_energy, "plain_kernel", chosen)
    return ways


def both(
    given: tuple[Tensor, ...], likelihood: str, reduction: str
) -> tuple[fe.FreeEnergyTerms, fe.FreeEnergyTerms]:
    target, prediction, mean, logvar = given
    names = {"likelihood": likelihood, "reduction": reduction, "beta": 0.7}
    ones = torch.ones(len(target))  # a weight takes the long way
    return (
        fe.free_energy(prediction, target, mean, logvar, **names),
        fe.free_energy(prediction, target, mean, logvar, weight=ones, **names),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_both_ways_agree(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], likelihood: str, reduction: str, taken: list[bool]
) -> None:
    given = operands(*shapes)
    short, long = both(given, likelihood, reduction)
    assert taken == [True]
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape == ()
    leaves = given[1:]
    for first, second in ((0, 0), (1, 2)):  # the loss, and two terms with factors of their own
        gradients = [
            torch.autograd.grad(terms[first] + 3.0 * terms[second], leaves, retain_graph=True)
            for terms in (short, long)
            for _ in range(2)  # the second backward computes them again
        ]
        for i, leaf in enumerate(leaves):
            assert all(torch.equal(gradients[0][i], other[i]) for other in gradients[1:])
            assert gradients[0][i].shape == leaf.shape


@pytest.mark.parametrize("shapes", SHAPES)
def test_gradients_of_gradients(shapes: tuple[tuple[int, ...], tuple[int, ...]], taken: list[bool]) -> None:
    given = operands(*shapes)
    results = []
    for terms in both(given, "bernoulli", "mean"):
        gradients = torch.autograd.grad(terms.free_energy, given[1:], create_graph=True)
        results.append(torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), given[1:]))
    assert taken == [True]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wanted", range(8))
def test_gradients_of_some(wanted: int, taken: list[bool]) -> None:
    target, *leaves = operands((33, 49), (33, 20))
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(wanted >> i & 1))
    short, long = both((target, *leaves), "mse", "mean")
    assert taken == [True]
    assert short.free_energy.requires_grad == bool(wanted)
    if not wanted:
        return
    results = []
    for terms in (short, long):
        terms.free_energy.backward()
        results.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a is not None) == (b is not None) == bool(wanted >> i & 1)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("shapes", SHAPES)
def test_inplace_backward(shapes: tuple[tuple[int, ...], tuple[int, ...]], taken: list[bool]) -> None:
    target, *leaves = operands(*shapes)
    predictions, results = [], []
    for short in (True, False):
        prediction = leaves[0] * 1.0
        version, place = prediction._version, prediction.data_ptr()
        weight = None if short else torch.ones(len(target))
        terms = fe.free_energy(
            prediction, target, *leaves[1:], likelihood="bernoulli", weight=weight, inplace_backward=True
        )
        assert prediction._version == version + 1
        gradients = torch.autograd.grad(3.0 * terms.free_energy, [prediction, *leaves[1:]])
        assert gradients[0].data_ptr() == place
        predictions.append(prediction.detach())
        results.append(gradients)
    assert taken == [True]
    assert torch.equal(*predictions)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_inplace_backward_leaves_leaves_to_the_long_way(taken: list[bool]) -> None:
    target, prediction, mean, logvar = operands((33, 49), (33, 20))
    before = prediction.detach().clone()
    with pytest.raises(ValueError, match="params must be the result of an operation"):
        fe.free_energy(prediction, target, mean, logvar, inplace_backward=True)
    with torch.no_grad():
        fe.free_energy(prediction, target, mean, logvar, inplace_backward=True)
    prediction.requires_grad_(False)
    fe.free_energy(prediction, target, mean, logvar, inplace_backward=True).kl.backward()
    assert taken == [False, True, True]
    assert torch.equal(prediction, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, r, m, v: (x, r.t().contiguous().t(), m, v),
        lambda x, r, m, v: (x.bool(), r, m, v),
        lambda x, r, m, v: (x, r.bfloat16(), m, v),
        lambda x, r, m, v: (x, r, m.double(), v.double()),
        lambda x, r, m, v: (x[:0], r[:0], m[:0], v[:0]),
    ],
    ids=["transposed", "bool target", "bfloat16", "float64", "empty batch"],
)
def test_everything_else_takes_the_long_way(change: object, taken: list[bool]) -> None:
    target, prediction, mean, logvar = change(*operands((33, 49), (33, 20)))  # type: ignore[operator]
    fe.free_energy(prediction, target, mean, logvar, likelihood="bernoulli")
    assert taken == [False]


@pytest.mark.parametrize("name", ["target", "prediction", "mean", "logvar"])
def test_a_wrong_shape_is_named(name: str, taken: list[bool]) -> None:
    given = dict(zip(("target", "prediction", "mean", "logvar"), operands((4, 6), (4, 6)), strict=True))
    given[name] = torch.zeros(4, 5)
    expected = "target" if name == "prediction" else "logvar" if name == "mean" else name
    with pytest.raises(ValueError, match=f"free_energy: {expected} must have shape"):
        fe.free_energy(given["prediction"], given["target"], given["mean"], given["logvar"])
    assert taken == [False]


@pytest.mark.parametrize("columns", [17, 20, 31, 32, 33, 100, 127])
def test_narrow_rows_do_not_depend_on_their_neighbours(columns: int) -> None:
    """Sixteen at a time they share vectors; alone they do not."""
    _, _, mean, logvar = operands((1,), (37, columns))
    together = fe.gaussian_kl(mean, logvar)
    gradients = torch.autograd.grad(together.sum(), (mean, logvar))
    for row in range(37):
        one = mean[row : row + 1].detach().requires_grad_(), logvar[row : row + 1].detach().requires_grad_()
        alone = fe.gaussian_kl(*one)
        assert torch.equal(alone[0], together[row])
        for a, b in zip(torch.autograd.grad(alone.sum(), one), gradients, strict=True):
            assert torch.equal(a[0], b[row])


def test_rows_of_different_weights() -> None:
    _, _, mean, logvar = operands((1,), (37, 20))
    weight = torch.arange(1.0, 38.0)
    target = torch.zeros(37, 20)
    terms = fe.free_energy(target.clone(), target, mean, logvar, weight=weight, reduction="sum")
    together = torch.autograd.grad(terms.kl, (mean, logvar))
    for row in range(37):
        one = mean[row : row + 1].detach().requires_grad_(), logvar[row : row + 1].detach().requires_grad_()
        for a, b in zip(torch.autograd.grad(fe.gaussian_kl(*one).sum(), one), together, strict=True):
            assert torch.equal(a[0] * weight[row], b[row])
