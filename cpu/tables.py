"""Tables of hashes, in flat arrays: a row of ``d_v`` sums for each bucket of a hash.

Sixteen vectors at a time find their buckets, those of all hashes of a *part* (a
`yoso_core.cpu.rounds.Part`), whose tables stand one after the other; then each is added to its
buckets, or reads them.
"""

import numpy as np

from yoso_core.cpu.compiling import helper
from yoso_core.cpu.lanes import LANES, fill, load, multiply_add, read, read_one, store, to_index, total


@helper
def find_buckets(buckets, part, code, slot, i, count, d_v, stored):
    """The rows of the tables that are the buckets of vectors ``i ... i + count - 1``, 16 at most:
    that of vector ``i + t`` in the part's ``hash`` is ``buckets[hash * 16 + t]``.

    ``slot`` is the index of a head among those whose codes are there. ``stored``, a constant, says
    that they lie as the caller gave them, ``code (heads, n, m)``, and are unchecked: what is out of
    range must not reach beyond a table, and has -1 for a bucket. Else ``code (heads, m, n)`` is our
    own.
    """
    capacity = part.table_size // max(d_v, 1)
    first = part.start // max(d_v, 1)
    for hash in range(part.hashes):
        start = first + hash * capacity
        if not stored and count == LANES:
            number = to_index(load(code, (slot, part.hash0 + hash, i)))
            store(buckets, hash * LANES, number + fill(np.intp(start)))
        else:
            for t in range(count):
                number = np.intp(code[slot, i + t, part.hash0 + hash] if stored else code[slot, part.hash0 + hash, i + t])
                known = not stored or 0 <= number < capacity
                buckets[hash * LANES + t] = start + number if known else -1


@helper
def scatter_row(tables, buckets, t, hashes, value, head, i, stored):
    """Add the value of key ``i`` to its ``buckets[hash * 16 + t]``. ``stored`` as in
    `find_buckets`.

    64 columns at a time stay in registers.
    """
    d_v = value.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    for c in range(0, wide, 4 * LANES):
        v0, v1 = read(value, (*head, i, c)), read(value, (*head, i, c + LANES))
        v2, v3 = read(value, (*head, i, c + 2 * LANES)), read(value, (*head, i, c + 3 * LANES))
        for bucket in range(t, t + hashes * LANES, LANES):
            if not stored or buckets[bucket] >= 0:
                at = buckets[bucket] * d_v + c
                store(tables, at, load(tables, at) + v0)
                store(tables, at + LANES, load(tables, at + LANES) + v1)
                store(tables, at + 2 * LANES, load(tables, at + 2 * LANES) + v2)
                store(tables, at + 3 * LANES, load(tables, at + 3 * LANES) + v3)
    for c in range(wide, full, LANES):
        v0 = read(value, (*head, i, c))
        for bucket in range(t, t + hashes * LANES, LANES):
            if not stored or buckets[bucket] >= 0:
                at = buckets[bucket] * d_v + c
                store(tables, at, load(tables, at) + v0)
    for c in range(full, d_v):
        for bucket in range(t, t + hashes * LANES, LANES):
            if not stored or buckets[bucket] >= 0:
                tables[buckets[bucket] * d_v + c] += read_one(value, (*head, i, c))


@helper
def gather_row(tables, buckets, t, hashes, fresh, out, head, i, stored):
    """Add the ``buckets[hash * 16 + t]`` of query ``i`` to its output row, or begin it, if
    ``fresh``. ``stored`` as in `find_buckets`.
    """
    d_v = out.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    zero = fill(out.dtype.type(0))
    for c in range(0, wide, 4 * LANES):
        y0, y1, y2, y3 = zero, zero, zero, zero
        if not fresh:
            y0, y1 = load(out, (*head, i, c)), load(out, (*head, i, c + LANES))
            y2, y3 = load(out, (*head, i, c + 2 * LANES)), load(out, (*head, i, c + 3 * LANES))
        for bucket in range(t, t + hashes * LANES, LANES):
            if not stored or buckets[bucket] >= 0:
                at = buckets[bucket] * d_v + c
                y0, y1 = y0 + load(tables, at), y1 + load(tables, at + LANES)
                y2, y3 = y2 + load(tables, at + 2 * LANES), y3 + load(tables, at + 3 * LANES)
        store(out, (*head, i, c), y0)
        store(out, (*head, i, c + LANES), y1)
        store(out, (*head, i, c + 2 * LANES), y2)
        store(out, (*head, i, c + 3 * LANES), y3)
    for c in range(wide, full, LANES):
        y0 = zero if fresh else load(out, (*head, i, c))
        for bucket in range(t, t + hashes * LANES, LANES):
            if not stored or buckets[bucket] >= 0:
                y0 = y0 + load(tables, buckets[bucket] * d_v + c)
        store(out, (*head, i, c), y0)
    for c in range(full, d_v):
        y = out.dtype.type(0) if fresh else out[(*head, i, c)]
        for bucket in range(t, t + hashes * LANES, LANES):
            if not stored or buckets[bucket] >= 0:
                y += tables[buckets[bucket] * d_v + c]
        out[(*head, i, c)] = y


@helper
def gather_squares(row_squares, buckets, t, hashes, stored):
    """The sum of what ``row_squares`` holds for the ``buckets[hash * 16 + t]`` of a query."""
    found = row_squares.dtype.type(0)
    for bucket in range(t, t + hashes * LANES, LANES):
        if not stored or buckets[bucket] >= 0:
            found += row_squares[buckets[bucket]]
    return found


@helper
def squares_of(tables, start, d_v, unit):
    """Those of the entries of a row, each times ``unit`` before, summed."""
    full = d_v - d_v % LANES
    squares = fill(tables.dtype.type(0))
    for c in range(start, start + full, LANES):
        scaled = load(tables, c) * fill(unit)
        squares = multiply_add(scaled, scaled, squares)
    found = total(squares)
    for c in range(start + full, start + d_v):
        found += (tables[c] * unit) * (tables[c] * unit)
    return found
