// Expected attention: out_i = sum_j (1 - arccos(q_i . k_j) / pi)^tau v_j for unit q and k. It works
// in blocks and stores no matrix of weights.
//
// Compiled for VALUE, and for OUT, the type in which the result is stored.
//
// Arrays are contiguous: query, key (heads, n, d), value (heads, n_k, d_v), out (heads, n_q, d_v),
// masks (heads, n).
#include "common.cuh"
#include "tiles.cuh"

constexpr int THREADS = 256;
constexpr int BLOCKS = sizeof(ACC) == 8 ? 2 : 3;  // that share a multiprocessor: this limits the registers of a thread
#include "pairs.cuh"

constexpr ACC STEEP = ACC(0.99);  // beyond this cosine arccos is not accurate enough

// normalize_rows
//   A warp scales one row to unit length; the row is stored as VALUE. It is divided by its largest
//   entry first, so that no square overflows or vanishes. A zero row stays zero, and a non-finite
//   row becomes NaN. A block has 8 rows. Moves d numbers in (twice more from cache) and d out for
//   each row. Deterministic.
extern "C" __global__ void normalize_rows(const VALUE* __restrict__ vectors, ACC* __restrict__ unit, long long rows, int dim) {
  const int lane = threadIdx.x;
  const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // the whole warp
  const VALUE* vector = vectors + row * dim;

  const RowSize size = size_of_row(vector, dim, lane);
  for (int i = lane; i < dim; i += 32) unit[row * dim + i] = size.finite ? size.unit(vector[i]) : not_a_number();
}

// expectation
//   A block takes 64 queries and 64 value dims (32 of them in float64), and walks over the keys 32
//   (16) at a time:
//   1. It copies queries, keys and values to shared memory, 64 (32) coordinates at a time. The
//      queries stay there if they have no more coordinates.
//   2. A thread takes 4 queries by 2 keys (2 by 2). It computes cosines in registers and writes
//      weights to shared memory.
//   3. A thread takes 4 (2) queries by 4 value dims. It adds weights times values to sums in
//      registers.
//   Every product reads shared memory four entries at a time. Rows there are four entries longer
//   than their content, so that the rows that a warp reads at a time start in different banks.
//   If a cosine is beyond +-0.99, the whole warp computes |q - k| and |q + k| of that pair.
//   Grid (queries / 64, slices of value dims, heads). Shared memory: 43 KiB (37 in float64). Moves,
//   for each block, n_k (d + 64) numbers, from the L2 cache except for the first block of a head:
//   16 multiply-adds to a byte. Does 2 n_q n_k (d + d_v) operations and n_q n_k arccosines for each
//   head; every slice of 64 value dims computes the cosines again. Deterministic: every sum is
//   taken in the order of the keys, first within a tile, then over the tiles.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
expectation(const ACC* __restrict__ unit_query, const ACC* __restrict__ unit_key, const VALUE* __restrict__ value,
            const unsigned char* __restrict__ query_mask, const unsigned char* __restrict__ key_mask, OUT* __restrict__ out, int n_q,
            int n_k, int dim, int value_dim, int hash_code_len) {
  __shared__ Four query_tile[ROWS][LONG_ROW];
  __shared__ Four key_tile[OTHERS][LONG_ROW];
  __shared__ Four value_tile[OTHERS][COLUMNS / 4];
  __shared__ Four weight_tile[ROWS][LONG_PAIRS];

  const Position at = my_position();
  const int across = at.across(at.lane), down = at.down(at.lane);
  const int first_query = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS;
  const long long head = blockIdx.z;

  Four sum[MY_ROWS] = {};
  for (int first_key = 0; first_key < n_k; first_key += OTHERS) {
    ACC x[MY_PAIRS] = {};  // cosines, then chances, then weights
    for (int first_dim = 0; first_dim < dim; first_dim += DIMS) {
      __syncthreads();  // every thread has read the tiles
      if (first_key == 0 || dim > DIMS) fetch_rows<ROWS, DIMS>(query_tile, unit_query, query_mask, head, n_q, first_query, dim, first_dim);
      fetch_rows<OTHERS, DIMS>(key_tile, unit_key, key_mask, head, n_k, first_key, dim, first_dim);
      if (first_dim == 0) fetch_rows<OTHERS, COLUMNS>(value_tile, value, key_mask, head, n_k, first_key, value_dim, first_column);
      __syncthreads();
      add_products(x, query_tile, key_tile, at, dim - first_dim);
    }

    unsigned steep = 0;  // one bit for each of the thread's pairs
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
      steep |= unsigned(ACC(fabs(x[e])) > STEEP) << e;
      x[e] = chance_of(x[e]);
    }
    to_power(x, hash_code_len);
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) entry(weight_tile, at.row(at.lane, e), at.other(at.lane, e)) = x[e];
    const ACC* queries = unit_query + (head * n_q + first_query) * dim;
    const ACC* keys = unit_key + (head * n_k + first_key) * dim;
    measure_steep(steep, at, queries, keys, dim, [&](int i, int j, ACC chance, ACC) {
      ACC weight[1] = {chance};
      to_power(weight, hash_code_len);
      entry(weight_tile, i, j) = weight[0];
    });
    __syncthreads();
    if (first_column + 4 * across < value_dim) add_weighted(sum, weight_tile, value_tile, at);
  }

#pragma unroll
  for (int i = 0; i < MY_ROWS; ++i) {
    const int query = first_query + down + DOWN * i;
    const long long row = head * n_q + query;
    if (query >= n_q) continue;
    const bool keep = kept(query_mask, row), nonfinite = keep && unit_query[row * dim] != unit_query[row * dim];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int column = first_column + 4 * across + u;
      const ACC result = !keep ? ACC(0) : nonfinite ? not_a_number() : nan_unless_finite(sum[i].at[u]);
      if (column < value_dim) out[row * value_dim + column] = narrow<OUT>(result);
    }
  }
}
