"""``python tools/draw_guides.py [PAGE ...]``: runs the blocks of docs/guide and keeps the pictures that they draw.

A guide's last block saves PAGE.png where it runs; here it goes to docs/images/guide.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.pages import blocks  # noqa: E402

PICTURES = ROOT / "docs/images/guide"


def main(names: list[str]) -> None:
    pages = sorted((ROOT / "docs/guide").glob("*.md"))
    unknown = set(names) - {page.stem for page in pages}
    if unknown:
        raise SystemExit(
            f"draw_guides: PAGE must be one of {', '.join(p.stem for p in pages)}; got {unknown}"
        )
    PICTURES.mkdir(exist_ok=True)
    for page in pages:
        if names and page.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            space: dict[str, object] = {"__name__": page.stem}
            for block in blocks(page.read_text(encoding="utf-8")):
                if block.language == "python":
                    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), space)
            picture = PICTURES / f"{page.stem}.png"
            picture.write_bytes((Path(folder) / picture.name).read_bytes())
            os.chdir(ROOT)
        print(f"written: {picture.relative_to(ROOT)}, {picture.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
