"""The functions people call: each checks its arguments, picks a variant, and hands back the
caller's kind of array.

The mathematics stands in `yoso_core.reference`, whose docstrings give the equations.
"""

from typing import Any

import numpy as np

from yoso_core import checks
from yoso_core.arrays import Array, Caller, one_caller
from yoso_core.operations import (
    EXPECTATION_ATTENTION,
    EXPECTATION_ATTENTION_BACKWARD,
    FAST_HASH,
    HADAMARD_TRANSFORM,
    HYPERPLANE_HASH,
    LSH_ATTENTION_BACKWARD,
    LSH_CUMULATION,
    LSH_WEIGHTED_CUMULATION,
    SMOOTH_TABLE,
    YOSO_ATTENTION,
)
from yoso_core.reference.expectation import Grad
from yoso_core.reference.hashing import LAYOUTS, WARM_UP, Layout, Seed, least_rotations, signs_shape
from yoso_core.reference.hashing import sample_planes as _draw_planes
from yoso_core.reference.hashing import sample_signs as _draw_signs
from yoso_core.registry import run


def sample_signs(
    num_hash: int,
    hash_code_len: int,
    dim: int,
    *,
    batch_shape: tuple[int, ...] = (),
    layout: Layout = "chained",
    rotations: int | None = None,
    rng: Seed = None,
) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Draw the random diagonals of the fast rotations, independent fair signs.

    A chain is one sequence of rounds ``H D``, all of which are used but the first three. In the
    paper's layout, each part of a hash is a rotation ``H D3 H D2 H D1 x`` with three diagonals
    ``D`` of its own.

    Parameters
    ----------
    num_hash, hash_code_len : ``m`` and ``tau`` (1 to 30).
    dim : the dimension ``d`` of the vectors. ``D`` is ``d`` rounded up to a power of two.
    batch_shape : leading dims. They broadcast against those of the vectors: ``()`` serves a whole
        batch with one draw, ``(heads,)`` draws for each head.
    layout : ``"chained"``, or ``"paper"``, whose collisions are too rare: see `fast_hash`.
    rotations : of a chain, ``P``, at least ``ceil(num_hash * hash_code_len / D)``. ``None``: the
        number in the table below, ``tau`` outside of it, and more where ``num_hash`` needs more.
        Fewer cost less and leave more bias; with ``tau`` every bit of a code has a rotation of its
        own.
    rng : a `numpy.random.Generator`, an int seed, or ``None`` for fresh entropy.

    Returns
    -------
    int8 of +1 and -1: ``(*batch_shape, P + 3, D)``, where ``[..., 0, :]`` is D1, the first to be
    applied; in the paper's layout ``(*batch_shape, 3, parts, D)``, where ``[..., 0, :, :]`` is D1.

    With the rotations of this table, the mean collision weight is within 1.5% of
    ``(1 - theta / pi)**tau`` at cosines of 0.5 to 0.9, and within 4% at a right angle, for every
    ``num_hash`` from 8 on; measured for 8 and for as many as there is room for (`yoso bench bias`).
    One-hot pairs near cosine 0.7 are the exception.

    ========  ===  ===  ===  ===  ===
    tau         8    9   10   11   12
    ========  ===  ===  ===  ===  ===
    D = 32      7    8   10   10   11
    D = 64      4    5    6    7    8
    D = 128     3    4    4    5    6
    ========  ===  ===  ===  ===  ===

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.2, for the paper's layout.

    >>> sample_signs(32, 8, 64, rng=0).shape
    (7, 64)
    >>> sample_signs(32, 8, 64, layout="paper", rng=0).shape
    (3, 4, 64)
    """
    m, tau, d, shape = checks.draw(num_hash, hash_code_len, dim, batch_shape)
    rotations = checks.rotations("layout", layout, rotations, least_rotations(m, tau, d))
    return _draw_signs(m, tau, d, batch_shape=shape, layout=layout, rotations=rotations, rng=checks.generator("rng", rng))


def sample_planes(
    num_hash: int, hash_code_len: int, dim: int, *, batch_shape: tuple[int, ...] = (), rng: Seed = None
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw the normals of ``num_hash * hash_code_len`` random hyperplanes, independent standard
    normal entries.

    Parameters are those of `sample_signs`.

    Returns
    -------
    float32 ``(*batch_shape, dim, num_hash * hash_code_len)``. Bit ``b`` of code ``h`` is the side
    of column ``h * hash_code_len + b``.

    >>> sample_planes(32, 8, 64, rng=0).shape
    (64, 256)
    """
    m, tau, d, shape = checks.draw(num_hash, hash_code_len, dim, batch_shape)
    return _draw_planes(m, tau, d, batch_shape=shape, rng=checks.generator("rng", rng))


def hadamard_transform(x: Array, *, variant: str | None = None) -> Array:
    """Unnormalized fast Walsh-Hadamard transform over the last axis, in Sylvester order.

    ``y_k = sum_j (-1)^{popcount(j & k)} x_j``, in ``D log2 D`` additions. The butterflies run from
    the largest stride to the smallest, so every variant returns the same bits.

    Parameters
    ----------
    x : float ``(..., D)``, ``D`` a power of two. float16 and bfloat16 are added up in float32 and
        rounded once.

    Returns
    -------
    Array of the same shape, kind and dtype. ``ValueError`` when ``D`` is not a power of two.

    >>> hadamard_transform(np.array([1.0, 2.0, 3.0, 4.0]))
    array([10., -2., -4.,  0.])
    """
    caller = one_caller({"x": x})
    checks.floating("x", x, ndim=1)
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"x: need a power of two as last dimension, got shape {tuple(x.shape)}")
    return run(HADAMARD_TRANSFORM, variant, caller, {"x": x})


def fast_hash(
    vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, layout: Layout = "chained", variant: str | None = None
) -> Array:
    """Hash codes by fast random rotations, ``tau`` sign bits to a code. Every variant returns the
    same bits.

    ``layout="chained"``: ``y_r = c_r H D_r y_(r-1)``, ``y_0 = x``, with an exact factor ``c_r``
    (`yoso_core.reference.fast_hash`). The coordinates of the ``P`` rounds from the fourth on form
    one stream; bit ``b`` of code ``h`` is its coordinate ``b (P D // tau) + h``, worth ``2**b``.
    Bits of different rotations agree independently, so codes collide as often as they should: with
    the rotations that `sample_signs` chooses within 1.5%, 4% at a right angle.

    ``layout="paper"``: with ``per = D // tau``, bit ``b`` of code ``h`` is
    ``projection[h // per][(h % per) * tau + b] > 0`` of ``H D3 H D2 H D1 x``, as in the paper's
    kernels. For ``tau > D`` the projections of all parts form one stream, cut every ``tau`` bits.
    The bits of a code are signs of orthogonal projections, which repel each other: codes collide
    too seldom, for ``d = 32``, ``tau = 11`` and a right angle by 57%. It costs three rounds for
    each part, where a chain costs ``P + 3``.

    Parameters
    ----------
    vectors : float ``(..., n, d)``. float64 is hashed in float64, all others in float32. The
        positive scale of a vector does not matter.
    signs : int8 ``(*batch, P + 3, D)``, or ``(*batch, 3, parts, D)`` in the paper's layout, from
        `sample_signs`. ``batch`` broadcasts against the leading dims of ``vectors``.
    num_hash, hash_code_len : ``m`` and ``tau`` (1 to 30).
    layout : ``"chained"`` or ``"paper"``, that of the signs.

    Returns
    -------
    int32 ``(..., n, num_hash)``, each in ``[0, 2**hash_code_len)``. A zero vector hashes to 0.
    Non-finite vectors usually hash to 0; check for them yourself.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.2.

    >>> x = np.random.default_rng(0).standard_normal((5, 64))
    >>> signs = sample_signs(4, 8, 64, rng=0)
    >>> codes = fast_hash(x, signs, 4, 8)
    >>> codes.shape, np.array_equal(codes, fast_hash(10 * x, signs, 4, 8))
    ((5, 4), True)
    """
    m, tau = checks.hash_numbers(num_hash, hash_code_len)
    caller = one_caller({"vectors": vectors, "signs": signs})
    checks.vectors("vectors", vectors)
    _check_signs(signs, vectors, m, tau, layout, caller)
    arguments = {"vectors": vectors, "signs": signs, "num_hash": m, "hash_code_len": tau, "layout": layout}
    return run(FAST_HASH, variant, caller, arguments)


def _check_signs(signs: Array, vectors: Array, num_hash: int, hash_code_len: int, layout: Layout, caller: Caller) -> None:
    checks.signs(signs)
    checks.one_of("layout", layout, LAYOUTS)
    numbers = num_hash, hash_code_len, vectors.shape[-1]
    of = f"num_hash {num_hash}, hash_code_len {hash_code_len}, d = {vectors.shape[-1]}"
    if layout == "chained":
        least = least_rotations(*numbers) + WARM_UP
        rounds = max(signs.shape[-2] if signs.ndim >= 2 else 0, least)
        shape, why = signs_shape(*numbers, layout, rounds - WARM_UP), f"at least {least} rounds, D for layout='chained', {of}"
    else:
        shape, why = signs_shape(*numbers, layout), f"3 diagonals, parts, D for {of}"
    checks.broadcastable("signs", signs, shape, vectors.shape[:-2], why)
    if caller.kind == "cpu" and not bool((abs(signs) == 1).all()):
        raise ValueError("signs: every entry must be +1 or -1")


def hyperplane_hash(vectors: Array, planes: Array, num_hash: int, hash_code_len: int, *, variant: str | None = None) -> Array:
    """Hash codes by Gaussian hyperplanes: bit ``b`` of code ``h`` is
    ``x . planes[:, h * tau + b] > 0`` and is worth ``2**b``.

    Codes of two vectors at angle ``theta`` collide with probability ``(1 - theta / pi)**tau``,
    exactly, in any dimension. The cost is ``n d m tau`` multiply-adds. Codes are the same within
    one variant only, since the order of a dot product is free.

    Parameters
    ----------
    vectors : float ``(..., n, d)``.
    planes : float32 or float64 ``(*batch, d, num_hash * hash_code_len)`` from `sample_planes`.
        ``batch`` broadcasts against the leading dims of ``vectors``.
    num_hash, hash_code_len : ``m`` and ``tau`` (1 to 30).

    Returns
    -------
    int32 ``(..., n, num_hash)``, each in ``[0, 2**hash_code_len)``.

    Source: Charikar 2002, "Similarity estimation techniques from rounding algorithms", section 3.

    >>> x = np.random.default_rng(0).standard_normal((5, 64))
    >>> planes = sample_planes(4, 8, 64, rng=0)
    >>> opposite = hyperplane_hash(x, planes, 4, 8) ^ hyperplane_hash(-x, planes, 4, 8)
    >>> bool((opposite == 255).all())
    True
    """
    m, tau = checks.hash_numbers(num_hash, hash_code_len)
    caller = one_caller({"vectors": vectors, "planes": planes})
    checks.vectors("vectors", vectors)
    _check_planes(planes, vectors, m, tau)
    arguments = {"vectors": vectors, "planes": planes, "num_hash": m, "hash_code_len": tau}
    return run(HYPERPLANE_HASH, variant, caller, arguments)


def _check_planes(planes: Array, vectors: Array, num_hash: int, hash_code_len: int) -> None:
    checks.floating("planes", planes)
    why = f"d, num_hash * hash_code_len = {num_hash} * {hash_code_len}"
    checks.broadcastable("planes", planes, (vectors.shape[-1], num_hash * hash_code_len), vectors.shape[:-2], why)


def _check_codes(
    query_hash_code: Array, key_hash_code: Array, capacity: object, query_mask: Array | None, key_mask: Array | None, *, limit: int
) -> int:
    number = checks.integer("hashtable_capacity", capacity, 1, limit)
    checks.codes("query_hash_code", query_hash_code)
    checks.codes("key_hash_code", key_hash_code, num_hash=query_hash_code.shape[-1])
    checks.leading("key_hash_code", key_hash_code, query_hash_code.shape[:-2], "those of query_hash_code")
    checks.mask("query_mask", query_mask, query_hash_code.shape[:-1], "query")
    checks.mask("key_mask", key_mask, key_hash_code.shape[:-1], "key")
    return number


def _check_code_range(caller: Caller, capacity: int, **codes: Array) -> None:
    if caller.kind in ("cpu", "cuda"):  # elsewhere there may be no numbers to look at, and nothing runs there
        for name, x in codes.items():
            checks.codes_in_range(name, x, capacity)


def lsh_cumulation(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
    validate: bool = True,
    variant: str | None = None,
) -> Array:
    """Every query adds up the values of the keys in its buckets:
    ``out_i = 1/m sum_h sum_j [code_h(q_i) = code_h(k_j)] v_j``.

    Parameters
    ----------
    query_hash_code, key_hash_code : int32 ``(..., n_q, m)`` and ``(..., n_k, m)``, each in
        ``[0, hashtable_capacity)``.
    value : float ``(..., n_k, d_v)``. float16 and bfloat16 are added up in float32 and rounded
        once.
    hashtable_capacity : number of buckets, ``2**tau``, at most ``2**30``. Memory follows the
        buckets that are occupied.
    oversample : ``s``, where codes have ``tau + s`` bits and ``hashtable_capacity`` is
        ``2**(tau + s)``. A key whose code differs from the query's in ``r`` bits then counts
        ``a_r = C(tau + s - r, tau) / C(tau + s, tau)`` in place of 1 or 0: the mean over all hashes
        of ``tau`` of those bits, with less variance. See `smooth_table`.
    query_mask, key_mask : bool or integer ``(..., n_q)`` and ``(..., n_k)``, each dim equal or 1,
        nonzero = keep. Masked entries are skipped, so they may hold NaN. Masked queries get zeros.
    validate : check that the codes are in range: one pass over them, and on a GPU a wait for it.
        Pass ``False`` for codes known to be right. What a code out of range meets is then not
        promised, only that nothing crashes.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. An entry that meets a non-finite value is NaN.

    Source: Zeng et al. 2021 (arXiv 2111.09714), algorithm 1.

    >>> codes = np.array([[0], [1], [0]], np.int32)
    >>> lsh_cumulation(codes, codes, np.array([[1.0], [2.0], [4.0]]), 2)
    array([[5.],
           [2.],
           [5.]])
    """
    caller = one_caller(
        {
            "query_hash_code": query_hash_code,
            "key_hash_code": key_hash_code,
            "value": value,
        },
        query_mask=query_mask,
        key_mask=key_mask,
    )
    capacity = _check_codes(query_hash_code, key_hash_code, hashtable_capacity, query_mask, key_mask, limit=1 << checks.MAX_CODE_LEN)
    smoothing = _check_oversample(oversample, "hashtable_capacity", capacity)
    checks.floating("value", value)
    checks.leading("value", value, key_hash_code.shape[:-2], "those of the hash codes")
    checks.size("value", value, -2, key_hash_code.shape[-2], "n of key_hash_code")
    if validate:
        _check_code_range(caller, capacity, query_hash_code=query_hash_code, key_hash_code=key_hash_code)
    arguments = {
        "query_hash_code": query_hash_code,
        "key_hash_code": key_hash_code,
        "value": value,
        "hashtable_capacity": capacity,
        "query_mask": query_mask,
        "key_mask": key_mask,
        "oversample": smoothing,
    }
    return run(LSH_CUMULATION, variant, caller, arguments)


def _check_oversample(oversample: object, name: str, rows: int) -> int:
    """``s`` for tables of ``rows = 2**(tau + s)`` buckets, of which argument ``name`` tells."""
    s = checks.oversample(oversample, 1)
    if s and (rows & (rows - 1) or rows.bit_length() - 1 <= s):
        raise ValueError(f"{name}: with oversample={s} need 2**(tau + {s}) for a tau of 1 or more, got {rows}")
    return s


def smooth_table(table: Array, oversample: int, *, variant: str | None = None) -> Array:
    """Average a table of hash buckets over their neighbors:
    ``out[c] = sum_{c'} a_|c xor c'| table[c']``.

    A hash of ``tau + s`` bits holds ``C(tau + s, tau)`` hashes of ``tau`` bits. Codes that differ
    in ``r`` bits collide in the share ``a_r = C(tau + s - r, tau) / C(tau + s, tau)`` of them, none
    for ``r > s``. So a row of the result is the mean of what all of them would read, and has the
    expectation of each with less variance.

    Parameters
    ----------
    table : float ``(..., 2**(tau + s), d_v)``: for every code the sum of its keys' values. float16
        and bfloat16 are added up in float32 and rounded once.
    oversample : ``s``, at least 0; ``tau`` is at least 1.

    Returns
    -------
    Array of the same shape, kind and dtype. An entry within ``s`` bits of a non-finite one is NaN.
    The sum of a column is multiplied by ``sum_r C(tau + s, r) a_r = 2**s``.

    >>> smooth_table(np.array([[1.0], [0.0], [0.0], [4.0]]), 1)
    array([[1. ],
           [2.5],
           [2.5],
           [4. ]])
    """
    caller = one_caller({"table": table})
    checks.floating("table", table)
    s = _check_oversample(oversample, "table", table.shape[-2])
    return run(SMOOTH_TABLE, variant, caller, {"table": table, "oversample": s})


def lsh_weighted_cumulation(
    query_hash_code: Array,
    query_weight: Array,
    key_hash_code: Array,
    key_weight: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    validate: bool = True,
    variant: str | None = None,
) -> Array:
    """`lsh_cumulation` with a product of weights in every term:
    ``out_i = 1/m sum_h sum_j [code_h(q_i) = code_h(k_j)] (query_weight_i . key_weight_j) v_j``.

    Every gradient of sampled attention has this form.

    Parameters
    ----------
    query_weight, key_weight : float ``(..., n_q, d_w)`` and ``(..., n_k, d_w)``, in the dtype of
        ``value``.
    The others are those of `lsh_cumulation`.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. A query with a non-finite weight gives NaN in its
    row.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.3.

    >>> codes, weight = np.array([[0], [1], [0]], np.int32), np.array([[1.0], [2.0], [3.0]])
    >>> lsh_weighted_cumulation(codes, weight, codes, weight, np.array([[1.0], [2.0], [4.0]]), 2)
    array([[13.],
           [ 8.],
           [39.]])
    """
    caller = one_caller(
        {
            "query_hash_code": query_hash_code,
            "query_weight": query_weight,
            "key_hash_code": key_hash_code,
            "key_weight": key_weight,
            "value": value,
        },
        query_mask=query_mask,
        key_mask=key_mask,
    )
    capacity = _check_codes(query_hash_code, key_hash_code, hashtable_capacity, query_mask, key_mask, limit=1 << checks.MAX_CODE_LEN)
    checks.floating("value", value)
    for name, x, side, codes in (
        ("query_weight", query_weight, "query_hash_code", query_hash_code),
        ("key_weight", key_weight, "key_hash_code", key_hash_code),
        ("value", value, "key_hash_code", key_hash_code),
    ):
        checks.floating(name, x, same_as=("value", value))
        checks.leading(name, x, codes.shape[:-2], "those of the hash codes")
        checks.size(name, x, -2, codes.shape[-2], f"n of {side}")
    checks.size("key_weight", key_weight, -1, query_weight.shape[-1], "d_w of query_weight")
    if validate:
        _check_code_range(caller, capacity, query_hash_code=query_hash_code, key_hash_code=key_hash_code)
    arguments = {
        "query_hash_code": query_hash_code,
        "query_weight": query_weight,
        "key_hash_code": key_hash_code,
        "key_weight": key_weight,
        "value": value,
        "hashtable_capacity": capacity,
        "query_mask": query_mask,
        "key_mask": key_mask,
    }
    return run(LSH_WEIGHTED_CUMULATION, variant, caller, arguments)


def check_attention(query: Array, key: Array, value: Array, query_mask: Array | None, key_mask: Array | None) -> None:
    """What every attention asks of its arrays."""
    checks.vectors("query", query)
    checks.vectors("key", key, same_as=("query", query))
    checks.floating("value", value)
    checks.same_precision("value", value, "query", query)
    checks.leading("key", key, query.shape[:-2], "those of query")
    checks.leading("value", value, query.shape[:-2], "those of query")
    checks.size("key", key, -1, query.shape[-1], "d of query")
    checks.size("value", value, -2, key.shape[-2], "n of key")
    checks.mask("query_mask", query_mask, query.shape[:-1], "query")
    checks.mask("key_mask", key_mask, key.shape[:-1], "key")


def expectation_attention(
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    variant: str | None = None,
) -> Array:
    """YOSO-E, the expected value of sampled attention:
    ``out_i = sum_j (1 - arccos(q_i . k_j) / pi)**tau v_j`` for unit ``q`` and ``k``.

    Parameters
    ----------
    query, key : float ``(..., n_q, d)`` and ``(..., n_k, d)``. They are normalized here, in float32
        at least. A zero vector has cosine 0 with all others.
    value : float ``(..., n_k, d_v)``.
    hash_code_len : ``tau`` (1 to 30).
    query_mask, key_mask : bool or integer ``(..., n_q)`` and ``(..., n_k)``, each dim equal or 1,
        nonzero = keep.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``, not normalized. Time is ``n_q n_k (d + d_v)``,
    memory linear. A non-finite query gives NaN in its row. A non-finite key or value that is kept
    gives NaN in every row of its head.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.1.

    >>> x = np.eye(2)
    >>> expectation_attention(x, x, np.eye(2), 3)
    array([[1.   , 0.125],
           [0.125, 1.   ]])
    """
    tau = checks.integer("hash_code_len", hash_code_len, 1, checks.MAX_CODE_LEN)
    caller = one_caller({"query": query, "key": key, "value": value}, query_mask=query_mask, key_mask=key_mask)
    check_attention(query, key, value, query_mask, key_mask)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "hash_code_len": tau,
        "query_mask": query_mask,
        "key_mask": key_mask,
    }
    return run(EXPECTATION_ATTENTION, variant, caller, arguments)


def expectation_attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    variant: str | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad_out * expectation_attention(query, key, value, ...))`` by query, key
    and value.

    For unit vectors, with ``E_ij`` the expected weight::

        dq_i = sum_j E_ij w_ij (g_i . v_j) k_j
        dk_j = sum_i E_ij w_ij (g_i . v_j) q_i
        dv_j = sum_i E_ij g_i

    The chain through the normalization of query and key follows. ``grad="lower_bound"`` is the
    paper's: ``w = tau / 2``, *not* the derivative. ``grad="exact"`` is the derivative:
    ``w = tau / ((pi - theta) sin theta)``, with both factors held at 1e-3 at least.

    Parameters
    ----------
    grad_out : float ``(..., n_q, d_v)`` in the dtype of ``value``.
    grad : ``"lower_bound"`` or ``"exact"``.
    The others are those of `expectation_attention`.

    Returns
    -------
    ``(grad_query, grad_key, grad_value)``, each in the shape and dtype of its input.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.3.

    >>> x, ones = np.eye(2), np.ones((2, 2))
    >>> grad_query, grad_key, grad_value = expectation_attention_backward(ones, x, x, x, 3)
    >>> grad_value
    array([[1.125, 1.125],
           [1.125, 1.125]])
    """
    tau = checks.integer("hash_code_len", hash_code_len, 1, checks.MAX_CODE_LEN)
    checks.one_of("grad", grad, ("lower_bound", "exact"))
    caller = one_caller({"grad_out": grad_out, "query": query, "key": key, "value": value}, query_mask=query_mask, key_mask=key_mask)
    check_attention(query, key, value, query_mask, key_mask)
    _check_grad_out(grad_out, query, value)
    arguments = {
        "grad_out": grad_out,
        "query": query,
        "key": key,
        "value": value,
        "hash_code_len": tau,
        "grad": grad,
        "query_mask": query_mask,
        "key_mask": key_mask,
    }
    return run(EXPECTATION_ATTENTION_BACKWARD, variant, caller, arguments)


def _check_grad_out(grad_out: Array, query: Array, value: Array) -> None:
    checks.floating("grad_out", grad_out, same_as=("value", value))
    needed = (*query.shape[:-1], value.shape[-1])
    if tuple(grad_out.shape) != needed:
        raise ValueError(f"grad_out: need the shape of the output, {needed}, got {tuple(grad_out.shape)}")


def lsh_attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    query_hash_code: Array,
    key_hash_code: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
    backward_num_hash: int | None = None,
    validate: bool = True,
    variant: str | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of sampled attention for the codes of its forward pass.

    They are those of `expectation_attention_backward` with ``C_ij``, the share of hashes in which
    query and key collide, in place of ``E_ij``. With ``grad="lower_bound"`` the cost can be linear
    in ``n``. With ``grad="exact"`` it is quadratic, since the factor depends on the pair.

    Parameters
    ----------
    query_hash_code, key_hash_code : int32 ``(..., n_q, m)`` and ``(..., n_k, m)``, in
        ``[0, 2**(hash_code_len + oversample))``.
    oversample : ``s`` of the forward pass. The gradient of the value is then that of the smoothed
        cumulation. Those of query and key take the plain collisions of the lowest ``hash_code_len``
        bits, which have the same mean.
    backward_num_hash : from how many of the hashes, the first ones, the gradients of query and key
        come; ``None`` for all. Fewer cost proportionally less, and are a noisier estimate of the
        same gradients.
    The others are those of `expectation_attention_backward` and `lsh_cumulation`.

    Returns
    -------
    ``(grad_query, grad_key, grad_value)``, each in the shape and dtype of its input.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.3.

    >>> x, ones, codes = np.eye(2), np.ones((2, 2)), np.array([[0, 1], [0, 3]], np.int32)
    >>> grad_query, grad_key, grad_value = lsh_attention_backward(ones, x, x, x, codes, codes, 2)
    >>> grad_value
    array([[1.5, 1.5],
           [1.5, 1.5]])
    """
    tau = checks.integer("hash_code_len", hash_code_len, 1, checks.MAX_CODE_LEN)
    checks.one_of("grad", grad, ("lower_bound", "exact"))
    caller = one_caller(
        {
            "grad_out": grad_out,
            "query": query,
            "key": key,
            "value": value,
            "query_hash_code": query_hash_code,
            "key_hash_code": key_hash_code,
        },
        query_mask=query_mask,
        key_mask=key_mask,
    )
    check_attention(query, key, value, query_mask, key_mask)
    _check_grad_out(grad_out, query, value)
    s = checks.oversample(oversample, tau)
    capacity = _check_codes(query_hash_code, key_hash_code, 1 << (tau + s), None, None, limit=1 << (tau + s))
    few = checks.backward_num_hash(backward_num_hash, query_hash_code.shape[-1])
    for name, codes, side, x in (
        ("query_hash_code", query_hash_code, "query", query),
        ("key_hash_code", key_hash_code, "key", key),
    ):
        checks.leading(name, codes, x.shape[:-2], f"those of {side}")
        checks.size(name, codes, -2, x.shape[-2], f"n of {side}")
    if validate:
        _check_code_range(caller, capacity, query_hash_code=query_hash_code, key_hash_code=key_hash_code)
    arguments = {
        "grad_out": grad_out,
        "query": query,
        "key": key,
        "value": value,
        "query_hash_code": query_hash_code,
        "key_hash_code": key_hash_code,
        "hash_code_len": tau,
        "grad": grad,
        "query_mask": query_mask,
        "key_mask": key_mask,
        "oversample": s,
        "backward_num_hash": few,
    }
    return run(LSH_ATTENTION_BACKWARD, variant, caller, arguments)


def yoso_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int = 32,
    hash_code_len: int = 8,
    use_expectation: bool = False,
    signs: Array | None = None,
    planes: Array | None = None,
    rng: Seed = None,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    normalize_output: bool = True,
    layout: Layout = "chained",
    rotations: int | None = None,
    oversample: int = 0,
    return_length: bool = False,
    return_error: bool = False,
    variant: str | None = None,
) -> Any:
    """YOSO attention without gradients: see `yoso_core.yoso_attention`, whose arguments these are.
    That function alone adds hashes up to a ``target_error``.

    ``return_length``: return a tuple, the rows and ``(..., n_q, 1)``, the length of each before it
    was scaled, in float32 at least. Masked rows have length 0. ``ValueError`` where no row is
    scaled. With ``return_error`` the error comes last.
    """
    m, tau = checks.hash_numbers(num_hash, hash_code_len)
    caller = one_caller(
        {
            "query": query,
            "key": key,
            "value": value,
        },
        signs=signs,
        planes=planes,
        query_mask=query_mask,
        key_mask=key_mask,
    )
    check_attention(query, key, value, query_mask, key_mask)
    smoothing = checks.oversample(oversample, tau)
    if signs is not None and planes is not None:
        raise ValueError("planes: give signs or planes, not both")
    if signs is not None:
        _check_signs(signs, query, m, tau + smoothing, layout, caller)
    elif planes is not None:
        _check_planes(planes, query, m, tau + smoothing)
    if return_error:
        checks.spread(m, use_expectation)
    if return_length and not normalize_output:
        raise ValueError("return_length: with normalize_output=False no row is scaled, so there is no length before that")
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "num_hash": m,
        "hash_code_len": tau,
        "use_expectation": bool(use_expectation),
        "signs": signs,
        "planes": planes,
        "layout": layout,
        "rotations": rotations,
        "oversample": smoothing,
        "rng": rng,
        "query_mask": query_mask,
        "key_mask": key_mask,
        "normalize_output": bool(normalize_output),
        "return_length": bool(return_length),
        "return_error": bool(return_error),
    }
    return run(YOSO_ATTENTION, variant, caller, YOSO_ATTENTION.complete(arguments))
