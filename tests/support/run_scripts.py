"""One script after another in the processes of one launch: ``torchrun -m tests.support.run_scripts COMMAND...``.

Each command, a script with its arguments, as a user starts it, so that several share the time of importing.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys


def main(*commands: str) -> None:
    for i, command in enumerate(commands):
        # A group's names in torchrun's store are those of an earlier one, but for this number.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)
        sys.argv = shlex.split(command)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException as ended:
            if not isinstance(ended, SystemExit) or ended.code:
                print(f"{command} ended with {ended!r}", file=sys.stderr, flush=True)
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
