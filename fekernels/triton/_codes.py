"""The numbers that kernels and launchers share; those of the pointer table stand in csrc/table.h as well.

Kernels reach them through this module's name (`codes.AMSGRAD`). Global names would be compared, one after another, at
every launch: 23 us a launch of 36 on the machine where that was noticed. Triton does not see them change either, so
kernels take VERSION as an argument: with other numbers they are other kernels, also in the cache on disk.
"""

import zlib

import triton.language as tl

# Dtypes.
FLOAT32 = tl.constexpr(0)
FLOAT64 = tl.constexpr(1)
BFLOAT16 = tl.constexpr(2)
FLOAT16 = tl.constexpr(3)

# Columns of the table; the six operands' addresses come first.
STEP = tl.constexpr(6)
NUMEL = tl.constexpr(7)
STREAM = tl.constexpr(8)
OFFSET = tl.constexpr(9)
RUN = tl.constexpr(10)
PITCH = tl.constexpr(11)
DTYPES = tl.constexpr(12)
LAYOUT = tl.constexpr(13)
NOISE_UNIT = tl.constexpr(15)
COLUMNS = tl.constexpr(16)

CHUNK = tl.constexpr(4096)  # elements of one program
ROWS_AT_ONCE = tl.constexpr(256)  # whose steps the last program advances together

# Where the noise goes.
MOMENTUM = tl.constexpr(0)
PRECONDITIONED = tl.constexpr(1)
ISOTROPIC = tl.constexpr(2)
NONE = tl.constexpr(3)

# Flags of the table's operators, then what else a kernel is compiled for.
AMSGRAD = tl.constexpr(1)
MAXIMIZE = tl.constexpr(2)
DECOUPLED = tl.constexpr(4)
BIAS_CORRECTION = tl.constexpr(8)
STOCHASTIC = tl.constexpr(16)
DECAY = tl.constexpr(64)
PRIOR = tl.constexpr(128)
SCALED = tl.constexpr(256)
RESCALE = tl.constexpr(512)
MAYBE_QUIET = tl.constexpr(1024)

# Purposes of the noise (csrc/math/philox.h).
LANGEVIN_NOISE = tl.constexpr(0)
STOCHASTIC_ROUNDING = tl.constexpr(1)

VERSION = zlib.crc32(repr([(n, v.value) for n, v in sorted(globals().items()) if n.isupper()]).encode())
