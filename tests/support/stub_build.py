"""Builds of a library that does next to nothing, each in a process of its own, for tests of finding and building."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fekernels._runtime import build, extension
from tests.support import ROOT, fork_server
from tests.support.fork_server import Child

WARNING = extension.SLOW

# Against PyTorch's C functions alone, declared here: with its headers a build took 3 s, and there are twenty.
REGISTER = """
#include <cstdint>
extern "C" {
int32_t aoti_torch_library_init_def(const char*, const char*, uint32_t, void**);
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, void**);
int32_t aoti_torch_library_def(void*, const char*);
int32_t torch_library_impl(void*, const char*, void (*)(uint64_t*, uint64_t, uint64_t), uint64_t);
int32_t torch_new_string_handle(const char*, uint64_t, void**);
}
namespace {
void give(uint64_t* stack, const char* text, uint64_t length) {
  void* handle = nullptr;
  torch_new_string_handle(text, length, &handle);
  stack[0] = reinterpret_cast<uint64_t>(handle);
}
void isa(uint64_t* stack, uint64_t, uint64_t) { give(stack, "baseline", 8); }
#ifdef FE_HAVE_CUDA
void build_info(uint64_t* stack, uint64_t, uint64_t) { give(stack, "stub, cuda", 10); }
#else
void build_info(uint64_t* stack, uint64_t, uint64_t) { give(stack, "stub", 4); }
#endif
const uint64_t kVersion = 0x020a000000000000ULL;
struct Registration {
  void *names = nullptr, *functions = nullptr;
  Registration() {
    aoti_torch_library_init_def("fekernels_native", __FILE__, __LINE__, &names);
    aoti_torch_library_def(names, "isa() -> str");
    aoti_torch_library_def(names, "build_info() -> str");
    aoti_torch_library_init_impl("fekernels_native", "CompositeExplicitAutograd", __FILE__, __LINE__, &functions);
    torch_library_impl(functions, "isa", &isa, kVersion);
    torch_library_impl(functions, "build_info", &build_info, kVersion);
  }
} registration;
}
"""
# One or two files of each kind: a compiler's start is most of what an empty one takes.
SOURCES = (
    "torch/library.cpp",
    "cpu/dispatch.cpp",
    "cpu/random.cpp",
    "cpu/optimizers/sgld.cpp",
    "cuda/random.cu",
)
PRELUDE = """
import logging, os, pathlib, sys
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
import torch
import fekernels
from fekernels._runtime import extension, locations
locations.SOURCE_ROOT = pathlib.Path(os.environ["STUB_SOURCES"])
locations.PREBUILT = pathlib.Path(os.environ["STUB_PREBUILT"])
"""
LOAD = "extension.load(); print(torch.ops.fekernels_native.isa(), extension.library_path())"
REASON = "print(extension.unavailable_reason()); extension.unavailable_reason()"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("csrc")
    for name in SOURCES:
        assert (ROOT / "csrc" / name).is_file()
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(REGISTER if name == "torch/library.cpp" else "")
    return root


def inherited() -> dict[str, str]:
    """The variables of this process, less those that choose how kernels are built."""
    return {
        k: v for k, v in os.environ.items() if not k.startswith("FEKERNELS_") and k not in ("CXX", "MAX_JOBS")
    }


@pytest.fixture
def environment(sources: Path, tmp_path: Path) -> dict[str, str]:
    """The variables of a child process: an empty cache, no prebuilt library, the stub sources, no nvcc."""
    return inherited() | {
        "TMPDIR": str(tmp_path),
        "FEKERNELS_CACHE_DIR": str(tmp_path / "cache"),
        "STUB_SOURCES": str(sources),
        "STUB_PREBUILT": str(tmp_path / "no" / "_C.so"),
        "NVCC": str(tmp_path / "no" / "nvcc"),
    }


@pytest.fixture(scope="session")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that holds the stub library."""
    cache = tmp_path_factory.mktemp("built")
    variables = {
        "FEKERNELS_CACHE_DIR": str(cache),
        "STUB_SOURCES": str(sources),
        "STUB_PREBUILT": str(cache / "no"),
    }
    done = run(LOAD, inherited() | variables)
    assert done.returncode == 0, done.stderr
    return cache


@pytest.fixture
def cached(built: Path, environment: dict[str, str]) -> Path:
    """The stub library, in this test's own cache."""
    shutil.copytree(built, environment["FEKERNELS_CACHE_DIR"])
    (library,) = Path(environment["FEKERNELS_CACHE_DIR"]).rglob("*.so")
    return library


def start(code: str, environment: dict[str, str]) -> Child:
    return Child(PRELUDE + code, environment)


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return fork_server.run(PRELUDE + code, environment)


def compiler_script(path: Path, line: str) -> str:
    """A command for CXX that does `line` and then what the real compiler does."""
    real = shlex.join(build.find_compiler()[0])
    path.write_text(f'#!/bin/sh\n{line}\nexec {real} "$@"\n')
    path.chmod(0o755)
    return str(path)
