"""The Stein operators as they are called directly: they check what kernels, which go by addresses, would not notice."""

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fekernels as fe
from fekernels import stein
from fekernels._catalogue.stein import KERNELS

OPS = torch.ops.fekernels
X = torch.arange(36.0).view(2, 6, 3)
H, W, G = torch.ones(2), torch.ones(1, 6, 4), torch.ones(2, 4)
CALL = (0, -0.5, 1.0, 1.0, 0)  # kernel, beta, c, temperature, precision


def direction(x=X, s=X, h=H, call=CALL):
    return OPS.svgd_direction(x, s, h, *call)


def backward(g=X, x=X, s=X, h=H, call=CALL, needs=7):
    return OPS.svgd_direction_backward(g, x, s, h, *call, needs)


def discrepancy(x=X, s=X, h=H, w=W, call=CALL[:3]):
    return OPS.kernel_stein_discrepancy(x, s, h, w, *call)


def discrepancy_backward(g=G, x=X, s=X, h=H, w=W, call=CALL[:3], needs=7):
    return OPS.kernel_stein_discrepancy_backward(g, x, s, h, w, *call, needs)


FOUR = (direction, backward, discrepancy, discrepancy_backward)
OPERANDS = {
    "no tensor of problems": (dict(x=X[0]), ValueError, "particles must have shape (B, n, d); got (6, 3)"),
    "fewer scores": (dict(s=X[:, :5]), ValueError, "scores must have shape (2, 6, 3) like particles; got (2, 5, 3)"),
    "other problems": (dict(s=X[:1]), ValueError, "scores must have shape (2, 6, 3) like particles; got (1, 6, 3)"),
    "transposed": (dict(s=X.mT), ValueError, "scores must have shape (2, 6, 3) like particles; got (2, 3, 6)"),
    "one bandwidth": (dict(h=H[0]), ValueError, "bandwidth must have shape (2,); got ()"),
    "a bandwidth too many": (dict(h=torch.ones(3)), ValueError, "bandwidth must have shape (2,); got (3,)"),
    "integers": (dict(x=X.long()), TypeError, "particles must be float32, bfloat16, float16 or float64; got int64"),
    "integer scores": (dict(s=X.long()), TypeError, "scores must be float32, bfloat16, float16 or float64; got int64"),
    "float8": (
        dict(s=X.to(torch.float8_e4m3fn)), TypeError,
        "scores must be float32, bfloat16, float16 or float64; got float8_e4m3fn",
    ),
    "complex": (dict(x=X.to(torch.complex64)), TypeError, "particles must be float32, bfloat16, float16 or float64"),
    "integer bandwidth": (dict(h=H.int()), TypeError, "bandwidth must be float32, bfloat16, float16 or float64"),
    "no kernel": (dict(call=(len(KERNELS), -0.5, 1.0, 1.0, 0)), ValueError, "kernel must be one of 0 (rbf), 1 (imq)"),
    "no kernel below": (dict(call=(-1, -0.5, 1.0, 1.0, 0)), ValueError, "kernel must be one of 0 (rbf), 1 (imq)"),
    "imq's beta": (dict(call=(1, 0.5, 1.0, 1.0, 0)), ValueError, "beta must be in (-1, 0); got 0.5"),
    "imq's c": (dict(call=(1, -0.5, 0.0, 1.0, 0)), ValueError, "c must be finite and > 0; got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("operator", FOUR)
@pytest.mark.parametrize("what", OPERANDS)
def test_operands_that_do_not_fit(operator, what):
    changes, error, message = OPERANDS[what]
    if "call" in changes and operator in (discrepancy, discrepancy_backward):
        changes = {"call": changes["call"][:3]}
    name = {
        direction: "svgd_direction",
        backward: "svgd_direction_backward",
        discrepancy: "kernel_stein_discrepancy",
        discrepancy_backward: "kernel_stein_discrepancy_backward",
    }[operator]
    with pytest.raises(error, match=f"^{name}: {re.escape(message)}"):
        operator(**changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: backward(g=X[:, :5]),
            ValueError,
            "grad must have shape (2, 6, 3) like particles; got (2, 5, 3)",
        ),
        (lambda: backward(g=X.int()), TypeError, "grad must be float32"),
        (lambda: backward(needs=8), ValueError, "needs must be in [0, 8), a bit per operand; got 8"),
        (lambda: backward(needs=-1), ValueError, "needs must be in [0, 8)"),
        (lambda: direction(call=(0, -0.5, 1.0, 1.0, 3)), ValueError, "precision must be one of 0 (fp32)"),
        (
            lambda: direction(call=(0, -0.5, 1.0, -1.0, 0)),
            ValueError,
            "temperature must be finite and >= 0; got -1",
        ),
        (lambda: discrepancy(w=W[0]), ValueError, "weights must have shape (1 or 2, 6, m); got (6, 4)"),
        (
            lambda: discrepancy(w=W[:, :5]),
            ValueError,
            "weights must have shape (1 or 2, 6, m); got (1, 5, 4)",
        ),
        (lambda: discrepancy(w=W.long()), TypeError, "weights must be float32"),
        (lambda: discrepancy(call=(2, -0.5, 1.0)), ValueError, "kernel must not be laplace"),
        (lambda: discrepancy_backward(g=G[:1]), ValueError, "grad must have shape (2, 4); got (1, 4)"),
        (lambda: discrepancy_backward(g=G.long()), TypeError, "grad must be float32"),
        (lambda: discrepancy_backward(needs=9), ValueError, "needs must be in [0, 8)"),
        (lambda: OPS.sq_dist_rank(X.long(), [0], None), TypeError, "particles must be float32"),
        (lambda: OPS.sq_dist_rank(X, [0], torch.ones(2, 1).long()), TypeError, "hint must be float32"),
    ],
)
def test_arguments_of_one_operator(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda ops, x: ops.svgd_direction(x.double(), x, H, *CALL),
        lambda ops, x: ops.svgd_direction(x, x[:1], H, *CALL),
        lambda ops, x: ops.svgd_direction(x, x.int(), H, *CALL),
        lambda ops, x: ops.svgd_direction(x, x, H[:1], *CALL),
        lambda ops, x: ops.svgd_direction(x, x, H, 7, *CALL[1:]),
        lambda ops, x: ops.svgd_direction_backward(x[:1], x, x, H, *CALL, 7),
        lambda ops, x: ops.kernel_stein_discrepancy(x, x, H, W[:, :3], *CALL[:3]),
        lambda ops, x: ops.kernel_stein_discrepancy(x, x, H, W.double(), *CALL[:3]),
        lambda ops, x: ops.sq_dist_rank(x.double(), [0], None),
        lambda ops, x: ops.sq_dist_rank(x, [0], torch.ones(3)),
    ],
)
def test_native_operators_check_too(call, native):
    with pytest.raises(RuntimeError, match="must be|kernel must"):
        call(native, X)


def negated(tensor: Tensor) -> Tensor:
    """The same values behind a negative bit: memory holds the other sign."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def test_lazily_negated_operands(backend):
    x, s = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    lazy_x, lazy_s = negated(x), negated(s)
    assert lazy_x.is_neg() and torch.equal(lazy_x, x)
    for call in (
        lambda x, s: stein.svgd_direction(x, s, bandwidth=1.0),
        lambda x, s: stein.svgd_direction(x, s),
        lambda x, s: stein.kernel_stein_discrepancy(x, s, kernel="imq"),
        lambda x, s: stein.median_bandwidth(x),
        lambda x, s: OPS.svgd_direction_backward(s, x, s, H, *CALL, 3)[0],
    ):
        assert torch.equal(call(lazy_x, lazy_s), call(x, s))


def test_subclasses_and_fake_tensors():
    """No kernel reads an address of theirs: they see operators."""
    x, s = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    two = TwoTensor(x, 2 * x), TwoTensor(s, s)
    for call in (
        lambda x, s: stein.svgd_direction(x, s, bandwidth=1.0),
        lambda x, s: stein.svgd_direction(x, s),
        lambda x, s: stein.median_bandwidth(x),
    ):
        got = call(*two)
        assert isinstance(got, TwoTensor)
        assert torch.equal(got.a, call(x, s)) and torch.equal(got.b, call(2 * x, s))
    with FakeTensorMode() as mode:
        fake_x, fake_s = (mode.from_tensor(t) for t in (x, s))
        assert stein.svgd_direction(fake_x, fake_s).shape == x.shape
        assert stein.kernel_stein_discrepancy(fake_x, fake_s, bandwidth=1.0).shape == (2,)


def test_numpy_numbers():
    import numpy as np

    x = torch.randn(6, 3)
    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5)):
        expected = stein.svgd_direction(x, -x, bandwidth=0.5, temperature=0.5)
        assert torch.equal(stein.svgd_direction(x, -x, bandwidth=number, temperature=number), expected)
        expected = stein.kernel_stein_discrepancy(x, -x, bandwidth=0.5)
        assert torch.equal(stein.kernel_stein_discrepancy(x, -x, bandwidth=number), expected)
        sampler = fe.SVGD(
            lambda x: -x.square().sum(-1) / 2, x, bandwidth=number, temperature=number, lr=number, seed=0
        )
        other = fe.SVGD(lambda x: -x.square().sum(-1) / 2, x, bandwidth=0.5, temperature=0.5, lr=0.5, seed=0)
        sampler.step()
        other.step()
        assert torch.equal(sampler.particles, other.particles)


BAD = {
    "numpy": lambda x: x.numpy(),
    "nested": lambda x: torch.nested.nested_tensor([x[0, 0], x[0, 1, :2]]),
    "sparse": lambda x: x[0].to_sparse(),
    "quantized": lambda x: torch.quantize_per_tensor(x[0], 0.1, 0, torch.quint8),
    "float8": lambda x: x[0].to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_tensor_of_numbers_is_named(kind):
    bad, x = BAD[kind](X), X[0]
    for name, call in {
        "svgd_direction: particles": lambda: stein.svgd_direction(bad, x),
        "svgd_direction: scores": lambda: stein.svgd_direction(x, bad),
        "svgd_direction: bandwidth": lambda: stein.svgd_direction(x, x, bandwidth=bad),
        "kernel_stein_discrepancy: particles": lambda: stein.kernel_stein_discrepancy(bad, x, bandwidth=1.0),
        "kernel_stein_discrepancy: scores": lambda: stein.kernel_stein_discrepancy(x, bad, bandwidth=1.0),
        "median_bandwidth: particles": lambda: stein.median_bandwidth(bad),
        "median_bandwidth: hint": lambda: stein.median_bandwidth(x, hint=bad),
        "goodness_of_fit: particles": lambda: stein.goodness_of_fit(bad, x),
        "SVGD: particles": lambda: fe.SVGD(torch.sum, bad),
        "SVGD: bandwidth": lambda: fe.SVGD(torch.sum, x, bandwidth=bad),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be"):
            call()


def test_names_that_are_none():
    x, bad = X[0], X[0].numpy()
    for name, call in {
        "svgd_direction: precision": lambda: stein.svgd_direction(x, x, precision=bad),
        "kernel_stein_discrepancy: statistic": lambda: stein.kernel_stein_discrepancy(x, x, statistic=bad),
        "median_bandwidth: convention": lambda: stein.median_bandwidth(x, bad),
        "SVGD: precision": lambda: fe.SVGD(torch.sum, x, precision=bad),
        "SVGD: noise": lambda: fe.SVGD(torch.sum, x, noise=bad),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
            call()


def test_values_that_are_none():
    with pytest.raises(ValueError, match="svgd_direction: bandwidth must be >= 0; got nan"):
        stein.svgd_direction(X[0], X[0], bandwidth=torch.tensor(torch.nan))
    with pytest.raises(ValueError, match="SVGD: particles must have values; got a meta tensor"):
        fe.SVGD(torch.sum, X[0].to("meta"))


@pytest.mark.parametrize("name", ["svgd_direction", "kernel_stein_discrepancy", "sq_dist_rank"])
def test_a_meta_operand_among_real_ones_is_refused(name):
    """It brings the call to the function that only makes shapes, whose memory nobody has written."""
    x, h = torch.randn(1, 5, 3), torch.ones(1)
    calls = {
        "svgd_direction": ((x, x.to("meta"), h, 0, -0.5, 1.0, 1.0, 0), "scores"),
        "kernel_stein_discrepancy": ((x, x, h, torch.ones(1, 5, 1, device="meta"), 0, -0.5, 1.0), "weights"),
        "sq_dist_rank": ((x, [3], torch.ones(1, 2, device="meta")), "hint"),
    }
    arguments, named = calls[name]
    with pytest.raises(ValueError, match=f"{name}: {named} must be on cpu like the others; got meta"):
        getattr(torch.ops.fekernels, name)(*arguments)
