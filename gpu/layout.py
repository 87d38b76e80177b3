"""What the launchers share: any leading dims as one, dtypes as macros, masks as bytes."""

from typing import Any

import numpy as np

from yoso_core.gpu.device import Array, Device, DoesNotFit, Shape

MAX_GRID_YZ = 65_535

# uint16 holds the bits of a bfloat16.
_C_TYPE = {"float32": "float", "float64": "double", "float16": "float16", "uint16": "bfloat16"}


def c_type(x: Array) -> str:
    """The name in CUDA C++ of what an array stores."""
    return _C_TYPE[str(x.dtype)]


def accumulator(x: Array) -> Any:
    """The dtype that an array's entries are added up in: float64 for float64, float32 for the
    rest.
    """
    return np.float64 if x.dtype == np.float64 else np.float32


def widened(x: Array) -> Array:
    """In the dtype that it is computed with."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(accumulator(x), copy=False)


def value_define(x: Array) -> tuple[tuple[str, str], ...]:
    return (("VALUE", c_type(x)),)


def heads(device: Device, x: Array, tail: int = 2) -> Array:
    """``(..., *tail)`` as contiguous ``(heads, *tail)``; a copy where the strides need one."""
    leading = x.shape[: x.ndim - tail]
    return device.xp.ascontiguousarray(x).reshape(count(leading), *x.shape[x.ndim - tail :])


def mask_bytes(device: Device, mask: Array | None, rows: Shape) -> Array | None:
    """A mask that broadcasts over ``rows = (..., n)`` as contiguous uint8 ``(heads, n)``; ``None``
    stays ``None``.
    """
    if mask is None:
        return None
    keep = device.xp.broadcast_to(mask != 0, rows)
    return device.xp.ascontiguousarray(keep).view(np.uint8).reshape(count(rows[:-1]), rows[-1])


def count(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pow2_at_least(x: int) -> int:
    return 1 << (x - 1).bit_length()


def grid_slices(count: int, at_once: int = MAX_GRID_YZ) -> list[slice]:
    """Ranges of at most ``at_once``, and never more than 65,535: as far as the second and third
    axis of a grid reach.
    """
    step = max(1, min(at_once, MAX_GRID_YZ))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def part_of(x: Array | None, part: slice) -> Array | None:
    return None if x is None else x[part]


def check_table(device: Device, shape: Shape, dtype: Any, instead: str) -> None:
    """Refuse a table in global memory that is larger than the device allows."""
    size = count(shape) * np.dtype(dtype).itemsize
    if size > device.max_table:
        raise DoesNotFit(
            f"hashtable_capacity: a table of shape {shape} takes {size:,} bytes, more than the {device.max_table:,} allowed here; "
            f"use the variant {instead}"
        )
