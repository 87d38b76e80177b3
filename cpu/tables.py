"""Tables of hashes, in flat arrays: a row of ``d_v`` sums for each bucket of a hash.

A vector at a time is added to its buckets, or reads them, those of all hashes of a *part* (a
`yoso_core.cpu.rounds.Part`), whose tables stand one after the other. Codes come as ``code (heads,
m, n)`` in any integer type; ``slot`` is the index of a head among those whose codes are there.
"""

import numpy as np

from yoso_core.cpu.compiling import helper
from yoso_core.cpu.lanes import LANES, fill, load, multiply_add, store, total


@helper
def bucket_offsets(offsets, part, code, slot, i, d_v, guarded):
    """Where in the tables the buckets of vector ``i`` begin; how many there are.

    ``guarded``, a constant, says that the codes come from outside and are unchecked: those that are
    out of range must not reach beyond a table, and are left out.
    """
    if not guarded:
        for hash in range(part.hashes):
            offsets[hash] = part.start + hash * part.table_size + np.intp(code[slot, part.hash0 + hash, i]) * d_v
        return part.hashes
    count, capacity = 0, part.table_size // max(d_v, 1)
    for hash in range(part.hashes):
        number = np.intp(code[slot, part.hash0 + hash, i])
        if 0 <= number < capacity:
            offsets[count] = part.start + hash * part.table_size + number * d_v
            count += 1
    return count


@helper
def scatter_row(tables, part, code, slot, offsets, guarded, value, head, i):
    """Add the value of key ``i`` to its buckets.

    64 columns at a time stay in registers. ``guarded`` as in `bucket_offsets`; ``offsets`` is its
    scratch.
    """
    d_v = value.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    count = bucket_offsets(offsets, part, code, slot, i, d_v, guarded)
    for c in range(0, wide, 4 * LANES):
        v0, v1 = load(value, (*head, i, c)), load(value, (*head, i, c + LANES))
        v2, v3 = load(value, (*head, i, c + 2 * LANES)), load(value, (*head, i, c + 3 * LANES))
        for bucket in range(count):
            at = offsets[bucket] + c
            store(tables, at, load(tables, at) + v0)
            store(tables, at + LANES, load(tables, at + LANES) + v1)
            store(tables, at + 2 * LANES, load(tables, at + 2 * LANES) + v2)
            store(tables, at + 3 * LANES, load(tables, at + 3 * LANES) + v3)
    for c in range(wide, full, LANES):
        v0 = load(value, (*head, i, c))
        for bucket in range(count):
            store(tables, offsets[bucket] + c, load(tables, offsets[bucket] + c) + v0)
    for c in range(full, d_v):
        for bucket in range(count):
            tables[offsets[bucket] + c] += value[(*head, i, c)]


@helper
def gather_row(tables, part, code, slot, offsets, guarded, spread, unit, out, head, i):
    """Add the buckets of query ``i`` to its output row. The first part begins the row.

    ``guarded`` as in `bucket_offsets`; ``offsets`` is its scratch. With ``spread``, a constant,
    returns the squares of all that was added, each times ``unit`` before, else 0.
    """
    d_v = out.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    fresh, zero = part.hash0 == 0, fill(out.dtype.type(0))
    squares, more = zero, zero
    count = bucket_offsets(offsets, part, code, slot, i, d_v, guarded)
    for c in range(0, wide, 4 * LANES):
        y0, y1, y2, y3 = zero, zero, zero, zero
        if not fresh:
            y0, y1 = load(out, (*head, i, c)), load(out, (*head, i, c + LANES))
            y2, y3 = load(out, (*head, i, c + 2 * LANES)), load(out, (*head, i, c + 3 * LANES))
        for bucket in range(count):
            at = offsets[bucket] + c
            r0, r1 = load(tables, at), load(tables, at + LANES)
            r2, r3 = load(tables, at + 2 * LANES), load(tables, at + 3 * LANES)
            y0, y1, y2, y3 = y0 + r0, y1 + r1, y2 + r2, y3 + r3
            if spread:
                squares, more = add_square(squares, r0, unit), add_square(more, r1, unit)
                squares, more = add_square(squares, r2, unit), add_square(more, r3, unit)
        store(out, (*head, i, c), y0)
        store(out, (*head, i, c + LANES), y1)
        store(out, (*head, i, c + 2 * LANES), y2)
        store(out, (*head, i, c + 3 * LANES), y3)
    for c in range(wide, full, LANES):
        y0 = zero if fresh else load(out, (*head, i, c))
        for bucket in range(count):
            r0 = load(tables, offsets[bucket] + c)
            y0 = y0 + r0
            if spread:
                squares = add_square(squares, r0, unit)
        store(out, (*head, i, c), y0)
    found = total(squares + more) if spread else out.dtype.type(0)
    for c in range(full, d_v):
        y = out.dtype.type(0) if fresh else out[(*head, i, c)]
        for bucket in range(count):
            r = tables[offsets[bucket] + c]
            y += r
            found += (r * unit) * (r * unit)
        out[(*head, i, c)] = y
    return found


@helper
def add_square(squares, row, unit):
    """``squares + (row * unit)**2``, lane by lane."""
    scaled = row * fill(unit)
    return multiply_add(scaled, scaled, squares)
