"""The physical floor: how fast this machine could do the work if nothing but bytes or arithmetic stood in the way."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from math import log2

import numpy as np

from yoso_core.benchmarks.cases import Workload
from yoso_core.reference import hash_layout

_ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


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
    """Query, key, value and output, each moved once."""
    operations: int
    """Additions or multiply-adds."""
    seconds: float
    """The longer of moving the bytes and doing the arithmetic: the two can overlap."""


def _best(call: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@cache
def measured_rates() -> Rates:
    import torch

    cores = os.cpu_count() or 1
    source = [np.ones(1 << 26, np.uint8) for _ in range(cores)]
    target = [np.zeros(1 << 26, np.uint8) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        copy = _best(lambda: list(pool.map(np.copyto, target, source)))
    square = torch.ones(2048, 2048)
    product = _best(lambda: square @ square)
    return Rates(copy_bytes=2 * cores * (1 << 26) / copy, multiply_adds=2048**3 / product)


def operations(workload: Workload) -> int:
    """Sampled: the additions of three Hadamard transforms of every part, ``3 D log2 D``, and those into and out of the tables.
    Exact expectation: the multiply-adds of its two matrix products.
    """
    if workload.run == "yoso_expectation":
        return workload.heads * workload.n**2 * 2 * workload.dim
    layout = hash_layout(workload.num_hash, workload.hash_code_len, workload.dim)
    transforms = 3 * layout.padded_dim * round(log2(layout.padded_dim)) * layout.parts
    return workload.heads * workload.n * 2 * (transforms + workload.num_hash * workload.dim)


def floor(workload: Workload, rates: Rates) -> Floor:
    moved = 4 * workload.heads * workload.n * workload.dim * _ITEM_SIZE[workload.dtype]
    work = operations(workload)
    return Floor(moved, work, max(moved / rates.copy_bytes, work / rates.multiply_adds))
