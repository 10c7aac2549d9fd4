"""Find the compiled kernels and load them; build them when there are none.

The order is: the library an ahead-of-time install put into the package (``_C.so``); a library built earlier
in the cache directory; a new build from ``csrc``. Its ops appear as ``torch.ops.fekernels_native``. Importing
this file runs no process and compiles nothing.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from pathlib import Path

from fekernels._runtime import locations
from fekernels._runtime.build import ExtensionUnavailable, find_nvcc
from fekernels._runtime.build_cache import CachedLibrary, cache_directory
from fekernels._runtime.host import build_beside

__all__ = [
    "ExtensionUnavailable",
    "build",
    "cache_directory",
    "check_torch_version",
    "has_cuda_kernels",
    "library_path",
    "load",
    "unavailable_reason",
]

MINIMUM_TORCH = (2, 10)
DEVICES = ("cpu", "cuda")

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


def build(device: str = "cpu", verbose: bool = False) -> Path:
    """Compile the kernels now instead of at first use.

    Args:
        device: "cpu", or "cuda" for the CUDA kernels as well.
        verbose: show the compiler's commands and output.

    Returns:
        The library; one that exists and is whole is not compiled again, but a build that failed before is tried.

    Raises:
        TypeError: when device is no string, or verbose no bool.
        ValueError: when device is neither "cpu" nor "cuda".
        ExtensionUnavailable: when they cannot be compiled, with the reason.
    """
    global _failure
    if not isinstance(device, str):
        raise TypeError(
            f"build: device must be a string, one of {', '.join(DEVICES)}; got {type(device).__name__}"
        )
    if device not in DEVICES:
        raise ValueError(f"build: device must be one of {', '.join(DEVICES)}; got {device!r}")
    if not isinstance(verbose, bool):
        raise TypeError(f"build: verbose must be a bool; got {type(verbose).__name__}")
    library = locations.PREBUILT
    if not _prebuilt_serves(device):
        cached = CachedLibrary(device, locations.SOURCE_ROOT)
        found = cached.find() if cached.failure() is None else None
        library = found or _build(cached, verbose=verbose, again=True)
    with _lock:
        _failure = None  # this process looks once more
    return library


def _cached_library(device: str) -> Path:
    """The library for ``device`` in the cache directory, built now when it is missing or damaged."""
    cached = CachedLibrary(device, locations.SOURCE_ROOT)
    return cached.find() or _build(cached)


def _build(cached: CachedLibrary, verbose: bool = False, again: bool = False) -> Path:
    with build_beside():
        return cached.build(verbose=verbose, again=again)


def _prebuilt_serves(device: str) -> bool:
    # nvcc puts device code into a section of this name; asking the library itself would mean loading it.
    return locations.PREBUILT.is_file() and (
        device == "cpu" or b".nv_fatbin" in locations.PREBUILT.read_bytes()
    )


def _open(library: Path) -> Path:
    import torch

    from fekernels._runtime.torch_internals import registered_operators

    if any(name.startswith("fekernels_native::") for name in registered_operators()):
        # A namespace that is defined twice ends the process.
        raise OSError(f"{library}: this process has loaded another library of fekernels already")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise OSError(f"{library}: {error.__cause__ or error}") from error
    if not hasattr(torch.ops.fekernels_native, "build_info"):
        raise OSError(f"{library} registers no ops")
    return library


def _open_cached(device: str) -> Path:
    """Load the library for ``device`` from the cache directory; compile another where that does not load."""
    cached = CachedLibrary(device, locations.SOURCE_ROOT)
    library = cached.find() or _build(cached)
    before = library.stat()
    try:
        return _open(library)
    except OSError as error:
        _log.warning("the cached library %s does not load: %s", library, error)
    cached.build(instead_of=before)
    name = _under_another_name(library)
    try:
        _open(name)
    except OSError as error:
        reason = f"the library that was compiled does not load: {error}"
        raise ExtensionUnavailable(cached.remember(reason, "")) from error
    finally:
        name.unlink(missing_ok=True)
    return library


def _under_another_name(library: Path) -> Path:
    """A second name for a library: under the name of one that is loaded, the loader hands out the loaded one."""
    name = library.with_name(f"{library.name}.{os.getpid()}")
    try:
        os.link(library, name)
    except OSError:  # a file system without links
        shutil.copyfile(library, name)
    return name


def _find() -> Path:
    """Load the library that FEKERNELS_BUILD asks for and return its path, or raise with all causes."""
    mode = locations.build_mode()
    if mode == "none":
        raise ExtensionUnavailable("FEKERNELS_BUILD=none")
    causes = []
    if _prebuilt_serves("cuda" if mode == "cuda" else "cpu"):
        try:
            return _open(locations.PREBUILT)
        except OSError as error:
            causes.append(f"prebuilt: {error}")
            _log.warning("the prebuilt library does not load, trying to compile one here: %s", error)
    else:
        causes.append(
            f"prebuilt: {'no CUDA kernels in it' if locations.PREBUILT.is_file() else 'none installed'}"
        )
    devices = [mode] if mode in DEVICES else [*["cuda"] * _wants_cuda(), "cpu"]
    for device in devices:
        try:
            return _open_cached(device)
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
                if locations.build_mode() == "auto":
                    _log.warning(f"{SLOW}: %s", _failure)
    if _failure is not None:
        raise ExtensionUnavailable(_failure)


def unavailable_reason() -> str | None:
    """Why the compiled kernels are missing, or None when they are.

    Raises:
        ExtensionUnavailable: when FEKERNELS_BUILD names them ("cpu", "cuda"): no quiet fallback then.
        ValueError: when FEKERNELS_BUILD holds an unknown value.
    """
    if _library is not None:
        return None
    try:
        load()
    except ExtensionUnavailable as error:
        if locations.build_mode() in DEVICES:
            raise
        return str(error)
    return None


def library_path() -> Path | None:
    """The library in use, or None before one is loaded."""
    return _library


def has_cuda_kernels() -> bool:
    """Whether the compiled kernels are available and include CUDA: ``build_info()`` then has the word cuda."""
    if unavailable_reason() is not None:
        return False
    import torch

    return "cuda" in str(torch.ops.fekernels_native.build_info()).split()
