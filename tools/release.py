"""Make and check what a release consists of: the source distribution, the pure wheel and the compiled one.

    pip install -e '.[test,release]'
    python tools/release.py [--out dist] [--url https://...]

They are built from the files that git tracks, in a directory of its own: the source distribution from those, both
wheels from it. Then each is looked at (its files, licence and version, and how its page on a package index reads),
installed into a new virtual environment and run there with every warning an error: `python -m fekernels info`, and each
operator once, with the same bits in all three. Nothing is uploaded.

The compiled wheel holds every instruction set of this kind of machine, for CPUs (with --device cuda for GPUs too). It
is named for the oldest glibc that its symbols allow, which auditwheel tells.
"""

from __future__ import annotations

import argparse
import base64
import csv
import email
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from installed import REPOSITORY, Failed, clean, computed, environment, run

SOURCES = (".h", ".def", ".cpp", ".cuh", ".cu")
NO_SOURCE = re.compile(r"(^|/)(__pycache__|\.\w+_cache|\.git|build|dist|site)/|\.(py[cod]|so|o|orig|rej)$")
OF_TORCH = {"libc10.so", "libtorch_cpu.so"}  # loaded by `import torch` before the library is
MADE = {"PKG-INFO", "setup.cfg", "fekernels.egg-info/"}  # by setuptools, in a source distribution
LIMIT = 100 << 20  # bytes, of one file on PyPI


def check(holds: object, said: str) -> None:
    if not holds:
        raise Failed(said)


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def version() -> str:
    """The version, on which every file that names it agrees."""
    found = {
        name: re.search(pattern, read(name), re.MULTILINE)
        for name, pattern in (
            ("fekernels/__init__.py", r'^__version__ = "(.+)"$'),
            ("CITATION.cff", r"^version: (\S+)$"),
            ("CHANGELOG.md", r"^## (\d\S*) \(\d{4}-\d\d-\d\d\)$"),
        )
    }
    versions = {name: match[1] if match else None for name, match in found.items()}
    check(len(set(versions.values())) == 1 and None not in versions.values(), f"versions differ: {versions}")
    dates = [
        re.search(pattern, read(name), re.MULTILINE)
        for name, pattern in (
            ("CITATION.cff", r"^date-released: (\S+)$"),
            ("CHANGELOG.md", r"^## \d\S* \((.+)\)$"),
        )
    ]
    check(all(dates) and len({date[1] for date in dates if date}) == 1, f"dates differ: {dates}")
    return str(versions["CITATION.cff"])


def build(scratch: Path, device: str, url: str | None) -> tuple[Path, Path, Path]:
    """The three artefacts, in scratch/out."""
    tree, out = scratch / "tree", scratch / "out"
    out.mkdir()
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tree / name)
    # Archives hold the time of the commit, not that of the build.
    variables = {"SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip()}
    env = clean(**variables, **({"FEKERNELS_README_URL": url} if url else {}))
    make = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", make, str(out)], cwd=tree, env=env)
    (sdist,) = out.iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch / "unpacked", filter="data")
    (source,) = (scratch / "unpacked").iterdir()
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", str(source)]
    wheels = []
    for kind in ("none", device):
        run([*pip, "-w", str(scratch / kind)], env=env | {"FEKERNELS_BUILD": kind})
        (wheel,) = (scratch / kind).iterdir()
        wheels.append(wheel)
    return sdist, wheels[0].rename(out / wheels[0].name), named_for_glibc(wheels[1], out)


def tracked() -> list[str]:
    return git("ls-files", "-z").split("\0")[:-1]


def named_for_glibc(wheel: Path, out: Path) -> Path:
    """The wheel under the oldest manylinux tag that its symbols and libraries allow.

    Nothing in it is patched: the library ends in a digest of itself. What it needs beyond the system's own libraries
    is torch's, and loaded already.
    """
    audit = [sys.executable, "-m", "auditwheel", "show", "--json", "--disable-isa-ext-check", str(wheel)]
    done = subprocess.run(audit, capture_output=True, text=True)
    check(done.returncode == 0, f"auditwheel: {done.stderr}")
    found = json.loads(done.stdout)
    foreign = set(found["external_libs"]) - OF_TORCH
    check(not foreign, f"{wheel.name} needs {', '.join(foreign)}")
    check(found["sym_tag"].startswith("manylinux_"), f"{wheel.name}: auditwheel gives it {found['sym_tag']}")
    tags = [sys.executable, "-m", "wheel", "tags", "--platform-tag", found["sym_tag"], str(wheel)]
    subprocess.run(tags, check=True, capture_output=True)
    (made,) = wheel.parent.glob("*manylinux*.whl")
    return made.rename(out / made.name)


def check_description(metadata: bytes, release: str) -> None:
    """Name, version, licence, and a description without a link or a picture that only the repository has."""
    message = email.message_from_bytes(metadata)
    stated = {name: message[name] for name in ("Name", "Version", "License-Expression", "License-File")}
    expected = {
        "Name": "fekernels",
        "Version": release,
        "License-Expression": "MIT",
        "License-File": "LICENSE",
    }
    check(stated == expected, f"metadata: {stated}, not {expected}")
    text = str(message.get_payload())
    links = re.findall(r"""(?:\]\(|(?:src|srcset|href)=["'])([^)"']+)""", text)
    relative = [link for link in links if not re.match(r"https://|#", link)]
    check(
        len(text) > 2000 and not relative,
        f"the description has links that only the repository has: {relative}",
    )


def check_sdist(path: Path, release: str) -> None:
    """It holds every tracked file as it is, and what setuptools adds."""
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
        expected = set(tracked())
        check(not (gone := expected - set(members)), f"{path.name} lacks {sorted(gone)}")
        more = {n for n in set(members) - expected if not any(n.startswith(made) for made in MADE)}
        check(not more, f"{path.name} holds {sorted(more)}")
        for name in expected:
            taken = archive.extractfile(members[name])
            check(taken and taken.read() == (REPOSITORY / name).read_bytes(), f"{path.name}: {name} differs")
        taken = archive.extractfile(members["PKG-INFO"])
        assert taken is not None
        check_description(taken.read(), release)


def check_wheel(path: Path, release: str) -> None:
    """It holds the package, csrc and the licence, nothing else, with the digests that its RECORD says."""
    information = f"fekernels-{release}.dist-info"
    expected = {n for n in tracked() if n.startswith("fekernels/")}
    expected |= {f"fekernels/{n}" for n in tracked() if n.startswith("csrc/") and n.endswith(SOURCES)}
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        own = {n for n in names if n.startswith("fekernels/")}
        libraries = {n for n in own if n.endswith(".so")}
        check(own - libraries == expected, f"{path.name}: {sorted(own - libraries ^ expected)} differ")
        strange = {n for n in names - own if not n.startswith(f"{information}/")}
        strange |= {n for n in own - libraries if NO_SOURCE.search(n)}
        check(not strange, f"{path.name} holds {sorted(strange)}")
        check(
            archive.read(f"{information}/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_bytes(),
            "licence",
        )
        check_description(archive.read(f"{information}/METADATA"), release)
        for name, digest, _ in csv.reader(io.StringIO(archive.read(f"{information}/RECORD").decode())):
            if digest:
                made = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=")
                check(digest == f"sha256={made.decode()}", f"{path.name}: the digest of {name}")
    compiled = "none-any" not in path.name
    check(("fekernels/_C.so" in libraries) == compiled == bool(libraries), f"{path.name} holds {libraries}")
    check(path.stat().st_size < LIMIT, f"{path.name}: more than PyPI takes")


def try_out(artefact: Path, torch: str, scratch: Path) -> dict[str, dict[str, str]]:
    """Install it into a new environment and run it there: what it computes."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    python = environment(sys.executable, scratch / "environment", torch, artefact)
    found = computed(python, scratch)
    variables = clean(FEKERNELS_CACHE_DIR=str(scratch / "cache"), FEKERNELS_BUILD="cpu")
    run([python, "-I", "-W", "error", "-m", "fekernels", "info"], cwd=scratch, env=variables)
    expected = "wheel" if "manylinux" in artefact.name else "first use"
    check(found["facts"]["library"] == expected, f"{artefact.name}: its library is that of {found['facts']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 all checks passed; 1 one failed, and --out is as it was; 2 a bad argument.",
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist", help="where they go (default: dist)")
    parser.add_argument(
        "--url", help="where the files of this release can be read; README's links lead there"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the compiled wheel")
    try:
        here = importlib.metadata.version("torch").partition("+")[
            0
        ]  # a build's own label is known to few indexes
    except importlib.metadata.PackageNotFoundError:
        here = None
    parser.add_argument("--torch", default=here, help=f"of the environments (default: {here}, as here)")
    options = parser.parse_args()
    if here is None:
        parser.error(
            "torch must be installed here, which the wheel is compiled against (pip install -e '.[release]')"
        )
    if options.url and not options.url.startswith("https://"):
        parser.error(f"--url must begin with https://; got {options.url}")
    try:
        release = version()
        commit = git("rev-parse", "--short", "HEAD").strip()
        if git("status", "--porcelain").strip():
            commit += " with changes that are not committed"
        with tempfile.TemporaryDirectory(prefix="release-") as name:
            scratch = Path(name)
            artefacts = build(scratch, options.device, options.url)
            check_sdist(artefacts[0], release)
            results = {}
            for artefact in artefacts:
                if artefact.suffix == ".whl":
                    check_wheel(artefact, release)
                twine = [sys.executable, "-m", "twine", "check", "--strict", str(artefact)]
                run(twine)
                found = try_out(artefact, options.torch, scratch / "trial")
                results[artefact.name] = found["results"]
                print(
                    f"{artefact.name}: {len(found['results'])} results ({found['facts']['library']})",
                    flush=True,
                )
            check(len({json.dumps(each) for each in results.values()}) == 1, f"results differ: {results}")
            options.out.mkdir(parents=True, exist_ok=True)
            for artefact in artefacts:
                shutil.copy(artefact, options.out)
    except Failed as failure:
        print(f"release: {failure}", file=sys.stderr)
        return 1
    for artefact in artefacts:
        path = options.out / artefact.name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.stat().st_size / 1e6:6.2f} MB  sha256 {digest}  {os.path.relpath(path)}")
    print(f"fekernels {release} at {commit}: all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
