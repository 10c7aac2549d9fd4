"""Builds that fail and are remembered, libraries that another user could have put there, and ones that are no good."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fekernels._runtime import build, build_cache
from tests.support.stub_build import LOAD, REASON, WARNING, compiler_script, run

USE = "print(fekernels.random.normal((3,), seed=1).shape)\n"
BACKENDS = "print({(r.op, r.in_use, r.reasons['cpp']) for r in fekernels.backends() if r.op == 'sgld_'})\n"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are compiled on Linux only")


class Compiler:
    """A CXX that counts the files it is given, and does `line` first for each."""

    def __init__(self, folder: Path, line: str) -> None:
        self.count = folder / "count"
        self.path = compiler_script(
            folder / "c++", f'case "$*" in *" -c "*) echo file >> {self.count}; {line};; esac'
        )

    def files(self) -> int:
        return self.count.read_text().count("file") if self.count.exists() else 0


@pytest.fixture
def here(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of a child process, in this one."""
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return environment


def cache_of(environment: dict[str, str]) -> Path:
    return Path(environment["FEKERNELS_CACHE_DIR"])


def test_a_failed_build_is_remembered_until_something_changes(
    environment: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    compiler = Compiler(
        tmp_path, f'[ -e {broken} ] && {{ echo "a.cpp:1:2: error: no such vector"; echo "more"; exit 1; }}'
    )
    environment |= {"CXX": compiler.path, "MAX_JOBS": "1"}
    first = run(USE + REASON, environment)
    assert first.returncode == 0 and first.stderr.count(f"WARNING {WARNING}") == 1, first.stderr
    assert "failed: a.cpp:1:2: error: no such vector. All of its output: " in first.stdout
    assert "fekernels.build() does so at once" in first.stdout
    (log,) = cache_of(environment).rglob("*.log")
    assert str(log) in first.stdout and "\nmore\n" in log.read_text()
    tried = compiler.files()
    assert tried >= 1

    second = run(USE + REASON, environment)
    assert "error: no such vector (as before). All of its output: " in second.stdout
    assert compiler.files() == tried and "fekernels: compiling" not in second.stderr
    # In one process: the call tries again, and what ran on the reference goes on with the library that it makes.
    retry = (
        "for mend in (False, True):\n"
        f"    if mend: os.unlink({str(broken)!r})\n"
        "    try: print('built', fekernels.build().name)\n"
        "    except extension.ExtensionUnavailable as error: print('refused', error)\n"
    )
    third = run(USE + retry + LOAD, environment)
    assert third.returncode == 0, third.stderr
    lines = third.stdout.splitlines()
    assert lines[1].startswith("refused compiling with") and lines[-2].startswith("built cpu-")
    assert lines[-1].startswith("baseline ") and compiler.files() > tried
    assert not list(cache_of(environment).rglob("*.log"))


def test_another_compiler_of_the_same_name_is_tried(
    here: dict[str, str], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tmp_path, 'echo "a.cpp:1:2: error: none"; exit 1')
    monkeypatch.setenv("CXX", compiler.path)
    for again in ("", r" \(as before\)"):
        with pytest.raises(build.ExtensionUnavailable, match=f"error: none{again}. All of its output"):
            build_cache.CachedLibrary("cpu", sources).build()
    tried = compiler.files()
    script = Path(compiler.path)
    script.write_text(script.read_text().replace("error: none", "error: other"))
    with pytest.raises(build.ExtensionUnavailable, match="error: other. All"):
        build_cache.CachedLibrary("cpu", sources).build()
    assert compiler.files() > tried


@pytest.mark.parametrize(
    ("last_words", "passing"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", True),
        ("x.s: No space left on device", True),
        ("cc1plus: out of memory allocating 65536 bytes", True),
        ("ninja: build stopped: interrupted by user.", True),
        ("a.cpp:1:2: error: 'x' was not declared", False),
    ],
)
def test_what_may_well_work_the_next_time_is_not_remembered(last_words: str, passing: bool) -> None:
    assert build.BuildFailed("gcc 12", 1, last_words).passing is passing


def test_a_build_that_was_killed_is_tried_again(
    here: dict[str, str], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tmp_path, 'echo "fatal error: Killed signal terminated program cc1plus"; exit 1')
    monkeypatch.setenv("CXX", compiler.path)
    for _ in range(2):
        before = compiler.files()
        with pytest.raises(build.ExtensionUnavailable, match="Killed signal"):
            build_cache.CachedLibrary("cpu", sources).build()
        assert compiler.files() > before
    assert not list(cache_of(here).rglob("*.log"))


# Whose a library is.


@pytest.mark.parametrize(
    ("which", "mode", "how"),
    [
        ("root", 0o777, "can be written by everybody (mode 0777)"),
        ("root", 0o770, "can be written by its group (mode 0770)"),
        ("directory", 0o757, "can be written by everybody (mode 0757)"),
        ("directory", 0o720, "can be written by its group (mode 0720)"),
        ("directory", None, "belongs to user 12345, while this is user "),
        ("directory", "link", "is a symbolic link"),
    ],
)
def test_a_directory_in_which_others_can_write_is_not_used(
    which: str,
    mode: int | str | None,
    how: str,
    cached: Path,
    here: dict[str, str],
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = cached.parent if which == "directory" else cache_of(here)
    assert build_cache.CachedLibrary("cpu", sources).find() == cached
    if mode == "link":
        place.rename(place.with_name("elsewhere"))
        place.symlink_to("elsewhere")
    elif isinstance(mode, int):
        place.chmod(mode)
    elif os.geteuid() == 0:
        os.chown(place, 12345, -1)
    else:  # nobody else can give a directory away: then this is another user
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        how = "while this is user 12345"
    before = sorted(path.name for path in cached.parent.iterdir())
    for call in ("find", "build"):
        with pytest.raises(build.ExtensionUnavailable) as refused:
            getattr(build_cache.CachedLibrary("cpu", sources), call)()
        said = str(refused.value)
        assert (
            f"directory {place} or built in it, because another user could have written one: it {how}" in said
        )
        assert "Set FEKERNELS_CACHE_DIR to a directory that only you can write" in said
    assert before == sorted(path.name for path in cached.parent.iterdir())


def test_a_cache_that_is_not_used_leaves_the_reference_and_one_warning(
    cached: Path, environment: dict[str, str]
) -> None:
    cached.parent.chmod(0o777)
    done = run(USE + BACKENDS, environment)
    assert done.returncode == 0 and "'reference'" in done.stdout, done.stderr
    assert "because another user could have written one" in done.stdout
    assert done.stderr.count(f"WARNING {WARNING}") == 1


@pytest.mark.parametrize("how", ["everybody", "group", "link", "owner"])
def test_a_file_that_others_could_have_written_is_not_taken(
    how: str,
    cached: Path,
    here: dict[str, str],
    sources: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "link":
        cached.rename(tmp_path / "planted.so")
        cached.symlink_to(tmp_path / "planted.so")
    elif how == "owner" and os.geteuid() == 0:
        os.chown(cached, 12345, -1)
    elif how == "owner":
        monkeypatch.setattr(build_cache.CachedLibrary, "_check_directory", lambda self: None)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        cached.chmod({"everybody": 0o602, "group": 0o620}[how])
    assert build_cache.CachedLibrary("cpu", sources).find() is None
    said = f"the cached library {cached} is not loaded, because another user could have written it: it "
    assert said in caplog.text and "Compiling it again" in caplog.text
    monkeypatch.setenv("CXX", str(tmp_path / "no"))
    assert build_cache.CachedLibrary("cpu", sources).find() is None
    assert f"Remove it: rm {cached}" in caplog.text


def test_a_file_that_others_could_have_written_is_compiled_again(
    cached: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """This one would leave a mark, were it loaded."""
    mark = tmp_path / "mark"
    spoil(cached, f'#include <cstdio>\nstatic int ran = (std::fclose(std::fopen("{mark}", "w")), 0);')
    cached.chmod(0o666)
    done = run(LOAD, environment)
    assert done.stdout == f"baseline {cached}\n", done.stderr
    assert not mark.exists() and stat.S_IMODE(cached.lstat().st_mode) == 0o600


def test_what_is_made_is_for_its_user_alone(environment: dict[str, str], tmp_path: Path) -> None:
    environment["FEKERNELS_CACHE_DIR"] = str(tmp_path / "new" / "cache")
    watch = (
        "os.umask(0)\n"
        "from fekernels._runtime import build\n"
        "real = build._run\n"
        "def spy(command, directory, show):\n"
        "    print(oct(os.stat(directory).st_mode & 0o777)); return real(command, directory, show)\n"
        "build._run = spy\n"
    )
    done = run(watch + LOAD, environment)
    assert done.stdout.startswith("0o700\nbaseline "), done.stderr
    made = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in made}
    assert len(modes) == 5  # two directories above, one for this torch, the library and its lock
    assert modes == {path: 0o700 if (tmp_path / path).is_dir() else 0o600 for path in modes}


def test_a_cache_directory_may_be_a_link_or_like_tmp(
    cached: Path, here: dict[str, str], sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cache_of(here)
    root.chmod(0o1777)
    link = root.with_name("link")
    link.symlink_to(root)
    monkeypatch.setenv("FEKERNELS_CACHE_DIR", str(link))
    found = build_cache.CachedLibrary("cpu", sources).find()
    assert found == link / cached.relative_to(root)


def test_the_default_directory_loses_its_groups_right(
    cached: Path, here: dict[str, str], sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What releases before made under umask 002; the library in it is its user's alone."""
    default = tmp_path / "home" / ".cache" / "fekernels"
    default.parent.mkdir(parents=True)
    shutil.move(cache_of(here), default)
    default.chmod(0o775)
    monkeypatch.delenv("FEKERNELS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = build_cache.CachedLibrary("cpu", sources).find()
    assert found == default / cached.parent.name / cached.name
    assert stat.S_IMODE(default.stat().st_mode) == 0o700


# Which instruction sets a library has.


@pytest.mark.skipif(len(build.instruction_sets()) == 1, reason="this kind of machine has one instruction set")
def test_a_library_of_every_instruction_set_serves_each_and_one_of_one_only_that(
    environment: dict[str, str],
) -> None:
    def library(isa: str) -> tuple[str, int]:
        done = run(LOAD, environment | {"FEKERNELS_ISA": isa})
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.split()[1]).name.rsplit("-", 1)[0], done.stderr.count("compiling")

    assert library("baseline") == ("cpu-baseline", 1)
    assert library("all") == ("cpu-all", 1)
    assert library("baseline") == ("cpu-baseline", 0)
    best = build.first_use_instruction_sets()[-1]
    assert library("auto") == ("cpu-all", 0) or best == "baseline"
    without_compiler = environment | {"CXX": "no-such-compiler", "FEKERNELS_ISA": "auto"}
    assert run(LOAD, without_compiler).stdout.split("/")[-1].startswith("cpu-all-") or best == "baseline"


# Libraries that are no good, and commands that are none.


def spoil(library: Path, source: str) -> None:
    """Put a whole library with other contents in the place of `library`."""
    command = [*build.find_compiler()[0], "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    data = library.read_bytes()
    library.write_bytes(data + hashlib.sha256(data).digest())
    library.chmod(0o600)


def test_a_library_that_registers_nothing_is_replaced_and_the_new_one_used(
    cached: Path, environment: dict[str, str]
) -> None:
    spoil(cached, "")
    done = run(
        LOAD + "; print(sorted(p.suffix for p in extension.library_path().parent.iterdir()))", environment
    )
    assert done.stdout == f"baseline {cached}\n['.lock', '.so']\n", done.stderr
    assert f"WARNING the cached library {cached} does not load: {cached} registers no ops" in done.stderr
    assert done.stderr.count("fekernels: compiling") == 1 and WARNING not in done.stderr
    assert run(LOAD, environment).stderr == ""


def test_a_compiler_whose_libraries_do_not_load_is_not_asked_again(
    sources: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """As where it is newer than the libstdc++ that Python has loaded."""
    empty = tmp_path / "empty"
    shutil.copytree(sources, empty)
    (empty / "torch/library.cpp").write_text("")
    environment["STUB_SOURCES"] = str(empty)
    compiler = Compiler(tmp_path, "true")
    environment["CXX"] = compiler.path
    first = run(REASON, environment)
    assert "the library that was compiled does not load: " in first.stdout, first.stderr
    tried = compiler.files()
    second = run(REASON, environment)
    assert "registers no ops (as before). All of its output: " in second.stdout
    assert compiler.files() == tried and second.stderr.count(WARNING) == 1
    assert "registers no ops" in run("fekernels.build()\n" + REASON, environment).stdout
    assert compiler.files() > tried


def test_a_library_of_half_the_ops_does_not_end_the_process(
    cached: Path, environment: dict[str, str]
) -> None:
    half = (
        'import torch; half = torch.library.Library("fekernels_native", "DEF"); half.define("half() -> ()")\n'
    )
    done = run(half + REASON, environment)
    assert done.returncode == 0, done.stderr
    assert "this process has loaded another library of fekernels already" in done.stdout


@pytest.mark.parametrize("variable", ["CXX", "FEKERNELS_CXXFLAGS"])
def test_a_quote_that_is_not_closed_is_one_reason(variable: str, environment: dict[str, str]) -> None:
    environment[variable] = "g++ '-DA"
    done = run(USE * 2 + BACKENDS, environment)
    assert done.returncode == 0 and done.stdout.count("torch.Size([3])") == 2, done.stderr
    assert f"'reference', 'prebuilt: none installed; compiling for cpu: {variable} must be " in done.stdout
    assert 'got "g++ \\\'-DA"' in done.stdout, done.stdout
    assert done.stderr.count(f"WARNING {WARNING}") == 1
    loud = run(BACKENDS + USE, environment | {"FEKERNELS_BUILD": "cpu"})
    assert loud.returncode == 1 and "'none'" in loud.stdout and f"{variable} must be" in loud.stdout
    assert "fekernels._runtime.build.ExtensionUnavailable: prebuilt: none installed" in loud.stderr


def test_a_home_that_is_not_known_is_one_reason(environment: dict[str, str]) -> None:
    done = run(USE + REASON, environment | {"FEKERNELS_CACHE_DIR": "~nobody-has-this-name/cache"})
    assert done.returncode == 0 and "FEKERNELS_CACHE_DIR='~nobody-has-this-name/cache'" in done.stdout


def test_commands_of_several_words_and_paths_with_spaces(
    sources: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "a 'b $c"
    shutil.copytree(sources, folder / "csrc")
    compiler = compiler_script(folder / "c++", "true")
    environment |= {
        "CXX": f'env A="1 2" "{compiler}" -DB=3',
        "STUB_SOURCES": str(folder / "csrc"),
        "FEKERNELS_CACHE_DIR": str(folder / "the cache"),
    }
    done = run(LOAD, environment)
    assert done.stdout.startswith(f"baseline {folder / 'the cache'}"), done.stderr
