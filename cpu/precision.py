"""What numbers are stored in, and what is computed with them: float64 in float64, all others in
float32.

A bfloat16 comes and goes as its bits, uint16, since NumPy lacks the type. Kernels that say
``stored`` read half precision as it is (`yoso_core.cpu.lanes.read`); for the others a copy is
widened.
"""

from functools import cache, partial
from platform import machine
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import from_dtype, types
from numba.core import config

from yoso_core.cpu.compiling import kernel
from yoso_core.cpu.lanes import LANES, float_type, read, read_one, write, write_one
from yoso_core.cpu.threads import share
from yoso_core.cpu.views import Array, heads, input_array, output_array

FLOAT16_BITS, BFLOAT16 = np.dtype(np.int16), np.dtype(np.uint16)
"""How kernels see half precision."""

ENTRIES = 1 << 14
"""Numbers to a task."""


def reads_float16(features: str | None) -> bool:
    """Whether code has instructions for float16 that is compiled for ``features``, such as
    ``"+avx2,+f16c"``, or for this processor where they are ``None``.
    """
    if machine() in ("aarch64", "arm64"):
        return True
    return get_host_cpu_features().get("f16c", False) if features is None else "+f16c" in features.split(",")


FLOAT16 = reads_float16(config.CPU_FEATURES)  # type: ignore[attr-defined]
"""Whether kernels read and write float16. Elsewhere, on processors older than AVX2, NumPy converts
it.
"""


def working_dtype(x: Array) -> Any:
    """float64 is computed in float64, everything else in float32."""
    return np.float64 if x.dtype == np.float64 else np.float32


def common_dtype(query: Array, value: Array) -> Any:
    """What attention of these is computed in."""
    return np.promote_types(working_dtype(query), working_dtype(value))


def stored_rows(x: Array, dtype: Any) -> Array:
    """``(..., n, d)`` as ``(batch, heads, n, d)``, the entries of a row next to each other: in half
    precision if they are, as `yoso_core.cpu.lanes.read` takes it, else in ``dtype``.
    """
    if x.dtype == np.float16 and FLOAT16:
        x = x.view(FLOAT16_BITS)
    elif x.dtype not in (FLOAT16_BITS, BFLOAT16):
        x = x.astype(dtype, copy=False)
    x = heads(x)
    packed = x.flags.aligned and (x.shape[-1] <= 1 or x.strides[-1] == x.itemsize)
    return x if packed else np.ascontiguousarray(x)


def stored_alike(*arrays: Array, dtype: Any, num_threads: int | None) -> list[Array]:
    """`stored_rows` of arrays that a kernel takes in one type: `rows` where they differ."""
    found = [stored_rows(x, dtype) for x in arrays]
    if len({x.dtype for x in found}) > 1:
        found = [rows(x, dtype, num_threads) for x in arrays]
    return found


def rows(x: Array, dtype: Any, num_threads: int | None) -> Array:
    """`stored_rows` in ``dtype``."""
    stored = stored_rows(x, dtype)
    if stored.dtype == dtype:
        return stored
    wide = np.empty(stored.shape, np.float32)
    convert = partial(_widen_kernel(from_dtype(stored.dtype)), x=stored, out=wide)
    count = stored.size // max(stored.shape[3], 1)
    share(count, convert, num_threads=num_threads, cost=float(stored.size), moved=6.0 * stored.size)
    return wide.astype(dtype, copy=False)


def rounded(x: Array, dtype: Any, num_threads: int | None) -> Array:
    """What was computed, C-contiguous, in the dtype in which it is returned. What kernels have
    rounded already stays as it is.
    """
    stored = stored_as(dtype)
    if stored == x.dtype:
        return x.view(dtype)
    if stored not in (FLOAT16_BITS, BFLOAT16):
        return x.astype(dtype)
    out = np.empty(x.shape, stored)
    convert = partial(_round_kernel(from_dtype(stored)), x=x.reshape(-1), out=out.reshape(-1))
    share(-(-x.size // ENTRIES), convert, num_threads=num_threads, cost=float(x.size), moved=6.0 * x.size)
    return out.view(dtype)


def round_to(x: Array, out: Array) -> None:
    """C-contiguous float32 to half precision, by this thread alone."""
    _round_kernel(from_dtype(out.dtype))(0, -(-x.size // ENTRIES), x.reshape(-1), out.reshape(-1))


def stored_as(dtype: Any) -> Any:
    """What kernels write for a result of this dtype."""
    return FLOAT16_BITS if dtype == np.float16 and FLOAT16 else np.dtype(dtype)


@cache
def _widen_kernel(stored: Any) -> Any:
    """A task is a row."""

    @kernel(x=input_array(stored, 4), out=output_array(float_type(stored), 4))
    def widen(first, last, x, out):
        d = x.shape[3]
        full = d - d % LANES
        for task in range(first, last):
            head_index, i = divmod(task, x.shape[2])
            head = divmod(head_index, x.shape[1])
            for c in range(0, full, LANES):
                write(out, (*head, i, c), read(x, (*head, i, c)))
            for c in range(full, d):
                write_one(out, (*head, i, c), read_one(x, (*head, i, c)))

    return widen


@cache
def _round_kernel(stored: Any) -> Any:
    """A task is `ENTRIES` numbers."""

    @kernel(x=input_array(types.float32, 1), out=output_array(stored, 1))
    def round_entries(first, last, x, out):
        end = min(last * ENTRIES, len(x))
        full = end - (end - first * ENTRIES) % LANES
        for c in range(first * ENTRIES, full, LANES):
            write(out, c, read(x, c))
        for c in range(full, end):
            write_one(out, c, read_one(x, c))

    return round_entries
