"""Which backend runs, who says so, and what fe.backends() tells."""

import ast
import dataclasses
import functools
import os
import shutil
import sys
import types

import pytest
import torch

import fekernels as fe
from fekernels._runtime import backends, host
from fekernels.ops.free_energy import autograd, reparameterize
from tests.support import ROOT, fork_server
from tests.support.implementations import CPU_PLACES
from tests.support.tensors import UNIT

NAMES = ("reference", "cpp", "triton", "cuda")
OPS = {
    *("philox_bits", "philox_uniform", "philox_normal", "langevin_adam_", "sgld_"),
    *("variational_draw_", "variational_accumulate_", "variational_adam_", "variational_kl"),
    *("free_energy", "reparameterize", "reparameterize_backward"),
    *("svgd_direction", "svgd_direction_backward", "kernel_stein_discrepancy", "sq_dist_rank"),
    "belief_propagation",
}
needs_cpp = pytest.mark.skipif("CPU_PLACES[1].obstacle() is not None", reason="no C++ kernels here")


@pytest.fixture
def calls(monkeypatch):
    """The (kernel, backend) of every call that reaches a backend."""
    seen = []
    real = backends.implementation

    def spy(kernel, backend, *overload):
        seen.append((kernel, backend))
        return real(kernel, backend, *overload)

    monkeypatch.setattr(backends, "implementation", spy)
    if CPU_PLACES[1].obstacle() is None and host.host() is not None:
        # Most free energies and samples reach the C++ kernels by the host module.
        energy, sample = autograd._native(), reparameterize._native()

        def energy_natively(*arguments):
            terms = energy(*arguments)
            if terms is not None:
                seen.append(("free_energy", "cpp"))
            return terms

        def sample_natively(*arguments):
            z = sample(*arguments)
            if z is not None:
                seen.append(("reparameterize", "cpp"))
                z.grad_fn.register_hook(lambda *_: seen.append(("reparameterize_backward", "cpp")))
            return z

        seen.clear()
        monkeypatch.setattr(autograd, "_native", lambda: energy_natively)
        monkeypatch.setattr(reparameterize, "_native", lambda: sample_natively)
    return seen


def run_all():
    """Each op once."""
    for kind in ("bits", "uniform", "normal"):
        getattr(fe.random, kind)(4, seed=0)
    for make in (fe.LangevinAdam, fe.SGLD):
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        make([p], lr=0.1).step()
    variational = fe.VariationalAdam([p], 0.1, 10)
    for _ in range(2):  # the first draw's gradient is summed when the second begins
        with variational.sampled_params(train=True):
            p.grad = torch.ones(3)
    variational.step()
    variational.kl()
    mean, logvar = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    z = fe.reparameterize(mean, logvar, seed=0)
    fe.free_energy(z, torch.zeros(2, 3), mean, logvar).free_energy.backward()
    particles = torch.randn(5, 2, requires_grad=True)
    fe.svgd_direction(particles, particles.detach()).sum().backward()
    fe.kernel_stein_discrepancy(particles.detach(), particles.detach())
    fe.graph.belief_propagation(torch.randn(2, 3), torch.tensor([[0, 1]]), torch.randn(3, 3))


def test_a_compiler_gives_the_cpp_backend():
    # Were the kernels to stop building, everything else would go on on the reference and pass.
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) or os.environ.get("FEKERNELS_BUILD") == "none":
        pytest.skip("no compiler, or told not to use it")
    assert CPU_PLACES[1].obstacle() is None


@needs_cpp
def test_auto_is_cpp_on_a_cpu(calls):
    run_all()
    assert set(calls) == {(op, "cpp") for op in OPS}


@pytest.mark.parametrize("name", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_use_backend_reaches_every_op(name, calls):
    with fe.use_backend(name):
        run_all()
    assert set(calls) == {(op, name) for op in OPS}


def test_use_backend_as_a_context_and_as_a_call():
    before = backends.choose("cpu")
    with fe.use_backend("reference"):
        assert backends.choose("cpu") == "reference"
        with fe.use_backend("auto"):
            assert backends.choose("cpu") == before
        assert backends.choose("cpu") == "reference"
    assert backends.choose("cpu") == before
    with pytest.raises(ZeroDivisionError), fe.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.choose("cpu") == before
    fe.use_backend("reference")
    assert backends.choose("cpu") == "reference"
    fe.use_backend("auto")
    assert backends.choose("cpu") == before


@needs_cpp
def test_an_optimizers_own_backend_goes_before_use_backend(calls):
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    with fe.use_backend("cpp"):
        fe.LangevinAdam([p], backend="reference").step()
        fe.SGLD([p], 0.1, backend="auto").step()
    assert calls == [("langevin_adam_", "reference"), ("sgld_", "cpp")]


@needs_cpp
def test_a_backend_may_change_between_steps(calls):
    p = torch.ones(3, requires_grad=True)
    optimizer = fe.LangevinAdam([p], 0.1, temperature=1.0, eps=0.1, seed=1)
    q = torch.ones(3, requires_grad=True)
    steady = fe.LangevinAdam([q], 0.1, temperature=1.0, eps=0.1, seed=1, backend="cpp")
    for name in ("cpp", "reference", "cpp", "reference"):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
        with fe.use_backend(name):
            optimizer.step()
        steady.step()
    assert [backend for _, backend in calls[::2]] == ["cpp", "reference", "cpp", "reference"]
    assert optimizer.state[p]["step"].item() == 4
    # Four steps of numbers below 4, a few roundings each.
    torch.testing.assert_close(p, q, rtol=0, atol=4 * 4 * 4 * UNIT)


def test_unknown_names():
    for call in (fe.use_backend, lambda name: backends.choose("cpu", name)):
        with pytest.raises(
            ValueError, match="backend must be one of auto, reference, cpp, triton, cuda; got 'fast'"
        ):
            call("fast")
        with pytest.raises(TypeError, match="backend must be a string; got int"):
            call(3)
    assert backends._requested is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
def test_backends_that_no_device_here_can_run():
    with pytest.raises(
        fe.BackendUnavailable, match="backend 'cuda' cannot run here.*the CUDA kernels run on GPU tensors"
    ):
        fe.use_backend("cuda")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here.*triton"):
        fe.use_backend("triton")
    assert backends._requested is None


def test_cpp_is_for_cpu_tensors():
    with pytest.raises(
        fe.BackendUnavailable, match="cannot run on cuda tensors: the C.. kernels run on CPU tensors"
    ):
        backends.choose("cuda", "cpp")


def test_what_has_no_cuda_kernel_says_so():
    with pytest.raises(fe.BackendUnavailable, match="svgd_direction has no CUDA C.. kernel; triton has one"):
        backends.choose("cuda", "cuda", kernel="svgd_direction")
    assert backends.choose("cuda", "reference", kernel="svgd_direction") == "reference"


def test_the_table_says_where_the_named_backend_cannot_run(monkeypatch):
    """A table that raises would show nothing to whoever looks for the reason."""
    monkeypatch.setattr(backends, "_requested", "cuda")
    assert {row.in_use for row in fe.backends() if row.device == "cpu"} == {"none"}


@pytest.fixture
def invented(monkeypatch):
    """A backend that is a record and modules of a package: {kernel: function} of both, the reference's, wrapped."""
    functions = {}
    for kernel, file in {**backends.KERNELS, "scale_": "free_energy.free_energy"}.items():
        module = sys.modules.get(f"invented.{file}") or types.ModuleType(f"invented.{file}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        functions[kernel] = functools.partial(backends.implementation(kernel, "reference"))
        setattr(module, kernel, functions[kernel])

    def obstacle(device_type, kernel):
        return None if device_type == "cpu" else "the invented kernels run on CPU tensors"

    record = backends.Backend(obstacle, package="invented", by_rows=True)
    monkeypatch.setitem(backends.RECORDS, "invented", record)
    monkeypatch.setattr(backends, "BACKENDS", tuple(backends.RECORDS))
    return functions


def test_a_backend_is_its_record_and_its_package(monkeypatch, invented, calls):
    for kernel, function in invented.items():
        assert backends.implementation(kernel, "invented") is function
    calls.clear()
    with fe.use_backend("invented"):
        run_all()
        assert {row.in_use for row in fe.backends() if row.device == "cpu"} == {"invented"}
    assert {backend for _, backend in calls} == {"invented"} and {kernel for kernel, _ in calls} == OPS
    for name in ("cuda", "xpu"):
        with pytest.raises(
            fe.BackendUnavailable, match="'invented' .* the invented kernels run on CPU tensors"
        ):
            backends.choose(name, "invented")
    with pytest.raises(
        ValueError, match="must be one of auto, reference, cpp, triton, cuda, invented; got 'fast'"
    ):
        fe.use_backend("fast")
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("invented", "reference"))
    assert backends.choose("cpu") == "invented" and backends.choose("cuda", "reference") == "reference"


@needs_cpp
def test_a_step_gets_what_the_record_says(monkeypatch, invented):
    """Tables of addresses, where it does not take rows; messages on a graph contiguous only for compiled operators."""
    record = backends.RECORDS["invented"]
    monkeypatch.setitem(backends.RECORDS, "invented", dataclasses.replace(record, by_rows=False))
    stepped = []
    native = backends.implementation("sgld_", "cpp")
    module = sys.modules["invented.optimizers.sgld"]
    monkeypatch.setattr(module, "sgld_", lambda *tables: stepped.append(tables) or native(*tables))
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    fe.SGLD([p], 0.5, temperature=0.0, backend="reference").step()
    with fe.use_backend("invented"):
        fe.SGLD([p], 0.5, temperature=0.0).step()
    assert len(stepped) == 1 and p.tolist() == [0.0] * 3
    seen = []
    monkeypatch.setattr(
        sys.modules["invented.graph.belief_propagation"],
        "belief_propagation",
        lambda *call: seen.append(call[0]) or invented["belief_propagation"](*call),
    )
    with fe.use_backend("invented"):
        fe.graph.belief_propagation(torch.randn(3, 2).T, torch.tensor([[0, 1]]), torch.randn(3, 3))
    assert not seen[0].is_contiguous()


def test_layers_name_no_compiled_backend():
    """What is true of one backend stands in its record: a name in a condition would leave the next one out."""
    for path in (ROOT / "fekernels").rglob("*.py"):
        if path == ROOT / "fekernels/_runtime/backends.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            operands += node.args if isinstance(node, ast.Call) else []
            names = {each.value for each in operands if isinstance(each, ast.Constant)}
            assert not names & {"cpp", "triton"}, f"{path}, line {node.lineno}"


def test_other_devices_get_the_reference():
    assert backends.choose("xpu") == "reference"


def test_the_table():
    table = fe.backends()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    assert {(row.op, row.device) for row in table} == {(op, device) for op in OPS for device in devices}
    assert len(table) == len(OPS) * len(devices)
    for row in table:
        assert row.in_use in row.available and "reference" in row.available
        assert set(row.available) | set(row.reasons) == set(NAMES) and not set(row.available) & set(
            row.reasons
        )
        assert all(row.reasons.values())
        assert table[row.op, row.device] is row
    with pytest.raises(KeyError):
        table["sgld_", "abacus"]
    text = str(table)
    for row in table:
        assert row.op in text and all(reason in text for reason in row.reasons.values())


def test_the_table_shows_what_was_asked_for():
    with fe.use_backend("reference"):
        assert {row.in_use for row in fe.backends()} == {"reference"}


def python(code, **environment):
    return fork_server.run(code, {**os.environ, **environment})


def test_the_environment_chooses_and_a_bad_name_is_told():
    code = "import fekernels as fe; print({row.in_use for row in fe.backends()}); fe.random.bits(4, seed=0)"
    assert python(code, FEKERNELS_BACKEND="reference").stdout.strip() == "{'reference'}"
    failed = python(code, FEKERNELS_BACKEND="fast")
    assert failed.returncode != 0
    assert "FEKERNELS_BACKEND must be one of auto, reference, cpp, triton, cuda; got 'fast'" in failed.stderr


# Instruction sets.


@needs_cpp
def test_instruction_sets_are_named(isa):
    assert backends.native_op("isa")() == isa


@needs_cpp
def test_unknown_instruction_sets():
    before = backends.native_op("isa")()
    with pytest.raises(
        (RuntimeError, ValueError), match="FEKERNELS_ISA must be one of auto, .*baseline.*; got 'mmx'"
    ):
        backends.native_op("set_isa")("mmx")
    assert backends.native_op("isa")() == before


@needs_cpp
def test_the_environment_chooses_the_instruction_set():
    code = "import fekernels as fe, torch; fe.random.bits(4, seed=0); print(torch.ops.fekernels_native.isa())"
    assert python(code, FEKERNELS_ISA="baseline").stdout.strip() == "baseline"
    failed = python(code, FEKERNELS_ISA="mmx")
    assert failed.returncode != 0 and "FEKERNELS_ISA must be one of auto" in failed.stderr
