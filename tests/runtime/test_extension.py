"""Finding, building and loading the compiled kernels, and everything that can go wrong with it.

Each case is a process of its own with a real compiler, on a source tree of a few files with next to nothing in
them. Only that tree and the place of the prebuilt library are put in by the test.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fekernels._runtime import extension
from tests.support import fork_server
from tests.support.fork_server import Child
from tests.support.stub_build import LOAD, REASON, WARNING, compiler_script, run, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")


def test_the_first_use_compiles_and_the_next_process_does_not(environment: dict[str, str]) -> None:
    four_threads = (
        "import threading\n"
        "threads = [threading.Thread(target=extension.load) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    first = run(four_threads + LOAD, environment)
    assert first.returncode == 0 and first.stdout.startswith("baseline "), first.stderr
    assert first.stderr.count("fekernels: compiling") == 1
    second = run(LOAD, environment)
    assert second.stdout == first.stdout and second.stderr == ""
    left = [path.name for path in Path(environment["FEKERNELS_CACHE_DIR"]).rglob("*") if path.is_file()]
    assert sorted(path.split(".", 1)[1] for path in left) == ["so", "so.lock"]


def test_import_compiles_nothing_and_runs_nothing(environment: dict[str, str]) -> None:
    """How long it takes is for `python -m fekernels bench` to say."""
    watch = """
import sys
import torch, numpy
ran = []
sys.addaudithook(lambda event, _: ran.append(event) if event in ("subprocess.Popen", "os.system") else None)
import fekernels
print(ran, [m for m in ("ninja", "sklearn", "matplotlib") if m in sys.modules])
"""
    done = fork_server.run(watch, environment)
    assert done.stdout.strip() == "[] []", done.stderr
    assert not Path(environment["FEKERNELS_CACHE_DIR"]).exists()


@pytest.mark.parametrize("how", ["CXX names nothing", "PATH has no compiler"])
def test_no_compiler_leaves_a_working_package_and_one_warning(
    how: str, environment: dict[str, str], tmp_path: Path
) -> None:
    if how == "CXX names nothing":
        environment["CXX"] = str(tmp_path / "no" / "g++")
    else:
        environment["PATH"] = str(tmp_path / "no")
    use = "print(fekernels.random.normal((3,), seed=1).shape)\n" * 2
    done = run(use + REASON, environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([3])") == 2
    assert "prebuilt: none installed; compiling for cpu: no C++20 compiler found" in done.stdout
    assert "Install g++ >= 11" in done.stdout
    assert done.stderr.count(f"WARNING {WARNING}") == 1, done.stderr


def test_no_compiler_needed_for_what_was_built_when_there_was_one(
    cached: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    done = run(LOAD, environment | {"CXX": str(tmp_path / "no" / "g++")})
    assert done.stdout == f"baseline {cached}\n", done.stderr


def test_a_compiler_error_is_in_the_reason(
    sources: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sources, broken)
    (broken / "cpu/optimizers/sgld.cpp").write_text("#error this file is broken\n")
    done = run(REASON, environment | {"STUB_SOURCES": str(broken)})
    assert "this file is broken" in done.stdout
    assert done.stderr.count(WARNING) == 1


@pytest.mark.parametrize("how", ["empty", "truncated", "changed", "not a library"])
def test_a_corrupt_cached_library_is_compiled_again_once(
    how: str, cached: Path, environment: dict[str, str]
) -> None:
    data = cached.read_bytes()
    text = b"whole, but no library"
    damaged = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "changed": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "not a library": text + hashlib.sha256(text).digest(),
    }[how]
    cached.write_bytes(damaged)
    done = run(LOAD, environment)
    assert done.stdout == f"baseline {cached}\n", done.stderr
    assert done.stderr.count("fekernels: compiling") == 1
    assert f"WARNING the cached library {cached} " in done.stderr
    assert WARNING not in done.stderr


@pytest.fixture
def stalled_builder(environment: dict[str, str], tmp_path: Path) -> Iterator[Child]:
    """A process that is compiling, and holds the lock, until the test ends."""
    compiling, hold = tmp_path / "compiling", tmp_path / "hold"
    hold.touch()
    stall = (
        f'case "$STALL $*" in 1*" -c "*) touch {compiling}; while [ -e {hold} ]; do sleep 0.1; done;; esac'
    )
    environment["CXX"] = compiler_script(tmp_path / "c++", stall)
    builder = start(LOAD, environment | {"STALL": "1"})
    while not compiling.exists() and builder.poll() is None:
        time.sleep(0.02)
    yield builder
    hold.unlink()  # ends the compilers, which outlive their builder
    builder.kill()
    builder.communicate()


def test_a_killed_builder_blocks_nobody(stalled_builder: Child, environment: dict[str, str]) -> None:
    cache = Path(environment["FEKERNELS_CACHE_DIR"])
    assert stalled_builder.poll() is None and list(cache.rglob("*.lock")) and list(cache.rglob("*.build-*"))
    stalled_builder.kill()
    stalled_builder.communicate()
    done = run(LOAD, environment)
    assert done.returncode == 0 and "waiting" not in done.stderr, done.stderr
    assert not list(cache.rglob("*.build-*"))


def test_two_processes_at_once_compile_once(environment: dict[str, str], tmp_path: Path) -> None:
    count = tmp_path / "links"
    note = f'case "$*" in *-shared*) echo link >> {count};; *" -c "*) sleep 0.5;; esac'
    environment["CXX"] = compiler_script(tmp_path / "c++", note)
    both = [start(LOAD, environment) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in both]
    assert all(stdout.startswith("baseline ") for stdout, _ in results), results
    assert count.read_text() == "link\n"
    assert sorted("waiting for another process" in stderr for _, stderr in results) == [False, True]


def test_a_prebuilt_library_comes_first(cached: Path, environment: dict[str, str], tmp_path: Path) -> None:
    prebuilt = tmp_path / "_C.so"
    cached.rename(prebuilt)
    environment |= {"STUB_PREBUILT": str(prebuilt), "CXX": str(tmp_path / "no")}
    done = run(
        LOAD + "; print(extension.has_cuda_kernels(), extension.build() == locations.PREBUILT)", environment
    )
    assert done.stdout == f"baseline {prebuilt}\nFalse True\n", done.stderr


def test_a_prebuilt_library_that_does_not_load(
    cached: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    prebuilt = tmp_path / "_C.so"
    prebuilt.write_text("no library")
    environment["STUB_PREBUILT"] = str(prebuilt)
    done = run(LOAD, environment)
    assert done.stdout == f"baseline {cached}\n"
    assert "WARNING the prebuilt library does not load" in done.stderr

    cached.unlink()
    both = run(REASON, environment | {"CXX": str(tmp_path / "no")})
    assert f"prebuilt: {prebuilt}: " in both.stdout and "compiling for cpu: no C++20 compiler" in both.stdout
    assert both.stderr.count(WARNING) == 1


@pytest.mark.parametrize(
    ("mode", "variable", "reason"),
    [("cuda", "NVCC", "no CUDA compiler"), ("cpu", "CXX", "no C++20 compiler found")],
)
def test_what_is_asked_for_by_name_fails_loudly(
    mode: str, variable: str, reason: str, environment: dict[str, str], tmp_path: Path
) -> None:
    each_way = """
for call in (extension.load, extension.unavailable_reason, lambda: fekernels.random.normal((3,), seed=1)):
    try:
        call()
    except extension.ExtensionUnavailable as error:
        print("refused:", error)
"""
    done = run(each_way, environment | {"FEKERNELS_BUILD": mode, variable: str(tmp_path / "no")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: ") == done.stdout.count(reason) == 3
    assert WARNING not in done.stderr


def test_a_prebuilt_library_without_cuda_does_not_serve_cuda(
    cached: Path, environment: dict[str, str]
) -> None:
    environment |= {"FEKERNELS_BUILD": "cuda", "STUB_PREBUILT": str(cached)}
    done = run(LOAD, environment)
    assert (
        done.returncode == 1 and "prebuilt: no CUDA kernels in it; compiling for cuda: no CUDA" in done.stderr
    )


def fake_nvcc(path: Path) -> str:
    """An nvcc 13.0 that compiles nothing."""
    path.write_text(
        '#!/bin/sh\ncase "$*" in --version) echo "release 13.0,";; --list*) echo compute_90;; '
        '*) echo "no such host compiler"; exit 1;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda", "wanted"),
    [(True, "13.2", True), (True, "12.8", False), (True, None, False), (False, "13.2", False)],
)
def test_when_cuda_kernels_are_built_unasked(
    nvcc: bool, torch_cuda: str | None, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path / "nvcc") if nvcc else str(tmp_path / "no"))
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert extension._wants_cuda() is wanted
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not extension._wants_cuda()


def test_cuda_kernels_that_do_not_compile_are_left_out(
    cached: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    on_a_gpu = "torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: True\n"
    done = run(on_a_gpu + LOAD, environment | {"NVCC": fake_nvcc(tmp_path / "nvcc")})
    assert done.stdout == f"baseline {cached}\n", done.stderr
    assert "WARNING left out the CUDA kernels: " in done.stderr and "no such host compiler" in done.stderr
    assert WARNING not in done.stderr


def test_none_compiles_nothing_and_is_no_surprise(environment: dict[str, str]) -> None:
    done = run(REASON, environment | {"FEKERNELS_BUILD": "none"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "FEKERNELS_BUILD=none\n", "")
    assert not Path(environment["FEKERNELS_CACHE_DIR"]).exists()


def test_an_unknown_mode_is_refused(environment: dict[str, str]) -> None:
    done = run(REASON, environment | {"FEKERNELS_BUILD": "gpu"})
    assert done.returncode == 1
    assert "ValueError: FEKERNELS_BUILD must be one of auto, none, cpu, cuda; got 'gpu'" in done.stderr


def test_a_cache_that_cannot_be_written(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(REASON, environment | {"FEKERNELS_CACHE_DIR": str(tmp_path / "file" / "cache")})
    assert (
        done.returncode == 0 and "Set FEKERNELS_CACHE_DIR to a directory that can be written" in done.stdout
    )


def test_build_takes_a_device_and_loads_nothing(cached: Path, environment: dict[str, str]) -> None:
    done = run("print(extension.build(), extension.library_path(), torch.ops.loaded_libraries)", environment)
    assert done.stdout == f"{cached} None set()\n", done.stderr
    with pytest.raises(ValueError, match="build: device must be one of cpu, cuda; got 'gpu'"):
        extension.build("gpu")
