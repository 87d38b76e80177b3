"""Sampled YOSO attention: codes of the heads at hand, kept in as few bits as they need, then the
two rounds of `yoso_core.cpu.rounds`.
"""

from typing import Any

import numpy as np

from yoso_core.cpu.codes import MadeCodes
from yoso_core.cpu.cumulation import by_stored_codes, by_tables, tables_pay
from yoso_core.cpu.expectation import expect
from yoso_core.cpu.hashing import all_codes, check_dim, hash_maker, narrowest
from yoso_core.cpu.precision import common_dtype, rounded, rows, stored_alike, stored_rows
from yoso_core.cpu.views import Array, heads, kept
from yoso_core.reference.hashing import Layout


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
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    normalize_output: bool = True,
    layout: Layout = "chained",
    oversample: int = 0,
    return_length: bool = False,
    return_error: bool = False,
    num_threads: int | None = None,
) -> Array | tuple[Array, ...]:
    """See `yoso_core.reference.yoso_attention`.

    Working memory: tables of 32 MiB (`yoso_core.cpu.rounds.TABLE_BYTES`) at most, whatever ``n``,
    and the codes of one side of the heads at hand, in 1, 2 or 4 bytes each. In half precision the
    sums of those heads, ``4 n_q d_v`` bytes each; of all, where heads are fewer than two a thread.
    Where ``2**(tau + s) > 4 n_k`` all codes are stored, ``4 m (n_q + n_k)`` bytes a head, and
    labels of the same size; a table then takes ``4 n_k d_v`` numbers at most.
    """
    if use_expectation:
        masks = {"query_mask": query_mask, "key_mask": key_mask}
        found = expect(query, key, value, hash_code_len, normalize=normalize_output, num_threads=num_threads, **masks)
        return found if return_length else found[0]
    dtype, bits = common_dtype(query, value), hash_code_len + oversample
    if signs is not None:
        check_dim("query", signs.shape[-1])
    q, k = stored_alike(query, key, dtype=dtype, num_threads=num_threads)
    v = stored_rows(value, dtype)
    keep = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    batch, num_heads, n_q, _ = q.shape
    nonfinite = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    rest: dict[str, Any] = {
        "keep": keep,
        "dtype": dtype,
        "nonfinite": nonfinite,
        "normalize": normalize_output,
        "spread": return_error,
        "num_threads": num_threads,
    }
    make_hash = hash_maker(signs, planes, num_hash, bits, layout)
    if tables_pay(1 << bits, oversample, n_q, k.shape[2]):
        code = narrowest(bits)
        hash = make_hash(leading=query.shape[:-2], dtype=dtype, stored=q.dtype, code=code, by_hash=True)
        of_queries, of_keys = nonfinite.reshape(-1, 1 + n_q), np.zeros((batch * num_heads, k.shape[2]), np.uint8)

        def mark_heads(head0: int, count: int) -> None:
            """A key that is kept and not finite marks its head."""
            if of_keys[head0 : head0 + count].any():
                for head in range(head0, head0 + count):
                    of_queries[head, 0] = (of_keys[head] & keep[1][divmod(head, num_heads)]).any()

        codes = (
            MadeCodes(q, hash, code, of_queries[:, 1:]),
            MadeCodes(k, hash, code, of_keys, made=mark_heads),
        )
        found_rows = by_tables(codes, code, v, 1 << bits, oversample, num_hash=num_hash, stored=False, **rest)
    else:
        query_code, key_code = (heads(all_codes(x, make_hash, num_threads)) for x in (query, key))
        q, k = rows(q, dtype, num_threads), rows(k, dtype, num_threads)
        nonfinite[:, :, 0] = (keep[1] & ~np.isfinite(k).all(axis=-1)).any(axis=-1)
        nonfinite[:, :, 1:] = ~np.isfinite(q).all(axis=-1)
        found_rows = by_stored_codes(query_code, key_code, v, 1 << bits, oversample, **rest)
    leading = query.shape[:-1]
    asked = [found_rows.lengths.reshape(*leading, 1)] if return_length else []
    asked += [found_rows.errors.reshape(leading)] if return_error else []
    out = rounded(found_rows.out.reshape(*leading, value.shape[-1]), value.dtype, num_threads)
    return (out, *asked) if asked else out
