"""What all launchers share: leading dims as one, dtypes as macros, masks as bytes, grid sizes."""

from typing import Any

import numpy as np

from yoso_core.gpu.device import Array, Device, DoesNotFit, Shape

MAX_GRID_X, MAX_GRID_YZ = 2**31 - 1, 65_535
"""The limits of the first size of a grid, and of the second and the third."""

# uint16 holds the bits of a bfloat16.
_C_TYPE = {"float32": "float", "float64": "double", "float16": "float16", "uint16": "bfloat16"}


def c_type(x: Array) -> str:
    """The CUDA C++ type of an array's entries.

    >>> c_type(np.zeros(3, np.uint16))
    'bfloat16'
    """
    return _C_TYPE[str(x.dtype)]


def accumulator(x: Array) -> Any:
    """The dtype that sums of an array's entries have: float64 for float64, else float32.

    >>> accumulator(np.zeros(3, np.float16)).__name__
    'float32'
    """
    return np.float64 if x.dtype == np.float64 else np.float32


def widened(x: Array) -> Array:
    """The array in the dtype of its sums.

    >>> widened(np.array([0x3F80], np.uint16))  # the bits of 1.0 in bfloat16
    array([1.], dtype=float32)
    """
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(accumulator(x), copy=False)


def value_define(x: Array) -> tuple[tuple[str, str], ...]:
    """The macro ``VALUE`` for an array.

    >>> value_define(np.zeros(3))
    (('VALUE', 'double'),)
    """
    return (("VALUE", c_type(x)),)


def heads(device: Device, x: Array, tail: int = 2) -> Array:
    """An array ``(..., n, d)`` as a contiguous array ``(heads, n, d)``; ``tail`` is the number of
    dims that stay. The array is copied only if it is not contiguous.

    >>> from yoso_core.gpu.emulator import Emulator
    >>> heads(Emulator(), np.zeros((2, 3, 5, 4))).shape
    (6, 5, 4)
    """
    leading = x.shape[: x.ndim - tail]
    return device.xp.ascontiguousarray(x).reshape(count(leading), *x.shape[x.ndim - tail :])


def mask_bytes(device: Device, mask: Array | None, rows: Shape) -> Array | None:
    """A mask that broadcasts to ``rows = (..., n)``, as contiguous uint8 ``(heads, n)``. ``None``
    stays ``None``.

    >>> from yoso_core.gpu.emulator import Emulator
    >>> mask_bytes(Emulator(), np.array([[True, False]]), (3, 2))
    array([[1, 0],
           [1, 0],
           [1, 0]], dtype=uint8)
    """
    if mask is None:
        return None
    keep = device.xp.broadcast_to(mask != 0, rows)
    return device.xp.ascontiguousarray(keep).view(np.uint8).reshape(count(rows[:-1]), rows[-1])


def int32s(**sizes: int) -> dict[str, np.int32]:
    """Sizes as a kernel takes them, by the names of its parameters.

    >>> int32s(n_q=5)["n_q"].dtype
    dtype('int32')
    """
    return {name: np.int32(size) for name, size in sizes.items()}


def count(shape: Shape) -> int:
    """The number of entries of a shape.

    >>> count((3, 4)), count(())
    (12, 1)
    """
    return int(np.prod(shape, dtype=np.int64))


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up to an integer.

    >>> ceil_div(9, 4)
    3
    """
    return -(-a // b)


def pow2_at_least(x: int) -> int:
    """The smallest power of two that is not less than a positive number.

    >>> pow2_at_least(5)
    8
    """
    return 1 << (x - 1).bit_length()


def grid_slices(count: int, at_once: int = MAX_GRID_YZ) -> list[slice]:
    """Slices of ``range(count)``, each with at most ``at_once`` entries and at most 65,535: the
    limit of the second and the third size of a grid.

    >>> grid_slices(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, min(at_once, MAX_GRID_YZ))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def part_of(x: Array | None, part: slice) -> Array | None:
    """``x[part]``; ``None`` for ``None``.

    >>> part_of(None, slice(2)) is None
    True
    """
    return None if x is None else x[part]


def check_table(device: Device, shape: Shape, dtype: Any, instead: str) -> None:
    """Raise `DoesNotFit` for a table in global memory that is larger than the device allows.

    >>> from yoso_core.gpu.emulator import Emulator
    >>> small = Emulator(max_table=1000)
    >>> check_table(small, (2, 256), np.float32, "sorted_buckets")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    yoso_core.gpu.device.DoesNotFit: hashtable_capacity: a table of shape (2, 256) takes 2,048 ...
    """
    size = count(shape) * np.dtype(dtype).itemsize
    if size > device.max_table:
        raise DoesNotFit(
            f"hashtable_capacity: a table of shape {shape} takes {size:,} bytes, more than the {device.max_table:,} allowed here; "
            f"use the variant {instead}"
        )
