"""What tools/release.py checks: one version everywhere, a description without dead links, wheels with nothing amiss."""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import fekernels as fe
from tests.support import ROOT
from tests.support.pages import blocks


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("release")


def metadata(text: str) -> bytes:
    head = f"Name: fekernels\nVersion: {fe.__version__}\nLicense-Expression: MIT\nLicense-File: LICENSE"
    return f"{head}\n\n{text}".encode()


def test_changelog_and_citation_name_this_version(release: ModuleType) -> None:
    assert release.version() == fe.__version__


@pytest.mark.parametrize("url", ["", "https://host.example/v1/"])
def test_the_description_has_no_link_that_only_the_repository_has(url: str, release: ModuleType) -> None:
    environment = os.environ | {"FEKERNELS_BUILD": "none", "FEKERNELS_README_URL": url}
    command = [sys.executable, "setup.py", "--long-description"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(release.Failed, match="links that only the repository has.*'docs/"):
        release.check_description(metadata(readme), fe.__version__)
    release.check_description(metadata(done.stdout), fe.__version__)
    shown = [block.code for block in blocks(done.stdout)]
    assert len(shown) >= 4 and set(shown) < {block.code for block in blocks(readme)}
    assert "<picture" not in done.stdout and "<!--" not in done.stdout
    assert done.stdout.count(f'src="{url}docs/images/') == (2 if url else 0)
    assert ("[noise without a generator](https://host.example/v1/docs/random.md)" in done.stdout) == bool(url)
    assert url or "| noise without a generator |" in done.stdout


FILES = {
    "LICENSE": "MIT",
    "fekernels/__init__.py": "x = 1",
    "csrc/core/lanes.h": "int x;",
    "tests/test_x.py": "",
}
INFORMATION = f"fekernels-{fe.__version__}.dist-info"


def wheel(path: Path, **changed: str) -> Path:
    """A wheel of FILES, then changed behind its RECORD's back; "" leaves a file out."""
    held = {
        "fekernels/__init__.py": FILES["fekernels/__init__.py"],
        "fekernels/csrc/core/lanes.h": FILES["csrc/core/lanes.h"],
        f"{INFORMATION}/licenses/LICENSE": FILES["LICENSE"],
        f"{INFORMATION}/METADATA": metadata("a line\n" * 400).decode(),
    }
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        for name, text in held.items()
    ]
    held[f"{INFORMATION}/RECORD"] = "\n".join(record)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (held | changed).items():
            if text:
                archive.writestr(name, text)
    return path


def test_a_wheel_with_anything_amiss_is_refused(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "LICENSE").write_text(FILES["LICENSE"])
    monkeypatch.setattr(release, "REPOSITORY", tmp_path)
    monkeypatch.setattr(release, "tracked", lambda: list(FILES))
    path = tmp_path / "fekernels-py3-none-any.whl"
    release.check_wheel(wheel(path), fe.__version__)
    for changed, said in (
        ({"fekernels/csrc/core/lanes.h": ""}, "lanes.h.*differ"),
        ({"fekernels/csrc/core/lanes.h": "int y;"}, "digest of fekernels/csrc/core/lanes.h"),
        ({"fekernels/__pycache__/a.pyc": "x"}, "a.pyc"),
        ({"tests/test_x.py": "x"}, r"holds \['tests/test_x.py'\]"),
        ({f"{INFORMATION}/licenses/LICENSE": "other"}, "licence"),
        ({"fekernels/_C.so": "x"}, r"holds \{'fekernels/_C.so'\}"),
    ):
        with pytest.raises(release.Failed, match=said):
            release.check_wheel(wheel(path, **changed), fe.__version__)
    with pytest.raises(release.Failed, match="metadata: .*, not"):
        release.check_description(metadata("a line\n" * 400), "9.9")


@pytest.mark.parametrize(
    ("line", "complains"),
    [
        ("warning: unused variable 'x' [-Wunused-variable]", True),
        ("a.h:3:1: warning: unused", True),
        ("DeprecationWarning: old", True),
        ("WARNING: Running pip as the 'root' user", True),
        ("DEPRECATION: Legacy editable install", True),
        ("copying fekernels/warnings.py", False),
        ("Successfully installed fekernels", False),
        ("warning: no previously-included files matching '*.so' found anywhere in distribution", False),
    ],
)
def test_complaints_are_told_from_names(line: str, complains: bool, release: ModuleType) -> None:
    command = [sys.executable, "-c", f"print({line!r})"]
    if complains:
        with pytest.raises(release.Failed, match="it complains"):
            release.run(command)
    else:
        assert release.run(command) == f"{line}\n"
