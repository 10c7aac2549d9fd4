"""Check that one pure wheel installs, imports, compiles and computes without a warning on each Python and torch.

    python tools/check_versions.py [--python 3.10 3.11 ...] [--torch 2.13.0 ...] [--json PATH]

Of every Python that is found (by its name on PATH, under pyenv, or by uv) a new virtual environment is made, one at a
time, with the wheel, torch and what they need. There: pip says no warning; `import fekernels` and the command line say
none with warnings as errors; the first use compiles the kernels, and the compiler says none; then each operator is
called once, with warnings as errors, and a loss and a step under torch.compile. All must compute the same bits.
What was found is printed as the table of docs/building.md.

An environment takes 1 GB where torch is a build for CPUs, and 7 GB where it brings CUDA with it; with uv on PATH they
share the files of torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from installed import REPOSITORY, Failed, clean, computed, environment, run

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCH = ("2.13.0",)
COLUMNS = ("python", "torch", "numpy", "first use", "host module", "results", "warnings")


def interpreter(name: str) -> str | None:
    """The Python of a version such as 3.12, or at a path; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [name] if os.sep in name else [f"python{name}", *map(str, pyenv.glob(f"{name}*/bin/python"))]
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", name], capture_output=True, text=True)
        candidates += found.stdout.split()
    for candidate in candidates:
        path = shutil.which(candidate)
        told = subprocess.run([path, "-V"], capture_output=True, text=True).stdout if path else ""
        if path and (os.sep in name or told.startswith(f"Python {name}.")):
            return path
    return None


def pure_wheel(scratch: Path) -> Path:
    """From the files that git tracks, as they are here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split("\0")[:-1]:
        (scratch / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, scratch / "tree" / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(scratch),
    ]
    run([*pip, str(scratch / "tree")], env=clean(FEKERNELS_BUILD="none"))
    (wheel,) = scratch.glob("*.whl")
    return wheel


def one(python: str, torch: str, wheel: Path, scratch: Path) -> tuple[dict[str, str], dict[str, str]]:
    """A row of the table, and the digests of what was computed."""
    installed = environment(python, scratch / "environment", torch, wheel)
    # The library holds no Python, so those of one torch share it, as on a user's machine.
    variables = clean(
        FEKERNELS_CACHE_DIR=str(scratch / "cache"), FEKERNELS_BUILD="cpu", MPLCONFIGDIR=str(scratch)
    )
    strict = [installed, "-I", "-W", "error"]
    run([*strict, "-c", "import fekernels"], cwd=scratch, env=variables)
    said = run([*strict, "-c", "import fekernels; fekernels.build(verbose=True)"], cwd=scratch, env=variables)
    compiled = "compiled" if "-ltorch_cpu" in said else "found, that of another Python"
    last = run([*strict, "-m", "fekernels", "info"], cwd=scratch, env=variables).splitlines()[-1]
    if "as reference" in last:
        raise Failed(f"under {installed} not every operator runs compiled: {last}")
    found = computed(installed, scratch, "--compile")
    facts = found["facts"]
    row = {
        "python": facts["python"],
        "torch": facts["torch"],
        "numpy": facts["numpy"],
        "first use": compiled,
        "host module": facts["host module"],
        "results": str(len(found["results"])),
        "warnings": "none",
    }
    return row, found["results"]


def table(rows: list[dict[str, str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([row[name] for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 all of them pass and agree; 1 one does not; 2 a Python that was asked for is not here.",
    )
    parser.add_argument(
        "--python", nargs="+", metavar="VERSION", help=f"or paths; default: of {PYTHONS} those here"
    )
    parser.add_argument(
        "--torch", nargs="+", default=TORCH, metavar="VERSION", help=f"default: {' '.join(TORCH)}"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write rows and digests to PATH")
    options = parser.parse_args()
    pythons = {name: interpreter(name) for name in options.python or PYTHONS}
    missing = [name for name, path in pythons.items() if path is None]
    if options.python and missing:
        parser.error(f"--python: not found: {', '.join(missing)}")
    rows, digests, failures = [], {}, []
    with tempfile.TemporaryDirectory(prefix="check-versions-") as name:
        scratch = Path(name)
        wheel = pure_wheel(scratch)
        for torch in options.torch:
            for version, path in pythons.items():
                if path is None:
                    continue
                try:
                    row, found = one(path, torch, wheel, scratch)
                except Failed as failure:
                    failures.append(f"Python {version}, torch {torch}: {failure}")
                    print(failures[-1], file=sys.stderr, flush=True)
                    continue
                rows.append(row)
                digests[f"Python {row['python']}, torch {row['torch']}"] = found
                print(f"Python {row['python']}, torch {row['torch']}: {row['results']} results", flush=True)
    first = next(iter(digests.values()), {})
    for where, found in digests.items():
        failures += [f"{where}: {key} differs" for key in first if found.get(key) != first[key]]
    rows.sort(key=lambda row: [int(number) for number in re.findall(r"\d+", row["python"])])
    print(f"\n{table(rows)}\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "digests": digests}, indent=1) + "\n")
    for failure in failures:
        print(re.sub(r"\n.*", "", failure, flags=re.DOTALL))
    if missing:
        print(f"not found here: Python {', '.join(missing)}")
    print(f"version check: {'failed' if failures else 'passed'}, {len(rows)} environments")
    return int(bool(failures) or not rows)


if __name__ == "__main__":
    sys.exit(main())
