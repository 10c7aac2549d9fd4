"""One script after another in the processes of one launch: ``torchrun -m tests.support.run_scripts FOLDER SCRIPT...``.

Each as a user starts it, in its quick form and, where it takes one, with a folder of its own, so that several share the
time of importing.
What a launcher has told them is printed before, the names of the variables.
"""

from __future__ import annotations

import os
import runpy
import sys
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


if __name__ == "__main__":
    main(*sys.argv[1:])
