"""A byte per operand: its shape, whether its gradient is wanted, and its region of partial sums (see broadcasting)."""

import triton.language as tl

FULL = tl.constexpr(0)
COLUMN = tl.constexpr(1)
ROW = tl.constexpr(2)
SCALAR = tl.constexpr(3)
SHAPE = tl.constexpr(3)  # the bits of the shape
WANTED = tl.constexpr(4)  # the gradient's bit
REGION = tl.constexpr(8)  # the unit of the region
BYTE = tl.constexpr(255)
