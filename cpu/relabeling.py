"""Buckets numbered anew where there are many more of them than keys: the occupied ones only, so
that memory follows the keys.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.sorting import MOVED_TO_SORT, read_labels
from yoso_core.cpu.threads import share
from yoso_core.cpu.views import Array, input_array, output_array

HASHES = 4
"""Hashes to a task: more read the codes with fewer misses, fewer keep more threads busy."""


def dense_tables_fit(capacity: int, n_k: int) -> bool:
    """Whether a table of all buckets costs no more than the keys do. If not, the occupied buckets
    are numbered first.
    """
    return capacity <= 4 * n_k


@helper
def find_slot(slots, code):
    """The slot of this code in a hash map, or the free slot where it belongs."""
    slot = (np.uint64(code) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)
    last = np.uint64(len(slots) - 1)
    slot = slot & last
    while slots[slot] != 0 and slots[slot] != np.int64(code) + 1:
        slot = (slot + np.uint64(1)) & last
    return slot


@helper
def slots_for(n_k):
    """Slots of a hash map for so many keys: a power of two, at most half of them taken."""
    size = 4
    while size < 2 * n_k:
        size *= 2
    return size


@helper
def number_occupied(query_label, key_label, slots, numbers):
    """Number the buckets in which there is a key: labels become ``0, 1, ...``, in the order in
    which keys first show them. A query whose bucket has no key gets -1, and -1 stays.

    A hash map with open addressing: ``slots`` holds the label plus one, or 0 for a free slot.
    """
    slots[:] = 0
    occupied = 0
    for i in range(len(key_label)):
        if key_label[i] >= 0:
            slot = find_slot(slots, key_label[i])
            if slots[slot] == 0:
                slots[slot], numbers[slot] = np.int64(key_label[i]) + 1, occupied
                occupied += 1
            key_label[i] = numbers[slot]
    for i in range(len(query_label)):
        if query_label[i] >= 0:
            slot = find_slot(slots, query_label[i])
            query_label[i] = numbers[slot] if slots[slot] != 0 else -1


@helper
def write_codes(code, labels, head, hash0):
    """``labels[hash, i]`` plus one, as the codes of hashes ``hash0`` and on."""
    for i in range(code.shape[2]):
        for hash in range(len(labels)):
            code[(*head, i, hash0 + hash)] = labels[hash, i] + 1


@cache
def _relabel_kernel() -> Any:
    """A task is (head, a few hashes). The occupied buckets of a hash get numbers from 1 on; 0 is
    the empty bucket.
    """

    @kernel(
        query_code=input_array(types.int32, 4),
        key_code=input_array(types.int32, 4),
        keep_query=input_array(types.uint8, 3),
        keep_key=input_array(types.uint8, 3),
        new_query_code=output_array(types.int32, 4),
        new_key_code=output_array(types.int32, 4),
        capacity=types.intp,
    )
    def relabel(first, last, query_code, key_code, keep_query, keep_key, new_query_code, new_key_code, capacity):
        n_q, n_k, num_hash = query_code.shape[2], key_code.shape[2], key_code.shape[3]
        size = slots_for(n_k)
        slots, numbers = np.empty(size, np.int64), np.empty(size, np.int32)
        blocks = (num_hash + HASHES - 1) // HASHES
        for task in range(first, last):
            head_index, block = divmod(task, blocks)
            head, hash0 = divmod(head_index, key_code.shape[1]), block * HASHES
            count = min(HASHES, num_hash - hash0)
            query_label, key_label = np.empty((count, n_q), np.int32), np.empty((count, n_k), np.int32)
            read_labels(query_label, query_code, keep_query, head, hash0, capacity)
            read_labels(key_label, key_code, keep_key, head, hash0, capacity)
            for hash in range(count):
                number_occupied(query_label[hash], key_label[hash], slots, numbers)
            write_codes(new_query_code, query_label, head, hash0)
            write_codes(new_key_code, key_label, head, hash0)

    return relabel


def relabeled(
    query_code: Array, key_code: Array, keep_query: Array, keep_key: Array, capacity: int, num_threads: int | None
) -> tuple[Array, Array]:
    """Codes ``(batch, heads, n, m)`` as numbers of occupied buckets, ``0 ... n_k``. Whoever meets
    nobody is in bucket 0: masked rows, codes out of range, queries whose bucket has no key.
    """
    new_query_code, new_key_code = np.empty(query_code.shape, np.int32), np.empty(key_code.shape, np.int32)
    batch, num_heads, _, num_hash = key_code.shape
    relabel = partial(
        _relabel_kernel(),
        query_code=query_code,
        key_code=key_code,
        keep_query=keep_query,
        keep_key=keep_key,
        new_query_code=new_query_code,
        new_key_code=new_key_code,
        capacity=capacity,
    )
    codes = query_code.size + key_code.size
    share(batch * num_heads * -(-num_hash // HASHES), relabel, num_threads=num_threads, cost=10.0 * codes, moved=MOVED_TO_SORT * codes)
    return new_query_code, new_key_code
