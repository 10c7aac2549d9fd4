"""What a build needs (torch, compilers), its steps, and the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fekernels._runtime import build, extension
from tests.support import ROOT


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117", "2.9.0a0+git1234", "unknown"])
def test_an_old_torch_is_named(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs torch >= 2\.10; found torch ") as caught:
        extension.check_torch_version(version)
    assert version in str(caught.value)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.0.dev20260901", "3.0.0"])
def test_a_new_torch_is_taken(version: str) -> None:
    assert extension.check_torch_version(version) is None


def test_import_with_an_old_torch_says_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import fekernels"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "ImportError: fekernels needs torch >= 2.10; found torch 2.9.1+cpu" in done.stderr


@pytest.mark.parametrize(
    ("macros", "reason"),
    [
        ("#define __GNUC__ 10", "gcc 10.0.0, older than 11"),
        ("#define __clang__ 1", "clang 0.0.0, older than 14"),
    ],
)
def test_an_old_compiler_is_named(
    macros: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    old.write_text(f"#!/bin/sh\necho '{macros}'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(build.ExtensionUnavailable, match=reason):
        build.find_compiler()


def test_the_steps_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = build.Toolchain("ninja", ("ccache", "g++"), "gcc 12", "nvcc", "nvcc 13.0", (80, 90))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    steps = dict(build.build_steps(tools, Path("csrc"), Path("torch")))
    sources = build.Sources.under(ROOT / "csrc")
    once = steps[f"{sources.baseline[0].replace('/', '_')}.o"]
    assert {*sources.baseline} == {word.removeprefix("csrc/") for word in once if word.endswith(".cpp")}
    assert len(steps) == 1 + 3 * len(sources.per_isa) + len(sources.cuda) + 1
    for isa in build.ISA_FLAGS:
        compiled = [step for name, step in steps.items() if name.endswith(f".{isa}.o")]
        files = [[word.removeprefix("csrc/") for word in step if word.endswith(".cpp")] for step in compiled]
        assert sorted(sum(files, [])) == sorted(sum(sources.per_isa, ()))
        for step, names in zip(compiled, files, strict=True):
            assert f"-DFE_ISA={isa}" in step and {*build.ISA_FLAGS[isa]} <= {*step}
            assert [name in build.O3_SOURCES for name in names] == [("-O3" in step)] * len(names)
            assert isa != "baseline" or not any(word.startswith("-m") for word in step)
    assert not any(word.startswith("-m") for word in once)
    assert "-DFE_HAVE_CUDA" in once
    assert "arch=compute_90,code=[sm_90,compute_90]" in steps["cuda_optimizers_sgld.cu.o"]
    assert steps["cuda_optimizers_sgld.cu.o"][:3] == ["nvcc", "-ccbin", "g++"]
    assert list(steps)[-1] == "library.so" and set(steps) - {"library.so"} <= set(steps["library.so"])

    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    arm = dict(build.build_steps(build.Toolchain("ninja", ("g++",), "gcc 12"), Path("csrc"), Path("torch")))
    assert len(arm) == 1 + len(sources.per_isa) + 1
    assert not any(word.startswith(("-m", "-DFE_HAVE")) for step in arm.values() for word in step)


def test_the_steps_for_one_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    tools = build.Toolchain("ninja", ("g++",), "gcc 12")
    steps = dict(build.build_steps(tools, Path("csrc"), Path("torch"), isas=("avx2",)))
    sources = build.Sources.under(Path("csrc"))
    assert len(steps) == 1 + len(sources.per_isa) + 1
    assert {word for step in steps.values() for word in step if word.startswith("-DFE_ISA")} == {
        "-DFE_ISA=avx2"
    }


AVX2 = "fpu sse2 fma f16c avx avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("facts", "chosen", "compiled"),
    [
        (AVX512, None, ["avx512"]),
        (AVX512, "auto", ["avx512"]),
        (AVX512, "avx2", ["avx2"]),
        (AVX512, "baseline", ["baseline"]),
        (AVX512, "mmx", ["avx512"]),
        (AVX512, "all", ["baseline", "avx2", "avx512"]),
        (AVX2, None, ["avx2"]),
        (AVX2, "avx512", ["avx2"]),
        (AVX512.replace(" avx512vl", ""), None, ["avx2"]),
        (AVX2.replace(" fma", ""), None, ["baseline"]),
        (AVX2.replace(" avx2", " avx2x"), "avx2", ["baseline"]),
        (None, None, ["baseline", "avx2", "avx512"]),
        (None, "avx2", ["baseline", "avx2", "avx512"]),
    ],
)
def test_the_first_use_compiles_what_this_processor_will_run(
    facts: str | None,
    chosen: str | None,
    compiled: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(build, "CPU_FACTS", tmp_path / "cpuinfo")
    if facts is not None:
        (tmp_path / "cpuinfo").write_text(f"model name\t: any\nflags\t\t: {facts}\nbugs\t\t: none\n")
    monkeypatch.delenv("FEKERNELS_ISA", raising=False)
    if chosen is not None:
        monkeypatch.setenv("FEKERNELS_ISA", chosen)
    assert [*build.first_use_instruction_sets()] == compiled
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert [*build.first_use_instruction_sets()] == ["baseline"]


def test_further_flags_come_last_and_name_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build.Toolchain("ninja", ("g++",), "gcc 12")
    cuda = build.Toolchain("ninja", ("g++",), "gcc 12", "nvcc", "nvcc 13.0", (90,))
    before = build.build_steps(plain, Path("csrc"), Path("torch"))
    monkeypatch.setenv("FEKERNELS_CXXFLAGS", "-O1 -fsanitize=address '-DA=b c'")
    flags = ["-O1", "-fsanitize=address", "-DA=b c"]
    after = dict(build.build_steps(plain, Path("csrc"), Path("torch")))
    assert after.keys() == dict(before).keys() and not any(after[name] == command for name, command in before)
    for name, command in after.items():
        where = command.index("-c") if "-c" in command else 1 + len(flags)
        assert command[where - len(flags) : where] == flags, name
    steps = dict(build.build_steps(cuda, Path("csrc"), Path("torch")))
    assert ",".join(flags) in steps["library.so"] and "-O1" not in steps["cuda_optimizers_sgld.cu.o"]
    monkeypatch.setenv("FEKERNELS_CXXFLAGS", "-DA='b")
    with pytest.raises(build.ExtensionUnavailable, match='FEKERNELS_CXXFLAGS must be flags.*got "-DA=\'b"'):
        build.build_steps(plain, Path("csrc"), Path("torch"))


def test_every_source_file_is_built() -> None:
    csrc = ROOT / "csrc"
    sources = build.Sources.under(csrc)
    built = [*sources.baseline, *sum(sources.per_isa, ()), *sources.cuda, *sources.host]
    assert len(built) == len({*built})
    assert {str(p.relative_to(csrc)) for p in csrc.rglob("*") if p.suffix in (".cpp", ".cu")} == {*built}
    assert {*build.SLOWEST, *build.O3_SOURCES} <= {*built}


def test_a_wheel_without_torch_is_pure_and_carries_the_sources(tmp_path: Path) -> None:
    """As `pip install .` makes it, and with what an ahead-of-time build left in the tree."""
    tree = tmp_path / "tree"
    for name in ("fekernels", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    stale = tree / "build" / "lib" / "fekernels" / "_C.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    environment = os.environ | {"FEKERNELS_BUILD": "none"}
    done = subprocess.run([*pip, "-w", tmp_path, tree], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fekernels/csrc/torch/library.cpp", "fekernels/_runtime/build.py", "fekernels/py.typed"} <= names
    assert not any(name.endswith(".so") or name.startswith(("csrc", "tests")) for name in names)
