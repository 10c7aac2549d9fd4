"""Bad input to the optimizers: the error by name, and every parameter, state, step and group tensor as before."""

import math

import pytest
import torch

import fekernels as fe
from tests.support.tensors import Frozen

OPTIMIZERS = ("LangevinAdam", "SGLD")
BACKENDS = "auto, reference, cpp, triton, cuda"


def make(name, params, **keywords):
    if name == "SGLD":
        return fe.SGLD(params, **{"lr": 0.1, "seed": 0, **keywords})
    return fe.LangevinAdam(params, **{"lr": 0.1, "temperature": 0.5, "eps": 0.1, "seed": 0, **keywords})


def started(name, steps=2, **keywords):
    """An optimizer in mid-run with two groups, the second of which each test spoils."""
    torch.manual_seed(0)
    params = [
        torch.randn(3, 4, requires_grad=True),
        torch.randn(5, requires_grad=True),
        torch.randn(6, requires_grad=True),
    ]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = make(name, groups, **keywords)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def freeze(optimizer):
    tensors = []
    for group in optimizer.param_groups:
        tensors += [value for value in group.values() if isinstance(value, torch.Tensor)]
        for p in group["params"]:
            tensors += [p, *optimizer.state.get(p, {}).values()]
    return Frozen([t for t in tensors if t.device.type != "meta"])


def assert_refused(optimizer, error, message):
    frozen = freeze(optimizer)
    versions = [p._version for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(error, match=message):
        optimizer.step()
    assert frozen.unchanged()
    assert versions == [p._version for group in optimizer.param_groups for p in group["params"]]


# Hyperparameters: refused at construction, in a new group, and at the step after they were changed.

NUMBERS = {
    "lr_negative": (dict(lr=-0.1), ValueError, "lr must be finite and >= 0; got -0.1"),
    "lr_nan": (dict(lr=math.nan), ValueError, "lr must be finite and >= 0; got nan"),
    "lr_infinite": (dict(lr=math.inf), ValueError, "lr must be finite and >= 0; got inf"),
    "lr_string": (dict(lr="0.1"), TypeError, "lr must be a number; got str"),
    "lr_bool": (dict(lr=True), TypeError, "lr must be a number; got bool"),
    "lr_tensor_negative": (dict(lr=torch.tensor(-1.0)), ValueError, "lr must be finite and >= 0"),
    "lr_tensor_two": (
        dict(lr=torch.ones(2)),
        ValueError,
        r"lr must be a number or a tensor with one element.*\(2,\)",
    ),
    "temperature_negative": (
        dict(temperature=-1e-9),
        ValueError,
        "temperature must be finite and >= 0; got -1e-09",
    ),
    "temperature_none": (dict(temperature=None), TypeError, "temperature must be a number; got NoneType"),
    "temperature_tensor": (
        dict(temperature=torch.tensor(-1.0)),
        ValueError,
        "temperature must be finite and >= 0",
    ),
    "prior_negative": (
        dict(prior_precision=-1.0),
        ValueError,
        "prior_precision must be finite and >= 0; got -1.0",
    ),
    "decay_negative": (dict(weight_decay=-1.0), ValueError, "weight_decay must be finite and >= 0; got -1.0"),
    "backend_unknown": (dict(backend="fast"), ValueError, f"backend must be one of {BACKENDS}; got 'fast'"),
}
ADAM_ONLY = {
    "eps_negative": (dict(eps=-1.0), ValueError, "eps must be finite and >= 0; got -1.0"),
    "eps_tensor": (dict(eps=torch.tensor(0.1)), TypeError, "eps must be a number; got Tensor"),
    "beta_one": (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\); got 1.0"),
    "beta_negative": (dict(betas=(-0.1, 0.9)), ValueError, r"betas\[0\] must be in \[0, 1\); got -0.1"),
    "betas_single": (dict(betas=0.9), TypeError, "betas must be a pair of numbers; got 0.9"),
    "noise_unknown": (
        dict(noise="white"),
        ValueError,
        "noise must be one of momentum, preconditioned, isotropic; got 'white'",
    ),
    "differentiable": (dict(differentiable=True), ValueError, "differentiable must be False"),
    "state_dtype": (
        dict(state_dtype=torch.int32),
        ValueError,
        "state_dtype must be None or one of float32, float64, bfloat16, float16; got torch.int32",
    ),
}
HYPERPARAMETERS = [
    *(pytest.param(name, *case, id=f"{name}-{key}") for name in OPTIMIZERS for key, case in NUMBERS.items()),
    *(pytest.param("LangevinAdam", *case, id=f"LangevinAdam-{key}") for key, case in ADAM_ONLY.items()),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), HYPERPARAMETERS)
def test_bad_hyperparameters(name, change, error, message):
    message = f"{name}: {message}"
    params = [torch.ones(3, requires_grad=True)]
    frozen = Frozen(params)
    with pytest.raises(error, match=message):
        make(name, params, **change)
    assert frozen.unchanged()

    optimizer = started(name)
    before = freeze(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params, **change})
    assert len(optimizer.param_groups) == 2 and before.unchanged() and params[0] not in optimizer.state

    optimizer.param_groups[1].update(change)
    assert_refused(optimizer, error, message)


@pytest.mark.parametrize(
    ("seed", "error"), [(1.5, TypeError), ("1", TypeError), (True, TypeError), (2**64, ValueError)], ids=repr
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_seeds(name, seed, error):
    with pytest.raises(error, match=f"{name}: seed must be"):
        make(name, [torch.ones(3, requires_grad=True)], seed=seed)
    optimizer = started(name)
    with pytest.raises(error, match=f"{name}: seed must be"):
        optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)], "seed": seed})
    assert len(optimizer.param_groups) == 2


# Backends.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_backend_that_cannot_run_says_why(name):
    for backend, reason in (("cuda", "the CUDA kernels run on GPU tensors"), ("triton", "triton")):
        message = f"backend '{backend}' cannot run on cpu tensors: {reason}"
        optimizer = started(name)
        optimizer.param_groups[1]["backend"] = backend
        assert_refused(optimizer, fe.BackendUnavailable, message)
        assert issubclass(fe.BackendUnavailable, ValueError)


# Parameters and devices.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_parameters(name):
    good = torch.ones(3, requires_grad=True)
    with pytest.raises(
        TypeError, match=rf"{name}: params\[1\] must be one of float32, .*; got torch.complex64"
    ):
        make(name, [good, torch.ones(3, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(TypeError, match=rf"{name}: params\[0\] must be one of float32, .*; got torch.int64"):
        make(name, [torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match=f"{name}: params of one group must be on one device; got cpu, meta"):
        make(name, [good, torch.ones(3, device="meta", requires_grad=True)])
    with pytest.raises(ValueError, match="empty parameter list"):
        make(name, [])
    for wrong in (good, None, "weights"):
        with pytest.raises(TypeError, match=f"{name}: params must be an iterable of tensors.*; got"):
            make(name, wrong)
    optimizer = started(name)
    before = freeze(optimizer)
    with pytest.raises(TypeError, match="got torch.complex64"):
        optimizer.add_param_group({"params": [torch.ones(3, dtype=torch.complex64, requires_grad=True)]})
    with pytest.raises(ValueError, match="must be on one device; got cpu, meta"):
        optimizer.add_param_group({"params": [good, torch.ones(3, device="meta", requires_grad=True)]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]})
    assert len(optimizer.param_groups) == 2 and before.unchanged()


@pytest.mark.parametrize("key", ["lr", "temperature"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_number_on_another_device(name, key):
    optimizer = started(name)
    optimizer.param_groups[1][key] = torch.tensor(0.1, device="meta")
    assert_refused(optimizer, ValueError, f"{name}: {key} must be on cpu like its parameters; got meta")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "anchor"])
def test_a_state_on_another_device(key):
    optimizer = started("LangevinAdam", prior_precision=1.0, anchor="init")
    p = optimizer.param_groups[1]["params"][1]
    optimizer.state[p][key] = optimizer.state[p][key].to("meta")
    assert_refused(optimizer, ValueError, f"LangevinAdam: {key} of .* must be on cpu .*; got meta")


# Gradients.


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients(name, steps):
    optimizer = started(name, steps)
    optimizer.param_groups[1]["params"][1].grad = torch.eye(6)[0].to_sparse()
    message = rf"{name}: the gradient of params\[1\] must be dense; got layout torch.sparse_coo .*SparseAdam"
    assert_refused(optimizer, ValueError, message)
    net = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = make(name, net.parameters())
    net(torch.tensor([1])).sum().backward()
    assert_refused(optimizer, ValueError, "must be dense")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_are_not_real_numbers(name, dtype, steps):
    optimizer = started(name, steps)
    p = optimizer.param_groups[1]["params"][1]
    p.grad = None
    p.grad_dtype = None  # any dtype will be taken
    p.grad = torch.ones(6, dtype=dtype)
    kind = "real" if dtype.is_complex else "one of float32"
    assert_refused(
        optimizer, TypeError, rf"{name}: the gradient of params\[1\] must be {kind}.*; got {dtype}"
    )


# Anchors.


@pytest.mark.parametrize(
    ("anchor", "error", "message"),
    [
        ("start", ValueError, "anchor must be None, 'init' or a list of tensors; got 'start'"),
        (1.0, TypeError, "anchor must be None, 'init' or a list of tensors; got float"),
        (torch.ones(3), TypeError, "anchor must be None, 'init' or a list of tensors; got Tensor"),
        ([torch.ones(3)], ValueError, "anchor must have 2 tensors like params; got 1"),
        ([torch.ones(3), 1.0], TypeError, r"anchor\[1\] must be a tensor; got float"),
        (
            [torch.ones(3), torch.ones(4)],
            ValueError,
            r"anchor\[1\] must have shape \(4, 1\) like its parameter; got \(4,\)",
        ),
        (
            [torch.ones(3), torch.ones(4, 1, dtype=torch.int64)],
            TypeError,
            r"anchor\[1\] must be one of float32.*int64",
        ),
    ],
    ids=["name", "float", "tensor", "count", "element", "shape", "dtype"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_anchors(name, anchor, error, message):
    params = [torch.ones(3, requires_grad=True), torch.ones(4, 1, requires_grad=True)]
    with pytest.raises(error, match=f"{name}: {message}"):
        make(name, params, anchor=anchor)
    optimizer = started(name)
    with pytest.raises(error, match=f"{name}: {message}"):
        optimizer.add_param_group({"params": params, "anchor": anchor})
    assert len(optimizer.param_groups) == 2
    assert not any(p in optimizer.state for p in params)


# States that do not fit, from a checkpoint of another model say: the kernels write through pointers.


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "anchor"])
def test_a_state_of_another_shape(key):
    optimizer = started("LangevinAdam", prior_precision=1.0, anchor="init", amsgrad=True)
    p = optimizer.param_groups[1]["params"][1]
    optimizer.state[p][key] = torch.zeros(2)
    assert_refused(optimizer, ValueError, rf"LangevinAdam: {key} of .* must have shape \(6,\) .*; got \(2,\)")


def test_a_step_that_is_no_number():
    for step in (torch.zeros(2), torch.zeros((), dtype=torch.int64)):
        optimizer = started("LangevinAdam")
        optimizer.state[optimizer.param_groups[1]["params"][1]]["step"] = step
        assert_refused(optimizer, ValueError, "LangevinAdam: step of .* must be one float32 or float64; got")


def test_states_of_several_dtypes():
    optimizer = started("LangevinAdam")
    state = optimizer.state[optimizer.param_groups[1]["params"][1]]
    state["exp_avg_sq"] = state["exp_avg_sq"].double()
    assert_refused(optimizer, ValueError, "LangevinAdam: the states of .* must have one dtype; got")


def test_a_checkpoint_of_another_model():
    adam = torch.optim.Adam(
        [torch.ones(3, 4, requires_grad=True), *(torch.ones(2, requires_grad=True) for _ in range(2))]
    )
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    adam.step()
    params = [
        torch.ones(3, 4, requires_grad=True),
        torch.ones(5, requires_grad=True),
        torch.ones(6, requires_grad=True),
    ]
    optimizer = make("LangevinAdam", params, temperature=0.0)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 must have shape \(5,\) .*got \(2,\)"):
        optimizer.load_state_dict(adam.state_dict())
    assert not optimizer.state
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_an_error_leaves_an_optimizer_that_works():
    optimizer, untouched = started("LangevinAdam"), started("LangevinAdam")
    group = optimizer.param_groups[1]
    group["lr"] = -1.0
    with pytest.raises(ValueError):
        optimizer.step()
    group["lr"] = 0.1
    for o in (optimizer, untouched):
        o.step()
    for a, b in zip(optimizer.param_groups, untouched.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a["params"], b["params"], strict=True))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_step_too_many_names_optimizer_and_parameter(backend, groups):
    params = [torch.zeros(3, requires_grad=True) for _ in range(4)]
    given = [{"params": params[:2]}, {"params": params[2:]}] if groups == 2 else params[2:]
    optimizer = fe.LangevinAdam(given, seed=0, backend=backend)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[3]]["step"].fill_(2.0**24)
    expected = (
        r"^LangevinAdam: step of params\[1\] must be below 2\^24, where its counter ends; got 16777216$"
    )
    with pytest.raises(RuntimeError, match=expected):
        optimizer.step()
    assert all(map(torch.equal, params, before))
