"""The numbers that kernels and launchers share: the catalogue's, and the columns of csrc/core/pointer_table.h.

Kernels reach them through this module's name (`codes.AMSGRAD`). Global names would be compared, one after another, at
every launch: 23 us per launch of 36 on the machine where that was noticed. Triton does not see them change either, so
kernels take VERSION as an argument: with other numbers they are other kernels, also in the cache on disk.
"""

import zlib

import triton.language as tl

from fekernels._catalogue import optimizers, random
from fekernels._runtime import pointer_table

# Dtypes.
FLOAT32 = tl.constexpr(optimizers.DTYPES.index("float32"))
FLOAT64 = tl.constexpr(optimizers.DTYPES.index("float64"))
BFLOAT16 = tl.constexpr(optimizers.DTYPES.index("bfloat16"))
FLOAT16 = tl.constexpr(optimizers.DTYPES.index("float16"))

# Columns of the table; the six operands' addresses come first.
STEP = tl.constexpr(6)
NUMEL = tl.constexpr(7)
STREAM = tl.constexpr(8)
OFFSET = tl.constexpr(9)
LENGTH = tl.constexpr(10)
PITCH = tl.constexpr(11)
DTYPES = tl.constexpr(12)
LAYOUT = tl.constexpr(13)
NOISE_UNIT = tl.constexpr(15)
COLUMNS = tl.constexpr(pointer_table.COLUMNS)

CHUNK = tl.constexpr(pointer_table.CHUNK)  # elements of one program
ROWS_AT_ONCE = tl.constexpr(256)  # whose steps the last program advances together

# Where the noise goes.
MOMENTUM = tl.constexpr(optimizers.NOISES["momentum"])
PRECONDITIONED = tl.constexpr(optimizers.NOISES["preconditioned"])
ISOTROPIC = tl.constexpr(optimizers.NOISES["isotropic"])
NONE = tl.constexpr(optimizers.NO_NOISE)

# Flags of the table's operators, then what else a kernel is compiled for.
AMSGRAD = tl.constexpr(optimizers.FLAGS["amsgrad"])
MAXIMIZE = tl.constexpr(optimizers.FLAGS["maximize"])
DECOUPLED = tl.constexpr(optimizers.FLAGS["decoupled_weight_decay"])
BIAS_CORRECTION = tl.constexpr(optimizers.FLAGS["bias_correction"])
STOCHASTIC = tl.constexpr(optimizers.FLAGS["stochastic_rounding"])
FROZEN = tl.constexpr(optimizers.FLAGS["frozen"])
DECAY = tl.constexpr(64)
PRIOR = tl.constexpr(128)
SCALED = tl.constexpr(256)
RESCALE = tl.constexpr(512)
MAYBE_QUIET = tl.constexpr(1024)

ABOVE_OF_MOMENTUM = tl.constexpr(optimizers.ABOVE_OF_MOMENTUM)

# Purposes of the noise.
LANGEVIN_NOISE = tl.constexpr(random.LANGEVIN_NOISE)
WEIGHT_SAMPLE = tl.constexpr(random.WEIGHT_SAMPLE)
STOCHASTIC_ROUNDING = tl.constexpr(random.STOCHASTIC_ROUNDING)

VERSION = zlib.crc32(repr([(n, v.value) for n, v in sorted(globals().items()) if n.isupper()]).encode())
