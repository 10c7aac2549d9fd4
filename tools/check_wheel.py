"""Check that one wheel, compiled under this torch, and its sources give the same bits on other versions of torch.

The wheel is built from a copy of this checkout with the CPU kernels, and the CUDA kernels if there is nvcc.
It is installed beside the torch of this interpreter, and in new virtual environments with other ones, the oldest
that is supported among them. Each computes the same noise, optimizer steps, free energies and Stein directions; the
others do so twice: with the library of the wheel, and with one that they compile from its sources, as the first use
does. Run it where `pip install -e ".[test]"` was done:

    python tools/check_wheel.py [--torch 2.10.0 2.11.0 2.13.0 ...]

An environment with torch takes 3 to 7 GB of TMPDIR where torch brings CUDA with it; there is one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from fekernels._runtime.build import ExtensionUnavailable, find_nvcc

REPOSITORY = Path(__file__).resolve().parents[1]
# The oldest that is supported; the one after it, which first has all calls that the library looks up; and the one under
# which the results of a release are compared.
TORCH = ("2.10.0", "2.11.0", "2.13.0")

# Prints digests of what the compiled kernels compute. Only the library that is asked for can have computed it: that
# of the wheel where there is no compiler, one compiled now where the other is out of sight; and FEKERNELS_BUILD=cpu
# refuses the reference.
VALUES = """
import hashlib, json, pathlib, sys
import torch
import fekernels as fe
from fekernels._runtime import extension, locations

expected = locations.PREBUILT
if sys.argv[1] == "compiled":
    locations.PREBUILT = expected.with_name("none")
    expected = fe.build()
extension.load()
assert extension.library_path() == expected, extension.library_path()
native = torch.ops.fekernels_native
results = {}

def record(name, tensor):
    assert tensor.isfinite().all() and tensor.unique().numel() > 100, name
    data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    results[name] = hashlib.sha256(data).hexdigest()

for isa in ("baseline", "avx2", "avx512"):
    try:
        native.set_isa(isa)
    except Exception:
        continue  # not on this processor
    record(f"normal, {isa}", fe.random.normal((1003,), seed=7, stream=3, step=2, offset=5))
    for make in (fe.LangevinAdam, fe.SGLD):
        weights = [fe.random.normal((37, 29), seed=1), fe.random.normal((1001,), seed=2)]
        optimizer = make(weights, lr=0.01, temperature=1e-3, prior_precision=1.0, seed=11)
        for step in range(3):
            for weight in weights:
                weight.grad = fe.random.normal(weight.shape, seed=4, step=step)
            optimizer.step()
        for number, weight in enumerate(weights):
            record(f"{make.__name__} {number}, {isa}", weight)
    logits = fe.random.normal((300, 1201), seed=5).requires_grad_()  # large: its gradient's memory is the library's own
    target = (fe.random.uniform((300, 1201), seed=6) < 0.5).float()
    mean = fe.random.normal((300, 33), seed=8).requires_grad_()
    z = fe.reparameterize(mean, mean, seed=9)
    value = fe.free_energy(logits, target, z, mean, likelihood="bernoulli").free_energy
    value.backward()
    x, s = fe.random.normal((300, 20), seed=3), fe.random.normal((300, 20), seed=10)
    phi = fe.svgd_direction(x.requires_grad_(), s)
    phi.sum().backward()
    discrepancy = fe.kernel_stein_discrepancy(x.detach(), s).view(1)
    record(f"Stein direction, {isa}", torch.cat((phi.detach().flatten(), x.grad.flatten(), discrepancy)))
    record(f"free energy, {isa}", torch.cat((value.detach().view(1), logits.grad.flatten(), mean.grad.flatten())))
facts = {"torch": torch.__version__, "build": native.build_info()}
print(json.dumps({"facts": facts, "results": results}))
"""


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options)
    if done.returncode != 0:
        print(done.stdout)
        sys.exit(f"wheel check: this failed: {' '.join(command)}")
    return done.stdout


def build_wheel(scratch: Path) -> Path:
    """Compile a wheel from a copy of the checkout, so that nothing is left in it and nothing old gets in."""
    tree = scratch / "tree"
    for name in ("fekernels", "csrc"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    try:
        find_nvcc()
        device = "cuda"
    except ExtensionUnavailable as error:
        print(f"without CUDA kernels: {error}")
        device = "cpu"
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-build-isolation", "--no-deps"]
    run([*pip, "-w", str(scratch), str(tree)], env=os.environ | {"FEKERNELS_BUILD": device})
    (wheel,) = scratch.glob("*.whl")
    if "-py3-none-linux" not in wheel.name or "fekernels/_C.so" not in zipfile.ZipFile(wheel).namelist():
        sys.exit(f"wheel check: {wheel.name} has no library in it")
    return wheel


def compute(python: str, scratch: Path, home: Path | None = None, compiled: bool = False) -> dict:
    """What this release computes under the torch of `python`.

    Args:
        home: where the wheel's files are, if not among the packages.
        compiled: with a library that is compiled now, in place of the wheel's.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FEKERNELS_") and k != "PYTHONPATH"}
    kept["FEKERNELS_ISA"] = "all"  # as the wheel has them
    kept |= {"FEKERNELS_BUILD": "cpu", "FEKERNELS_CACHE_DIR": str(scratch / "cache")}
    if not compiled:
        kept["CXX"] = str(scratch / "none")
    if home is not None:
        kept["PYTHONPATH"] = str(home)
    return json.loads(run([python, "-c", VALUES, "compiled" if compiled else "wheel"], cwd=scratch, env=kept))


def differing(ours: dict, theirs: dict, how: str) -> int:
    """Say how many results agree, and return how many do not."""
    differ = [key for key in ours["results"] if theirs["results"].get(key) != ours["results"][key]]
    same = len(ours["results"]) - len(differ)
    print(
        f"torch {theirs['facts']['torch']}, {how}: {same} results with the same bits, {len(differ)} others",
        flush=True,
    )
    for key in differ:
        print(f"  differs: {key}")
    return len(differ)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--torch", nargs="+", default=TORCH, metavar="VERSION", help=f"default: {' '.join(TORCH)}"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="of the other environments; default: this one"
    )
    options = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="check-wheel-") as name:
        scratch = Path(name)
        begin = time.monotonic()
        wheel = build_wheel(scratch)
        print(f"{wheel.name}, compiled in {time.monotonic() - begin:.0f} s", flush=True)
        home = scratch / "home"  # beside the packages: this environment may hold an editable install
        run([sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(home), str(wheel)])
        here = compute(sys.executable, scratch, home)
        print(f"torch {here['facts']['torch']}: {len(here['results'])} results ({here['facts']['build']})")
        for version in options.torch:
            begin = time.monotonic()
            environment = scratch / "environment"
            run([options.python, "-m", "venv", "--clear", str(environment)])
            python = str(environment / "bin" / "python")
            run([python, "-m", "pip", "install", "-qq", f"torch=={version}", str(wheel)])
            how = f"installed in {time.monotonic() - begin:.0f} s, library of the wheel"
            failures += differing(here, compute(python, scratch), how)
            begin = time.monotonic()
            compiled = compute(python, scratch, compiled=True)
            failures += differing(here, compiled, f"compiled under it, in {time.monotonic() - begin:.0f} s")
    print(f"wheel check: {'failed' if failures else 'passed'}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
