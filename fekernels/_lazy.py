"""Names that a package imports at their first use, so that who needs none of them does not wait (PEP 562).

    if not TYPE_CHECKING:  # or a name that does not exist would be Any
        __getattr__, __dir__ = _lazy.attach(__name__, {".svgd": ["SVGD"]})

Type checkers and the reference read the same imports under ``if TYPE_CHECKING``.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["attach"]


def attach(
    package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The package's ``__getattr__`` and ``__dir__``.

    Args:
        package: its ``__name__``.
        names: of each module, as ``importlib.import_module`` takes it, the names that are its.
        modules: the package's own modules and packages that are names themselves.
    """
    homes = {name: module for module, its in names.items() for name in its}
    later = {*homes, *modules}

    def __getattr__(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(homes[name], package), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # and is not asked again
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *later})

    return __getattr__, __dir__
