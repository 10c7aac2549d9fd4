"""What is native of Python's side: ``csrc/torch/host``, a module of Python that may be missing.

The optimizers' check between steps; the way of a free energy and of a sample to its kernel and into autograd's graph;
what a model asks of its data and weights at every step. It is compiled
against one release of torch and one Python, while the kernels are compiled or, where a wheel had those, at the first
use of either. Where it cannot be built, their twins in Python serve (``optim/_table_cache.py``,
``ops/free_energy/autograd.py``, ``ops/free_energy/reparameterize.py``, ``ops/free_energy/domains.py`` and
``models/noise_counter.py``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fekernels._runtime import locations
from fekernels._runtime.build import ExtensionUnavailable, Sources, host_file
from fekernels._runtime.build_cache import CachedLibrary

__all__ = ["build_beside", "host", "model_checks", "unavailable_reason"]

SLOW = (
    "the optimizers check gradients in Python, 0.3 ms a step of 200 parameters, and free energies and samples their"
    " operands, 40 us each"
)

_log = logging.getLogger("fekernels")


@contextlib.contextmanager
def build_beside() -> Iterator[None]:
    """Compile the module, where it is missing, while the kernels are compiled. A failure is :func:`host`'s to tell."""

    def build() -> None:
        with contextlib.suppress(ExtensionUnavailable, OSError):
            cached = _cached()
            _ = cached.find() or cached.build()

    thread = threading.Thread(target=build)
    if not _prebuilt().is_file() and _has_sources():
        thread.start()
    yield
    if thread.ident is not None:
        thread.join()


def host() -> ModuleType | None:
    """The module, found or built at the first call; None where it cannot be had, which is logged once."""
    return _loaded()[0]


@functools.cache
def model_checks() -> ModuleType | None:
    """The module, for its ``all_within`` and ``weights_state``; None where it cannot be had."""
    import torch

    module = host()
    if module is not None:
        try:
            module.connect_model_checks(torch.Tensor, torch.nn.Parameter, torch.empty(0))
        except TypeError:  # tensors are laid out otherwise than it looks for them
            return None
    return module


def unavailable_reason() -> str | None:
    """Why there is no module, None where there is one."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    if locations.build_mode() == "none":
        return None, "FEKERNELS_BUILD=none"
    try:
        if _prebuilt().is_file():
            return _open(_prebuilt()), None
        cached = _cached()
        return _open(cached.find() or cached.build()), None
    except (ExtensionUnavailable, ImportError, OSError) as error:
        _log.info(f"{SLOW}: %s", error)
        return None, str(error)


def _has_sources() -> bool:
    return bool(Sources.under(locations.SOURCE_ROOT).host)


def _prebuilt() -> Path:
    import torch

    return locations.PREBUILT.with_name(host_file(torch.__version__))


def _cached() -> CachedLibrary:
    if not _has_sources():
        raise ExtensionUnavailable(f"{locations.SOURCE_ROOT} has no torch/host")
    return CachedLibrary("host", locations.SOURCE_ROOT)


def _open(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("host", str(path))
    spec = importlib.util.spec_from_file_location("host", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
