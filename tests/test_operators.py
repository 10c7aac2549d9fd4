"""The operators as PyTorch sees them: schemas, compilation, and calls that they refuse."""

from contextlib import nullcontext

import pytest
import torch
from cases import DRAWS, SEED, Case, Frozen, Options, Row, bits_equal, make_row
from formulas import STEPS


def sample_arguments(op):
    """(positional arguments) of one valid call; tensors that do not require grad, as under no_grad."""
    if op.startswith("philox"):
        out = torch.empty(11, dtype=torch.int32 if op == "philox_bits" else torch.float32)
        return (out, SEED, 1, 2, 3, 4)
    options = Options(amsgrad=True, anchor=True)
    captured = []
    packet = getattr(torch.ops.fekernels, op)
    names = [argument.name for argument in packet.default._schema.arguments]

    class Stop(Exception):
        pass

    def record(**arguments):
        captured.extend(arguments[name] for name in names)
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.ops.fekernels, op, record)
        STEPS[op][0]([make_row(Case((5,)), options), make_row(Case((3, 7)), options)], options, None)
    return tuple(captured)


OPS = ("philox_bits", "philox_uniform", "philox_normal", "langevin_adam_", "sgld_")


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    result = torch.library.opcheck(getattr(torch.ops.fekernels, op).default, sample_arguments(op))
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_and_once(op):
    # Lengths, and every number that a training run changes, must stay symbols; lr and temperature as tensors, since
    # torch specialises on floats. (The sizes are all different: equal ones would be taken for the same symbol.)
    packet = getattr(torch.ops.fekernels, op)
    arguments = sample_arguments(op)
    names = [argument.name for argument in packet.default._schema.arguments]
    varied = {
        "step": 5,
        "offset": 8,
        "lr_tensor": torch.tensor(0.3),
        "temperature_tensor": torch.tensor(0.125),
    }

    def run(*args):
        packet(*args)

    def case(times):
        values = []
        for name, value in zip(names, arguments, strict=True):
            if name in varied:
                value = varied[name] * times
            elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
                value = [v.clone() if v.dim() == 0 else torch.cat([v] * times) for v in value]
            elif isinstance(value, torch.Tensor):
                value = torch.cat([value] * times) if name == "out" else value.clone()
            values.append(value)
        return values

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for times, context in ((2, nullcontext()), (3, torch._dynamo.config.patch(error_on_recompile=True))):
        eager, traced = case(times), case(times)
        packet(*eager)
        with context:
            compiled(*traced)
        for a, b in zip(eager, traced, strict=True):
            for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
                assert bits_equal(x, y) if isinstance(x, torch.Tensor) else x == y
    torch._dynamo.reset()


# Bad input.


def zeros(*shape, **keywords):
    return torch.zeros(shape, **keywords)


BAD_CALLS = {
    "noise": (dict(noise="white"), "noise must be one of momentum, preconditioned, isotropic; got 'white'"),
    "backend": (
        dict(backend="fast"),
        "backend must be one of auto, reference, cpp, triton, cuda; got 'fast'",
    ),
    "few_grads": (dict(grads=[]), "grads must have 1 entries like params; got 0"),
    "many_anchors": (dict(anchors=[zeros(5), zeros(5)]), "anchors must have 1 entries like params; got 2"),
    "many_streams": (dict(streams=[1, 2]), "streams must have 1 entries like params; got 2"),
    "many_steps": (dict(steps=[zeros(1), zeros(1)]), "steps must have 1 entries like params; got 2"),
    "stream": (dict(streams=[2**32]), r"streams\[0\] must be in \[0, 2\^32\); got 4294967296"),
    "few_shards": (dict(shards=[0, 5]), "shards must have 3 entries or none; got 2"),
    "no_run": (dict(shards=[0, 0, 5]), r"shards must have .* 1 <= run <= pitch; got \(0, 0, 5\)"),
    "long_run": (dict(shards=[0, 6, 5]), r"shards must have .* got \(0, 6, 5\) for params\[0\]"),
    "grad_shape": (
        dict(grads=[zeros(6)]),
        r"grad of params\[0\] must have shape \(5,\) like its parameter; got \(6,\)",
    ),
    "grad_dtype": (
        dict(grads=[zeros(5, dtype=torch.int32)]),
        r"grad of params\[0\] must be one of float32.*int32",
    ),
    "state_shape": (dict(exp_avgs=[zeros(4)]), r"exp_avg of params\[0\] must have shape \(5,\)"),
    "state_dtypes": (
        dict(exp_avg_sqs=[zeros(5).double()]),
        r"states of params\[0\] must have one dtype; got torch.float32, torch.float64",
    ),
    "anchor_shape": (dict(anchors=[zeros(1)]), r"anchor of params\[0\] must have shape \(5,\)"),
    "step_shape": (
        dict(steps=[zeros(2)]),
        r"step of params\[0\] must be one float32 or float64; got .*\(2,\)",
    ),
    "step_dtype": (
        dict(steps=[zeros(dtype=torch.int64)]),
        r"step of params\[0\] .* got torch.int64 of shape \(\)",
    ),
    "no_maximum": (dict(amsgrad=True), "max_exp_avg_sqs must hold a tensor a parameter"),
    "unit_dtype": (
        dict(noise_units=[zeros()]),
        r"noise_unit of params\[0\] must be one float64 on cpu; got torch.float32",
    ),
    "unit_shape": (
        dict(noise_units=[zeros(2).double()]),
        r"noise_unit of params\[0\] must be one float64 .* shape \(2,\)",
    ),
    "many_units": (
        dict(noise_units=[zeros().double()] * 2),
        "noise_units must have 1 entries like params; got 2",
    ),
    "lr_tensor": (dict(lr_tensor=zeros(0)), r"lr_tensor must be one float32 or float64; got .* \(0,\)"),
    "temperature_tensor": (
        dict(temperature_tensor=zeros(dtype=torch.int64)),
        "temperature_tensor must be one float32",
    ),
    "grad_scale": (dict(grad_scale=zeros(2)), "grad_scale must be one float32 or float64"),
    "found_inf": (dict(found_inf=zeros(2)), "found_inf must be one float32 or float64"),
}


def bad_calls():
    """Each op with the calls whose arguments it has."""
    for op in STEPS:
        names = {a.name for a in getattr(torch.ops.fekernels, op).default._schema.arguments}
        yield from ((op, what) for what, (changes, _) in BAD_CALLS.items() if set(changes) <= names)


@pytest.mark.parametrize(("op", "what"), bad_calls())
def test_bad_calls_raise_and_change_nothing(op, what):
    changes, message = BAD_CALLS[what]
    row = make_row(Case((5,)), Options())
    frozen = Frozen([getattr(row, name) for name in Row.WRITTEN])
    with pytest.raises(ValueError, match=message if what == "backend" else f"{op}: .*{message}"):
        STEPS[op][0]([row], Options(), **changes)
    assert frozen.unchanged()


def test_no_rows_is_a_step_of_nothing():
    for op in STEPS:
        values = [[] if isinstance(value, list) else value for value in sample_arguments(op)]
        frozen = Frozen([value for value in values if isinstance(value, torch.Tensor)])
        getattr(torch.ops.fekernels, op)(*values)
        assert frozen.unchanged()


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_want_a_contiguous_output_of_their_dtype(kind):
    op = getattr(torch.ops.fekernels, f"philox_{kind}")
    with pytest.raises(
        ValueError, match=f"philox_{kind}: out must be torch.{DRAWS[kind]}".replace("torch.torch", "torch")
    ):
        op(torch.empty(4, dtype=torch.float64), 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"out must be contiguous; got strides \(2,\) for shape \(4,\)"):
        op(torch.empty(8, dtype=DRAWS[kind])[::2], 0, 0, 0, 0, 0)
