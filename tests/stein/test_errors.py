"""Bad arguments of the Stein functions: a clear error each, before anything is computed, and no tensor changed."""

import re

import pytest
import torch

import fekernels as fe
from fekernels import stein
from fekernels._catalogue.stein import KERNELS, NAMES
from fekernels._runtime import backends

ANY = ", ".join(NAMES)
FINITE = ", ".join(row.name for row in KERNELS if row.discrepancy)
X = torch.arange(24.0).view(2, 4, 3)
GOOD = {"particles": X, "scores": -X}

# (changed arguments, error, message), of both functions
OPERANDS = [
    ({"particles": None}, TypeError, "particles must be a tensor; got NoneType"),
    ({"particles": [1.0]}, TypeError, "particles must be a tensor; got list"),
    (
        {"particles": X.long()},
        TypeError,
        "particles must be float32, bfloat16, float16 or float64; got int64",
    ),
    (
        {"particles": X + 0j},
        TypeError,
        "particles must be float32, bfloat16, float16 or float64; got complex64",
    ),
    ({"particles": X.to_sparse()}, TypeError, "particles must be dense; got layout sparse_coo"),
    ({"particles": X[0, 0]}, ValueError, "particles must have shape (..., n, d); got (3,)"),
    ({"scores": 1.0}, TypeError, "scores must be a tensor; got float"),
    ({"scores": X.long()}, TypeError, "scores must be float32, bfloat16, float16 or float64; got int64"),
    ({"scores": X.to_sparse()}, TypeError, "scores must be dense; got layout sparse_coo"),
    ({"scores": X[:1]}, ValueError, "scores must have shape (2, 4, 3) like particles; got (1, 4, 3)"),
    ({"scores": X.mT}, ValueError, "scores must have shape (2, 4, 3) like particles; got (2, 3, 4)"),
    ({"scores": X.to("meta")}, ValueError, "scores must be on cpu like the others; got meta"),
    (
        {"kernel": "gauss"},
        ValueError,
        f"kernel must be one of {ANY} or an instance of fe.kernels; got 'gauss'",
    ),
    (
        {"kernel": 0},
        TypeError,
        f"kernel must be one of {ANY} or an instance of fe.kernels; got int",
    ),
    ({"kernel": None}, TypeError, "kernel must be one of rbf"),
    ({"kernel": stein.RBF}, TypeError, "or an instance of fe.kernels; got the class RBF"),
    ({"bandwidth": -1.0}, ValueError, "bandwidth must be >= 0; got -1.0"),
    ({"bandwidth": float("nan")}, ValueError, "bandwidth must be >= 0; got nan"),
    ({"bandwidth": "mean"}, ValueError, "bandwidth must be 'median', a number or a tensor; got 'mean'"),
    ({"bandwidth": None}, TypeError, "bandwidth must be a number; got NoneType"),
    ({"bandwidth": True}, TypeError, "bandwidth must be a number; got bool"),
    (
        {"bandwidth": torch.ones(3)},
        ValueError,
        "bandwidth must have a shape that broadcasts to the batch (2,) of particles; got (3,)",
    ),
    (
        {"bandwidth": torch.ones(1, 2)},
        ValueError,
        "bandwidth must have a shape that broadcasts to the batch (2,) of particles; got (1, 2)",
    ),
    (
        {"bandwidth": torch.ones(2).long()},
        TypeError,
        "bandwidth must be float32, bfloat16, float16 or float64; got int64",
    ),
    ({"bandwidth": torch.tensor([1.0, -2.0])}, ValueError, "bandwidth must be >= 0; got -2.0"),
    (
        {"bandwidth": torch.ones(2, device="meta")},
        ValueError,
        "bandwidth must be on cpu like the others; got meta",
    ),
]
DIRECTION = [
    ({"temperature": -0.5}, ValueError, "temperature must be finite and >= 0; got -0.5"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite and >= 0; got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be finite and >= 0; got inf"),
    ({"temperature": "1"}, TypeError, "temperature must be a number; got str"),
    ({"temperature": torch.ones(())}, TypeError, "temperature must be a number; got Tensor"),
    (
        {"precision": "fp16"},
        ValueError,
        "precision must be one of fp32, tf32, bf16x3; got 'fp16'",
    ),
]
DISCREPANCY = [
    (
        {"kernel": "laplace"},
        ValueError,
        f"kernel must be one of {FINITE}; got 'laplace', whose discrepancy is infinite",
    ),
    ({"kernel": stein.Laplace()}, ValueError, "got 'laplace', whose discrepancy is infinite"),
    ({"statistic": "w"}, ValueError, "statistic must be one of u, v; got 'w'"),
]
GOODNESS = [
    *DISCREPANCY[:2],
    ({"draws": 0}, ValueError, "draws must be in [1, 2147483648); got 0"),
    ({"draws": 10.0}, TypeError, "draws must be an int; got float"),
    ({"change_probability": 0.0}, ValueError, "change_probability must be in (0, 0.5]; got 0.0"),
    ({"change_probability": 0.6}, ValueError, "change_probability must be in (0, 0.5]; got 0.6"),
    ({"seed": 1.5}, TypeError, "seed must be an int; got float"),
    (
        {"particles": X[:, :1], "scores": X[:, :1]},
        ValueError,
        "particles must be at least 2 (n, for a pair); got 1",
    ),
]
INFINITE = (
    {"kernel": "laplace"}, ValueError, f"kernel must be one of {FINITE}; got 'laplace', whose discrepancy is infinite"
)  # fmt: skip
NO_WIDTH = ({"bandwidth": 0.0}, ValueError, "bandwidth must be > 0")
MATRIX = [
    INFINITE,
    NO_WIDTH,
    ({"others": X}, ValueError, "others and other_scores must be given together; got others alone"),
    (
        {"other_scores": X},
        ValueError,
        "others and other_scores must be given together; got other_scores alone",
    ),
    ({"others": 1.0, "other_scores": X}, TypeError, "others must be a tensor; got float"),
    (
        {"others": X[:1], "other_scores": X},
        ValueError,
        "others must have shape (2, m, 3) like particles; got (1, 4, 3)",
    ),
    (
        {"others": X[0], "other_scores": X},
        ValueError,
        "others must have shape (2, m, 3) like particles; got (4, 3)",
    ),
    (
        {"others": X.to("meta"), "other_scores": X},
        ValueError,
        "others must be on cpu like the others; got meta",
    ),
    ({"others": X, "other_scores": X.long()}, TypeError, "other_scores must be float32"),
    (
        {"others": X, "other_scores": X[:, :2]},
        ValueError,
        "other_scores must have shape (2, 4, 3) like others; got (2, 2, 3)",
    ),
]
THINNING = [
    INFINITE,
    NO_WIDTH,
    ({"m": 0}, ValueError, "m must be"),
    ({"m": 2.0}, TypeError, "m must be an int; got float"),
    (
        {"particles": X[:, :0], "scores": X[:, :0]},
        ValueError,
        "particles must be at least 1; got shape (2, 0, 3)",
    ),
    ({"scores": (X + 1) / 0}, ValueError, "scores must be finite; got a NaN or an infinity"),
    ({"particles": X.exp().exp()}, ValueError, "particles must be finite; got a NaN or an infinity"),
]
REQUIRED = {"thinning": {"m": 2}}
FUNCTIONS = {
    "svgd_direction": OPERANDS + DIRECTION,
    "kernel_stein_discrepancy": OPERANDS + DISCREPANCY,
    "goodness_of_fit": OPERANDS + GOODNESS,
    "kernel_matrix": OPERANDS + MATRIX,
    "thinning": OPERANDS + THINNING,
}
CALLS = [
    pytest.param(function, *call, id=f"{function}-{i}")
    for function, calls in FUNCTIONS.items()
    for i, call in enumerate(calls)
]


@pytest.mark.parametrize(("function", "change", "error", "message"), CALLS)
def test_bad_arguments(function, change, error, message, monkeypatch):
    arguments = {**GOOD, **REQUIRED.get(function, {}), **change}
    tensors = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and not value.is_sparse and not value.is_meta
    }
    before = {name: value.clone() for name, value in tensors.items()}

    def computed(*_):
        raise AssertionError("computed before the checks were done")

    monkeypatch.setattr(backends, "implementation", computed)
    particles, scores = arguments.pop("particles"), arguments.pop("scores")
    with pytest.raises(error, match=re.escape(message)) as caught:
        getattr(stein, function)(particles, scores, **arguments)
    assert str(caught.value).startswith(f"{function}: ")
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stein.IMQ(beta=0.0), ValueError, "IMQ: beta must be in (-1, 0); got 0.0"),
        (lambda: stein.IMQ(beta=-1), ValueError, "IMQ: beta must be in (-1, 0); got -1"),
        (lambda: stein.IMQ(beta=float("nan")), ValueError, "IMQ: beta must be in (-1, 0); got nan"),
        (lambda: stein.IMQ(beta="1"), TypeError, "IMQ: beta must be a number; got str"),
        (lambda: stein.IMQ(c=0.0), ValueError, "IMQ: c must be finite and > 0; got 0.0"),
        (lambda: stein.IMQ(c=float("inf")), ValueError, "IMQ: c must be finite and > 0; got inf"),
        (lambda: stein.IMQ(c=True), TypeError, "IMQ: c must be a number; got bool"),
        (
            lambda: stein.median_bandwidth(X, "median"),
            ValueError,
            "median_bandwidth: convention must be one of liu_wang, pairs, blackjax, numpyro; got 'median'",
        ),
        (
            lambda: stein.median_bandwidth(X[0, 0]),
            ValueError,
            "median_bandwidth: particles must have shape (..., n, d); got (3,)",
        ),
        (
            lambda: stein.median_bandwidth(X.long()),
            TypeError,
            "median_bandwidth: particles must be float32, bfloat16, float16 or float64; got int64",
        ),
        (
            lambda: stein.median_bandwidth(X[:, :0]),
            ValueError,
            "median_bandwidth: particles must be at least 1 (n); got 0",
        ),
        (
            lambda: stein.median_bandwidth(X, hint=torch.ones(3)),
            ValueError,
            "median_bandwidth: hint must have shape (2,), the batch of particles; got (3,)",
        ),
        (
            lambda: stein.median_bandwidth(X, hint=1.0),
            TypeError,
            "median_bandwidth: hint must be a tensor; got float",
        ),
        (
            lambda: stein.pairwise_sq_dist_median(X, 1),
            TypeError,
            "pairwise_sq_dist_median: include_diagonal must be a bool; got int",
        ),
        (
            lambda: stein.pairwise_sq_dist_median(X[:, :0]),
            ValueError,
            "pairwise_sq_dist_median: particles must be at least 1 (n); got 0",
        ),
    ],
)
def test_bad_calls_of_the_others(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_kernels_are_values():
    assert stein.IMQ() == stein.IMQ(-0.5, 1.0) != stein.IMQ(-0.4) and hash(stein.RBF()) == hash(stein.RBF())
    with pytest.raises(AttributeError):
        stein.IMQ().beta = -0.1


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there, so these backends can run")
    with pytest.raises(fe.BackendUnavailable, match=f"backend '{name}' cannot run"), fe.use_backend(name):
        stein.svgd_direction(X, -X)


def test_nan_stays_in_its_problem():
    x = torch.randn(2, 6, 3)
    s = -x
    s[0, 2, 1] = torch.nan
    for kernel in NAMES:
        phi = stein.svgd_direction(x, s, kernel=kernel, bandwidth=1.0)
        assert phi[0, 2, 1].isnan() and not phi[1].isnan().any()
    x[0, 2, 1] = torch.nan
    for h in ("median", 1.0):
        phi = stein.svgd_direction(x, -x, bandwidth=h)
        assert phi[0].isnan().any() and not phi[1].isnan().any()
