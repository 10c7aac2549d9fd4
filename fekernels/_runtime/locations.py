"""Where libraries and sources are, and what FEKERNELS_BUILD says of them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PREBUILT", "SOURCE_ROOT", "build_mode"]

MODES = ("auto", "none", "cpu", "cuda")

PACKAGE = Path(__file__).parents[1]
PREBUILT = PACKAGE / "_C.so"
SOURCE_ROOT = next(
    (path for path in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if path.is_dir()), PACKAGE / "csrc"
)


def build_mode() -> str:
    """FEKERNELS_BUILD, checked: "auto" (default), "none", "cpu" or "cuda"."""
    mode = os.environ.get("FEKERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise ValueError(f"FEKERNELS_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode
