"""Gradients of sampled attention with the lower bound, bucket by bucket, in time linear in ``n``.

What meets in a bucket of one hash adds to all three gradients at once::

    dq_i += sum_j (g_i . v_j) k_j      dk_j += sum_i (g_i . v_j) q_i      dv_j += sum_i g_i

With ``p`` queries and ``r`` keys in the bucket there are two ways to the first two. By *pairs*: the
products ``g . v``, once for both, about ``p r (2 d + d_v)`` multiply-adds. By *outer products*:
``sum_j v_j k_j^T`` times every ``g`` and ``sum_i g_i q_i^T`` times every ``v``, about
``2 (p + r) d d_v``. Whichever is less is done, so the cost never grows faster than ``n``, however
skewed the buckets: `yoso_core.cpu.bucket_gradients`. The third is a plain cumulation, and
`yoso_core.cpu.cumulation` does it.

A head is copied to scratch first, in *triples*: a row of ``q``, of ``g`` and of the sum for ``q``
side by side, likewise ``k``, ``v`` and the sum for ``k``, so that a visit finds all it needs in one
place. The buckets of a hash touch different rows, so threads may share them; every row is added to
hash after hash, whoever does it.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.bucket_gradients import HeadSizes, walk_buckets
from yoso_core.cpu.compiling import helper, kernel, subroutine
from yoso_core.cpu.lanes import LANES, fill, load, store
from yoso_core.cpu.precision import common_dtype, rounded, stored_alike
from yoso_core.cpu.relabeling import dense_tables_fit, number_occupied, slots_for
from yoso_core.cpu.rows import RowBlock, l2_normalize_backward, pack_rows, pack_unit_rows, store_row
from yoso_core.cpu.scratch import aligned_empty, clear, padded_width
from yoso_core.cpu.sorting import HASHES_AT_ONCE, MOVED_TO_SORT, read_labels, sort_by_label
from yoso_core.cpu.threads import BATCH_BYTES, BATCH_COST, default_threads, share
from yoso_core.cpu.views import Array, heads, input_array, int_tuple, kept, output_array

ROW_BLOCK = 256
"""Rows to a task, where threads share a head."""

RANGES = 32
"""Tasks into which the buckets of a hash are cut, where threads share a head."""

CACHE_BYTES = 32 << 20
"""Scratch of all heads that are in work, at most, so that it stays in the cache; a larger head is
in work alone, shared by all threads.
"""

ALL, PREPARE, SORT, WALK, FINISH = range(5)


class Job(NamedTuple):
    """What a call of the kernel does."""

    stage: int
    """``ALL`` of a head for each task, or one stage of one head."""
    head: int
    hash0: int
    hash1: int
    """Hashes ``hash0 ... hash1 - 1`` are those whose buckets are walked, in stage ``WALK``."""
    sorted_at_once: int
    """Hashes to a task of stage ``SORT``."""
    ranges: int
    """Tasks of stage ``WALK``: more than one for a single hash alone."""
    hash_code_len: int
    buckets: int
    """All of a hash, or, where these are many, as many as may be occupied."""


@subroutine
def sort_hashes(query_code, key_code, keep_query, keep_key, head, hash0, count, capacity, buckets, begins, order):
    """Sort the queries and keys of a head by their buckets, for hashes
    ``hash0 ... hash0 + count - 1``.

    ``begins (2, m, buckets + 2)`` and ``order (2, m, n)``, flat: queries, then keys.
    """
    n_q, n_k, num_hash = query_code.shape[2], key_code.shape[2], query_code.shape[3]
    query_label, key_label = np.empty((count, n_q), np.int32), np.empty((count, n_k), np.int32)
    read_labels(query_label, query_code, keep_query, head, hash0, capacity)
    read_labels(key_label, key_code, keep_key, head, hash0, capacity)
    numbered = capacity > buckets
    size = slots_for(n_k) if numbered else 0
    slots, numbers = np.empty(size, np.int64), np.empty(size, np.int32)
    for c in range(count):
        if numbered:
            number_occupied(query_label[c], key_label[c], slots, numbers)
        hash = hash0 + c
        sort_by_label(query_label[c], begins, hash * (buckets + 2), order, hash * n_q, buckets)
        sort_by_label(key_label[c], begins, (num_hash + hash) * (buckets + 2), order, num_hash * n_q + hash * n_k, buckets)


@helper
def prepare_side(triples, block, x, companion, head, lengths, nonfinite):
    """Triples of a block of rows: the unit row of ``x``, its companion (``g`` or ``v``), zeros."""
    width = padded_width(x.shape[3])
    pack_unit_rows(triples, block, x, head, lengths, nonfinite)
    second = RowBlock(start=block.start + width, step=block.step, first=block.first, last=block.last)
    pack_rows(triples, second, companion, head, nonfinite)
    for i in range(block.first, block.last):
        clear(triples, block.start + (i + 1) * block.step - width, width)


@helper
def scale_sum(triples, at, width, scale, nonfinite):
    """Times ``scale``. An entry that is not finite becomes NaN, and every entry if ``nonfinite``
    says so.
    """
    for c in range(at, at + width, LANES):
        y = load(triples, c) * fill(scale)
        store(triples, c, fill(triples.dtype.type(np.nan)) if nonfinite else y + (y - y))


@subroutine
def finish_side(grad, triples, block, keep, head, scale, lengths, nonfinite):
    """The sums of a block of rows become gradients with respect to the rows as they came; zeros for
    masked rows.
    """
    width = padded_width(grad.shape[3])
    for i in range(block.first, block.last):
        at = block.start + (i + 1) * block.step - width
        scale_sum(triples, at, width, triples.dtype.type(scale), nonfinite[i])
        l2_normalize_backward(
            grad=triples,
            at=at,
            unit=triples,
            unit_at=block.start + i * block.step,
            width=width,
            length=lengths[i] if keep[(*head, i)] else triples.dtype.type(0),
            zeros_stay=True,
        )
        store_row(grad, head, i, triples, at)


@cache
def _backward_kernel(dtype: Any, stored: Any, stored_value: Any) -> Any:
    """All of a head for each task, or one stage of one head, whose scratch all threads share: see
    `Job`.

    ``triples``, flat, are those of the queries, then those of the keys; so are ``lengths`` and
    ``nonfinite``. A task of stage ``PREPARE`` or ``FINISH`` is a block of rows of both sides, of
    ``SORT`` some hashes, of ``WALK`` a range of the buckets of a hash, or all buckets of several.
    The list of types makes it long.
    """

    @kernel(
        job=int_tuple(Job),
        grad_out=input_array(stored_value, 4),
        query=input_array(stored, 4),
        key=input_array(stored, 4),
        value=input_array(stored_value, 4),
        query_code=input_array(types.int32, 4),
        key_code=input_array(types.int32, 4),
        keep_query=input_array(types.uint8, 3),
        keep_key=input_array(types.uint8, 3),
        grad_query=output_array(stored, 4),
        grad_key=output_array(stored, 4),
        triples=output_array(dtype, 1),
        lengths=output_array(dtype, 1),
        nonfinite=output_array(types.uint8, 1),
        begins=output_array(types.int32, 1),
        order=output_array(types.int32, 1),
    )
    def backward(
        first,
        last,
        job,
        grad_out,
        query,
        key,
        value,
        query_code,
        key_code,
        keep_query,
        keep_key,
        grad_query,
        grad_key,
        triples,
        lengths,
        nonfinite,
        begins,
        order,
    ):
        n_q, n_k, num_hash, buckets = query.shape[2], key.shape[2], query_code.shape[3], job.buckets
        width, width_v = padded_width(query.shape[3]), padded_width(value.shape[3])
        triple = 2 * width + width_v
        sizes = HeadSizes(
            n_q=n_q, n_k=n_k, num_hash=num_hash, buckets=buckets, value_dim=value.shape[3], width=width, width_v=width_v, triple=triple
        )
        lengths_q, lengths_k, nonfinite_q, nonfinite_k = lengths[:n_q], lengths[n_q:], nonfinite[:n_q], nonfinite[n_q:]
        whole = job.stage == ALL
        for task in range(first, last):
            head, row0 = divmod(task if whole else job.head, query.shape[1]), 0 if whole else task * ROW_BLOCK
            row1 = max(n_q, n_k) if whole else row0 + ROW_BLOCK
            block_q = RowBlock(start=0, step=triple, first=min(row0, n_q), last=min(row1, n_q))
            block_k = RowBlock(start=n_q * triple, step=triple, first=min(row0, n_k), last=min(row1, n_k))
            if whole or job.stage == PREPARE:
                prepare_side(
                    triples=triples, block=block_q, x=query, companion=grad_out, head=head, lengths=lengths_q, nonfinite=nonfinite_q
                )
                prepare_side(triples=triples, block=block_k, x=key, companion=value, head=head, lengths=lengths_k, nonfinite=nonfinite_k)
            if whole or job.stage == SORT:
                begin = 0 if whole else task * job.sorted_at_once
                end = num_hash if whole else min(begin + job.sorted_at_once, num_hash)
                for hash0 in range(begin, end, job.sorted_at_once):
                    sort_hashes(
                        query_code=query_code,
                        key_code=key_code,
                        keep_query=keep_query,
                        keep_key=keep_key,
                        head=head,
                        hash0=hash0,
                        count=min(job.sorted_at_once, num_hash - hash0),
                        capacity=1 << job.hash_code_len,
                        buckets=buckets,
                        begins=begins,
                        order=order,
                    )
            if whole or job.stage == WALK:
                walk_buckets(
                    triples=triples,
                    begins=begins,
                    order=order,
                    sizes=sizes,
                    hash0=0 if whole else job.hash0,
                    hash1=num_hash if whole else job.hash1,
                    first=0 if whole else buckets * task // job.ranges,
                    last=buckets if whole else buckets * (task + 1) // job.ranges,
                )
            if whole or job.stage == FINISH:
                scale = job.hash_code_len / 2 / num_hash
                finish_side(
                    grad=grad_query,
                    triples=triples,
                    block=block_q,
                    keep=keep_query,
                    head=head,
                    scale=scale,
                    lengths=lengths_q,
                    nonfinite=nonfinite_q,
                )
                finish_side(
                    grad=grad_key,
                    triples=triples,
                    block=block_k,
                    keep=keep_key,
                    head=head,
                    scale=scale,
                    lengths=lengths_k,
                    nonfinite=nonfinite_k,
                )

    return backward


class Stage(NamedTuple):
    """A part of the work on a head."""

    job: Job
    tasks: int
    cost: float
    moved: float = 0


def _stages(job: Job, *, n_q: int, n_k: int, num_hash: int, triple: int, hashes: int) -> Iterator[Stage]:
    """All work on the head of a ``job``, ``hashes`` to a walk, in order."""
    rows_in_all, blocks = n_q + n_k, -(-max(n_q, n_k) // ROW_BLOCK)
    in_triples, codes = float(rows_in_all) * triple, float(num_hash) * rows_in_all
    yield Stage(job._replace(stage=PREPARE), blocks, cost=3 * in_triples, moved=8 * in_triples)
    yield Stage(job._replace(stage=SORT), -(-num_hash // job.sorted_at_once), cost=10 * codes, moved=MOVED_TO_SORT * codes)
    for hash0 in range(0, num_hash, hashes):
        hash1 = min(hash0 + hashes, num_hash)
        walk = job._replace(stage=WALK, hash0=hash0, hash1=hash1, ranges=RANGES if hashes == 1 else 1)
        yield Stage(walk, walk.ranges, cost=(hash1 - hash0) * _walk_cost(rows_in_all, triple))
    yield Stage(job._replace(stage=FINISH), blocks, cost=3 * in_triples, moved=8 * in_triples)


def _walk_cost(rows_in_all: int, triple: int) -> float:
    """Of one hash."""
    return 20.0 * rows_in_all * triple


def _head_by_head(
    backward: Callable[..., object],
    scratch: Callable[[], dict[str, Array]],
    job: Job,
    heads_in_all: int,
    sizes: dict[str, int],
    num_threads: int | None,
    cost: float,
) -> None:
    """Every thread has a head in work, with scratch of its own. ``cost`` is that of a head."""
    spare: list[dict[str, Array]] = []
    hashes = max(1, int(sizes["num_hash"] * BATCH_COST / max(cost, 1)))

    def do_heads(first: int, last: int) -> Iterator[None]:
        try:
            mine = spare.pop()
        except IndexError:
            mine = scratch()
        if cost <= BATCH_COST:
            backward(first, last, job=job, **mine)
        else:
            for head in range(first, last):
                for stage in _stages(job._replace(head=head), **sizes, hashes=hashes):
                    backward(0, stage.tasks, job=stage.job, **mine)
                    yield
        spare.append(mine)

    share(heads_in_all, do_heads, num_threads=num_threads, cost=cost * heads_in_all)


def lsh_lower_bound_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    codes: tuple[Array, Array],
    hash_code_len: int,
    *,
    query_mask: Array | None,
    key_mask: Array | None,
    num_threads: int | None,
) -> tuple[Array, Array]:
    """The gradients of query and key, see `yoso_core.reference.lsh_attention_backward` with
    ``grad="lower_bound"``; ``codes`` are
    `yoso_core.reference.smoothing.plain_codes`.

    Working memory for a head: ``(n_q + n_k) (2 d + d_v)`` numbers, and twice the size of its codes.
    Each thread has a head in work as long as they stay within 32 MiB (`CACHE_BYTES`) together; a
    larger head is in work alone, shared by all threads.
    """
    dtype = common_dtype(query, value)
    q, k = stored_alike(query, key, dtype=dtype, num_threads=num_threads)
    v, g = stored_alike(value, grad_out, dtype=dtype, num_threads=num_threads)
    query_code, key_code = map(heads, codes)
    keep_query, keep_key = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    batch, num_heads, n_q, d = q.shape
    n_k, d_v, num_hash, heads_in_all = k.shape[2], v.shape[3], query_code.shape[3], batch * num_heads
    capacity = 1 << hash_code_len
    buckets = capacity if dense_tables_fit(capacity, n_k) else n_k
    triple = 2 * padded_width(d) + padded_width(d_v)
    grad_query, grad_key = np.empty(q.shape, q.dtype), np.empty(k.shape, k.dtype)

    def scratch() -> dict[str, Array]:
        return {
            "triples": aligned_empty((n_q + n_k) * triple, dtype),
            "lengths": np.empty(n_q + n_k, dtype),
            "nonfinite": np.empty(n_q + n_k, np.uint8),
            "begins": np.empty(2 * num_hash * (buckets + 2), np.int32),
            "order": np.empty(num_hash * (n_q + n_k), np.int32),
        }

    backward = partial(
        _backward_kernel(*(from_dtype(np.dtype(kind)) for kind in (dtype, q.dtype, v.dtype))),
        grad_out=g,
        query=q,
        key=k,
        value=v,
        query_code=query_code,
        key_code=key_code,
        keep_query=keep_query,
        keep_key=keep_key,
        grad_query=grad_query,
        grad_key=grad_key,
    )
    sorted_at_once = max(1, min(HASHES_AT_ONCE, int(BATCH_BYTES / MOVED_TO_SORT) // max(n_q + n_k, 1)))
    job = Job(stage=ALL, head=0, hash0=0, hash1=0, sorted_at_once=sorted_at_once, ranges=1, hash_code_len=hash_code_len, buckets=buckets)
    threads = num_threads or default_threads()
    bytes_of_a_head = (n_q + n_k) * triple * np.dtype(dtype).itemsize + 4 * num_hash * (n_q + n_k + 2 * buckets)
    cost = num_hash * _walk_cost(n_q + n_k, triple)
    sizes = {"n_q": n_q, "n_k": n_k, "num_hash": num_hash, "triple": triple}
    if min(threads, heads_in_all) * bytes_of_a_head <= CACHE_BYTES and (heads_in_all >= 2 * threads or cost < 1e7):
        _head_by_head(backward, scratch, job, heads_in_all, sizes, num_threads, cost)
    else:
        shared = partial(backward, **scratch())
        for head in range(heads_in_all):
            for stage in _stages(job._replace(head=head), **sizes, hashes=1):  # all threads work on one head, a stage at a time
                share(stage.tasks, partial(shared, job=stage.job), num_threads=num_threads, cost=stage.cost, moved=stage.moved)
    grad_query, grad_key = (rounded(grad, x.dtype, num_threads) for grad, x in ((grad_query, query), (grad_key, key)))
    return grad_query.reshape(query.shape), grad_key.reshape(key.shape)
