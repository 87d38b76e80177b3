"""Smoothed cumulation where the tables would be large: every query reads the occupied ones among
the buckets within ``s`` bits of its own.

`yoso_core.cpu.smoothing` smooths whole tables instead, which costs less where they are small
against what is read: `yoso_core.cpu.cumulation.tables_pay`.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.finishing import Rows, empty_rows, finish_rows
from yoso_core.cpu.lanes import LANES, fill, load, store
from yoso_core.cpu.relabeling import find_slot, number_occupied, slots_for
from yoso_core.cpu.scratch import aligned, clear
from yoso_core.cpu.sorting import read_labels
from yoso_core.cpu.tables import squares_of
from yoso_core.cpu.threads import default_threads, in_steps, share
from yoso_core.cpu.views import Array, input_array, output_array
from yoso_core.reference.smoothing import neighbors, smoothing_weights

LOOKUP_COST = 10.0
"""Operations to look for a bucket among the occupied ones."""


@helper
def add_scaled(flat, at, source, source_at, weight, count):
    """``flat[at : at + count] += weight * source[...]``."""
    full = count - count % LANES
    for c in range(0, full, LANES):
        store(flat, at + c, load(flat, at + c) + load(source, source_at + c) * fill(weight))
    for c in range(full, count):
        flat[at + c] += source[source_at + c] * weight


@cache
def _neighbors_kernel(dtype: Any) -> Any:
    """A task is (head, piece of its queries), a step of it a hash: the keys go to a table of the
    occupied buckets, and every query adds up what it finds across each of ``masks``.

    Every piece makes the table for itself. A query and hash cost ``len(masks)`` lookups, and
    ``d_v`` multiply-adds for each bucket that is there.
    """

    @kernel(
        step0=types.intp,
        step1=types.intp,
        pieces=types.intp,
        query_code=input_array(types.int32, 4),
        key_code=input_array(types.int32, 4),
        value=input_array(dtype, 4),
        keep_query=input_array(types.uint8, 3),
        keep_key=input_array(types.uint8, 3),
        nonfinite=input_array(types.uint8, 3),
        masks=input_array(types.int32, 1),
        weights=input_array(dtype, 1),
        capacity=types.intp,
        out=output_array(dtype, 4),
        lengths=output_array(dtype, 3),
        normalize=types.boolean,
        units=input_array(dtype, 2),
        squares=output_array(dtype, 3),
        errors=output_array(types.float32, 3),
    )
    def read(
        first,
        last,
        step0,
        step1,
        pieces,
        query_code,
        key_code,
        value,
        keep_query,
        keep_key,
        nonfinite,
        masks,
        weights,
        capacity,
        out,
        lengths,
        normalize,
        units,
        squares,
        errors,
    ):
        n_q, n_k, num_hash, d_v = query_code.shape[2], key_code.shape[2], query_code.shape[3], value.shape[3]
        size = slots_for(n_k)
        slots, numbers = np.empty(size, np.int64), np.empty(size, np.int32)
        labels, nobody = np.empty((1, n_k), np.int32), np.empty(0, np.int32)
        table, one, spread = aligned(n_k * d_v, out.dtype), aligned(d_v, out.dtype), len(errors) > 0
        for task in range(first, last):
            head_index, piece = divmod(task, pieces)
            head = divmod(head_index, out.shape[1])
            begin, end = n_q * piece // pieces, n_q * (piece + 1) // pieces
            flat = out[head].reshape(-1)
            for hash in range(step0, step1):
                if hash == 0:
                    clear(flat, begin * d_v, (end - begin) * d_v)
                read_labels(labels, key_code, keep_key, head, hash, capacity)
                number_occupied(nobody, labels[0], slots, numbers)
                clear(table, 0, n_k * d_v)
                for j in range(n_k):
                    if labels[0, j] >= 0:
                        for c in range(d_v):
                            table[labels[0, j] * d_v + c] += value[(*head, j, c)]
                for i in range(begin, end):
                    code = query_code[(*head, i, hash)]
                    clear(one, 0, d_v)
                    if keep_query[(*head, i)] and 0 <= code < capacity:
                        for k in range(len(masks)):
                            slot = find_slot(slots, code ^ masks[k])
                            if slots[slot] != 0:
                                add_scaled(one, 0, table, numbers[slot] * d_v, weights[k], d_v)
                        add_scaled(flat, i * d_v, one, 0, out.dtype.type(1), d_v)
                    if spread:
                        found = squares_of(one, 0, d_v, units[head])
                        squares[(*head, i)] = found if hash == 0 else squares[(*head, i)] + found
                if hash == num_hash - 1:
                    finish_rows(
                        out=out,
                        lengths=lengths,
                        errors=errors,
                        squares=squares,
                        units=units,
                        keep=keep_query,
                        nonfinite=nonfinite,
                        head=head,
                        begin=begin,
                        end=end,
                        num_hash=num_hash,
                        normalize=normalize,
                        spread=spread,
                    )

    return read


def read_neighbors(
    query_code: Array,
    key_code: Array,
    value: Array,
    capacity: int,
    oversample: int,
    *,
    keep: tuple[Array, Array],
    nonfinite: Array,
    normalize: bool,
    spread: bool,
    num_threads: int | None,
) -> Rows:
    """As `yoso_core.cpu.cumulation.by_stored_codes`.

    Working memory for a thread: a table of ``n_k d_v`` numbers and the map of its buckets.
    """
    batch, num_heads, n_q, num_hash = query_code.shape
    n_k, d_v = value.shape[2:]
    bits = capacity.bit_length() - 1
    across = neighbors(bits, oversample)
    weights = np.repeat(smoothing_weights(bits - oversample, oversample), [len(masks) for masks in across]).astype(value.dtype)
    found = empty_rows(value, value.dtype, value.dtype, keep, spread, num_threads)
    threads = num_threads or default_threads()
    pieces = 1 if batch * num_heads >= 2 * threads else min(threads, max(n_q, 1))
    of_a_hash = n_k * (d_v + 30.0) + n_q / pieces * len(weights) * (LOOKUP_COST + d_v)
    read = partial(
        _neighbors_kernel(from_dtype(value.dtype)),
        pieces=pieces,
        query_code=query_code,
        key_code=key_code,
        value=value,
        keep_query=keep[0],
        keep_key=keep[1],
        nonfinite=nonfinite,
        masks=np.array([mask for masks in across for mask in masks], np.int32),
        weights=weights,
        capacity=capacity,
        normalize=normalize,
        **found._asdict(),
    )
    tasks, cost = batch * num_heads * pieces, num_hash * of_a_hash
    share(tasks, in_steps(read, num_hash, cost), num_threads=num_threads, cost=tasks * cost)
    return found
