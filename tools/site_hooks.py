"""What mkdocs does besides: equations become MathML; CONTRIBUTING.md, CHANGELOG.md and CITATION.cff pages of the site.

A browser draws MathML by itself, so that the site runs no script for it and asks no other host.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# As pymdownx.arithmatex leaves $...$ and $$...$$ with generic: true.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[([](.*?)\\[)\]]</\1>', re.DOTALL)
# A function's name and what it is applied to, unless that is in brackets; not where the name has a script.
NAME = re.compile(r"(?<!<msub>)(?<!<msup>)(<mi>(?:log|exp|cos|sin)</mi>)(?!<mo[^>]*>&#x00028;|<mrow><mo)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):(?=<code>)")  # of docstrings
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|docs/)([^)]*)\)")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """These texts stand once, where a repository has them. What they link to beside docs/ is named."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = LINK.sub(lambda link: f"{link[1]}, `{link[2].partition('#')[0]}`", text).replace(
            "](docs/", "]("
        )
        files.append(File.generated(config, name.lower(), content=text))
    files.append(File.generated(config, "cite.md", content=how_to_cite()))
    return files


def how_to_cite() -> str:
    """CITATION.cff as a page: its message, and what BibTeX takes."""
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    authors = " and ".join(f"{{{author['name']}}}" for author in facts["authors"])
    return f"""# How to cite

{facts["message"]}

```bibtex
@software{{fekernels,
  author = {{{authors}}},
  title = {{{facts["title"]}}},
  version = {{{facts["version"]}}},
  year = {{{facts["date-released"].year}}}
}}
```
"""


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Equations as MathML, and roles of docstrings left out. PluginError for what the converter does not know."""

    def typeset(found: re.Match[str]) -> str:
        latex = html.unescape(found[2]).strip()
        kind = "block" if found[1] == "div" else "inline"
        mathml = convert(latex, display=kind)
        if "\\" in mathml or ">&<" in mathml:
            raise PluginError(f"{page.file.src_uri}: LaTeX that is not known in {latex!r}")
        mathml = NAME.sub(r'\1<mspace width="0.17em" />', mathml)
        return f'<{found[1]} class="equation">{mathml}</{found[1]}>'

    return EQUATION.sub(typeset, ROLE.sub("", content))
