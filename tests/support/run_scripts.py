"""One script after another in the processes of one launch: ``torchrun -m tests.support.run_scripts FOLDER SCRIPT...``.

Each as a user starts it, in its quick form and with a folder of its own, so that several share the time of importing.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main(folder: str, *scripts: str) -> None:
    for script in scripts:
        path = Path(script)
        sys.argv = [script, "--quick", "--folder", str(Path(folder, path.stem))]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise SystemExit(f"{path.name} ended with {ended.code}") from None


if __name__ == "__main__":
    main(*sys.argv[1:])
