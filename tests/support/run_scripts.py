"""One script after another in the processes of one launch: ``torchrun -m tests.support.run_scripts FOLDER SCRIPT...``.

Each as a user starts it, in its quick form and, where it takes one, with a folder of its own, so that several share the
time of importing.
What a launcher has told them is printed before, the names of the variables.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def main(folder: str, *scripts: str) -> None:
    told = ("LOCAL_", "MASTER_", "RANK", "TORCHELASTIC_", "WORLD_")
    lines = [f"variable {name}\n" for name in sorted(os.environ) if name.startswith(told)]
    if os.environ.get("RANK") == "0":  # in one piece, that no line of another rank comes between
        os.write(1, "".join(["\n", *lines]).encode())
    for script in scripts:
        path = Path(script)
        of_its_own = ["--folder", str(Path(folder, path.stem))] if '"--folder"' in path.read_text() else []
        sys.argv = [script, "--quick", *of_its_own]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise SystemExit(f"{path.name} ended with {ended.code}") from None


def ranks(
    world: int, names: Sequence[str], imported: Sequence[str], seconds: int, command: Sequence[str]
) -> None:
    """`main` in a process for each rank, which is told its number by the variables `names`; one that fails ends all.

    Args:
        imported: modules that are imported here once, before the ranks are forked.
        seconds: after which a rank is ended, by SIGALRM.
    """
    for name in imported:
        importlib.import_module(name)
    running = {}
    for rank in range(world):
        process = os.fork()
        if process == 0:
            signal.alarm(seconds)
            _rank(dict.fromkeys(names, str(rank)), command)
        running[process] = rank
    while running:
        process, status = os.wait()
        if (rank := running.pop(process, None)) is not None and status:  # type: ignore[assignment]
            for other in running:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}")


def _rank(variables: dict[str, str], command: Sequence[str]) -> None:
    """Ends the process, by no frame of the one that it was forked from."""
    code = 1
    try:
        os.environ.update(variables)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # no line within another rank's
        main(*command)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
