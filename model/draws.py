"""The hashes of a model in evaluation: a pure function of (hash_seed, layer, head, shape).

Every head of every layer has its own PCG64 stream, seeded by these three numbers. The draw is made
from the raw 64-bit words of that stream. So it is the same on every machine, on every device and in
every version of NumPy, and other random draws do not change it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from yoso_core import checks
from yoso_core.model.plain import in_onnx_export
from yoso_core.model.values import shapes_alone
from yoso_core.reference.hashing import Layout, least_rotations, signs_shape

Kind = Literal["signs", "planes"]
Numbers = tuple[int, int, int, int, int, int]
"""hash_seed, layer, num_heads, num_hash, hash_code_len, dim."""


def _words(hash_seed: int, layer: int, head: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.random.PCG64(np.random.SeedSequence([hash_seed, layer, head])).random_raw(count)


def evaluation_signs(
    hash_seed: int,
    layer: int,
    num_heads: int,
    num_hash: int,
    hash_code_len: int,
    dim: int,
    layout: Layout = "chained",
    rotations: int | None = None,
) -> Tensor:
    """The diagonals of the fast hash: int8 of +1 and -1, ``(num_heads, rotations + 3, D)``, or
    ``(num_heads, 3, parts, D)`` in the paper's layout.

    Entry ``i`` of the flattened signs of a head is +1 where bit ``i % 64`` of the head's word
    ``i // 64`` is one.

    >>> numbers = {"num_heads": 2, "num_hash": 4, "hash_code_len": 8, "dim": 16}
    >>> evaluation_signs(hash_seed=0, layer=0, **numbers).shape
    torch.Size([2, 11, 16])
    """
    rotations = checks.rotations("layout", layout, rotations, least_rotations(num_hash, hash_code_len, dim))
    shape = signs_shape(num_hash, hash_code_len, dim, layout, rotations)
    size = math.prod(shape)
    bits = np.empty((num_heads, size), np.int8)
    for head in range(num_heads):
        words = _words(hash_seed, layer, head, -(-size // 64)).astype("<u8")
        bits[head] = np.unpackbits(words.view(np.uint8), bitorder="little")[:size]
    return torch.from_numpy((2 * bits - 1).reshape(num_heads, *shape))


def evaluation_planes(hash_seed: int, layer: int, num_heads: int, num_hash: int, hash_code_len: int, dim: int) -> Tensor:
    """Gaussian planes: float32 ``(num_heads, dim, num_hash * hash_code_len)``.

    The normal numbers come in pairs, ``sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)`` (Box and Muller
    1958). The uniform numbers ``u`` and ``v`` are the upper 53 bits of two words in turn.

    >>> numbers = {"num_heads": 2, "num_hash": 4, "hash_code_len": 8, "dim": 16}
    >>> evaluation_planes(hash_seed=0, layer=0, **numbers).shape
    torch.Size([2, 16, 32])
    """
    shape = dim, num_hash * hash_code_len
    size = math.prod(shape)
    planes = np.empty((num_heads, size + size % 2), np.float32)
    for head in range(num_heads):
        words = _words(hash_seed, layer, head, size + size % 2)
        u, v = (((words >> np.uint64(11)) + 0.5) * 2.0**-53).reshape(-1, 2).T
        radius = np.sqrt(-2 * np.log(u))
        planes[head, 0::2], planes[head, 1::2] = radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)
    return torch.from_numpy(planes[:, :size].reshape(num_heads, *shape))


def evaluation_draw(
    kind: Kind,
    hash_seed: int,
    layer: int,
    num_heads: int,
    num_hash: int,
    hash_code_len: int,
    dim: int,
    device: torch.device,
    layout: Layout = "chained",
    rotations: int | None = None,
) -> Tensor:
    """`evaluation_signs` or `evaluation_planes` on ``device``, kept there for the next call: do not
    write to it. Planes have no ``layout``.

    >>> numbers = {"num_heads": 2, "num_hash": 4, "hash_code_len": 8, "dim": 16}
    >>> cpu = torch.device("cpu")
    >>> signs = evaluation_draw("signs", hash_seed=0, layer=0, **numbers, device=cpu)
    >>> signs is evaluation_draw("signs", hash_seed=0, layer=0, **numbers, device=cpu)
    True
    """
    numbers = (hash_seed, layer, num_heads, num_hash, hash_code_len, dim)
    if in_onnx_export():  # a constant of the graph, made anew: kept tensors would belong to the export
        return _drawn(kind, numbers, layout, rotations).to(device)
    if torch.compiler.is_compiling() or shapes_alone():
        return _copied(kind, *numbers, device, layout, rotations)
    return _kept(kind, numbers, device, layout, rotations)


@lru_cache(maxsize=128)
def _kept(kind: Kind, numbers: Numbers, device: torch.device, layout: Layout, rotations: int | None) -> Tensor:
    # A tensor of inference mode could not be used in training later. To torch.jit.trace the draw is
    # a constant in the first call as in any other.
    with torch.inference_mode(False), _tracing_paused():
        return _drawn(kind, numbers, layout, rotations).to(device)


def _drawn(kind: Kind, numbers: Numbers, layout: Layout, rotations: int | None) -> Tensor:
    return evaluation_signs(*numbers, layout=layout, rotations=rotations) if kind == "signs" else evaluation_planes(*numbers)


@contextmanager
def _tracing_paused() -> Iterator[None]:
    if not torch._C._is_tracing():
        yield
        return
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@custom_op("yoso_core::evaluation_draw", mutates_args=())
def _copied(
    kind: str,
    hash_seed: int,
    layer: int,
    num_heads: int,
    num_hash: int,
    hash_code_len: int,
    dim: int,
    device: torch.device,
    layout: str = "chained",
    rotations: int | None = None,
) -> Tensor:
    """A copy, for compiled code: the compiler may reuse the memory of an operator's result."""
    numbers = (hash_seed, layer, num_heads, num_hash, hash_code_len, dim)
    return _kept(cast(Kind, kind), numbers, device, cast(Layout, layout), rotations).clone()


@_copied.register_fake
def _(
    kind: str, _: int, __: int, num_heads: int, num_hash: int, hash_code_len: int, dim: int, device: torch.device, *of_signs: Any
) -> Tensor:
    if kind == "planes":
        return torch.empty(num_heads, dim, num_hash * hash_code_len, device=device)
    shape = signs_shape(num_hash, hash_code_len, dim, *(of_signs or ("chained",)))
    return torch.empty(num_heads, *shape, dtype=torch.int8, device=device)
