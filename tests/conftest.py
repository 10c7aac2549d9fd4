"""What every test gets: a known random state, and its global settings put back."""

import atexit
import ctypes
import functools
import gc
import importlib.util
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from filelock import FileLock

import fekernels as fe
from fekernels._runtime import backends, extension
from tests.fuzz import budget as fuzz_budget
from tests.support import cuda_on_cpu
from tests.support.cuda_on_cpu.free_energy import FreeEnergyKernels
from tests.support.free_energy_kernels import Kernels, implementation
from tests.support.implementations import (
    CPU_PLACES,
    GPU_IMPLEMENTATIONS,
    GPU_PLACES,
    IMPLEMENTATIONS,
    ISAS,
    PLACES,
    Place,
    instruction_set,
)
from tests.support.optimizer_kernels import StepKernel, backend_kernel
from tests.support.random import NoiseKernel, backend_noise
from tests.support.stein_kernels import stein_kernels  # noqa: F401 (a fixture)
from tests.support.stub_build import built, cached, environment, sources  # noqa: F401 (fixtures)
from tests.support.triton.free_energy_worker import interpreted_kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=fuzz_budget.DEFAULT,
        help="examples of all tests in tests/fuzz together; another number than the default draws new ones every time",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Every instruction set is compiled, because the tests compare them.

    One thread a worker: most tensors here are small, and `pytest -n` has its own. Tests of threads say how many.
    """
    os.environ.setdefault("FEKERNELS_ISA", "all")
    torch.set_num_threads(1)
    _let_torchs_loggers_propagate()
    fuzz_budget.total = config.getoption("--fuzz-examples")


def _let_torchs_loggers_propagate() -> None:
    """To the one named torch, which has the same handler: pytest adds two to each that does not, thrice a test."""
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger) and not logger.propagate:
            logger.handlers.clear()
            logger.propagate = True


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """A million objects that live to the end: nobody looks for garbage among them, neither now nor in the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Or what is not collected at the end is a leak to triton, which tells of it.

    One of `pytest -n`'s processes has told its results by now, and leaves its objects to the system: to look for
    garbage among them and to free each takes 6 s.
    """
    if hasattr(config, "workerinput"):
        atexit._run_exitfuncs()
        os._exit(0)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """No test leaves a backend, a thread count or a default dtype behind, and none depends on the one before."""
    backend, threads, dtype = backends._requested, torch.get_num_threads(), torch.get_default_dtype()
    # For devices that are not there torch.manual_seed keeps stack traces, which takes as long as many a test.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    backends._requested = backend
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Each backend on each device that this machine has for it."""
    obstacle = request.param.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    return request.param


@pytest.fixture
def backend(place: Place) -> Iterator[Place]:
    """`place`, and the public functions use its backend."""
    with fe.use_backend(place.backend):
        yield place


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ kernels that this processor has."""
    obstacle = Place("cpp", "cpu").obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(scope="session")
def native() -> object:
    """The operators of the C++ CPU kernels."""
    if cuda_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler")
    extension.load()
    return torch.ops.fekernels_native


def _compiled_once(factory: pytest.TempPathFactory, name: str, files: Sequence[str]) -> ctypes.CDLL:
    """CUDA sources compiled for the CPU, by the first of `pytest -n`'s processes that asks for them."""
    cxx = cuda_on_cpu.compiler()
    if cxx is None:
        pytest.skip("no C++ compiler")
    base = factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    directory.mkdir(exist_ok=True)
    with FileLock(directory / "lock"):
        return cuda_on_cpu.compile_kernels(cxx, directory, cuda_on_cpu.CSRC, files)


@pytest.fixture(scope="session")
def cuda_free_energy(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The free energy's CUDA sources compiled for the CPU."""
    return _compiled_once(tmp_path_factory, "cuda_free_energy", cuda_on_cpu.FREE_ENERGY_SOURCES)


@pytest.fixture(scope="session")
def cuda_steps(tmp_path_factory: pytest.TempPathFactory) -> cuda_on_cpu.Kernels:
    """The CUDA sources of noise and of the optimizers compiled for the CPU."""
    return cuda_on_cpu.Kernels(_compiled_once(tmp_path_factory, "cuda_steps", cuda_on_cpu.STEP_SOURCES))


@pytest.fixture(scope="session")
def interpret() -> Iterator[Callable[..., Any]]:
    """interpret(name, *arguments) calls a function of tests.support.triton.worker, where Triton interprets its kernels.

    One process for all tests: it takes seconds to import torch and triton once more.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from tests.support.triton.worker import interpreter

    with interpreter() as run:
        yield run


@pytest.fixture(scope="session")
def fuses(interpret: Callable[..., Any]) -> bool:
    """Whether interpreted kernels have a GPU's bits: Triton 3.9 rounds an fma once, 3.6 twice."""
    return bool(interpret("fuses"))


EACH = [pytest.param(k, marks=pytest.mark.gpu if k in GPU_IMPLEMENTATIONS else ()) for k in IMPLEMENTATIONS]


@contextmanager
def _place_of(request: pytest.FixtureRequest, name: str) -> Iterator[Place]:
    """The backend and device of this name; "cpp-avx2" is "cpp" with this instruction set."""
    backend, _, isa = name.partition("-")
    if isa in ISAS:
        request.getfixturevalue("native")
        with instruction_set(isa):
            yield Place(backend, "cpu")
        return
    place = next(each for each in (*CPU_PLACES, *GPU_PLACES) if str(each) == name)
    if (obstacle := place.obstacle()) is not None:
        pytest.skip(obstacle)
    yield place


@pytest.fixture(params=EACH)
def step_kernel(request: pytest.FixtureRequest) -> Iterator[StepKernel]:
    """Every implementation of the optimizers' steps."""
    name: str = request.param
    if name == "cuda_on_cpu":
        yield StepKernel(name, request.getfixturevalue("cuda_steps").step_rows)
    elif name == "triton_interpreted":
        interpret = request.getfixturevalue("interpret")
        yield StepKernel(name, functools.partial(interpret, "step"), exact=request.getfixturevalue("fuses"))
    else:
        with _place_of(request, name) as place:
            yield backend_kernel(place, name)


@pytest.fixture(params=EACH)
def free_energy_kernel(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Every implementation of the free energy and of the reparameterisation."""
    name: str = request.param
    if name == "cuda_on_cpu":
        yield FreeEnergyKernels(request.getfixturevalue("cuda_free_energy")).kernels()
    elif name == "triton_interpreted":
        yield interpreted_kernels(request.getfixturevalue("interpret"), request.getfixturevalue("fuses"))
    else:
        with _place_of(request, name) as place:
            yield implementation(place.backend, place.device, name)


@pytest.fixture(params=EACH)
def noise_kernel(request: pytest.FixtureRequest) -> Iterator[NoiseKernel]:
    """Every implementation of the noise."""
    name: str = request.param
    if name == "cuda_on_cpu":
        yield NoiseKernel(name, request.getfixturevalue("cuda_steps").fill)
    elif name == "triton_interpreted":
        interpret = request.getfixturevalue("interpret")
        yield NoiseKernel(name, functools.partial(interpret, "fill"), exact=request.getfixturevalue("fuses"))
    else:
        with _place_of(request, name) as place:
            yield backend_noise(place, name)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, or the largest integer, so that what a kernel leaves unwritten shows."""
    memory = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    native = extension.unavailable_reason() is None  # its own results are made past PyTorch's filling
    if native:
        backends.native_op("poison_empty")(True)
    yield
    if native:
        backends.native_op("poison_empty")(False)
    torch.use_deterministic_algorithms(before[0])
    memory.fill_uninitialized_memory = before[1]
