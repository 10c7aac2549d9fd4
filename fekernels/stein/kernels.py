"""The kernels of the Stein functions, of u = \\|x - y\\|^2 / h with h the bandwidth; names do as well ("rbf")."""

from fekernels._catalogue import stein as _catalogue
from fekernels._catalogue.stein import *  # noqa: F403

__all__: list[str] = []
__all__ += _catalogue.__all__  # in the one form that type checkers understand
