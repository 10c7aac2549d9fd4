"""``python -m fekernels info | demo | unified | bench``; alone it says what these are."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fekernels
from fekernels._runtime.command_line import check_outputs, painted, parser

COMMANDS = {
    "info": "what runs where, and why not elsewhere",
    "demo": "train and sample a network on real data, with and without noise",
    "unified": "every system of the design document on real data, beside its exact answer",
    "bench": "tables of times, as ratios to the peers",
}
# Where a command's ``main`` is, and the extra that brings what it needs, where they are not called like the command.
MODULES = {"unified": "unified.command"}
EXTRAS = {"unified": "demo"}
INTERRUPTED = 130


def _told(call: Callable[[], object]) -> object:
    """What a call returns, or what it raises where a variable of the environment is not to be had: both are told."""
    from fekernels._runtime.extension import ExtensionUnavailable

    try:
        return call()
    except (ExtensionUnavailable, ValueError) as error:
        return str(error)


def _check_environment(reader: argparse.ArgumentParser) -> None:
    """End with a usage error where a variable holds a value that every op refuses."""
    from fekernels._runtime import backends, build, locations

    try:
        locations.build_mode()
        backends.requested()
        build.requested_instruction_set()
    except ValueError as error:
        reader.error(str(error))


def overview() -> int:
    """Print which commands there are."""
    print(f"fekernels {fekernels.__version__}: fused PyTorch kernels for free-energy minimisation\n")
    for name, text in COMMANDS.items():
        print(f"  python -m fekernels {name:8} {text}")
    print(
        "\nEach takes --help, and --json PATH for what it found. In Python: import fekernels as fe; help(fe)."
    )
    return 0


def info(argv: list[str]) -> int:
    """Print the versions, the compiled library, the table of backends, and how many operators run on which."""
    reader = parser("info", f"Print {COMMANDS['info']}.", codes="0 done, also where nothing is compiled")
    reader.add_argument("--json", type=Path, metavar="PATH", help="write what is printed to PATH")
    path: Path | None = reader.parse_args(argv).json
    _check_environment(reader)
    check_outputs(reader, json=path)

    import torch

    from fekernels._runtime import extension, host

    reason = _told(extension.unavailable_reason)
    native = torch.ops.fekernels_native
    rows = {
        "fekernels": fekernels.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}), {torch.get_num_threads()} threads",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiled kernels": str(extension.library_path()) if reason is None else f"none: {reason}",
        "host module": f"none: {missing}" if (missing := host.unavailable_reason()) else "compiled",
        "cache directory": str(_told(extension.cache_directory)),
    }
    if reason is None:
        try:
            rows |= {"built with": native.build_info(), "instruction set": native.isa()}
        except ValueError as error:  # a set that there is, but not on this processor or not in this library
            reader.error(str(error))
    for name, value in rows.items():
        if name != "host module":  # which the table's last line tells
            print(f"{name:17} {value}")
    table = fekernels.backends()
    print(f"\n{table}\n")
    if path is not None:
        in_use = {f"{row.op} on {row.device}": row.in_use for row in table}
        path.write_text(json.dumps({**rows, "backends": in_use}, indent=1) + "\n")
        print(f"written: {path}")
    counts = Counter((row.in_use, row.device) for row in table)
    told = ", ".join(f"{count} run as {name} on {device}" for (name, device), count in counts.items())
    print(painted(f"Of {len(table)} operators {told}", "green" if reason is None else "yellow"))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command. Each reads its own options, so their help is theirs too."""
    top = parser(
        "", "Fused PyTorch kernels for free-energy minimisation.", codes="0 done; 1 as the command says"
    )
    top.add_argument("--version", action="version", version=fekernels.__version__)
    commands = top.add_subparsers(dest="command")
    parsers = {
        name: commands.add_parser(name, help=text, description=text, add_help=False)
        for name, text in COMMANDS.items()
    }
    arguments, rest = top.parse_known_args(argv)
    command = arguments.command
    if command is None:
        if rest:
            top.error(f"unrecognized arguments: {' '.join(rest)}")
        return overview()
    try:
        if command == "info":
            return info(rest)
        if not {"-h", "--help"} & set(rest):
            _check_environment(parsers[command])
        module = importlib.import_module(f"fekernels.{MODULES.get(command, command)}")
        return int(module.main(rest) or 0)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fekernels"):
            raise
        extra = EXTRAS.get(command, command)
        print(f"fekernels {command} needs {error.name}: pip install 'fekernels[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
