// Gradients of attention, expected and sampled. For unit vectors they all have one form. Rows x
// with companions p walk over the other side, rows y with companions r:
//   grad_unit_i = sum_j C_ij w_ij (p_i . r_j) y_j        grad_companion_i = sum_j C_ij r_j.
// C_ij w_ij (p_i . r_j) is the gradient by the cosine x_i . y_j (grad_cosine). If x are the
// queries, p the gradients of the output, y the keys and r the values, then grad_unit is the
// gradient by the unit queries. With the sides exchanged, grad_unit is the gradient by the unit
// keys, and grad_companion the gradient by the values. l2_normalize_backward turns a gradient by
// unit rows into the gradient by the vectors.
//
// Compiled for VALUE: the type in which gradient_rows and scan_nonfinite_heads store companions,
// and l2_normalize_backward stores vectors.
//
// Arrays are contiguous: unit rows and grad_unit (heads, n, d), companions and grad_companion
// (heads, n, d_v), codes (heads, n, m), masks (heads, n).
#include "common.cuh"
#include "tiles.cuh"

constexpr int THREADS = 128;
constexpr int BLOCKS = sizeof(ACC) == 8 ? 3 : 4;  // that share a multiprocessor: this limits the registers of a thread
#include "pairs.cuh"

constexpr ACC SMALLEST = ACC(1e-3);  // of both factors in the denominator of the exact derivative

constexpr int HASHES = 32;  // at a time
struct alignas(16) FourCodes { int at[4]; };

// The weights of a tile of pairs; before they are known, the codes of one side.
union PairTile {
  Four weights[ROWS][LONG_PAIRS];
  FourCodes codes[ROWS][HASHES / 4 + 1];
};

// Copies the codes of HEIGHT rows from first_row on to a tile: HASHES codes of each, from
// first_hash on. Codes out of range, and codes of masked rows, become `nobody`. No load waits for the mask.
template <int HEIGHT>
__device__ inline void fetch_codes(FourCodes (*tile)[HASHES / 4 + 1], const int* codes, const unsigned char* mask, long long head, int rows,
                                   int first_row, int num_hash, int first_hash, int capacity, int nobody) {
  const int hash = threadIdx.x % HASHES;
#pragma unroll 4
  for (int turn = 0; turn < HEIGHT * HASHES / THREADS; ++turn) {
    const int i = turn * (THREADS / HASHES) + threadIdx.x / HASHES;
    const long long row = head * rows + first_row + i;
    const bool inside = first_hash + hash < num_hash && first_row + i < rows;
    const int code = inside ? codes[row * num_hash + first_hash + hash] : nobody;
    tile[i][hash / 4].at[hash % 4] = in_range(code, capacity) && kept(mask, row) ? code : nobody;
  }
}

// Adds to `met`, for each of a thread's pairs, the number of equal codes in the first 4 fours
// hashes of the tiles.
__device__ inline void count_equal(int (&met)[MY_PAIRS], const FourCodes (*rows)[HASHES / 4 + 1], const FourCodes (*others)[HASHES / 4 + 1],
                                   Position at, int fours) {
  const int across = at.across(at.lane), down = at.down(at.lane);
#pragma unroll 1
  for (int four = 0; four < fours; ++four) {
    FourCodes a[MY_ROWS], b[MY_OTHERS];
#pragma unroll
    for (int i = 0; i < MY_ROWS; ++i) a[i] = rows[down + DOWN * i][four];
#pragma unroll
    for (int j = 0; j < MY_OTHERS; ++j) b[j] = others[across + ACROSS * j][four];
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
#pragma unroll
      for (int u = 0; u < 4; ++u) met[e] += a[e / MY_OTHERS].at[u] == b[e % MY_OTHERS].at[u];
    }
  }
}

// chance = 1 - theta / pi and sine = sin(theta) of a thread's pairs. Beyond a cosine of
// `steep_beyond` they come from the unit vectors: `unit` from `row` on, and `other_unit` from
// `other` on. Such pairs go through two tiles in shared memory, since registers cannot be indexed.
__device__ inline void measure_angles(ACC (&chance)[MY_PAIRS], ACC (&sine)[MY_PAIRS], const ACC (&cosine)[MY_PAIRS], ACC steep_beyond,
                                      Position at, const ACC* unit, long long row, const ACC* other_unit, long long other, int dim,
                                      Four (*chance_tile)[LONG_PAIRS], Four (*sine_tile)[LONG_PAIRS]) {
  unsigned steep = 0;  // one bit for each of the thread's pairs
#pragma unroll
  for (int e = 0; e < MY_PAIRS; ++e) {
    const ACC size = smaller(ACC(1), ACC(fabs(cosine[e])));
    steep |= unsigned(size > steep_beyond) << e;
    chance[e] = chance_of(cosine[e]);
    sine[e] = sqrt((ACC(1) - size) * (ACC(1) + size));
  }
  if (!__any_sync(FULL_WARP, steep)) return;
#pragma unroll
  for (int e = 0; e < MY_PAIRS; ++e) {
    entry(chance_tile, at.row(at.lane, e), at.other(at.lane, e)) = chance[e];
    entry(sine_tile, at.row(at.lane, e), at.other(at.lane, e)) = sine[e];
  }
  measure_steep(steep, at, unit + row * dim, other_unit + other * dim, dim, [&](int i, int j, ACC found_chance, ACC found_sine) {
    entry(chance_tile, i, j) = found_chance;
    entry(sine_tile, i, j) = found_sine;
  });
#pragma unroll
  for (int e = 0; e < MY_PAIRS; ++e) {
    chance[e] = entry(chance_tile, at.row(at.lane, e), at.other(at.lane, e));
    sine[e] = entry(sine_tile, at.row(at.lane, e), at.other(at.lane, e));
  }
}

// gradient_rows
//   A block takes 32 rows and one slice of 64 columns (32 in float64) of both results, and walks
//   over the others 32 (16) at a time:
//   1. It copies rows, others and the companions of both to shared memory, 64 (32) coordinates at a
//      time. The block's own rows stay there if they have no more coordinates. The slice comes
//      last, so that the tiles then hold the columns that step 4 adds up.
//   2. A thread takes 4 rows by 2 others (2 by 2). It computes cosines and products p . r in
//      registers. If there are codes, they go to shared memory, 32 hashes at a time, where the
//      weights will be, and are compared.
//   3. It writes C and grad_cosine = C w (p . r) to shared memory. w is tau / 2, or if `exact`
//      tau / ((pi - theta) sin(theta)).
//   4. A thread takes 4 (2) rows by 4 columns. It adds weights times companions and grad_cosine
//      times others to sums in registers.
//   Without codes, C is the expected weight (1 - theta / pi)^tau. Beyond a cosine of 0.99, angle
//   and sine come from differences. With codes they do so beyond 0.9: such a C is exact, so the
//   error of the sine would show. If `grad_companion` is null, it is not computed. Grid (rows / 32,
//   slices of columns, heads). Shared memory: 43 KiB (37 in float64). Moves, for each block,
//   n_other (d + d_v) numbers, from the L2 cache except for the first block of a head, and n_other
//   m codes. Does n n_other (4 d + 2 d_v) operations for each head, 2 d_v more for grad_companion,
//   and m comparisons of codes; every further slice computes cosines and products again.
//   Deterministic: every sum is taken in the order of the others, first within a tile, then over
//   the tiles.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_rows(const ACC* __restrict__ unit, const VALUE* __restrict__ companion, const int* __restrict__ code,
              const unsigned char* __restrict__ mask, const ACC* __restrict__ other_unit, const VALUE* __restrict__ other_companion,
              const int* __restrict__ other_code, const unsigned char* __restrict__ other_mask, ACC* __restrict__ grad_unit,
              VALUE* __restrict__ grad_companion, int n, int n_other, int dim, int companion_dim, int num_hash, int hash_code_len,
              int exact) {
  __shared__ Four unit_tile[ROWS][LONG_ROW];
  __shared__ Four companion_tile[ROWS][LONG_ROW];
  __shared__ Four other_tile[OTHERS][LONG_ROW];
  __shared__ Four other_companion_tile[OTHERS][LONG_ROW];
  __shared__ PairTile first_pairs;   // C
  __shared__ PairTile second_pairs;  // grad_cosine

  const Position at = my_position();
  const int across = at.across(at.lane), down = at.down(at.lane);
  const int first_row = blockIdx.x * ROWS, slice = blockIdx.y, first_column = slice * COLUMNS + 4 * across;
  const long long head = blockIdx.z;
  const int chunks = ceil_div(larger(dim, companion_dim), DIMS);
  const bool sampled = code != nullptr;
  const ACC tau = ACC(hash_code_len), steep_beyond = sampled && exact ? ACC(0.9) : ACC(0.99);

  Four unit_sum[MY_ROWS] = {}, companion_sum[MY_ROWS] = {};
  for (int first_other = 0; first_other < n_other; first_other += OTHERS) {
    ACC cosine[MY_PAIRS] = {}, product[MY_PAIRS] = {};
    for (int chunk = 1; chunk <= chunks; ++chunk) {
      const int from = (slice + chunk) % chunks * DIMS;
      __syncthreads();  // every thread has read the tiles
      if (first_other == 0 || chunks > 1) {
        fetch_rows<ROWS, DIMS>(unit_tile, unit, mask, head, n, first_row, dim, from);
        fetch_rows<ROWS, DIMS>(companion_tile, companion, mask, head, n, first_row, companion_dim, from);
      }
      fetch_rows<OTHERS, DIMS>(other_tile, other_unit, other_mask, head, n_other, first_other, dim, from);
      fetch_rows<OTHERS, DIMS>(other_companion_tile, other_companion, other_mask, head, n_other, first_other, companion_dim, from);
      __syncthreads();
      add_products(cosine, unit_tile, other_tile, at, dim - from);
      add_products(product, companion_tile, other_companion_tile, at, companion_dim - from);
    }

    int met[MY_PAIRS] = {};
    for (int first_hash = 0; sampled && first_hash < num_hash; first_hash += HASHES) {
      __syncthreads();  // the codes before have been compared
      fetch_codes<ROWS>(first_pairs.codes, code, mask, head, n, first_row, num_hash, first_hash, 1 << hash_code_len, -1);
      fetch_codes<OTHERS>(second_pairs.codes, other_code, other_mask, head, n_other, first_other, num_hash, first_hash, 1 << hash_code_len,
                          -2);
      __syncthreads();
      count_equal(met, first_pairs.codes, second_pairs.codes, at, ceil_div(smaller(HASHES, num_hash - first_hash), 4));
    }
    if (sampled) __syncthreads();  // weights replace the codes

    ACC chance[MY_PAIRS], sine[MY_PAIRS];  // 1 - theta / pi, sin(theta)
    measure_angles(chance, sine, cosine, steep_beyond, at, unit, head * n + first_row, other_unit, head * n_other + first_other, dim,
                   first_pairs.weights, second_pairs.weights);

    ACC weight[MY_PAIRS];
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) weight[e] = chance[e];
    if (!sampled) to_power(weight, hash_code_len);
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
      const int i = at.row(at.lane, e), j = at.other(at.lane, e), other = first_other + j;
      const bool inside = other < n_other && kept(other_mask, head * n_other + other);
      if (sampled) weight[e] = ACC(met[e]) / ACC(num_hash);
      const ACC factor = exact ? tau / (larger(SMALLEST, PI * chance[e]) * larger(SMALLEST, sine[e])) : tau / 2;
      entry(first_pairs.weights, i, j) = inside ? weight[e] : ACC(0);
      entry(second_pairs.weights, i, j) = inside ? weight[e] * factor * product[e] : ACC(0);
    }
    __syncthreads();
    if (first_column < dim) add_weighted(unit_sum, second_pairs.weights, other_tile, at);
    if (grad_companion != nullptr && first_column < companion_dim) {
      add_weighted(companion_sum, first_pairs.weights, other_companion_tile, at);
    }
  }

#pragma unroll
  for (int i = 0; i < MY_ROWS; ++i) {
    if (first_row + down + DOWN * i >= n) continue;
    const long long row = head * n + first_row + down + DOWN * i;
    const bool keep = kept(mask, row);  // nobody reads masked rows of grad_unit
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int column = first_column + u;
      if (column < dim) grad_unit[row * dim + column] = unit_sum[i].at[u];
      if (grad_companion != nullptr && column < companion_dim) {
        grad_companion[row * companion_dim + column] = narrow<VALUE>(keep ? companion_sum[i].at[u] : ACC(0));
      }
    }
  }
}

constexpr int WARPS = 8;

// scan_nonfinite_heads
//   Sets head_nonfinite to 1 for every head in which a kept row, or its companion, holds an
//   infinity or NaN: such a row makes every gradient of the other side NaN. A warp takes one row,
//   and a block has 8. Moves one unit entry and d_v numbers in for each row, and an atomic write
//   for each non-finite row. Deterministic: every write is the same.
extern "C" __global__ void scan_nonfinite_heads(const ACC* __restrict__ unit, const VALUE* __restrict__ companion,
                                                const unsigned char* __restrict__ mask, int* __restrict__ head_nonfinite,
                                                long long num_rows, long long rows_per_head, int dim, int companion_dim) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows || !kept(mask, row)) return;  // the whole warp
  bool finite = is_finite(unit[row * dim]);         // normalize_rows has made non-finite rows NaN throughout
  for (int i = lane; i < companion_dim; i += 32) finite = finite && is_finite(widen(companion[row * companion_dim + i]));
  if (!__all_sync(FULL_WARP, finite) && lane == 0) atomicOr(&head_nonfinite[row / rows_per_head], 1);
}

// l2_normalize_backward
//   Turns the gradient g by a unit row u = x / |x| into the gradient by x:
//   factor (g - (g . u) u) / |x|. Masked rows and zero rows get zeros. All other rows of a
//   non-finite head get NaN; `head_nonfinite` may be null. A warp takes one row, and a block has 8.
//   Moves d vector entries and d gradient entries in, three times more from cache, and d out for
//   each row. Deterministic.
extern "C" __global__ void l2_normalize_backward(const VALUE* __restrict__ vectors, const ACC* __restrict__ grad_unit,
                                                 const unsigned char* __restrict__ mask, const int* __restrict__ head_nonfinite,
                                                 VALUE* __restrict__ out, long long num_rows, long long rows_per_head, int dim,
                                                 ACC factor) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows) return;  // the whole warp
  const VALUE* x = vectors + row * dim;
  const ACC* g = grad_unit + row * dim;
  VALUE* y = out + row * dim;

  const bool keep = kept(mask, row);
  const RowSize size = keep ? size_of_row(x, dim, lane) : RowSize{};
  if (!keep || (size.finite && size.scale == ACC(0))) {
    for (int i = lane; i < dim; i += 32) y[i] = narrow<VALUE>(ACC(0));
    return;
  }
  const bool nonfinite = !size.finite || (head_nonfinite != nullptr && head_nonfinite[row / rows_per_head]);
  ACC along = 0;
  for (int i = lane; i < dim; i += 32) along += g[i] * size.unit(x[i]);
  along = warp_sum(along);
  for (int i = lane; i < dim; i += 32) {
    const ACC across = factor * (g[i] - along * size.unit(x[i]));
    y[i] = narrow<VALUE>(nonfinite ? not_a_number() : across / size.length / size.scale);
  }
}
