"""Compile the kernels: their sources and flags, the compilers, and the build itself.

Called by ``extension.py`` at first use and by setup.py ahead of time, which loads this file by its path; so
it imports neither torch nor the rest of the package. Importing it runs no process.

The library speaks LibTorch's stable ABI and contains no Python, so one file serves every Python and every
torch from 2.10 on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Chooses an instruction set, so that it must run on any CPU, like the files of csrc/torch.
DISPATCH = "cpu/dispatch.cpp"
# These take longest, so they begin first, and each is compiled alone.
SLOWEST = (
    "cpu/free_energy/free_energy.cpp",
    "cpu/stein/svgd_direction.cpp",
    "cpu/optimizers/langevin_adam.cpp",
    "cpu/graph/belief_propagation.cpp",
    "cpu/stein/svgd_direction_backward.cpp",
    "cpu/stein/svgd_direction_wide.cpp",
    "cuda/free_energy/memory_bound.cu",
    "cuda/free_energy/count_likelihoods.cu",
    "cuda/optimizers/langevin_adam.cu",
    "cuda/free_energy/compute_bound.cu",
)
SOURCE_SUFFIXES = (".h", ".def", ".cpp", ".cuh", ".cu")

# Contraction stays off and fma explicit, so that every instruction set gives the same bits. Nobody reads
# errno or floating-point traps, and keeping them right would make loops with a sqrt scalar.
CXX_FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
# -O3 makes the noise 3% faster in the cache, a draw of weights 7%, a Stein direction of two dimensions, effective
# sample sizes and the KL of weights 20%; to the others it does nothing but take a third more time to compile.
O3_SOURCES = (
    "cpu/diagnostics/chain_statistics.cpp",
    "cpu/optimizers/langevin_adam.cpp",
    "cpu/optimizers/sgld.cpp",
    "cpu/optimizers/variational_adam.cpp",
    "cpu/optimizers/variational_draw.cpp",
    "cpu/optimizers/variational_kl.cpp",
    "cpu/random.cpp",
    "cpu/stein/tiles.cpp",
)
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
# For gcc alone, which at -O2 makes vectors of hardly any loop. And it leaves this scheduling out on x86: instructions
# of independent chains are interleaved before registers are given out, which takes 10% to 20% off the noise.
GCC_FLAGS = ("-ftree-vectorize", "-fvect-cost-model=dynamic", "-fschedule-insns", "-fsched-pressure")
NVCC_FLAGS = ("-std=c++20", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden")
# Binaries for these, and PTX of the last one for later GPUs.
CUDA_ARCHITECTURES = (80, 90, 100)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"

# How compilers, their drivers and ninja say that a process was ended or that there was no memory or disk left.
PASSING = (
    r"Killed|Terminated|interrupted by user|[Nn]o space left|quota exceeded|[Oo]ut of memory|memory exhausted"
    r"|Cannot allocate memory|std::bad_alloc"
)

CPU_FACTS = Path("/proc/cpuinfo")
_DIGEST_BYTES = 32
_log = logging.getLogger("fekernels")


class ExtensionUnavailable(RuntimeError):
    """The compiled kernels cannot be had on this machine; the message holds every cause."""


class BuildFailed(ExtensionUnavailable):
    """The compiler or the linker failed.

    Attributes:
        output: all that they said.
        passing: whether a lack of memory or disk, or an interruption, ended it: the next try may well succeed.
    """

    def __init__(self, name: str, status: int, output: str) -> None:
        lines = output.splitlines()
        told = [line.strip() for line in lines if re.search(r"\berror\b|undefined reference", line)]
        shown = told[:3] or [line.strip() for line in lines[-5:]]
        super().__init__(f"compiling with {name} failed: {'; '.join(shown)}")
        self.output = output
        self.passing = status in (-2, -15, 130, 143) or re.search(PASSING, output) is not None


@dataclass(frozen=True, eq=False)
class Toolchain:
    """What a build runs: ninja, a C++ compiler, and nvcc where CUDA kernels are built."""

    ninja: str
    cxx: tuple[str, ...]
    name: str
    nvcc: str | None = None
    nvcc_name: str = ""
    architectures: tuple[int, ...] = ()


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def find_compiler() -> tuple[tuple[str, ...], str]:
    """The C++ compiler: CXX when it is set, else the first of g++, c++ and clang++ that is new enough.

    Returns:
        The command, and its name with the version.

    Raises:
        ExtensionUnavailable: with what was tried and what to install.
    """
    given = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(given)
    except ValueError as error:
        raise ExtensionUnavailable(
            f"CXX must be a command as a shell takes it; got {given!r} ({error})"
        ) from error
    tried = []
    for command in [chosen] if chosen else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]) is None:
            tried.append(f"{command[0]} was not found")
            continue
        try:
            # The macros name the compiler whatever its command is called, and prove that it takes C++20.
            text = _output([*command, "-x", "c++", "-std=c++20", "-dM", "-E", os.devnull])
        except (OSError, subprocess.SubprocessError) as error:
            tried.append(f"{shlex.join(command)} does not take -std=c++20 ({error})")
            continue
        macros = dict(re.findall(r"^#define (\w+) (.*)$", text, re.MULTILINE))
        if "__clang__" in macros:
            kind, least, parts = "clang", 14, ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
        else:
            kind, least, parts = "gcc", 11, ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
        version = [int(macros.get(part, "0")) for part in parts]
        name = f"{kind} {'.'.join(map(str, version))}"
        if version[0] >= least:
            return tuple(command), name
        tried.append(f"{shlex.join(command)} is {name}, older than {least}")
    raise ExtensionUnavailable(
        f"no C++20 compiler found through {'CXX' if chosen else 'PATH'}: {'; '.join(tried)}."
        " Install g++ >= 11 or clang >= 14 (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++;"
        " conda: conda install cxx-compiler), or set CXX"
    )


def find_nvcc() -> tuple[str, str, tuple[int, ...]]:
    """nvcc: NVCC when it is set, else the one in CUDA_HOME or CUDA_PATH, else on PATH or in /usr/local/cuda.

    Returns:
        The command, its name with the version, and the architectures to build for.

    Raises:
        ExtensionUnavailable: with the reason.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes]
    if chosen := os.environ.get("NVCC"):
        candidates = [chosen]
    elif not candidates:
        candidates = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((found for path in candidates if (found := shutil.which(path))), None)
    if nvcc is None:
        raise ExtensionUnavailable(
            f"no CUDA compiler: {' and '.join(candidates)} not found. Install the CUDA toolkit >= 12, or set"
            " CUDA_HOME or NVCC"
        )
    try:
        release = re.search(r"release (\d+)\.(\d+)", _output([nvcc, "--version"]))
        listed = {int(number) for number in re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))}
    except (OSError, subprocess.SubprocessError) as error:
        raise ExtensionUnavailable(f"{nvcc} does not run: {error}") from error
    architectures = tuple(number for number in CUDA_ARCHITECTURES if number in listed)
    if release is None or int(release[1]) < 12 or not architectures:
        raise ExtensionUnavailable(f"{nvcc} is too old: CUDA >= 12 is needed, for C++20 and sm_90")
    return nvcc, f"nvcc {release[1]}.{release[2]}", architectures


def find_ninja() -> str:
    """The ninja of the PyPI package, else the one on PATH, or ExtensionUnavailable."""
    directories: list[str | None] = [None]  # None is PATH
    with contextlib.suppress(ImportError):
        import ninja

        directories.insert(0, ninja.BIN_DIR)
    found = next((path for directory in directories if (path := shutil.which("ninja", path=directory))), None)
    if found is None:
        raise ExtensionUnavailable("ninja not found. Run: pip install ninja")
    return found


def find_toolchain(device: str) -> Toolchain:
    """The tools for a library with kernels for ``device``, or ExtensionUnavailable with the reason."""
    if sys.platform != "linux":
        raise ExtensionUnavailable(f"the compiled kernels are built on Linux only; this is {sys.platform}")
    return Toolchain(find_ninja(), *find_compiler(), *(find_nvcc() if device == "cuda" else ()))


def instruction_sets(machine: str | None = None) -> tuple[str, ...]:
    """The instruction sets that there are for a kind of machine (default: this one's), in rising order."""
    return tuple(ISA_FLAGS) if (machine or platform.machine()) in ("x86_64", "AMD64") else ("baseline",)


def first_use_instruction_sets() -> tuple[str, ...]:
    """Those that a build at first use is for: the one that will run, or every one with FEKERNELS_ISA=all.

    The best of this processor's runs, unless FEKERNELS_ISA names another. A name that is unknown, or of a set that this
    processor does not have, is refused by the library when it is loaded, so any set will do.
    """
    known, chosen = instruction_sets(), os.environ.get("FEKERNELS_ISA")
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPU_FACTS.read_text(), re.MULTILINE)
    except OSError:
        flags = None
    if chosen == "all" or (flags is None and len(known) > 1):
        return known
    has = set(flags[1].split()) if flags is not None else set()
    # What the compiler may use is what /proc/cpuinfo must list, by the same names.
    needs = {isa: {flag[2:] for flag in ISA_FLAGS[isa] if "=" not in flag} for isa in known}
    able = [isa for isa in known if needs[isa] <= has]
    return (chosen,) if chosen in able else (able[-1],)


def requested_instruction_set() -> str:
    """FEKERNELS_ISA. ValueError where it names no set; whether this processor has that one, the library knows."""
    chosen, known = os.environ.get("FEKERNELS_ISA") or "auto", ("auto", "all", *instruction_sets()[::-1])
    if chosen not in known:
        raise ValueError(f"FEKERNELS_ISA must be one of {', '.join(known)}; got {chosen!r}")
    return chosen


def extra_flags() -> list[str]:
    """FEKERNELS_CXXFLAGS: flags behind the package's own, for compiling C++ and for linking.

    They are part of the commands, so a library of other flags is another file in the cache directory.

    Raises:
        ExtensionUnavailable: where a quote in it is not closed.
    """
    given = os.environ.get("FEKERNELS_CXXFLAGS", "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise ExtensionUnavailable(
            f"FEKERNELS_CXXFLAGS must be flags as a shell takes them; got {given!r}"
        ) from error


@dataclass(frozen=True, eq=False)
class Sources:
    """The files to compile, as paths under csrc.

    Attributes:
        baseline: compiled once, for any CPU, and together: the registration files and the choice of an instruction set.
        per_isa: compiled for each instruction set, those of a group together.
        cuda: for nvcc.
        host: a module of Python against torch's own headers, in a library of its own: neither outlives a release of its
            side.
    """

    baseline: tuple[str, ...]
    per_isa: tuple[tuple[str, ...], ...]
    cuda: tuple[str, ...]
    host: tuple[str, ...]

    @classmethod
    def under(cls, root: Path) -> Sources:
        """All that there are under ``root``, the directory csrc. A file's folder says how it is compiled."""

        def found(pattern: str) -> list[str]:
            names = {path.relative_to(root).as_posix() for path in root.glob(pattern)}
            return [name for name in SLOWEST if name in names] + sorted(names - {*SLOWEST})

        kernels = [name for name in found("cpu/**/*.cpp") if name != DISPATCH]
        short = [name for name in kernels if name not in SLOWEST]
        together = [tuple(name for name in short if (name in O3_SOURCES) is o3) for o3 in (False, True)]
        return cls(
            baseline=(*found("torch/*.cpp"), DISPATCH),
            per_isa=(*filter(None, together), *((name,) for name in kernels if name in SLOWEST)),
            cuda=tuple(found("cuda/**/*.cu")),
            host=tuple(found("torch/host/*.cpp")),
        )


def _as_one(root: Path, sources: tuple[str, ...]) -> tuple[str, list[str]]:
    """The file to compile and the flags that add the others.

    To read torch's headers, or the compiler's for vectors, takes longer than what many a file has of its own.
    """
    first, *others = sources
    return first, [word for source in others for word in ("-include", str(root / source))]


def build_steps(
    tools: Toolchain,
    root: Path,
    torch_root: Path,
    sources: Sources | None = None,
    isas: tuple[str, ...] | None = None,
) -> list[tuple[str, list[str]]]:
    """Every output file, in order, with the command that makes it; the library comes last.

    Args:
        tools: from :func:`find_toolchain`.
        root: the directory csrc.
        torch_root: the directory of the package torch.
        sources: those under ``root`` unless given, for a ``root`` that only stands for the real one.
        isas: the instruction sets; every one unless given.
    """
    isas, sources = isas or instruction_sets(), sources or Sources.under(root)
    facts = [TORCH_TARGET, *(["-DFE_HAVE_CUDA"] if tools.nvcc else [])]
    compiler, extra = [*tools.cxx, *CXX_FLAGS, "-I", str(root)], extra_flags()
    steps: list[tuple[str, list[str]]] = []

    def add(source: str, tag: str, command: list[str]) -> None:
        name = f"{source.replace('/', '_')}{tag}.o"
        steps.append((name, [*command, "-c", str(root / source), "-o", name]))

    linker = [*tools.cxx, *extra]
    if tools.nvcc:
        # nvcc takes one program as its host compiler: of a CXX such as "ccache g++", the last word.
        nvcc = [tools.nvcc, "-ccbin", tools.cxx[-1]]
        *earlier, last = tools.architectures
        codes = [f"arch=compute_{number},code=sm_{number}" for number in earlier]
        codes.append(f"arch=compute_{last},code=[sm_{last},compute_{last}]")
        generate = [word for code in codes for word in ("-gencode", code)]
        for source in sources.cuda:  # first, because they take longest
            add(source, "", [*nvcc, *NVCC_FLAGS, *generate, "-I", str(root)])
        # As the linker, nvcc knows where its libcudart_static.a is and what that needs.
        linker = [*nvcc, "-cudart", "static", *(["-Xcompiler", ",".join(extra)] if extra else [])]
    first, beside = _as_one(root, sources.baseline)
    add(first, "", [*compiler, "-isystem", str(torch_root / "include"), *facts, *beside, *extra])
    for group in sources.per_isa:
        first, beside = _as_one(root, group)
        for isa in isas:
            flags = [*ISA_FLAGS[isa], *(GCC_FLAGS if tools.name.startswith("gcc") else ())]
            flags += ["-O3"] if first in O3_SOURCES else []
            add(first, f".{isa}", [*compiler, *flags, f"-DFE_ISA={isa}", *beside, *extra])
    objects = [name for name, _ in steps]
    libraries = ["-L", str(torch_root / "lib"), "-ltorch_cpu"]
    steps.append(("library.so", [*linker, "-shared", *objects, *libraries, "-o", "library.so"]))
    return steps


def host_file(torch_version: str) -> str:
    """The name of a host module that was compiled ahead of time."""
    import sysconfig  # 2 ms, which an import of fekernels need not take

    return f"_host-torch{torch_version}-{sysconfig.get_config_var('SOABI')}.so"


def host_steps(
    tools: Toolchain, root: Path, torch_root: Path, python: Path, sources: Sources | None = None
) -> list[tuple[str, list[str]]]:
    """As :func:`build_steps`, of the host module; ``python`` has Python's headers."""
    extra, sources = extra_flags(), sources or Sources.under(root)
    includes = ["-I", str(root), "-isystem", str(torch_root / "include"), "-isystem", str(python)]
    compiler = [*tools.cxx, "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", *includes, *extra]
    first, beside = _as_one(root, sources.host)
    libraries = ["-L", str(torch_root / "lib"), "-ltorch_python", "-ltorch_cpu", "-lc10"]
    return [
        ("host.o", [*compiler, *beside, "-c", str(root / first), "-o", "host.o"]),
        ("library.so", [*tools.cxx, *extra, "-shared", "host.o", *libraries, "-o", "library.so"]),
    ]


def _jobs(tasks: int) -> int:
    """How many compilers run at once: MAX_JOBS, else one per CPU, but no more than GiB of free memory."""
    chosen = os.environ.get("MAX_JOBS", "")
    if chosen.isdigit() and int(chosen) > 0:
        return min(tasks, int(chosen))
    if chosen:
        _log.warning("MAX_JOBS must be a whole number of at least 1; got %r, which is left out", chosen)
    jobs = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        memory = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if memory:
            jobs = min(jobs, int(memory[1]) >> 20)
        group = Path("/sys/fs/cgroup")  # a container's own limit: the word "max" when there is none
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        jobs = min(jobs, (limit - used) >> 30)
    return max(1, min(tasks, jobs))


def compile_library(
    output: Path,
    tools: Toolchain,
    steps: list[tuple[str, list[str]]],
    verbose: bool = False,
    mode: int = 0o755,
) -> None:
    """Compile and link in a temporary directory beside ``output``, then rename it into place.

    The library ends in the SHA-256 digest of what precedes it: a loader ignores bytes behind the last
    section, and :func:`is_intact` tells a damaged file from a whole one without running it.

    Args:
        output: the library; its directory exists.
        tools: from :func:`find_toolchain`.
        steps: from :func:`build_steps` or :func:`host_steps`.
        verbose: show the commands and their output.
        mode: who may read and write the library.

    Raises:
        BuildFailed: with the compiler's output.
    """
    jobs = _jobs(len(steps) - 1)
    work = sum(8 if ".cu." in name else 4 for name, _ in steps[:-1])
    files = "a file" if len(steps) == 2 else f"{len(steps) - 1} files"
    announce(f"compiling {files} with {tools.name} (once, about {work / jobs:.0f} s)")
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.build-", dir=output.parent) as scratch:
        lines = ["rule run", "  command = $words", "  description = $out"]
        for name, command in steps:
            needs = " ".join(other for other, _ in steps[:-1]) if name == "library.so" else ""
            lines += [f"build {name}: run {needs}", f"  words = {shlex.join(command).replace('$', '$$')}"]
        Path(scratch, "build.ninja").write_text("\n".join(lines) + "\n")
        command = [tools.ninja, "-j", str(jobs), *(["-v"] if verbose else [])]
        status, said = _run(command, scratch, verbose)
        if status != 0:
            raise BuildFailed(f"{tools.name} {tools.nvcc_name}".strip(), status, said)
        built = Path(scratch, "library.so")
        data = built.read_bytes()
        built.write_bytes(data + hashlib.sha256(data).digest())
        built.chmod(mode)
        os.replace(built, output)


def _run(command: list[str], directory: str, show: bool) -> tuple[int, str]:
    """Run a command: its exit status and what it says, which is shown as it comes where asked."""
    lines = []
    with subprocess.Popen(
        command,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                if show:
                    print(line, end="", flush=True)
        except BaseException:
            process.kill()
            raise
    return process.returncode, "".join(lines)


def is_intact(path: Path) -> bool:
    """Whether ``path`` is a whole library of :func:`compile_library`."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return len(body) > 0 and hashlib.sha256(body).digest() == digest


def announce(message: str) -> None:
    """Log a message and show it: someone is waiting, and few set up logging."""
    _log.info(message)
    print(f"fekernels: {message}", file=sys.stderr, flush=True)
