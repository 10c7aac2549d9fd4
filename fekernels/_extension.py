"""Find the compiled kernels and load them; build them when there are none.

The order is: the library an ahead-of-time install put beside this file (``_C.so``); a library built earlier
in the cache directory; a new build from ``csrc``. Its ops appear as ``torch.ops.fekernels_native``. Importing
this file runs no process and compiles nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from fekernels._build import (
    SOURCE_SUFFIXES,
    ExtensionUnavailable,
    announce,
    build_steps,
    compile_library,
    find_nvcc,
    find_toolchain,
    is_intact,
)

__all__ = [
    "ExtensionUnavailable",
    "build",
    "build_mode",
    "cache_directory",
    "check_torch_version",
    "has_cuda_kernels",
    "library_path",
    "load",
    "unavailable_reason",
]

MINIMUM_TORCH = (2, 10)
MODES = ("auto", "none", "cpu", "cuda")
DEVICES = ("cpu", "cuda")

PREBUILT = Path(__file__).with_name("_C.so")
SOURCE_ROOT = next(
    (p for p in (Path(__file__).with_name("csrc"), Path(__file__).parents[1] / "csrc") if p.is_dir()),
    Path(__file__).with_name("csrc"),
)

SLOW = "fekernels runs its reference implementation, about 10x slower than the compiled kernels"

_log = logging.getLogger("fekernels")
_lock = threading.Lock()
_library: Path | None = None
_failure: str | None = None


def check_torch_version(version: str) -> None:
    """Raise ImportError when ``version`` (of torch) is older than the stable ABI that is used here."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        raise ImportError(
            f"fekernels needs torch >= {needed}; found torch {version}. Run: pip install 'torch>={needed}'"
        )


def build_mode() -> str:
    """FEKERNELS_BUILD, checked: "auto" (default), "none", "cpu" or "cuda"."""
    mode = os.environ.get("FEKERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise ValueError(f"FEKERNELS_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def cache_directory() -> Path:
    """Where libraries built at first use are kept: FEKERNELS_CACHE_DIR, else the user's cache directory."""
    if chosen := os.environ.get("FEKERNELS_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fekernels"
    except RuntimeError as error:  # a container's user with no entry in its password file
        raise ExtensionUnavailable("no home directory to build in: set FEKERNELS_CACHE_DIR") from error


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCE_ROOT.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCE_ROOT)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def _cached_library(device: str, verbose: bool = False) -> Path:
    """The library for ``device`` in the cache directory, built now when it is not there or is damaged."""
    import torch

    system = f"{sys.platform}-{platform.machine()}-{'-'.join(platform.libc_ver())}"
    directory = cache_directory() / f"torch-{torch.__version__}-{system}-{_source_digest()}"
    try:
        tools = find_toolchain(device)
    except ExtensionUnavailable:
        # A library from the time when there was a compiler (an image's build stage, say) is as good as ever.
        earlier = [path for path in directory.glob(f"{device}-*.so") if is_intact(path)]
        if earlier:
            return max(earlier, key=lambda path: path.stat().st_mtime)
        raise
    # Fixed paths stand in for the real ones: the same sources and torch elsewhere give the same library.
    steps = build_steps(tools, Path("csrc"), Path("torch"))
    key = hashlib.sha256(json.dumps([tools.name, tools.nvcc_name, steps]).encode()).hexdigest()[:16]
    library = directory / f"{device}-{key}.so"
    if is_intact(library):
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _file_lock(directory / f"{library.name}.lock"):
            if is_intact(library):  # another process built it while this one waited
                return library
            if library.exists():
                _log.warning("the cached library %s is damaged: compiling it again", library)
            for left in directory.glob(f"{library.name}.build-*"):  # of a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
            compile_library(library, tools, SOURCE_ROOT, Path(torch.__file__).parent, verbose)
    except OSError as error:
        raise ExtensionUnavailable(
            f"cannot build in {directory}: {error}. Set FEKERNELS_CACHE_DIR to a place that can be written"
        ) from error
    return library


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an OS lock: the kernel lets go of it when its holder dies, so a killed builder blocks nobody."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0.2)
    except filelock.Timeout:
        announce("waiting for another process that is compiling the kernels")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build(device: str = "cpu", verbose: bool = False) -> Path:
    """Compile the kernels now instead of at first use.

    Args:
        device: "cpu", or "cuda" for the CUDA kernels as well.
        verbose: show the compiler's commands and output.

    Returns:
        The library; one that is already there and whole is not compiled again.

    Raises:
        ValueError: when device is neither "cpu" nor "cuda".
        ExtensionUnavailable: when they cannot be compiled, with the reason.
    """
    if device not in DEVICES:
        raise ValueError(f"build: device must be one of {', '.join(DEVICES)}; got {device!r}")
    return PREBUILT if _prebuilt_serves(device) else _cached_library(device, verbose)


def _prebuilt_serves(device: str) -> bool:
    # nvcc puts device code into a section of this name; asking the library itself would mean loading it.
    return PREBUILT.is_file() and (device == "cpu" or b".nv_fatbin" in PREBUILT.read_bytes())


def _open(library: Path) -> Path:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise OSError(f"{library}: {error.__cause__ or error}") from error
    if not hasattr(torch.ops.fekernels_native, "build_info"):
        raise OSError(f"{library} registers no ops")
    return library


def _find() -> Path:
    """Load the library that FEKERNELS_BUILD asks for and return its path, or raise with all causes."""
    mode = build_mode()
    if mode == "none":
        raise ExtensionUnavailable("FEKERNELS_BUILD=none")
    causes = []
    if _prebuilt_serves("cuda" if mode == "cuda" else "cpu"):
        try:
            return _open(PREBUILT)
        except OSError as error:
            causes.append(f"prebuilt: {error}")
            _log.warning("the prebuilt library does not load, trying to compile one here: %s", error)
    else:
        causes.append(f"prebuilt: {'no CUDA kernels in it' if PREBUILT.is_file() else 'none installed'}")
    devices = [mode] if mode in DEVICES else [*["cuda"] * _wants_cuda(), "cpu"]
    for device in devices:
        try:
            library = _cached_library(device)
            try:
                return _open(library)
            except OSError as error:
                _log.warning("the cached library %s does not load, compiling it again: %s", library, error)
                library.unlink(missing_ok=True)
                return _open(_cached_library(device))
        except (ExtensionUnavailable, OSError) as error:
            causes.append(f"compiling for {device}: {error}")
            if device != devices[-1]:
                _log.warning("left out the CUDA kernels: %s", error)
    raise ExtensionUnavailable("; ".join(causes))


def _wants_cuda() -> bool:
    """Whether a build that was not asked for by name includes the CUDA kernels."""
    import torch

    if not (torch.cuda.is_available() and torch.version.cuda):
        return False
    try:
        release = find_nvcc()[1].split()[1]
    except ExtensionUnavailable as error:
        _log.info("building without the CUDA kernels: %s", error)
        return False
    # A program linked to a later CUDA major version can need a later driver than the one torch runs on.
    if int(release.split(".")[0]) > int(torch.version.cuda.split(".")[0]):
        _log.info("building without the CUDA kernels: nvcc %s is later than torch's CUDA", release)
        return False
    return True


def load() -> None:
    """Make ``torch.ops.fekernels_native`` available; the first call may compile, later calls cost nothing.

    Raises:
        ExtensionUnavailable: with all causes. It is remembered, and logged once as a warning.
        ValueError: when FEKERNELS_BUILD holds an unknown value.
    """
    global _library, _failure
    if _library is not None:
        return
    with _lock:
        if _library is None and _failure is None:
            try:
                _library = _find()
            except ExtensionUnavailable as error:
                _failure = str(error)
                if build_mode() == "auto":
                    _log.warning(f"{SLOW}: %s", _failure)
    if _failure is not None:
        raise ExtensionUnavailable(_failure)


def unavailable_reason() -> str | None:
    """Why the compiled kernels are not there, or None when they are.

    Raises:
        ExtensionUnavailable: when FEKERNELS_BUILD names them ("cpu", "cuda"): no quiet fallback then.
        ValueError: when FEKERNELS_BUILD holds an unknown value.
    """
    if _library is not None:
        return None
    try:
        load()
    except ExtensionUnavailable as error:
        if build_mode() in DEVICES:
            raise
        return str(error)
    return None


def library_path() -> Path | None:
    """The library in use, or None before one is loaded."""
    return _library


def has_cuda_kernels() -> bool:
    """Whether the compiled kernels are there and include CUDA: ``build_info()`` then has the word cuda."""
    if unavailable_reason() is not None:
        return False
    import torch

    return "cuda" in str(torch.ops.fekernels_native.build_info()).split()
