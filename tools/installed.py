"""What release.py and check_versions.py share: new environments, and what an installed fekernels says and computes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SMOKE = Path(__file__).with_name("smoke.py")
# How pip, setuptools, compilers and Python begin a complaint.
COMPLAINT = re.compile(r"(?:^|\s)(?:warning|WARNING|DEPRECATION|\w+Warning):|^\s*!!$")
# Of MANIFEST.in, where a clean tree has nothing to leave out; of pip, where a configured place of links is not there.
HARMLESS = re.compile(r"warning: no previously-included files|WARNING: Location '.*' is ignored")
# On standard error: that the first use compiles, and torch's own log.
EXPECTED = re.compile(r"fekernels: compiling |[IWE]\d{4} .* torch/")


class Failed(Exception):
    """A command ended with an error, or complained; the message has what it said of that."""


def clean(**variables: str) -> dict[str, str]:
    """The environment without what would reach into an installed package, and with ``variables``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FEKERNELS_", "PYTHON"))}
    return kept | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables


def run(command: list[str], **options: Any) -> str:
    """What a command prints, both streams; Failed where its exit code is not 0, or where it complains."""
    options.setdefault("env", clean())
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    said = str(done.stdout)
    complaints = [line for line in said.splitlines() if COMPLAINT.search(line) and not HARMLESS.search(line)]
    if done.returncode or complaints:
        why = f"exit code {done.returncode}" if done.returncode else f"it complains: {complaints[0].strip()}"
        raise Failed(f"{' '.join(command)}: {why}\n" + "\n".join(complaints[:5] or said.splitlines()[-30:]))
    return said


def environment(interpreter: str, folder: Path, torch: str, artefact: Path) -> str:
    """The Python of a new virtual environment with this torch, and what is tried out, installed without a complaint.

    Where there is uv it brings torch, whose files all environments then share; pip installs the rest.
    """
    run([interpreter, "-m", "venv", "--clear", str(folder)])
    python = str(folder / "bin" / "python")
    if uv := shutil.which("uv"):
        run([uv, "pip", "install", "--python", python, f"torch=={torch}"])
    run([python, "-m", "pip", "install", f"torch=={torch}", str(artefact)])
    return python


def computed(python: str, folder: Path, *options: str, **variables: str) -> dict[str, dict[str, str]]:
    """What smoke.py, which sees no file of this checkout, finds with the fekernels of ``python``: facts and digests.

    Args:
        folder: where it runs, and its library is compiled.
        options: of smoke.py.
        variables: of its environment.
    """
    env = clean(FEKERNELS_BUILD="cpu", FEKERNELS_CACHE_DIR=str(folder / "cache"), **variables)
    done = subprocess.run(
        [python, "-I", "-W", "error", str(SMOKE), *options],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    told = [line for line in done.stderr.splitlines() if not EXPECTED.match(line)]
    if done.returncode or told:
        raise Failed(f"{SMOKE.name} under {python}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found
