"""The operators as PyTorch sees them: schemas, compilation, and calls that they refuse."""

import functools
from contextlib import nullcontext

import pytest
import torch

from fekernels._runtime import backends
from fekernels._runtime.pointer_table import PointerTable
from fekernels._runtime.pointer_table import Row as TableRow
from tests.support.optimizer_rows import OPERATIONS, Row, call, make_row, settings_of
from tests.support.optimizers import SEED, Case, Options
from tests.support.tensors import Frozen, bits_equal


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
        call(op, [make_row(Case((5,)), options), make_row(Case((3, 7)), options)], options)
    return tuple(captured)


OPS = ("philox_bits", "philox_uniform", "philox_normal", *OPERATIONS)


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
    "no_length": (dict(shards=[0, 0, 5]), r"shards must have .* 1 <= length <= pitch; got \(0, 0, 5\)"),
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
    "param_memory": (dict(params=[zeros(1).expand(5)]), r"param of params\[0\] must have memory of its own"),
    "state_memory": (
        dict(exp_avgs=[zeros(1).expand(5)]),
        r"exp_avg of params\[0\] must have memory of its own",
    ),
    "param_shape": (dict(params=[zeros(4)]), r"must have shape \(4,\) like its parameter; got \(5,\)"),
    "param_dtype": (
        dict(params=[zeros(5, dtype=torch.int64)]),
        r"param of params\[0\] must be one of float32",
    ),
    "complex_param": (
        dict(params=[zeros(5, dtype=torch.complex64)]),
        r"param of params\[0\] must be one of float32.*complex64",
    ),
    "sparse_grad": (dict(grads=[zeros(5).to_sparse()]), r"grad of params\[0\] must be dense; got layout"),
    "meta_grad": (dict(grads=[zeros(5, device="meta")]), "grads must be on cpu like the others; got meta"),
    "meta_params": (dict(params=[zeros(5, device="meta")]), "grads must be on meta like the others; got cpu"),
    "meta_step": (dict(steps=[zeros(device="meta")]), "steps must be on cpu like the others; got meta"),
    "meta_state": (dict(exp_avg_sqs=[zeros(5, device="meta")]), "exp_avg_sqs must be on cpu .* got meta"),
    "meta_lr": (dict(lr_tensor=zeros(device="meta")), "lr_tensor must be on cpu like the others; got meta"),
    "no_maximum": (dict(amsgrad=True), "max_exp_avg_sqs must hold one tensor per parameter"),
    "unit_dtype": (
        dict(noise_units=[zeros()]),
        r"noise_unit of params\[0\] must be one float64; got torch.float32",
    ),
    "unit_shape": (
        dict(noise_units=[zeros(2).double()]),
        r"noise_unit of params\[0\] must be one float64; got .* shape \(2,\)",
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
    for op in OPERATIONS:
        names = {a.name for a in getattr(torch.ops.fekernels, op).default._schema.arguments}
        # The message of meta_params names the gradients, which draws have none of.
        yield from (
            (op, what)
            for what, (changes, _) in BAD_CALLS.items()
            if set(changes) <= names and (what != "meta_params" or "grads" in names)
        )


@pytest.mark.parametrize(("op", "what"), list(bad_calls()))
def test_bad_calls_raise_and_change_nothing(op, what):
    changes, message = BAD_CALLS[what]
    row = make_row(Case((5,)), Options())
    frozen = Frozen([getattr(row, name) for name in Row.WRITTEN])
    with pytest.raises(ValueError, match=message if what == "backend" else f"{op}: .*{message}"):
        call(op, [row], Options(), **changes)
    assert frozen.unchanged()


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bits", [24, 32])
def test_a_step_at_its_end_raises_and_changes_nothing(op, backend, bits):
    """A float32 counter's last is 2^24, where adding 1 changes nothing; a float64's is the noise's last, 2^32 - 1."""
    rows = [make_row(Case((5,)), Options()) for _ in range(2)]
    last = 2**24 if bits == 24 else 2**32 - 1
    rows[1].step = torch.tensor(float(last), dtype=torch.float32 if bits == 24 else torch.float64)
    frozen = Frozen([getattr(row, name) for row in rows for name in Row.WRITTEN])
    with pytest.raises(RuntimeError, match=rf"step must be below 2\^{bits}"):
        call(op, rows, Options(), backend)
    assert frozen.unchanged()
    rows[1].step -= 1
    call(op, rows, Options(), backend)
    assert not frozen.unchanged()


@pytest.mark.parametrize("op", OPERATIONS)
def test_params_on_two_devices_are_refused(op):
    rows = [make_row(Case((5,)), Options()), make_row(Case((5,)), Options()).clone("meta")]
    frozen = Frozen([getattr(rows[0], name) for name in Row.WRITTEN])
    with pytest.raises(ValueError, match=f"{op}: .*(one device|meta)"):
        call(op, rows, Options())
    assert frozen.unchanged()


@pytest.mark.parametrize("op", OPERATIONS)
def test_negated_operands_give_what_their_values_give(op):
    options = Options(anchor=True, prior_precision=2.0)
    row, other = (make_row(Case((65,)), options) for _ in range(2))
    for name in ("grad", "anchor", "param"):
        tensor = getattr(other, name)
        setattr(other, name, torch.complex(torch.zeros_like(tensor), -tensor).conj().imag)
        assert getattr(other, name).is_neg()
    call(op, [row], options)
    # torch itself materialises a lazily negated tensor for an operator, but cannot write a list back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fekernels, op, OPERATIONS[op].step_lists)
        call(op, [other], options)
    torch.testing.assert_close(other.param.resolve_neg(), row.param, rtol=1e-6, atol=1e-6)


# The compiled library's own operators go by the addresses of a table, and see to it that it can be one.

FIELDS = {
    "numel": (7, -1),
    "step": (6, 0),
    "stream": (8, 1 << 32),
    "offset": (9, -4),
    "run": (10, 0),
    "pitch": (11, 1),
    "dtypes": (12, 4),
    "layout": (13, 3),
    "negative layout": (13, -1),
    "param": (0, 0),
    "grad": (1, 0),
}


# Draws take no gradient, and sums write to no parameter.
WITH_GRADIENTS = [op for op in OPERATIONS if op not in ("variational_draw_", "variational_accumulate_")]


def native_step(op, table, layouts, whole=True):
    chunks, scratch = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    settings = settings_of(op, [make_row(Case((5,)), Options())], Options(temperature=0.0)).row
    step = functools.partial(backends.implementation(op, "cpp"), table, layouts, chunks, scratch)
    step(settings if whole else settings[1:], None, None, None, None, 7, 0)


@pytest.mark.parametrize("op", OPERATIONS)
def test_settings_of_another_operation_are_refused(op, native):
    row = make_row(Case((5,)), Options())
    table = PointerTable([table_row(row)])
    before = Frozen([row.param, row.step])
    with pytest.raises((RuntimeError, ValueError), match=r"settings must hold \d+ numbers; got"):
        native_step(op, table.table, table.layouts, whole=False)
    assert before.unchanged()


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_a_broken_table_is_refused(op, field, native):
    row = make_row(Case((5,)), Options())
    table = PointerTable([table_row(row)])
    before = Frozen([row.param, row.step])
    column, value = FIELDS[field]
    broken = table.table.clone()
    broken[0, column] = value
    with pytest.raises((RuntimeError, ValueError), match="table must hold rows as"):
        native_step(op, broken, table.layouts)
    assert before.unchanged()
    native_step(op, table.table, table.layouts)
    assert not before.unchanged()


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_broken_layouts_are_refused(op, native):
    row = make_row(Case((3, 5), "transposed"), Options())
    table = PointerTable([table_row(row)])
    assert table.table[0, 13] == 1
    before = Frozen([row.param, row.step])
    for layouts in (
        table.layouts[:-1].clone(),
        torch.cat((torch.tensor([65]), table.layouts[1:])),
        torch.cat((table.layouts[:1], table.layouts[1:2] + 1, table.layouts[2:])),
        table.layouts.int(),
        table.layouts[None],
    ):
        with pytest.raises((RuntimeError, ValueError), match="table must hold rows as|layouts must be"):
            native_step(op, table.table, layouts)
    for bad in (table.table.int(), table.table[:, :15], table.table[0]):
        with pytest.raises((RuntimeError, ValueError), match="table must be a contiguous int64"):
            native_step(op, bad, table.layouts)
    assert before.unchanged()


def table_row(row):
    return TableRow(row.param, row.grad, row.step, row.stream, row.exp_avg, row.exp_avg_sq)


def test_no_rows_is_a_step_of_nothing():
    for op in OPERATIONS:
        values = [[] if isinstance(value, list) else value for value in sample_arguments(op)]
        frozen = Frozen([value for value in values if isinstance(value, torch.Tensor)])
        getattr(torch.ops.fekernels, op)(*values)
        assert frozen.unchanged()
