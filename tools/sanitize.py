"""The tests under AddressSanitizer and UndefinedBehaviorSanitizer, for the instruction sets at both ends.

    python tools/sanitize.py                          # the tests that reach compiled kernels, baseline and AVX-512
    python tools/sanitize.py --all                    # every test
    python tools/sanitize.py --isa avx512 -- -k categorical tests    # what follows -- goes to pytest
    python tools/sanitize.py --only undefined         # without AddressSanitizer: a third of the time

The kernels are compiled once at -O1 into a cache directory of their own, with the sanitizers' flags
(FEKERNELS_CXXFLAGS); the CUDA sources that the tests compile for the CPU get the same. A report ends its process, so
that the test fails also where a process of its own swallows what is printed; pytest leaves the error stream alone, and
the reports are printed once more at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize={} -fno-sanitize=vptr"
REPORT = re.compile(r"runtime error:|ERROR: AddressSanitizer")
# Those that call a compiled kernel with more than one shape; the statistics, examples and builds add hours, not paths.
TESTS = [f"tests/{name}" for name in "contract random optimizers free_energy stein graph fuzz".split()]
OTHERS = ("test_triton.py", "test_compile.py", "test_sampling.py")  # of which the kernels are a small part


def library(name: str, cxx: list[str]) -> str:
    """The path of a runtime library of the compiler."""
    found = subprocess.run([*cxx, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"tools/sanitize.py: {' '.join(cxx)} has no {name}; install the sanitizers of this compiler")
    return str(path.resolve())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--isa", nargs="+", default=["baseline", "avx512"], metavar="ISA", help="instruction sets"
    )
    parser.add_argument("--only", choices=["address", "undefined"], help="one of the two sanitizers")
    parser.add_argument("--all", action="store_true", help="every test (hours)")
    parser.add_argument(
        "pytest", nargs="*", metavar="-- ARGUMENT", help="of pytest, in place of the selection"
    )
    arguments = parser.parse_args()

    sys.path.insert(0, str(REPOSITORY))
    from fekernels._runtime.build import ExtensionUnavailable, find_compiler
    from fekernels._runtime.extension import cache_directory

    try:
        cxx = list(find_compiler()[0])
    except ExtensionUnavailable as error:
        sys.exit(f"tools/sanitize.py: {error}")
    environment = os.environ | {
        "FEKERNELS_CXXFLAGS": FLAGS.format(arguments.only or "address,undefined"),
        "FEKERNELS_BUILD": "cpu",
        "FEKERNELS_ISA": "all",  # one library for every part of the run
        "FEKERNELS_CACHE_DIR": str(cache_directory() / "sanitized"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    # Before libasan is there, because compilers run slowly and leak under it.
    build = "import sys, fekernels; print('sanitized library:', fekernels.build())"
    subprocess.run([sys.executable, "-c", build], env=environment, cwd=REPOSITORY, check=True)

    selection = arguments.pytest or ([] if arguments.all else TESTS)
    ignored = [] if arguments.pytest or arguments.all else [f"--ignore-glob=*/{name}" for name in OTHERS]
    ignored += ["-k", "not triton_interpreted"] if ignored else []  # the interpreter calls no compiled kernel
    runtimes = ["libubsan.so" if arguments.only == "undefined" else "libasan.so", "libstdc++.so"]
    failed = False
    for isa in arguments.isa:
        sanitized = environment | {
            "FEKERNELS_ISA": isa,
            # libstdc++ beside it: what loads before torch has no C++ exceptions that libasan could find.
            "LD_PRELOAD": " ".join(library(name, cxx) for name in runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # so that Python's own buffers have red zones too
        }
        print(f"== {isa}", flush=True)
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--capture=sys", *ignored]
        # The fault that this test provokes leaves frames without their epilogues: libasan takes them for live ones.
        options += [
            "--deselect",
            "tests/free_energy/test_cuda.py::test_scaling_by_one_reads_and_writes_nothing",
        ]
        command = [sys.executable, "-m", "pytest", *options, *selection]
        with subprocess.Popen(
            command, env=sanitized, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as done:
            assert done.stderr is not None
            stderr = done.stderr.read()
        print(stderr)
        reports = len(REPORT.findall(stderr))
        print(
            f"== {isa}: pytest ended with {done.returncode}, {reports} reports of the sanitizers", flush=True
        )
        failed |= done.returncode != 0 or reports > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
