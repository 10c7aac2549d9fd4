"""What the commands share: help as plain text, exit codes, colours where someone looks."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Literal, TextIO

__all__ = ["EXIT_CODES", "check_outputs", "painted", "parser"]

EXIT_CODES = "2 an argument or a variable of the environment that cannot be taken; 130 interrupted."
COLOURS = {"green": 32, "yellow": 33, "red": 31}


def parser(command: str, description: str, *, codes: str) -> argparse.ArgumentParser:
    """The parser of ``python -m fekernels <command>``.

    Args:
        codes: what exit codes 0 and 1 say; the help tells them with those that all commands have.
    """
    return argparse.ArgumentParser(
        prog=f"python -m fekernels {command}".rstrip(),
        description=description,
        epilog=f"Exit codes: {codes}; {EXIT_CODES}",
    )


def check_outputs(reader: argparse.ArgumentParser, picture: bool = False, **paths: Path | None) -> None:
    """End with a usage error where what a command finds could not be written, after all its work.

    Args:
        picture: whether the paths are those of figures, whose suffix says their format; needs matplotlib.
        paths: by the options that gave them.
    """
    for option, path in paths.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            reader.error(f"--{option} must be in a directory that exists; got {path}")
        if path.is_dir():
            reader.error(f"--{option} must be a file; got the directory {path}")
        if picture and path.suffix:
            from fekernels.plots.panels import FORMATS

            if path.suffix[1:].lower() not in FORMATS:
                reader.error(f"--{option} must end in one of .{', .'.join(FORMATS)}; got {path}")


def painted(text: str, colour: Literal["green", "yellow", "red"] | None, stream: TextIO | None = None) -> str:
    """``text`` in a colour where ``stream`` (default: standard output) is a terminal and nobody set NO_COLOR."""
    stream = sys.stdout if stream is None else stream
    if (
        colour is None
        or os.environ.get("NO_COLOR")
        or os.environ.get("TERM") == "dumb"
        or not stream.isatty()
    ):
        return text
    return f"\033[{COLOURS[colour]}m{text}\033[0m"
