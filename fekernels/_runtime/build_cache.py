"""The cache directory: libraries compiled at first use, whose they must be, and builds that failed.

A library is code that runs with its user's rights. So one that another user could have put there is not loaded, and
what is made here is for its owner alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from fekernels._runtime.build import (
    SOURCE_SUFFIXES,
    BuildFailed,
    ExtensionUnavailable,
    Sources,
    announce,
    build_steps,
    compile_library,
    find_toolchain,
    first_use_instruction_sets,
    host_steps,
    instruction_sets,
    is_intact,
)

__all__ = ["CachedLibrary", "cache_directory"]

# What a build can hang on besides the commands, which name it. A library that works serves whatever they are.
BUILD_VARIABLES = (
    *("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "MAX_JOBS", "TMPDIR"),
)
TRY_AGAIN = (
    "It is not tried again until the sources, the compiler, its settings or torch change; fekernels.build() does so"
    " at once"
)

_log = logging.getLogger("fekernels")


def cache_directory() -> Path:
    """Where libraries built at first use are kept: FEKERNELS_CACHE_DIR, else the user's cache directory.

    Raises:
        ExtensionUnavailable: where the home directory that it would be in is not known.
    """
    chosen = os.environ.get("FEKERNELS_CACHE_DIR")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fekernels"
    except (
        RuntimeError
    ) as error:  # a container's user with no entry in its password file, or ~ of an unknown one
        names = f"FEKERNELS_CACHE_DIR={chosen!r} names" if chosen else "there is"
        raise ExtensionUnavailable(
            f"{names} no home directory to build in: set FEKERNELS_CACHE_DIR to a directory that can be written"
        ) from error


class CachedLibrary:
    """A library by these sources, compilers and torch: found in the cache directory, or built.

    Args:
        name: "cpu" or "cuda", the kernels for one device; or "host", the module for this Python.
        source_root: the directory csrc.

    Raises:
        ExtensionUnavailable: with no directory for a cache, or flags that cannot be read.
    """

    def __init__(self, name: str, source_root: Path) -> None:
        import sysconfig  # 2 ms, which an import of fekernels need not take

        import torch

        self._sources, self._torch = source_root, Path(torch.__file__).parent
        self._python = Path(sysconfig.get_paths()["include"])
        self._name = name if name != "host" else f"host-{sysconfig.get_config_var('SOABI')}"
        self._isas = first_use_instruction_sets() if name != "host" else ()
        system = f"{sys.platform}-{platform.machine()}-{'-'.join(platform.libc_ver())}"
        self._directory = (
            cache_directory() / f"torch-{torch.__version__}-{system}-{_source_digest(source_root)}"
        )
        self._missing: ExtensionUnavailable | None = None
        try:
            self._tools = find_toolchain("cuda" if name == "cuda" else "cpu")
        except ExtensionUnavailable as error:
            self._missing = error
            return
        self._path = self._directory / self._file_name(self._isas)
        self._failed = self._path.with_suffix(f".{self._circumstances()}.log")

    def _file_name(self, isas: tuple[str, ...]) -> str:
        # Fixed paths stand in for the real ones: the same sources and torch elsewhere give the same library.
        steps = self._steps(Path("csrc"), Path("torch"), Path("python"), isas)
        key = _digest([self._tools.name, self._tools.nvcc_name, steps])
        return f"{_stem(self._name, isas)}-{key}.so"

    def _steps(
        self, csrc: Path, torch: Path, python: Path, isas: tuple[str, ...]
    ) -> list[tuple[str, list[str]]]:
        sources = Sources.under(self._sources)
        if not isas:
            return host_steps(self._tools, csrc, torch, python, sources)
        return build_steps(self._tools, csrc, torch, sources, isas)

    def failure(self) -> str | None:
        """Why a build under the same circumstances is known to fail; None when it is not."""
        if self._missing is not None:
            return None
        try:
            with open(self._failed, errors="replace") as file:
                return f"{file.readline().strip()} (as before). {self._way_out()}"
        except OSError:
            return None

    def find(self) -> Path | None:
        """The library that is there already; None when there is none, or it is damaged or another user's.

        Raises:
            ExtensionUnavailable: when another user could write in the directory.
        """
        try:
            self._check_directory()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._cannot("read", error) from error
        # A library of every instruction set serves as well. So does one from the time when there was a compiler (an
        # image's build stage, say).
        served = {_stem(self._name, isas): isas for isas in (self._isas, self._isas and instruction_sets())}
        if self._missing is None:
            paths = [self._directory / self._file_name(isas) for isas in served.values()]
        else:
            found = [path for stem in served for path in self._directory.glob(f"{stem}-*.so")]
            paths = sorted(found, key=_age)
        for path in paths:
            if not os.path.lexists(path):
                continue
            if reason := _not_private(path):
                _log.warning(
                    "the cached library %s is not loaded, because another user could have written it: it %s.%s",
                    *(path, reason, f" Remove it: rm {path}" if self._missing else " Compiling it again"),
                )
            elif is_intact(path):
                return path
            else:
                _log.warning("the cached library %s is damaged: compiling it again", path)
        return None

    def build(
        self, *, verbose: bool = False, again: bool = False, instead_of: os.stat_result | None = None
    ) -> Path:
        """Compile the library, or take the one that another process makes meanwhile.

        Args:
            verbose: show the commands and their output.
            again: also where it is known to fail.
            instead_of: of a library that is whole but no good. The same file is not taken again.

        Raises:
            ExtensionUnavailable: with the reason, at once where the build is known to fail.
        """
        if self._missing is not None:
            raise self._missing
        try:
            if again and self.failure() is not None:
                self._forget()
                if instead_of is None and os.path.lexists(self._path):  # it does not load
                    instead_of = self._path.lstat()
            self._raise_known_failure()
            _make_private(self._directory)
            self._check_directory()
            with _file_lock(self._path.with_name(f"{self._path.name}.lock")):
                self._raise_known_failure()  # of another process that tried while this one waited
                if not self._served(instead_of):
                    # Of a builder that was killed.
                    for left in self._directory.glob(f"{self._path.name}.build-*"):
                        shutil.rmtree(left, ignore_errors=True)
                    self._compile(verbose)
        except OSError as error:
            raise self._cannot("build", error) from error
        return self._path

    def _compile(self, verbose: bool) -> None:
        try:
            steps = self._steps(self._sources, self._torch, self._python, self._isas)
            compile_library(self._path, self._tools, steps, verbose, mode=0o600)
        except BuildFailed as error:
            # What a lack of memory or an interruption ended may well work the next time.
            if error.passing:
                raise
            raise ExtensionUnavailable(self.remember(str(error), error.output)) from error
        self._forget()

    def remember(self, reason: str, output: str) -> str:
        """Keep the log of a build that failed, or gave a library that does not load, so that no process tries again.

        Returns:
            The reason, with where the log is and what starts another try.
        """
        with contextlib.suppress(OSError):  # a full disk: then the next process tries again
            temporary = self._failed.with_suffix(f".{os.getpid()}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(f"{reason}\n\n{output}")
            os.replace(temporary, self._failed)
        return f"{reason}. {self._way_out()}"

    def _way_out(self) -> str:
        return f"All of its output: {self._failed}. {TRY_AGAIN}"

    def _raise_known_failure(self) -> None:
        if reason := self.failure():
            raise ExtensionUnavailable(reason)

    def _forget(self) -> None:
        for log in self._directory.glob(f"{self._path.stem}.*.log"):
            log.unlink(missing_ok=True)

    def _served(self, instead_of: os.stat_result | None) -> bool:
        """Whether another process has built the library while this one waited."""
        if not os.path.lexists(self._path) or _not_private(self._path) or not is_intact(self._path):
            return False
        return instead_of is None or not os.path.samestat(instead_of, self._path.stat())

    def _circumstances(self) -> str:
        """What a build depends on and its key leaves out."""
        tools = self._tools
        names = [tools.ninja, tools.cxx[0], tools.cxx[-1], tools.nvcc or "", "as", "ld"]
        programs = [found for name in names if (found := shutil.which(name))]
        files = [*programs, str(self._torch / "version.py")]
        facts = [(path, os.stat(path).st_mtime_ns) for path in files if os.path.exists(path)]
        return _digest([facts, str(self._sources), [os.environ.get(name) for name in BUILD_VARIABLES]])

    def _check_directory(self) -> None:
        """Raise ExtensionUnavailable when another user could write in the cache directory."""
        root = self._directory.parent
        if not os.environ.get("FEKERNELS_CACHE_DIR"):
            _tighten(root)
        reason = _not_private(root, is_root=True)
        path, remedy = root, f"run chmod go-w {root}"
        if reason is None and (reason := _not_private(self._directory)):
            path, remedy = self._directory, f"remove it: rm -r {self._directory}"
        if reason is not None:
            raise ExtensionUnavailable(
                f"no library is loaded from the cache directory {path} or built in it, because another user could"
                f" have written one: it {reason}. Set FEKERNELS_CACHE_DIR to a directory that only you can write,"
                f" or, if this one is yours, {remedy}"
            )

    def _cannot(self, what: str, error: OSError) -> ExtensionUnavailable:
        return ExtensionUnavailable(
            f"cannot {what} in {self._directory}: {error}. Set FEKERNELS_CACHE_DIR to a directory that can be written"
        )


def _stem(name: str, isas: tuple[str, ...]) -> str:
    return "-".join([name, *(["all"] if len(isas) > 1 else isas)])


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _source_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in SOURCE_SUFFIXES):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def _age(path: Path) -> float:
    return -path.lstat().st_mtime


def _not_private(path: Path, is_root: bool = False) -> str | None:
    """How another user could have written ``path``, or could replace it; None when none but root could.

    ``is_root``: the cache directory itself, which may be a link of this user's, or one like /tmp where
    nobody can replace the entries of others.
    """
    facts = [path.lstat()]
    if stat.S_ISLNK(facts[0].st_mode):
        if not is_root:
            return "is a symbolic link"
        facts.append(path.stat())
    user = os.geteuid()
    for fact in facts:
        if fact.st_uid not in (user, 0):
            return f"belongs to user {fact.st_uid}, while this is user {user}"
    mode = stat.S_IMODE(facts[-1].st_mode)
    if not mode & (stat.S_IWGRP | stat.S_IWOTH) or (is_root and mode & stat.S_ISVTX):
        return None
    return f"can be written by {'everybody' if mode & stat.S_IWOTH else 'its group'} (mode {mode:04o})"


def _tighten(path: Path) -> None:
    """Take a group's right to write from the user's own default cache directory.

    Releases up to 2026-11 left it behind under umask 002, the default where every user has a group of their own. What
    lies in it is looked at one by one.
    """
    with contextlib.suppress(OSError):
        found = path.lstat()
        mode = stat.S_IMODE(found.st_mode)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and mode & 0o022 == stat.S_IWGRP:
            path.chmod(0o700)


def _make_private(directory: Path) -> None:
    """Make a directory and those above it that are missing, for this user alone, as XDG wants it too."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was first
            path.mkdir(mode=0o700)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an OS lock: the kernel lets go of it when its holder dies, so a killed builder blocks nobody."""
    import filelock

    lock = filelock.FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=0.2)
    except filelock.Timeout:
        announce("waiting for another process that is compiling the kernels")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
