"""Triton's interpreter without what it does anew at every operation, which takes more than half of its time.

Nothing that a kernel computes changes. What is kept, types, their shapes and NumPy's dtypes, is what Triton's own
functions made the first time.
"""

from __future__ import annotations

import builtins
from dataclasses import replace
from typing import Any

__all__ = ["quicken"]


def quicken() -> None:
    """Patch `triton`, where nothing has run yet."""
    _keep_block_types()
    _keep_shapes_of_tensors()
    _keep_numpy_dtypes()
    _compare_at_once()
    _leave_what_fits()
    _omit_what_nobody_reads()
    _reduce_in_halves()


def _keep_block_types() -> None:
    """Those of one element and one shape share their attributes, and those of one shape the shape too."""
    from triton.language import core

    original, constant = core.block_type.__init__, core.constexpr
    of_lengths: dict[Any, tuple[Any, dict[str, Any]]] = {}
    of_shapes: dict[tuple[int, int], dict[str, Any]] = {}  # by the ids of an element and of a kept shape
    shapes: dict[Any, Any] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        attributes = of_shapes.get((id(element_ty), id(shape)))
        if attributes is None:
            lengths = builtins.tuple(
                length.value if type(length) is constant else length
                for length in getattr(shape, "values", shape)
            )
            kept = of_lengths.get((id(element_ty), lengths))
            if kept is None:
                original(self, element_ty, shape)
                self.shape = shapes.setdefault(lengths, self.shape)
                of_shapes[id(element_ty), id(self.shape)] = attributes = dict(vars(self))
                of_lengths[id(element_ty), lengths] = element_ty, attributes  # no other can have the id then
                return
            attributes = kept[1]
        vars(self).update(attributes)

    core.block_type.__init__ = init


def _keep_shapes_of_tensors() -> None:
    from triton.language import core

    original = core.tensor.__init__
    kept: dict[int, tuple[Any, dict[str, Any]]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        found = kept.get(id(shape))
        if found is None:
            original(self, handle, type)
            of_shape = {key: v for key, v in vars(self).items() if key not in ("handle", "type", "dtype")}
            kept[id(shape)] = shape, of_shape
        else:
            vars(self).update(found[1], handle=handle, type=type, dtype=type.scalar)

    core.tensor.__init__ = init


def _keep_numpy_dtypes() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    original, block_type = interpreter._get_np_dtype, core.block_type
    kept: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        if type(dtype) is block_type:
            dtype = dtype.element_ty
        found = kept.get(dtype.name)
        if found is None:
            found = kept[dtype.name] = original(dtype)
        return found

    interpreter._get_np_dtype = get


def _compare_at_once() -> None:
    """Types that are one object, and shapes that are integers."""
    from triton.language import core

    for kind in (core.dtype, core.block_type, core.pointer_type):

        def equal(self: Any, other: Any, original: Any = kind.__eq__) -> Any:
            return self is other or original(self, other)

        kind.__eq__ = equal

    of_any, constant = core.tuple.__eq__, core.constexpr

    def equal_shapes(self: Any, other: Any) -> Any:
        values = getattr(other, "values", other)
        if isinstance(values, list) and all([type(value) is int for value in values]):
            return constant(self.values == values)
        return of_any(self, other)

    core.tuple.__eq__ = equal_shapes


def _leave_what_fits() -> None:
    """Operands of one type and shape need no cast and no broadcast."""
    from triton.language import semantic

    kind = semantic.TritonSemantic
    broadcast, cast = kind.broadcast_impl_value, kind.cast

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one is other or (getattr(one, "shape", None) is getattr(other, "shape", None)):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_unless_alike(self: Any, value: Any, dtype: Any, *rounding: Any, **named: Any) -> Any:
        return value if value.dtype is dtype.scalar else cast(self, value, dtype, *rounding, **named)

    kind.broadcast_impl_value, kind.cast = broadcast_unless_alike, cast_unless_alike


def _omit_what_nobody_reads() -> None:
    """Every integer operation once more in 64 bits, whose overflow only a debugging interpreter would tell."""
    from triton.runtime.interpreter import interpreter_builder as builder

    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _reduce_in_halves() -> None:
    """As a GPU does, and not one element after another: a reduction's function may be called in any order."""
    from triton.runtime import interpreter

    original = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, given: Any) -> Any:
        if len(given) > 1 or self.axis is None or self.keep_dims or len(given[0].shape) < 2:
            return original(self, given)
        (values,), dtype, axis = [each.handle.data for each in given], given[0].dtype, self.axis
        while values.shape[axis] > 1:
            first, second = (self.to_tensor(half, dtype) for half in _halves(values, axis))
            values = self.combine_fn.fn(first, second).handle.data
        return [self.to_tensor(values.squeeze(axis), dtype)]

    interpreter.ReduceOps.generic_reduce = reduce


def _halves(values: Any, axis: int) -> list[Any]:
    import numpy

    halves: list[Any] = numpy.split(values, 2, axis)
    return halves
