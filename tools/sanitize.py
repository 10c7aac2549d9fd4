"""The tests under AddressSanitizer and UndefinedBehaviorSanitizer, for the instruction sets at both ends.

    python tools/sanitize.py                          # the tests that reach compiled kernels, baseline and AVX-512
    python tools/sanitize.py --all                    # every test
    python tools/sanitize.py --isa avx512 -- -k categorical tests    # what follows -- goes to pytest

The kernels are compiled once at -O1 into a cache directory of their own, with the sanitizers' flags
(FEKERNELS_CXXFLAGS); the CUDA sources that the tests compile for the CPU get the same. Every report ends up in a
file, is printed at the end, and makes the exit status 1, also where the test that caused it passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr"
# Those that call a compiled kernel with more than one shape; the statistics, examples and builds add hours, not paths.
TESTS = """
    contract operators raw_operators memory optimizer_memory untrusted_checkpoints errors random sgld
    reparameterize noise_transforms noise_units categorical
    free_energy free_energy_arguments free_energy_autograd free_energy_batches free_energy_errors free_energy_extremes
    free_energy_inplace free_energy_layouts free_energy_numerics free_energy_operators free_energy_plain losses_errors
    langevin_adam langevin_adam_bits langevin_adam_checkpoints langevin_adam_pointers
    cuda_free_energy cuda_source
    svgd_direction svgd_direction_autograd svgd_direction_native stein_operators stein_cancellation
    kernel_stein_discrepancy sq_dist_rank median_bandwidth
""".split()


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
    parser.add_argument("--all", action="store_true", help="every test (hours)")
    parser.add_argument(
        "pytest", nargs="*", metavar="-- ARGUMENT", help="of pytest, in place of the selection"
    )
    arguments = parser.parse_args()

    sys.path.insert(0, str(REPOSITORY))
    from fekernels._build import ExtensionUnavailable, find_compiler
    from fekernels._extension import cache_directory

    try:
        cxx = list(find_compiler()[0])
    except ExtensionUnavailable as error:
        sys.exit(f"tools/sanitize.py: {error}")
    environment = os.environ | {
        "FEKERNELS_CXXFLAGS": FLAGS,
        "FEKERNELS_BUILD": "cpu",
        "FEKERNELS_CACHE_DIR": str(cache_directory() / "sanitized"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    # Before libasan is there, because compilers run slowly and leak under it.
    build = "import sys, fekernels; print('sanitized library:', fekernels.build())"
    subprocess.run([sys.executable, "-c", build], env=environment, cwd=REPOSITORY, check=True)

    selection = arguments.pytest or (
        [] if arguments.all else ["tests/fuzz", *(f"tests/test_{name}.py" for name in TESTS)]
    )
    missing = [
        name for name in selection if name.startswith("tests/") and not Path(REPOSITORY, name).exists()
    ]
    if missing and not arguments.pytest:
        sys.exit(f"tools/sanitize.py: TESTS must name files; got {', '.join(missing)}")
    failed = False
    for isa in arguments.isa:
        with tempfile.TemporaryDirectory() as reports:
            log = f"log_path={reports}/report"
            sanitized = environment | {
                "FEKERNELS_ISA": isa,
                # libstdc++ beside it: what loads before torch has no C++ exceptions that libasan could find.
                "LD_PRELOAD": " ".join(library(name, cxx) for name in ("libasan.so", "libstdc++.so")),
                "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=0:{log}.asan",
                "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=0:{log}.ubsan",
                "PYTHONMALLOC": "malloc",  # so that Python's own buffers have red zones too
            }
            print(f"== {isa}", flush=True)
            options = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
            command = [sys.executable, "-m", "pytest", *options, *selection]
            done = subprocess.run(command, env=sanitized, cwd=REPOSITORY)
            texts = [path.read_text(errors="replace") for path in sorted(Path(reports).iterdir())]
            for text in texts:
                print(text)
            print(
                f"== {isa}: pytest ended with {done.returncode}, {len(texts)} reports of the sanitizers",
                flush=True,
            )
            failed |= done.returncode != 0 or bool(texts)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
