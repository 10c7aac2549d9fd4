"""What importing the package does, and does not do."""

from __future__ import annotations

import os
import subprocess
import sys


def test_import_is_light_and_compiles_nothing(tmp_path):
    """No compiler, and none of the modules that take long: those would be paid by everyone who imports fekernels."""
    code = (
        "import sys, torch; before = set(sys.modules); import fekernels; new = set(sys.modules) - before\n"
        "slow = ('torch._dynamo', 'torch._inductor', 'triton', 'sympy', 'matplotlib', 'sklearn', 'safetensors')\n"
        "print(sorted(name for name in new if name.startswith(slow)))"
    )
    environment = {**os.environ, "FEKERNELS_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_public_names():
    import fekernels as fe

    missing = [name for name in fe.__all__ if not hasattr(fe, name)]
    missing += [f"optim.{name}" for name in fe.optim.__all__ if not hasattr(fe.optim, name)]
    assert missing == []
    assert fe.__version__
