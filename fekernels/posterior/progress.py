"""How far a run has come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fekernels.posterior.pilot import Data

__all__ = ["Bar", "bar_over"]


class Bar:
    """A tqdm bar of unknown length that tells the epochs, or none. What it gives is called with what a step was of."""

    def __init__(self, owner: str, data: Data, progress: bool) -> None:
        self._data, self._bar = data, None
        if progress:
            from tqdm import tqdm

            self._bar = tqdm(desc=owner, unit=" steps", leave=False)

    def __enter__(self) -> Any:
        return self._tick

    def _tick(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(f"{what}, {self._data.epochs:.0f} epochs", refresh=False)
            self._bar.update()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def bar_over(samples: Iterable[Any], count: int, progress: bool) -> Iterable[Any]:
    if progress:
        from tqdm import tqdm

        return tqdm(samples, total=count, desc="samples", leave=False)
    return samples
