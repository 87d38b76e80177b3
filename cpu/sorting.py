"""Rows sorted by the bucket that they fall into, one hash at a time.

A *label* is the number of a row's bucket, or -1 for a row that stands in none.
"""

from yoso_core.cpu.compiling import helper, subroutine

HASHES_AT_ONCE = 16
"""Hashes whose codes are read together: as many codes as stand in a cache line."""


MOVED_TO_SORT = 16.0
"""Bytes that count for sorting one code: it is read and written here and there."""


@subroutine
def read_labels(labels, code, keep, head, hash0, capacity):
    """Codes of ``len(labels)`` hashes, from hash ``hash0`` on, as labels: ``labels[hash, i]``.

    Masked rows, and codes out of range, which unchecked codes may be, get -1.
    """
    for i in range(code.shape[2]):
        for hash in range(len(labels)):
            number = code[(*head, i, hash0 + hash)]
            labels[hash, i] = number if keep[(*head, i)] and 0 <= number < capacity else -1


@helper
def sort_by_label(label, begins, begins_at, order, order_at, buckets):
    """Counting sort: bucket ``k`` holds the rows from ``order[order_at + begins[begins_at + k]]``
    on, up to where bucket ``k + 1`` begins, in ascending order.

    ``begins`` takes ``buckets + 2`` entries. Rows without a bucket are left out.
    """
    begins[begins_at : begins_at + buckets + 2] = 0
    for i in range(len(label)):
        if label[i] >= 0:
            begins[begins_at + label[i] + 2] += 1
    for k in range(begins_at + 2, begins_at + buckets + 2):
        begins[k] += begins[k - 1]
    for i in range(len(label)):
        if label[i] >= 0:
            next_of_bucket = begins_at + label[i] + 1
            order[order_at + begins[next_of_bucket]] = i
            begins[next_of_bucket] += 1
