"""The bytes that each CUDA variant moves by design, kernel by kernel. They are counted from the
kernels, not measured.

There are two counts. *Device memory* is what a launch reads and writes there. What the blocks share
that work on the same head counts once, since it comes from the L2 cache. What is read again after a
whole array has passed counts again, since arrays of this size do not stay in the cache. *Cache* is
what the blocks ask for beyond that, and atomic additions, which the L2 cache carries out.

The formulas hold for what the suites run: as many queries as keys, no masks, ``d_v = d_w = d``,
codes spread evenly over the buckets, and codes that fit into one part of the hash (``tau <= D``).
Flags and numbers of which there is one for each head do not count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from yoso_core.benchmarks.cases import Workload
from yoso_core.benchmarks.contenders import CONTENDERS, Composed
from yoso_core.benchmarks.floor import ITEM_SIZE
from yoso_core.benchmarks.machines import H100, Limits
from yoso_core.benchmarks.sides import Ours
from yoso_core.reference.hashing import hash_layout, signs_shape

_WARP = 32
_SECTOR = 32
"""The smallest number of bytes that memory transfers."""


@dataclass(frozen=True)
class Traffic:
    """The bytes that one kernel moves in all its launches together."""

    kernel: str
    """Its name. In brackets: a fill or a conversion, which CuPy or torch launches."""
    launches: int
    read: int
    """Bytes from device memory."""
    written: int
    """Bytes to device memory."""
    cached: int = 0
    """Bytes that blocks ask for beyond what is read, and atomic additions."""

    @property
    def moved(self) -> int:
        return self.read + self.written


class _Sizes:
    """The numbers in the formulas. A name that ends in ``_bytes`` counts bytes."""

    def __init__(self, workload: Workload, limits: Limits) -> None:
        self.limits = limits
        self.n, self.dim, self.num_hash = workload.n, workload.dim, workload.num_hash
        self.capacity = 1 << workload.hash_code_len
        self.heads = workload.batch * workload.heads
        self.rows = self.heads * self.n
        numbers = workload.num_hash, workload.hash_code_len, workload.dim
        self.parts = hash_layout(*numbers).parts
        """Of the paper's layout."""
        self.signs_of_parts, self.signs_of_head = (prod(signs_shape(*numbers, layout)) for layout in ("paper", "chained"))
        self.sign_sets = workload.heads
        self.item = ITEM_SIZE[workload.dtype]
        self.acc = max(4, self.item)
        self.widened = self.item < self.acc
        self.codes = self.rows * self.num_hash
        self.codes_bytes = 4 * self.codes
        """Codes of the queries, or of the keys."""
        self.vectors_bytes = self.rows * self.dim * self.item
        """Query, key, value, a weight, or a result, in the caller's dtype."""
        self.sums_bytes = self.rows * self.dim * self.acc
        """The same in the dtype of the computation."""
        self.bucket_rows = self.heads * self.num_hash * min(self.capacity, self.n)
        """Rows of sums, one for each occupied bucket."""
        self.buckets_bytes = self.bucket_rows * self.dim * self.acc
        self.asked_bytes = self.codes * self.dim * self.acc
        """A row of sums for each code, added to tables or read from them."""
        self.search_bytes = 4 * self.codes * self.n.bit_length()
        """One bisection of a head's sorted codes for each code."""


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _warp_per_chain(s: _Sizes) -> list[Traffic]:
    signs = s.sign_sets * s.signs_of_head
    return [Traffic("warp_per_chain", 1, s.vectors_bytes + signs, s.codes_bytes, s.rows * s.signs_of_head - signs)]


def _block_per_part(s: _Sizes) -> list[Traffic]:
    # One part of all vectors is hashed before the next part of any, so the vectors come from memory
    # once for each part.
    signs = s.sign_sets * s.signs_of_parts
    return [Traffic("block_per_part", 1, s.parts * s.vectors_bytes + signs, s.codes_bytes, s.rows * s.signs_of_parts - signs)]


def _widened(s: _Sizes, arrays: int) -> list[Traffic]:
    return [Traffic("(widen)", 0, arrays * s.vectors_bytes, arrays * s.sums_bytes)] if s.widened else []


def _rounded(s: _Sizes) -> list[Traffic]:
    return [Traffic("(round)", 0, s.sums_bytes, s.vectors_bytes)] if s.widened else []


def _numba_hash(s: _Sizes) -> list[Traffic]:
    signs = s.heads * s.signs_of_head  # a copy for each head
    cached = s.rows * s.signs_of_head - signs
    return [*_widened(s, 1), Traffic("hash_by_chain", 1, s.sums_bytes + signs, s.codes_bytes, cached)]


def _shared_table(s: _Sizes, out_bytes: int) -> list[Traffic]:
    from yoso_core.gpu.cupy_kernels.cumulation import shared_table_layout

    _, side_by_side, width = shared_table_layout(s.num_hash, s.dim, s.capacity, s.limits.max_shared, s.acc)
    slices, rounds = _ceil_div(s.dim, width), _ceil_div(s.num_hash, side_by_side)
    again = (rounds - 1) * s.sums_bytes  # sums that wait for the other hashes
    read = 2 * s.codes_bytes + rounds * s.vectors_bytes + again
    return [Traffic("shared_table", 1, read, out_bytes + again, (slices - 1) * 2 * s.codes_bytes)]


def _sorting(s: _Sizes, sides: int) -> list[Traffic]:
    passes = sides * _ceil_div((s.capacity - 1).bit_length(), 4)
    return [
        Traffic("transpose_codes", sides, sides * s.codes_bytes, sides * 2 * s.codes_bytes),
        Traffic("sort_codes", passes, passes * 2 * s.codes_bytes, passes * 2 * s.codes_bytes, passes * s.codes_bytes),
    ]


def _sorted_buckets(s: _Sizes, out_bytes: int) -> list[Traffic]:
    from yoso_core.gpu.cupy_kernels import cumulation

    most = min(cumulation._GROUP_BYTES, s.limits.max_table) // (s.sums_bytes // s.heads)  # hashes of one head
    together = max(1, min(s.num_hash, most))
    groups = _ceil_div(s.num_hash, together)
    launches = groups * _ceil_div(s.heads, max(1, most // together))
    stretch_rows = s.heads * s.num_hash * (_ceil_div(s.n, cumulation._STRETCH) - 1)  # that begin inside a bucket, all but few
    stretch_bytes = stretch_rows * s.dim * s.acc
    again = (groups - 1) * s.sums_bytes
    joining = [Traffic("join_stretches", launches, 2 * stretch_bytes, stretch_bytes)] if stretch_rows else []
    return [
        *_sorting(s, 1),
        Traffic(
            "sum_buckets",
            launches,
            2 * s.codes_bytes + groups * s.vectors_bytes,
            s.buckets_bytes + stretch_bytes,
            (s.num_hash - groups) * s.vectors_bytes,
        ),
        *joining,
        Traffic(
            "gather_buckets",
            launches,
            s.codes_bytes + s.buckets_bytes + again,
            out_bytes + again,
            s.asked_bytes - s.buckets_bytes + s.search_bytes,
        ),
    ]


def _global_table(s: _Sizes, out_bytes: int) -> list[Traffic]:
    passes = _ceil_div(s.dim, _WARP)
    table_bytes = s.heads * s.num_hash * s.capacity * _WARP * s.acc
    codes = passes * s.codes_bytes
    return [
        Traffic("(zeros)", 0, 0, passes * table_bytes),
        Traffic("global_table_scatter", passes, codes + s.vectors_bytes + s.buckets_bytes, s.buckets_bytes, s.asked_bytes),
        Traffic("global_table_gather", passes, codes + s.buckets_bytes, out_bytes, s.asked_bytes - s.buckets_bytes),
    ]


def _numba_tables(s: _Sizes) -> tuple[int, int, int]:
    """Cuts of the heads, cuts of the value dims, and bytes of all tables, as in `table_cut` of the
    launchers.
    """
    column = s.num_hash * s.capacity * s.acc
    dims = min(_WARP, s.dim, s.limits.max_table // column)
    passes = _ceil_div(s.dim, dims)
    return _ceil_div(s.heads, s.limits.max_table // (column * dims)), passes, passes * dims * s.heads * column


def _numba_global_table(s: _Sizes) -> list[Traffic]:
    cuts, passes, table_bytes = _numba_tables(s)
    codes = passes * (s.codes_bytes + s.rows)  # and a byte of the mask for each row
    return [
        *_widened(s, 1),
        Traffic("(zeros)", 0, 0, 2 * s.rows + s.sums_bytes + table_bytes),
        Traffic("add_keys_to_table", cuts * passes, codes + s.sums_bytes + s.buckets_bytes, s.buckets_bytes, s.asked_bytes),
        Traffic("read_table", cuts * passes, codes + s.buckets_bytes, s.sums_bytes, s.asked_bytes - s.buckets_bytes),
        *_rounded(s),
    ]


def _numba_shared_table(s: _Sizes) -> list[Traffic]:
    columns = s.limits.max_shared // (s.capacity * s.acc)
    dims = min(_SECTOR // s.acc, s.dim, columns)
    slices, rounds = _ceil_div(s.dim, dims), _ceil_div(s.num_hash, min(s.num_hash, columns // dims))
    codes = 2 * s.codes_bytes + rounds * 2 * s.rows
    return [
        *_widened(s, 1),
        Traffic("(zeros)", 0, 0, 2 * s.rows + s.sums_bytes),
        Traffic("cumulate_in_shared_table", 1, codes + 2 * rounds * s.sums_bytes, rounds * s.sums_bytes, (slices - 1) * codes),
        *_rounded(s),
    ]


def _finish_rows(s: _Sizes) -> Traffic:
    return Traffic("finish_rows", 1, s.vectors_bytes + s.sums_bytes, s.vectors_bytes)


def _outer_products(s: _Sizes) -> list[Traffic]:
    from yoso_core.gpu.cupy_kernels import weighted

    # A group of heads goes through all hashes before the next. Its weights, values and sums stay in
    # the cache from hash to hash, if they fit. Sums are atomic additions, carried out there.
    padded = _ceil_div(s.dim, 4) * 4
    sums_bytes = s.rows * padded * s.acc
    at_once = weighted._CACHE_BYTES // (s.n * (3 * s.dim * s.item + padded * s.acc))
    times = 1 if at_once else s.num_hash
    slices, pieces = _ceil_div(s.dim, 32 if s.acc == 8 else 64), _ceil_div(s.dim, 64)
    moved = 3 * s.vectors_bytes + sums_bytes  # both weights, the value, and the sums
    more = 2 * (slices - 1) * s.vectors_bytes + (pieces - 1) * (s.vectors_bytes + 2 * sums_bytes)
    cached = s.num_hash * more + (s.num_hash - times) * (moved + sums_bytes)
    return [
        Traffic("(zeros)", 0, 0, sums_bytes),
        *_sorting(s, 2),
        Traffic("outer_products", 1, s.num_hash * 16 * s.rows + times * moved, times * sums_bytes, cached),
        _finish_rows(s),
    ]


def _sorted_pairs(s: _Sizes) -> list[Traffic]:
    pairs = s.codes * s.n // s.capacity
    asked = pairs * (4 + 2 * s.dim * s.item) + 2 * s.search_bytes
    keys = 2 * s.vectors_bytes + s.codes_bytes  # that all but few are met by some query
    return [
        *_sorting(s, 1),
        Traffic("sorted_pairs", 1, 3 * s.codes_bytes + 3 * s.vectors_bytes, s.vectors_bytes, max(0, asked - keys)),
    ]


def _one_coordinate(s: _Sizes) -> int:
    """Bytes of one coordinate of every weight: a sector for each row."""
    return s.rows * min(_SECTOR, s.dim * s.item)


def _weight_by_weight(s: _Sizes) -> list[Traffic]:
    passes = _ceil_div(s.dim, _WARP)
    table_bytes = s.heads * s.num_hash * s.capacity * _WARP * s.acc
    launches = passes * s.dim
    each = launches * (s.codes_bytes + _one_coordinate(s))
    buckets, sums, asked = s.dim * s.buckets_bytes, s.dim * s.sums_bytes, s.dim * s.asked_bytes
    return [
        Traffic("(zeros)", 0, 0, s.sums_bytes + launches * table_bytes),
        Traffic("weight_by_weight_scatter", launches, each + s.dim * s.vectors_bytes + buckets, buckets, asked),
        Traffic("weight_by_weight_gather", launches, each + buckets + sums, sums, asked - buckets),
        _finish_rows(s),
    ]


def _numba_weight_by_weight(s: _Sizes) -> list[Traffic]:
    cuts, passes, table_bytes = _numba_tables(s)
    each = passes * s.dim * (s.codes_bytes + s.rows + s.rows * min(_SECTOR, s.dim * s.acc))
    buckets, sums, asked = s.dim * s.buckets_bytes, s.dim * s.sums_bytes, s.dim * s.asked_bytes
    launches = cuts * passes * s.dim
    return [
        *_widened(s, 3),
        Traffic("(zeros)", 0, 0, 2 * s.rows + s.sums_bytes + s.dim * table_bytes),
        Traffic("add_weighted_keys_to_table", launches, each + sums + buckets, buckets, asked),
        Traffic("read_weighted_table", launches, each + buckets + sums, sums, asked - buckets),
        *_rounded(s),
    ]


def _blocked_expectation(s: _Sizes) -> list[Traffic]:
    tiles, slices = _ceil_div(s.n, 64), _ceil_div(s.dim, 32 if s.acc == 8 else 64)
    cached = (slices * tiles - 1) * s.sums_bytes + (tiles - 1) * s.vectors_bytes + (slices - 1) * s.sums_bytes
    return [
        Traffic("normalize_rows", 2, 2 * s.vectors_bytes, 2 * s.sums_bytes),
        Traffic("expectation", 1, 2 * s.sums_bytes + s.vectors_bytes, s.vectors_bytes, cached),
    ]


def _attention(cumulate: Callable[[_Sizes, int], list[Traffic]]) -> Callable[[_Sizes], list[Traffic]]:
    def formula(s: _Sizes) -> list[Traffic]:
        (hashed,) = _warp_per_chain(s)
        return [
            Traffic(hashed.kernel, 2, 2 * hashed.read, 2 * (hashed.written + s.rows), 2 * hashed.cached),
            *cumulate(s, s.sums_bytes),
            Traffic("mark_nonfinite_heads", 1, s.rows, 0),
            Traffic("finish_attention", 1, s.sums_bytes + s.rows, s.vectors_bytes),
        ]

    return formula


def _by_itself(cumulate: Callable[[_Sizes, int], list[Traffic]]) -> Callable[[_Sizes], list[Traffic]]:
    return lambda s: cumulate(s, s.vectors_bytes)


FORMULAS: dict[tuple[str, str], Callable[[_Sizes], list[Traffic]]] = {
    ("fast_hash", "cupy:warp_per_vector"): _warp_per_chain,
    ("fast_hash", "cupy:block_per_part"): _block_per_part,
    ("fast_hash", "numba_cuda:shared_memory"): _numba_hash,
    ("lsh_cumulation", "cupy:shared_table"): _by_itself(_shared_table),
    ("lsh_cumulation", "cupy:sorted_buckets"): _by_itself(_sorted_buckets),
    ("lsh_cumulation", "cupy:global_table"): _by_itself(_global_table),
    ("lsh_cumulation", "numba_cuda:shared_table"): _numba_shared_table,
    ("lsh_cumulation", "numba_cuda:global_table"): _numba_global_table,
    ("lsh_weighted_cumulation", "cupy:outer_products"): _outer_products,
    ("lsh_weighted_cumulation", "cupy:sorted_pairs"): _sorted_pairs,
    ("lsh_weighted_cumulation", "cupy:weight_by_weight"): _weight_by_weight,
    ("lsh_weighted_cumulation", "numba_cuda:weight_by_weight"): _numba_weight_by_weight,
    ("expectation_attention", "cupy:blocked"): _blocked_expectation,
    ("yoso_attention", "cupy:shared_table"): _attention(_shared_table),
    ("yoso_attention", "cupy:sorted_buckets"): _attention(_sorted_buckets),
}


def by_design(op: str, variant: str, workload: Workload, limits: Limits = H100) -> list[Traffic]:
    """The traffic of each kernel, in the order of the launches. ``KeyError`` for a variant without
    a formula.

    >>> (table,) = by_design("lsh_cumulation", "cupy:shared_table", Workload("cumulation", n=512))
    >>> table.read, table.written
    (3145728, 1572864)
    """
    return FORMULAS[op, variant](_Sizes(workload, limits))


def traffic(workload: Workload, limits: Limits = H100) -> list[Traffic] | None:
    """All traffic of one call of a workload; ``None`` where a step of it has no formula."""
    contender = CONTENDERS[workload.run]
    if not isinstance(contender, Ours):
        return None
    found: list[Traffic] = []
    for op, variant in contender.steps(workload):
        if variant is None or (op, variant) not in FORMULAS:
            return None
        found += by_design(op, variant, workload, limits)
    if isinstance(contender, Composed):
        sizes = _Sizes(workload, limits)
        # torch's normalize reads the sums twice: for their lengths, and to divide them.
        found += [*_widened(sizes, 1), Traffic("(normalize)", 0, 2 * sizes.sums_bytes, sizes.sums_bytes), *_rounded(sizes)]
    return found
