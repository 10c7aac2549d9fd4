"""Bad arguments of the free energy: a clear error each, and no tensor changed."""

import re

import pytest
import torch

import fekernels as fe

X, Z = torch.zeros(4, 6), torch.zeros(4, 2)
GOOD = {"params": X, "target": X, "mean": Z, "logvar": Z}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"likelihood": "gausian"}, ValueError, "likelihood must be one of mse, gaussian, bernoulli"),
        ({"likelihood": None}, ValueError, "likelihood must be one of"),
        ({"reduction": "average"}, ValueError, "reduction must be one of none, mean, sum; got 'average'"),
        ({"params": 3.0}, TypeError, "params must be a tensor or a tuple of tensors; got float"),
        ({"params": [X, 3.0]}, TypeError, "params[1] must be a tensor; got float"),
        ({"params": X.long()}, TypeError, "params must be float32, bfloat16, float16 or float64; got int64"),
        (
            {"params": X + 0j},
            TypeError,
            "params must be float32, bfloat16, float16 or float64; got complex64",
        ),
        ({"params": X.to_sparse()}, TypeError, "params must be dense; got layout sparse_coo"),
        ({"target": X.to_sparse()}, TypeError, "target must be dense; got layout sparse_coo"),
        ({"params": (X, X, X)}, ValueError, "params must hold 1 or 2 tensor(s) for 'gaussian'; got 3"),
        (
            {"params": X, "likelihood": "laplace"},
            ValueError,
            "params must hold 2 tensor(s) for 'laplace'; got 1",
        ),
        (
            {"params": (X, torch.zeros(5))},
            ValueError,
            "params[1] must have a shape that broadcasts to (4, 6) like params[0]; got (5,)",
        ),
        ({"params": torch.zeros(())}, ValueError, "params must have shape (batch, ...); got ()"),
        ({"target": None}, TypeError, "target must be a tensor; got NoneType"),
        ({"target": torch.zeros(4, 5)}, ValueError, "target must have shape (4, 6) like params; got (4, 5)"),
        ({"target": X + 0j}, TypeError, "target must be real; got complex64"),
        ({"target": X.clone().requires_grad_()}, ValueError, "target must not require a gradient"),
        (
            {"likelihood": "categorical"},
            ValueError,
            "target must have shape (4,) like params without its last dimension (the classes); got (4, 6)",
        ),
        (
            {"likelihood": "categorical", "target": torch.zeros(4)},
            TypeError,
            "target must hold class indices, an integer dtype; got float32",
        ),
        (
            {"likelihood": "categorical", "target": torch.zeros(4).long().to_sparse()},
            TypeError,
            "target must be dense; got layout sparse_coo",
        ),
        ({"mask": (X == 0).to_sparse()}, TypeError, "mask must be dense; got layout sparse_coo"),
        ({"params": None}, TypeError, "params must be a tensor or a tuple of tensors; got NoneType"),
        ({"mean": None}, TypeError, "mean must be a tensor; got NoneType"),
        ({"logvar": None}, TypeError, "logvar must be a tensor; got NoneType"),
        ({"logvar": torch.zeros(4, 3)}, ValueError, "logvar must have shape (4, 2) like mean; got (4, 3)"),
        ({"logvar": Z.long()}, TypeError, "logvar must be float32, bfloat16, float16 or float64; got int64"),
        (
            {"mean": torch.zeros(3, 2), "logvar": torch.zeros(3, 2)},
            ValueError,
            "mean must have the batch size 4 of params; got shape (3, 2)",
        ),
        (
            {"prior_mean": torch.zeros(3)},
            ValueError,
            "prior_mean must have a shape that broadcasts to (4, 2) like mean; got (3,)",
        ),
        ({"prior_logvar": 0.0}, TypeError, "prior_logvar must be a tensor; got float"),
        ({"mask": X}, TypeError, "mask must be a bool tensor, True = observed; got float32"),
        ({"mask": [True]}, TypeError, "mask must be a bool tensor, True = observed; got list"),
        (
            {"mask": torch.ones(4, 5).bool()},
            ValueError,
            "mask must have shape (4, 6) like target; got (4, 5)",
        ),
        ({"weight": torch.zeros(3)}, ValueError, "weight must have shape (4,); got (3,)"),
        ({"weight": 1.0}, TypeError, "weight must be a tensor; got float"),
        ({"weight": torch.ones(4).requires_grad_()}, ValueError, "weight must not require a gradient"),
        ({"beta": -1.0}, ValueError, "beta must be finite and >= 0; got -1.0"),
        ({"beta": "1"}, TypeError, "beta must be a number; got str"),
        ({"beta": float("nan")}, ValueError, "beta must be finite and >= 0; got nan"),
        ({"free_bits": -0.1}, ValueError, "free_bits must be finite and >= 0; got -0.1"),
        ({"free_bits": 0.1, "reduction": "none"}, ValueError, "free_bits needs a batch mean"),
        (
            {"inplace_backward": True, "reduction": "none"},
            ValueError,
            "inplace_backward needs a gradient known",
        ),
        ({"target": X.to("meta")}, ValueError, "target must be on cpu like the others; got meta"),
        (
            {"mean": Z.to("meta"), "logvar": Z.to("meta")},
            ValueError,
            "mean must be on cpu like the others; got meta",
        ),
        ({"mask": X.bool().to("meta")}, ValueError, "mask must be on cpu like the others; got meta"),
        ({"likelihood": "bernoulli", "target": X - 1, "validate": True}, ValueError, "target"),
        ({"likelihood": "poisson", "target": X + 0.5, "validate": True}, ValueError, "target"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {**GOOD, **change}
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    positional = [arguments.pop(name) for name in GOOD]
    with pytest.raises(error, match=re.escape(message)) as caught:
        fe.free_energy(*positional, **arguments)
    assert str(caught.value).startswith("free_energy: ")
    after = {**dict(zip(GOOD, positional, strict=True)), **arguments}
    for name, value in before.items():
        assert value.is_meta or value.is_sparse or torch.equal(after[name], value)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", GOOD)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_nested_tensor_is_refused_whatever_the_reduction(name, reduction):
    nested = torch.nested.nested_tensor(list(GOOD[name]))
    with pytest.raises(TypeError, match=f"^free_energy: {name} must be dense; got nested"):
        fe.free_energy(**{**GOOD, name: nested}, reduction=reduction)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_beta_tensor_of_the_cpu_is_checked_as_a_number_is(value, reduction):
    message = f"^free_energy: beta must be finite and >= 0; got {value}"
    for beta in (value, torch.tensor(value), torch.nn.Parameter(torch.tensor(value))):
        with pytest.raises(ValueError, match=message):
            fe.free_energy(**GOOD, beta=beta, reduction=reduction)
    with pytest.raises(ValueError, match="beta must be finite and >= 0; got -2"):
        fe.free_energy(**GOOD, beta=torch.tensor(-2))
    # A transform hides the values, and whoever is inside of one has none to check.
    betas = torch.tensor([value, 1.0])
    rows = torch.func.vmap(lambda beta: fe.free_energy(**GOOD, beta=beta).free_energy)(betas)
    assert rows.shape == (2,)


def test_functions_name_themselves():
    with pytest.raises(ValueError, match=r"^energy: likelihood must be one of"):
        fe.energy(X, X, "gausian")
    with pytest.raises(ValueError, match=r"^gaussian_kl: logvar must have shape"):
        fe.gaussian_kl(Z, X)
    with pytest.raises(
        TypeError, match=r"^energy: params must be a tensor or a tuple of tensors; got NoneType"
    ):
        fe.energy(None, X)
    with pytest.raises(TypeError, match=r"^gaussian_kl: mean must be a tensor; got NoneType"):
        fe.gaussian_kl(None, Z)
    with pytest.raises(TypeError, match=r"^gaussian_kl: logvar must be a tensor; got NoneType"):
        fe.gaussian_kl(Z, None)
    with pytest.raises(ValueError, match=r"^gaussian_kl: reduction must be one of"):
        fe.gaussian_kl(Z, Z, reduction="all")
    with pytest.raises(ValueError, match="prior_mean and prior_logvar must be given together"):
        torch.ops.fekernels.gaussian_kl(Z, Z, Z, None, "sum")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there, so these backends can run")
    with pytest.raises(fe.BackendUnavailable, match=f"backend '{name}' cannot run"), fe.use_backend(name):
        fe.free_energy(X, X, Z, Z)


def test_valid_targets_pass_validation():
    x = torch.tensor([[0.0, 1.0, 3.0]])
    z = torch.zeros(1, 1)
    assert fe.free_energy(x, x, z, z, likelihood="poisson", validate=True).energy.isfinite()
    hidden = torch.tensor([[0.0, -1.0, 3.0]])
    mask = torch.tensor([[True, False, True]])
    assert fe.free_energy(x, hidden, z, z, likelihood="poisson", mask=mask, validate=True).energy.isfinite()


@pytest.mark.parametrize("freed", range(4))
def test_operands_whose_storage_was_freed_are_refused(freed):
    operands = [torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 2), torch.randn(6, 2)]
    operands[freed].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"must hold values; its storage has 0 of the \d+ bytes needed"):
        fe.free_energy(*operands, likelihood="mse")
