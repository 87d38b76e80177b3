"""The physical floor: how fast this machine could do the work if nothing but bytes or arithmetic
stood in the way.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np

from yoso_core.benchmarks.cases import Workload
from yoso_core.benchmarks.contenders import CONTENDERS
from yoso_core.benchmarks.machines import MACHINES
from yoso_core.benchmarks.sides import Ours
from yoso_core.operations import OPERATIONS, Sizes

ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Rates:
    """What this machine does per second, on all cores, measured."""

    copy_bytes: float
    """Bytes read plus bytes written by large copies."""
    multiply_adds: float
    """Fused multiply-adds of a float32 matrix product; an addition alone takes the same slot."""


@dataclass(frozen=True)
class Floor:
    bytes: int
    """Every input and the output, each moved once."""
    operations: int
    """Additions or multiply-adds."""
    seconds: float
    """The longer of moving the bytes and doing the arithmetic: the two can overlap."""


def _best(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    times = []
    for _ in range(10):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def measured_rates(device: str = "cpu") -> Rates:
    return _cpu_rates() if device == "cpu" else _torch_rates(device)


def _cpu_rates() -> Rates:
    import torch

    cores = os.cpu_count() or 1
    source = [np.ones(1 << 26, np.uint8) for _ in range(cores)]
    target = [np.zeros(1 << 26, np.uint8) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        copy = _best(lambda: list(pool.map(np.copyto, target, source)))
    square = torch.ones(2048, 2048)
    product = _best(lambda: square @ square)
    return Rates(copy_bytes=2 * cores * (1 << 26) / copy, multiply_adds=2048**3 / product)


def _torch_rates(device: str, size: int = 1 << 30, side: int = 8192) -> Rates:
    """By copies of ``size`` bytes, many times what a cache holds, and a product of random matrices
    in plain float32: no TF32.
    """
    return Rates(copy_bytes=_torch_copy(device, size), multiply_adds=_torch_product(device, side))


def _torch_copy(device: str, size: int, copies: int = 4) -> float:
    import torch

    source = torch.ones(size // 4, device=MACHINES[device].torch)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):  # one after the other, so that waiting for them is a small part
            target.copy_(source)

    return 2 * copies * size / _best(copy, MACHINES[device].wait)


def _torch_product(device: str, side: int) -> float:
    import torch

    square = torch.randn(side, side, device=MACHINES[device].torch)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return side**3 / _best(lambda: square @ square, MACHINES[device].wait)
    finally:
        torch.set_float32_matmul_precision(precision)


def operations_of(workload: Workload) -> tuple[str, ...]:
    """The operations of ours that a workload asks for."""
    contender = CONTENDERS[workload.run]
    if not isinstance(contender, Ours):
        raise ValueError(f"run: {workload.run} is no operation of this library")
    return contender.ops


def sizes_of(workload: Workload) -> Sizes:
    return Sizes(
        rows=workload.batch * workload.heads * workload.n,
        n=workload.n,
        dim=workload.dim,
        num_hash=workload.num_hash,
        hash_code_len=workload.hash_code_len,
        backward_num_hash=workload.backward_num_hash,
        item_size=ITEM_SIZE[workload.dtype],
    )


def operations(workload: Workload) -> int:
    """Additions or multiply-adds that the workload cannot do without."""
    return sum(_multiply_adds(op, workload) for op in operations_of(workload))


def least_bytes(workload: Workload) -> int:
    """Every input of the workload and its output, each moved once; the signs, which are few, do not
    count.

    Vectors are ``(n, d)``, of queries, keys, values, weights and output alike; codes take four
    bytes. A backward pass adds the gradient that comes in and the three that go out.
    """
    return sum(_least_bytes(op, workload) for op in operations_of(workload))


LAYERS = {"encoder_layer": 1, "encoder_layer_backward": 2}
"""Layers of an encoder, which are no operations, and how often they do the work of a forward pass.

The dense part of a layer of hidden size ``hidden`` takes ``4 hidden**2`` multiply-adds a token
around the attention and ``8 hidden**2`` in the feed-forward network. It moves the tokens' states in
and out, and the weights; backward, the gradients of these.
"""


def _dense(workload: Workload) -> int:
    return 12 * (workload.heads * workload.dim) ** 2


def _multiply_adds(op: str, workload: Workload) -> int:
    if op in LAYERS:
        return LAYERS[op] * workload.batch * workload.n * _dense(workload)
    return OPERATIONS[op].multiply_adds(sizes_of(workload))


def _least_bytes(op: str, workload: Workload) -> int:
    sizes = sizes_of(workload)
    if op in LAYERS:
        return 2 * sizes.vectors + _dense(workload) * sizes.item_size
    return OPERATIONS[op].least_bytes(sizes)


def floor(workload: Workload, rates: Rates) -> Floor:
    moved, work = least_bytes(workload), operations(workload)
    return Floor(moved, work, max(moved / rates.copy_bytes, work / rates.multiply_adds))
