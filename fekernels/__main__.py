"""``python -m fekernels info | demo | unified | bench``; alone it says what these are."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

COMMANDS = {
    "info": "what runs where, and why not elsewhere",
    "demo": "train and sample a network on real data, with and without noise",
    "unified": "every system of the design document on real data, beside its exact answer",
    "bench": "tables of times, as ratios to the peers",
}
# Where a command's ``main`` is, and the extra that brings what it needs, where they are not called like the command.
MODULES = {"unified": "unified.command"}
EXTRAS = {"unified": "demo"}


def _told(call: Callable[[], object]) -> object:
    """What a call returns, or what it raises where a variable of the environment is not to be had: both are told."""
    from fekernels._runtime.extension import ExtensionUnavailable

    try:
        return call()
    except (ExtensionUnavailable, ValueError) as error:
        return str(error)


def _check_environment(parser: argparse.ArgumentParser) -> None:
    """End with a usage error where a variable holds a value that every op refuses."""
    from fekernels._runtime import backends, locations

    try:
        locations.build_mode()
        backends.requested()
    except ValueError as error:
        parser.error(str(error))


def overview() -> int:
    """Print which commands there are."""
    import fekernels

    print(f"fekernels {fekernels.__version__}: fused PyTorch kernels for free-energy minimisation\n")
    for name, text in COMMANDS.items():
        print(f"  python -m fekernels {name:8} {text}")
    print(
        "\nEach takes --help, and --json PATH for what it found. In Python: import fekernels as fe; help(fe)."
    )
    return 0


def info(written: Path | None = None) -> int:
    """Print the versions, the compiled library and the table of backends; ``written``: a file for them as JSON."""
    import torch

    import fekernels
    from fekernels._runtime import extension, host

    reason = _told(extension.unavailable_reason)
    native = torch.ops.fekernels_native
    rows = {
        "fekernels": fekernels.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}), {torch.get_num_threads()} threads",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiled kernels": str(extension.library_path()) if reason is None else f"none: {reason}",
        "gradient check": f"in Python: {missing}" if (missing := host.unavailable_reason()) else "compiled",
        "cache directory": str(_told(extension.cache_directory)),
    }
    if reason is None:
        rows |= {"built with": native.build_info(), "instruction set": str(_told(native.isa))}
    for name, value in rows.items():
        print(f"{name:17} {value}")
    table = fekernels.backends()
    print(f"\n{table}")
    if written is not None:
        in_use = {f"{row.op} on {row.device}": row.in_use for row in table}
        written.write_text(json.dumps({**rows, "backends": in_use}, indent=1) + "\n")
        print(f"\nwritten: {written}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; all but ``info`` read their own options, so their help is theirs too."""
    parser = argparse.ArgumentParser(prog="python -m fekernels")
    commands = parser.add_subparsers(dest="command")
    parsers = {
        name: commands.add_parser(name, help=text, description=text, add_help=name == "info")
        for name, text in COMMANDS.items()
    }
    parsers["info"].add_argument("--json", type=Path, metavar="PATH", help="write what is printed to PATH")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return overview()
    if arguments.command == "info":
        if rest:
            parsers["info"].error(f"unrecognized arguments: {' '.join(rest)}")
        _check_environment(parsers["info"])
        if arguments.json is not None and not arguments.json.parent.is_dir():
            parsers["info"].error(f"--json must be in a directory that exists; got {arguments.json}")
        return info(arguments.json)
    if not {"-h", "--help"} & set(rest):
        _check_environment(parsers[arguments.command])
    try:
        command = arguments.command
        module = importlib.import_module(f"fekernels.{MODULES.get(command, command)}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fekernels"):
            raise
        print(
            f"fekernels {command} needs {error.name}: pip install 'fekernels[{EXTRAS.get(command, command)}]'",
            file=sys.stderr,
        )
        return 1
    return int(module.main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
