"""The two rounds of every cumulation by tables, and how they are cut into tasks.

*Scatter*: each task owns the tables of one part (a few hashes) of one head, clears them and adds
the value of every key to its bucket. *Gather*: each task owns a block of queries of one head and
adds up the buckets they fall into. One task alone writes a table, and one task alone writes an
output row, hash after hash, so nothing depends on which thread does what.

Between the two rounds the tables are smoothed, with oversampling (`yoso_core.cpu.smoothing`), and
the squares of their rows added up, where errors are wanted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core import processor
from yoso_core.cpu.codes import Codes
from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.precision import round_to, working_dtype
from yoso_core.cpu.scratch import aligned_empty, clear
from yoso_core.cpu.steps import TableStep
from yoso_core.cpu.threads import BATCH_BYTES, BATCH_COST, default_threads, in_steps, share
from yoso_core.cpu.views import Array, output_array

TABLE_BYTES = 32 << 20
"""Tables that exist at the same time, at most. More heads or hashes than fit are done in groups.
One part of one head is always held.
"""

THREAD_TABLE_BYTES = 2 << 20
"""Tables that a thread with heads of its own has at the same time, or those of one part: parts are
scattered, smoothed and read again while they are near.
"""

PART_BYTES = (processor.caches()["l2"] or 512 << 10) // 2
HASHES_AT_LEAST, HASHES_AT_MOST = 4, 8
"""Hashes that a vector is added to, or read from, in one go: as many as have tables in half of the
second-level cache, within these limits. Fewer than four would fetch values and outputs too often,
which costs more than tables that do not fit.
"""

KEY_BLOCK = QUERY_BLOCK = 2048
"""Keys and queries that one thread takes through all its parts before it goes on: they are read
from memory once, not for every part.
"""

SMALL_QUERY_BLOCK = 512
"""Queries to a gather task where all threads share a head."""

SPLIT_TASKS = 16
SPLIT_KEYS = 4096
"""Where there are fewer pairs of a head and four hashes than `SPLIT_TASKS`, the keys are split as
well, in pieces of at least `SPLIT_KEYS`.
"""


class Sizes(NamedTuple):
    """Of one attention."""

    batch: int
    heads: int
    n_q: int
    n_k: int
    d_v: int

    @property
    def heads_in_all(self) -> int:
        return self.batch * self.heads


class Cut(NamedTuple):
    """How the hashes and keys of a head are cut up."""

    num_hash: int
    per: int
    """Hashes to a part (the last may have fewer). They are added up one after the other, however
    many there are.
    """
    splits: int
    """Pieces of the keys. They decide what is added up with what, so they follow from shapes alone,
    on every machine.
    """
    table_size: int
    """Entries of one hash's table."""


class Group(NamedTuple):
    """What has tables at the same time: some parts of some heads."""

    head0: int
    """Number of the first head."""
    part0: int
    """Number of the first part."""
    parts: int


class Part(NamedTuple):
    """One part of one head and one piece of its keys, in the kernels."""

    number: int
    """Of the part, among all of its head."""
    hash0: int
    """Number of the first hash."""
    hashes: int
    start: int
    """Where the first table begins; the others follow."""
    table_size: int


@dataclass(frozen=True)
class Plan:
    """How the work is dealt out. What depends on the number of threads, or on the size of a cache,
    changes no sum.
    """

    cut: Cut
    parts: int
    by_head: bool
    """If there are enough heads for every thread, one thread scatters and gathers a head, in tables
    of its own that stay in its cache. Otherwise all threads scatter first, into tables of many
    heads, and then gather.
    """
    heads_at_once: int
    parts_at_once: int

    @property
    def entries(self) -> int:
        """Size of the tables that one group needs."""
        return self.heads_at_once * self.parts_at_once * self.cut.splits * self.cut.per * self.cut.table_size


def make_plan(sizes: Sizes, dtype: Any, *, num_hash: int, capacity: int, num_threads: int | None) -> Plan:
    """For tables of ``capacity`` rows in ``dtype``."""
    num_heads, threads = sizes.heads_in_all, num_threads or default_threads()
    table_size = capacity * sizes.d_v
    table_bytes = max(table_size * np.dtype(dtype).itemsize, 1)
    per = min(num_hash, max(HASHES_AT_LEAST, min(HASHES_AT_MOST, PART_BYTES // table_bytes)))
    parts = -(-num_hash // per)
    part_bytes = per * table_bytes
    affordable = max(1, TABLE_BYTES // part_bytes)
    tasks = max(1, num_heads * -(-num_hash // HASHES_AT_LEAST))
    splits = max(1, min(SPLIT_TASKS // tasks, sizes.n_k // SPLIT_KEYS, TABLE_BYTES // (min(num_hash, HASHES_AT_MOST) * table_bytes)))
    cut = Cut(num_hash=num_hash, per=per, splits=splits, table_size=table_size)
    if splits == 1 and num_heads >= 2 * threads and affordable >= threads:
        near = max(1, THREAD_TABLE_BYTES // part_bytes)
        return Plan(cut, parts, by_head=True, heads_at_once=1, parts_at_once=min(parts, affordable // threads, near))
    slots = max(1, affordable // splits)
    parts_at_once = min(parts, slots)
    return Plan(cut, parts, by_head=False, heads_at_once=max(1, min(num_heads, slots // parts_at_once)), parts_at_once=parts_at_once)


@helper
def scatter_task(task, group, together, cut):
    """A scatter task's head, its first part of ``together``, both counted from the first of the
    group; and its piece of the keys.
    """
    slot, split = divmod(task, cut.splits)
    head_index, turn = divmod(slot, (group.parts + together - 1) // together)
    return head_index, turn * together, split


@helper
def part_of(cut, group, head_index, part, split):
    """A part of a head, both counted from the first of the group, with one piece of its keys."""
    number = group.part0 + part
    hash0 = number * cut.per
    start = ((head_index * group.parts + part) * cut.splits + split) * cut.per * cut.table_size
    return Part(number=number, hash0=hash0, hashes=min(cut.per, cut.num_hash - hash0), start=start, table_size=cut.table_size)


@helper
def clear_piece(tables, part, step, clears):
    """Zeros in one of ``clears`` pieces of the tables of a part."""
    size = part.hashes * part.table_size
    start = size * step // clears
    clear(tables, part.start + start, size * (step + 1) // clears - start)


@cache
def _merge_kernel(dtype: Any) -> Any:
    """The tables of the pieces of one part, added up into the first piece's, in order."""

    @kernel(tables=output_array(dtype, 1), splits=types.intp, part_size=types.intp)
    def merge(first, last, tables, splits, part_size):
        for slot in range(first, last):
            start = slot * splits * part_size
            for split in range(1, splits):
                piece = start + split * part_size
                for c in range(part_size):
                    tables[start + c] += tables[piece + c]

    return merge


def accumulate(
    plan: Plan,
    sizes: Sizes,
    codes: tuple[Codes, Codes],
    scatter: Callable[..., None],
    gather: Callable[..., None],
    out: Array,
    *,
    smoothing: TableStep | None,
    squares: TableStep | None,
    num_threads: int | None,
) -> None:
    """Both rounds, for as many heads and parts at a time as the plan says, and the codes of the
    queries and keys of these heads before them.

    ``scatter(first, last, tables=, head0=, part0=, parts=, together=, clears=, step0=, step1=,
    key_code=)`` does a range of tasks of one `Group`, ``together`` parts to a task. Its steps are
    blocks of keys, and the first one clears the tables; where these are large, ``clears`` steps
    before it do. ``gather(first, last, tables=, row_squares=, head0=, part0=, parts=, block=,
    query_code=, out=)`` likewise, ``block`` queries to a task; the rows are those of ``out (batch,
    heads, n_q, d_v)``, which may be stored in half precision where the plan goes by heads. Between
    them the tables are smoothed, and ``squares`` fills ``row_squares``, a number for each of their
    rows. All numbers come one by one, since a NamedTuple costs two microseconds where Python calls
    a kernel.
    """
    work = _Work(plan, sizes, *codes, scatter, gather, out, smoothing, squares)
    if plan.by_head:
        cost = sizes.heads_in_all * work.cost_of_a_head
        share(sizes.heads_in_all, work.head_by_head, num_threads=num_threads, cost=cost)
        return
    scratch = work.scratch()
    for head0 in range(0, sizes.heads_in_all, plan.heads_at_once):
        work.by_all_threads(scratch, head0, min(plan.heads_at_once, sizes.heads_in_all - head0), num_threads)


class Scratch(NamedTuple):
    """Of one group."""

    tables: Array
    row_squares: Array
    """A number for each row of the tables, or empty."""
    rows: Array
    """``(n_q, d_v)``: the sums of a head that are rounded when they are complete, or empty."""


@dataclass(frozen=True)
class _Work:
    """What `accumulate` does, in either order."""

    plan: Plan
    sizes: Sizes
    queries: Codes
    keys: Codes
    scatter: Callable[..., None]
    gather: Callable[..., None]
    out: Array
    smoothing: TableStep | None
    squares: TableStep | None

    @property
    def dtype(self) -> Any:
        """What is added up in: half precision is added up in float32."""
        return np.dtype(working_dtype(self.out))

    @property
    def rounds(self) -> bool:
        """Whether rows are rounded when they are complete."""
        return bool(self.out.dtype != self.dtype)

    @property
    def part_size(self) -> int:
        return self.plan.cut.per * self.plan.cut.table_size

    @property
    def row_work(self) -> int:
        """Operations for a row, in either round."""
        return self.plan.cut.num_hash * (self.sizes.d_v + 64)

    @property
    def cost_of_a_head(self) -> float:
        codes = self.queries.cost + self.keys.cost
        between = sum(step.cost for step in (self.smoothing, self.squares) if step is not None) * self.plan.cut.num_hash
        return codes + self.row_work * (self.sizes.n_q + self.sizes.n_k) + self.plan.parts * self.part_size + between

    @property
    def key_blocks(self) -> int:
        return max(1, -(-self.sizes.n_k // (self.plan.cut.splits * KEY_BLOCK)))

    def groups(self) -> Iterator[tuple[int, int, bool]]:
        """The first part and the number of parts that have tables at the same time, and whether
        others follow.
        """
        parts, together = self.plan.parts, self.plan.parts_at_once
        for part0 in range(0, parts, together):
            yield part0, min(together, parts - part0), part0 + together < parts

    def scratch(self) -> Scratch:
        """Room for the tables of one group."""
        entries, d_v = self.plan.entries, self.sizes.d_v
        return Scratch(
            tables=aligned_empty(entries, self.dtype),
            row_squares=np.empty(entries // max(d_v, 1) if self.squares is not None else 0, self.dtype),
            rows=np.empty((self.sizes.n_q if self.rounds else 0, d_v), self.dtype),
        )

    def between(self, scratch: Scratch, head0: int, part0: int, parts: int) -> Iterator[tuple[TableStep, dict[str, Any]]]:
        """What is done to the tables of a group between the rounds, with the arguments of it."""
        cut = self.plan.cut
        part_size = cut.splits * self.part_size
        call = {"tables": scratch.tables, "part0": part0, "parts": parts, "per": cut.per, "num_hash": cut.num_hash, "part_size": part_size}
        if self.smoothing is not None:
            yield self.smoothing, call
        if self.squares is not None:
            yield self.squares, {**call, "head0": head0, "row_squares": scratch.row_squares}

    def head_by_head(self, first: int, last: int) -> Iterator[None]:
        """All of a head, then the next, by one thread in tables of its own."""
        plan, n_q = self.plan, self.sizes.n_q
        query_blocks = -(-n_q // QUERY_BLOCK)
        blocks_at_once = max(1, BATCH_COST // (self.row_work * KEY_BLOCK))
        scratch = self.scratch()
        out = self.out
        if self.rounds:
            out = np.lib.stride_tricks.as_strided(scratch.rows, self.out.shape, (0, 0, *scratch.rows.strides))
        for head in range(first, last):
            query_code = None
            key_code = yield from self.keys.of_head(head)
            for part0, parts, more in self.groups():
                group: dict[str, Any] = {"tables": scratch.tables, "head0": head, "part0": part0, "parts": parts}
                for step in range(0, self.key_blocks, blocks_at_once):
                    end = min(step + blocks_at_once, self.key_blocks)
                    self.scatter(0, 1, **group, together=parts, clears=0, step0=step, step1=end, key_code=key_code)
                    yield
                key_code = key_code if more else None
                for to_do, call in self.between(scratch, head, part0, parts):
                    yield from to_do.in_pieces(parts * plan.cut.per, call)
                if query_code is None:
                    query_code = yield from self.queries.of_head(head)
                group |= {"row_squares": scratch.row_squares, "block": QUERY_BLOCK, "query_code": query_code, "out": out}
                for block in range(0, query_blocks, blocks_at_once):
                    end = min(block + blocks_at_once, query_blocks)
                    self.gather(block, end, **group)
                    if self.rounds and not more:
                        done = slice(block * QUERY_BLOCK, min(end * QUERY_BLOCK, n_q))
                        round_to(scratch.rows[done], self.out[(*divmod(head, self.sizes.heads), done)])
                    yield

    def by_all_threads(self, scratch: Scratch, head0: int, heads: int, num_threads: int | None) -> None:
        """One round of some heads after the other, all threads at work in each."""
        plan, n_q = self.plan, self.sizes.n_q
        query_code, key_code = None, self.keys.of_heads(head0, heads, num_threads)
        for part0, parts, more in self.groups():
            group: dict[str, Any] = {"tables": scratch.tables, "head0": head0, "part0": part0, "parts": parts}
            self._fill(group, heads, key_code, num_threads)
            key_code = key_code if more else None
            for to_do, call in self.between(scratch, head0, part0, parts):
                to_do.by_all_threads(heads * parts * plan.cut.per, call, num_threads)
            if query_code is None:
                query_code = self.queries.of_heads(head0, heads, num_threads)
            group |= {"row_squares": scratch.row_squares, "block": SMALL_QUERY_BLOCK, "query_code": query_code, "out": self.out}
            share(
                heads * -(-n_q // SMALL_QUERY_BLOCK),
                partial(self.gather, **group),
                num_threads=num_threads,
                cost=heads * self.row_work * n_q,
            )

    def _fill(self, group: dict[str, Any], heads: int, key_code: Array, num_threads: int | None) -> None:
        """The tables of a group of ``heads``, by all threads."""
        splits, slots, part_size = self.plan.cut.splits, heads * group["parts"], self.part_size
        part_bytes = part_size * self.dtype.itemsize
        clears, tasks = part_bytes // BATCH_BYTES, slots * splits
        steps, cost = clears + self.key_blocks, float(heads * self.row_work * self.sizes.n_k + slots * part_size)
        cost_of_a_task = cost / tasks if clears == 0 else float(steps * BATCH_COST)  # a large table: step by step
        scatter = partial(self.scatter, **group, together=1, clears=clears, key_code=key_code)
        share(tasks, in_steps(scatter, steps, cost_of_a_task), num_threads=num_threads, cost=cost, moved=tasks * part_bytes)
        if splits > 1:
            merge = partial(_merge_kernel(from_dtype(self.dtype)), tables=group["tables"], splits=splits, part_size=part_size)
            share(slots, merge, num_threads=num_threads, cost=slots * splits * part_size)
