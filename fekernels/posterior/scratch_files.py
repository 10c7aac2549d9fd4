"""Directories for files that are being written, which every later writer can tell from those of a killed process."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".fekernels-writing-"
LOCK = "lock"

if sys.platform != "win32":
    import fcntl

    def _lock(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
else:

    def _lock(descriptor: int, wait: bool) -> None:
        raise OSError("no lock that ends with its process")


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A directory of one's own inside ``parent``, gone afterwards; those that killed processes left go first.

    A file to rename into place is written here rather than beside its final name, since libraries that write
    make temporary files of their own (safetensors does, under a random name).
    """
    remove_abandoned(parent)
    directory, descriptor = _make_locked(parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _make_locked(parent: Path) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # removed as abandoned before there was a lock to hold
            continue
        # Where a file system has no locks, nobody's directory is ever found to be abandoned.
        with contextlib.suppress(OSError):
            _lock(descriptor, wait=True)
        if directory.exists():
            return directory, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """No other process is in here for the same directory, where the file system has locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # Windows opens no directory
            descriptor = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, wait=True)
        yield


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch directories in ``parent`` whose processes are gone.

    The operating system lets go of a lock when its holder dies, however it dies, so a directory that can be locked
    has no writer: no process number could be mistaken for that of another host or container.
    """
    for directory in parent.glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT)
        except OSError:  # removed by another, or in a directory that may only be read
            continue
        try:
            _lock(descriptor, wait=False)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            pass  # its writer is alive
        finally:
            os.close(descriptor)
