"""Ships csrc inside the wheel and, where torch can be found at build time, the compiled library as well.

`pip install .` builds in isolation, without torch: the wheel is pure and the kernels are compiled at first
use. `pip install --no-build-isolation .` compiles them now. FEKERNELS_BUILD applies: "none" compiles nothing;
"cpu" and "cuda" fail when they cannot be had; "auto" takes what the machine can do.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fekernels needs setuptools >= 77, found {setuptools.__version__}: pip install -U setuptools")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("fekernels_build", HERE / "fekernels" / "_runtime" / "build.py")
assert spec is not None and spec.loader is not None
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build
spec.loader.exec_module(build)

MODE = os.environ.get("FEKERNELS_BUILD") or "auto"
if MODE not in ("auto", "none", "cpu", "cuda"):
    sys.exit(f"FEKERNELS_BUILD must be one of auto, none, cpu, cuda; got {MODE!r}")


def torch_root() -> Path | None:
    """The directory of the torch to compile against, found without importing it; None when there is none."""
    found = importlib.util.find_spec("torch")
    return Path(found.origin).parent if found is not None and found.origin else None


@functools.cache
def toolchains() -> list:
    """What can compile the library ahead of time, the best first; empty when the first use is to do it."""
    if MODE == "none" or torch_root() is None:
        return []
    found, reasons = [], []
    for device in ("cuda", "cpu") if MODE == "auto" else (MODE,):
        try:
            version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
            if version is None or (int(version[1]), int(version[2])) < (2, 10):
                raise build.ExtensionUnavailable("the kernels need torch >= 2.10")
            found.append(build.find_toolchain(device))
        except build.ExtensionUnavailable as error:
            reasons.append(str(error))
    if not found and MODE != "auto":
        sys.exit(f"FEKERNELS_BUILD={MODE}: {reasons[-1]}")
    if not found:
        build.announce(f"nothing is compiled ahead of time: {reasons[-1]}")
    return found


def description() -> str:
    """README as a package index can show it, which has neither its files nor pictures of two themes.

    FEKERNELS_README_URL says where the files can be read. Without it links are left as text, and pictures out.
    """
    url = os.environ.get("FEKERNELS_README_URL", "").rstrip("/")
    text = re.sub(r"<!--.*?-->\n*", "", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    of_a_theme = re.compile(r"<picture>.*?(<img [^>]*>).*?</picture>\n*", re.DOTALL)
    elsewhere = r"(?!https?://|#)"
    if not url:
        return re.sub(rf"\[([^]\n]*)\]\({elsewhere}[^)]*\)", r"\1", of_a_theme.sub("", text))
    text = re.sub(rf'(src=|href=)"{elsewhere}', rf'\1"{url}/', of_a_theme.sub("\\1\n\n", text))
    return re.sub(rf"(\[[^]\n]*\]\(){elsewhere}", rf"\1{url}/", text)


class Distribution(setuptools.Distribution):
    def has_ext_modules(self) -> bool:
        return bool(toolchains())  # makes a wheel with the library platform-specific


class BuildPy(build_py):
    """Adds csrc and the library; an editable install finds csrc where it is, and compiles at first use."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)  # or an earlier build's library would be shipped
        super().run()
        package = Path(self.build_lib, "fekernels").resolve()
        for source in (HERE / "csrc").rglob("*"):
            if source.suffix in build.SOURCE_SUFFIXES:
                target = package / source.relative_to(HERE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for tools in toolchains():
            try:
                steps = build.build_steps(tools, HERE / "csrc", torch_root())
                build.compile_library(package / "_C.so", tools, steps, verbose=True)
                break
            except build.ExtensionUnavailable as error:
                if tools is toolchains()[-1]:
                    raise
                build.announce(f"the CUDA kernels are left out: {error}")
        if toolchains():
            self.compile_host(package)

    @staticmethod
    def compile_host(package: Path) -> None:
        """For this torch and this Python alone; others compile theirs at first use, or do without."""
        tools, torch = toolchains()[-1], torch_root()
        version = re.search(r"^__version__ = '(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
        steps = build.host_steps(tools, HERE / "csrc", torch, Path(sysconfig.get_paths()["include"]))
        try:
            build.compile_library(package / build.host_file(version[1]), tools, steps, verbose=True)
        except build.ExtensionUnavailable as error:
            build.announce(
                f"the native gradient check and the free energy's native node are left out: {error}"
            )


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        # No Python in the library: any version loads it.
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setuptools.setup(
    distclass=Distribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": PlatformWheel},
    long_description=description(),
    long_description_content_type="text/markdown",
)
