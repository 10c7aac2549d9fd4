"""``python -m fekernels info | demo | bench``."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys

COMMANDS = {
    "info": "what runs where, and why not elsewhere",
    "demo": "train and sample a network on real data, with and without noise",
    "bench": "tables of times, as ratios to the peers",
}


def info() -> int:
    """Print the versions, the compiled library and the table of backends."""
    import torch

    import fekernels
    from fekernels import _extension

    reason = _extension.unavailable_reason()
    native = torch.ops.fekernels_native
    rows = {
        "fekernels": fekernels.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda}), {torch.get_num_threads()} threads",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiled kernels": str(_extension.library_path()) if reason is None else f"none: {reason}",
        "cache directory": str(_extension.cache_directory()),
    }
    if reason is None:
        rows |= {"built with": native.build_info(), "instruction set": native.isa()}
    for name, value in rows.items():
        print(f"{name:17} {value}")
    print(f"\n{fekernels.backends()}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; ``demo`` and ``bench`` read their own options, so their help is theirs too."""
    parser = argparse.ArgumentParser(prog="python -m fekernels")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: commands.add_parser(name, help=text, description=text, add_help=name == "info")
        for name, text in COMMANDS.items()
    }
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "info":
        if rest:
            parsers["info"].error(f"unrecognized arguments: {' '.join(rest)}")
        return info()
    try:
        module = importlib.import_module(f"fekernels.{arguments.command}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fekernels"):
            raise
        print(
            f"fekernels {arguments.command} needs {error.name}: pip install 'fekernels[{arguments.command}]'",
            file=sys.stderr,
        )
        return 1
    return int(module.main(rest) or 0)


if __name__ == "__main__":
    sys.exit(main())
