// Gradients of attention, expected and sampled. For unit vectors all of them have one form: rows x
// with companions p walk over the others, rows y with companions r,
//   pull_i = sum_j C_ij w_ij (p_i . r_j) y_j        spread_i = sum_j C_ij r_j.
// With queries and gradients of the output as x, p and keys and values as y, r, pull is the
// gradient of the query; with the roles exchanged it is that of the key, and spread that of the
// value. Then pull goes through the normalization of x.
//
// Compiled for VALUE: in pull_rows and note_spoiled_heads how companions are stored, in
// through_normalization how the vectors are.
//
// Arrays are contiguous: unit rows and pull (heads, n, d), companions and spread (heads, n, d_v),
// codes (heads, n, m), masks (heads, n).
#include "common.cuh"
#include "tiles.cuh"

constexpr int THREADS = 128;
constexpr int BLOCKS = sizeof(ACC) == 8 ? 3 : 4;  // that share a multiprocessor: so many registers may a thread have
#include "pairs.cuh"

constexpr ACC SMALLEST = ACC(1e-3);  // both factors of the exact derivative's denominator are held at this at least

constexpr int HASHES = 32;  // at one time
struct alignas(16) FourCodes { int at[4]; };

// Weights of a tile of pairs; before they are known, the codes of one side.
union PairTile {
  Four weights[ROWS][LONG_PAIRS];
  FourCodes codes[ROWS][HASHES / 4 + 1];
};

// Hashes first_hash ... of rows first_row ... go to a tile. Whatever is no code, or is out of
// range, is `nobody`.
template <int HEIGHT>
__device__ inline void fetch_codes(FourCodes (*tile)[HASHES / 4 + 1], const int* codes, const unsigned char* mask, long long head, int rows,
                                   int first_row, int num_hash, int first_hash, int capacity, int nobody) {
  const int h = threadIdx.x % HASHES;
  for (int t = threadIdx.x / HASHES; t < HEIGHT; t += THREADS / HASHES) {
    const long long row = head * rows + first_row + t;
    const bool there = first_hash + h < num_hash && first_row + t < rows && kept(mask, row);
    const int code = there ? codes[row * num_hash + first_hash + h] : nobody;
    tile[t][h / 4].at[h % 4] = in_range(code, capacity) ? code : nobody;
  }
}

// pull_rows
//   A block takes 32 rows and one slice of 64 columns (32 in float64), of pull and of spread alike,
//   and walks over the others, 32 (16) at a time:
//   1. rows, companions and others go to shared memory, 64 (32) coordinates at a time; the block's
//      own stay there if they have no more. The slice comes last, so that the tiles then hold the
//      columns to be added up;
//   2. a thread takes 4 rows by 2 others (2 by 2): cosines and products p . r in registers. With
//      codes, these go to shared memory, 32 hashes at a time, where the weights will stand, and are
//      compared;
//   3. C and C w (p . r) go to shared memory; w is tau / 2, or if `exact` tau / ((pi - theta)
//      sin(theta));
//   4. a thread takes 4 (2) rows by 4 columns: weights times companions and weights times others,
//      to sums in registers.
//   Without codes C is the expected weight (1 - theta / pi)^tau. Beyond a cosine of 0.99 angle and
//   sine come from differences; with codes beyond 0.9, since such a C has no error beside which
//   that of a sine is small. `spread` may be null: it is then not made. grid (rows / 32, slices of
//   columns, heads). Shared memory: 43 KiB (37 in float64). Moves, for each block, n_other (d +
//   d_v) numbers, from the L2 cache but for the first block of a head, and n_other m codes. In all
//   n n_other (4 d + 2 d_v) operations for each head, 2 d_v more for spread, m comparisons with
//   codes; cosines and products again for each slice more. Deterministic: every sum is taken in the
//   order of the others, by itself for each tile.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
pull_rows(const ACC* __restrict__ unit, const VALUE* __restrict__ companion, const int* __restrict__ code,
          const unsigned char* __restrict__ mask, const ACC* __restrict__ other_unit, const VALUE* __restrict__ other_companion,
          const int* __restrict__ other_code, const unsigned char* __restrict__ other_mask, ACC* __restrict__ pull,
          VALUE* __restrict__ spread, int n, int n_other, int dim, int companion_dim, int num_hash, int hash_code_len, int exact) {
  __shared__ Four unit_tile[ROWS][LONG_ROW];
  __shared__ Four companion_tile[ROWS][LONG_ROW];
  __shared__ Four other_tile[OTHERS][LONG_ROW];
  __shared__ Four other_companion_tile[OTHERS][LONG_ROW];
  __shared__ PairTile first_pairs;   // C
  __shared__ PairTile second_pairs;  // C w (p . r)

  const Place at = my_place();
  const int across = at.across(at.lane), down = at.down(at.lane);
  const int first_row = blockIdx.x * ROWS, slice = blockIdx.y, first_column = slice * COLUMNS + 4 * across;
  const long long head = blockIdx.z;
  const int chunks = ceil_div(larger(dim, companion_dim), DIMS);
  const bool sampled = code != nullptr;
  const ACC tau = ACC(hash_code_len), steep_beyond = sampled && exact ? ACC(0.9) : ACC(0.99);

  Four pull_sum[MY_ROWS] = {}, spread_sum[MY_ROWS] = {};
  for (int first_other = 0; first_other < n_other; first_other += OTHERS) {
    ACC cosine[MY_PAIRS] = {}, product[MY_PAIRS] = {};
    for (int chunk = 1; chunk <= chunks; ++chunk) {
      const int from = (slice + chunk) % chunks * DIMS;
      __syncthreads();  // the tiles have been read
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
#pragma unroll 1
      for (int h = 0; h < ceil_div(smaller(HASHES, num_hash - first_hash), 4); ++h) {
        FourCodes a[MY_ROWS], b[MY_OTHERS];
#pragma unroll
        for (int i = 0; i < MY_ROWS; ++i) a[i] = first_pairs.codes[down + DOWN * i][h];
#pragma unroll
        for (int j = 0; j < MY_OTHERS; ++j) b[j] = second_pairs.codes[across + ACROSS * j][h];
#pragma unroll
        for (int e = 0; e < MY_PAIRS; ++e) {
#pragma unroll
          for (int u = 0; u < 4; ++u) met[e] += a[e / MY_OTHERS].at[u] == b[e % MY_OTHERS].at[u];
        }
      }
    }
    if (sampled) __syncthreads();  // weights take the place of the codes

    ACC chance[MY_PAIRS], sine[MY_PAIRS];  // 1 - theta / pi, sin(theta)
    unsigned steep = 0;                    // one bit for each of the thread's pairs
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
      const ACC size = smaller(ACC(1), ACC(fabs(cosine[e])));
      steep |= unsigned(size > steep_beyond) << e;
      chance[e] = chance_of(cosine[e]);
      sine[e] = sqrt((ACC(1) - size) * (ACC(1) + size));
    }
    if (__any_sync(FULL_WARP, steep)) {  // through shared memory, since no register can be chosen by a number
#pragma unroll
      for (int e = 0; e < MY_PAIRS; ++e) {
        entry(first_pairs.weights, at.row(at.lane, e), at.other(at.lane, e)) = chance[e];
        entry(second_pairs.weights, at.row(at.lane, e), at.other(at.lane, e)) = sine[e];
      }
      const ACC* rows = unit + (head * n + first_row) * dim;
      const ACC* others = other_unit + (head * n_other + first_other) * dim;
      measure_steep(steep, at, rows, others, dim, [&](int i, int j, ACC found_chance, ACC found_sine) {
        entry(first_pairs.weights, i, j) = found_chance;
        entry(second_pairs.weights, i, j) = found_sine;
      });
#pragma unroll
      for (int e = 0; e < MY_PAIRS; ++e) {
        chance[e] = entry(first_pairs.weights, at.row(at.lane, e), at.other(at.lane, e));
        sine[e] = entry(second_pairs.weights, at.row(at.lane, e), at.other(at.lane, e));
      }
    }

    ACC weight[MY_PAIRS];
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) weight[e] = chance[e];
    if (!sampled) to_power(weight, hash_code_len);
#pragma unroll
    for (int e = 0; e < MY_PAIRS; ++e) {
      const int i = at.row(at.lane, e), j = at.other(at.lane, e), other = first_other + j;
      const bool there = other < n_other && kept(other_mask, head * n_other + other);
      if (sampled) weight[e] = ACC(met[e]) / ACC(num_hash);
      const ACC factor = exact ? tau / (larger(SMALLEST, PI * chance[e]) * larger(SMALLEST, sine[e])) : tau / 2;
      entry(first_pairs.weights, i, j) = there ? weight[e] : ACC(0);
      entry(second_pairs.weights, i, j) = there ? weight[e] * factor * product[e] : ACC(0);
    }
    __syncthreads();
    if (first_column < dim) add_weighted(pull_sum, second_pairs.weights, other_tile, at);
    if (spread != nullptr && first_column < companion_dim) add_weighted(spread_sum, first_pairs.weights, other_companion_tile, at);
  }

#pragma unroll
  for (int i = 0; i < MY_ROWS; ++i) {
    if (first_row + down + DOWN * i >= n) continue;
    const long long row = head * n + first_row + down + DOWN * i;
    const bool keep = kept(mask, row);  // of pull, nobody reads the others
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = first_column + c;
      if (column < dim) pull[row * dim + column] = pull_sum[i].at[c];
      if (spread != nullptr && column < companion_dim) {
        spread[row * companion_dim + column] = narrow<VALUE>(keep ? spread_sum[i].at[c] : ACC(0));
      }
    }
  }
}

constexpr int WARPS = 8;

// note_spoiled_heads
//   Says of each head whether a row that is kept, or its companion, holds an infinity or NaN: such
//   a row spoils what the other side gets. A warp takes one row, blocks have 8. Moves 1 unit entry
//   and d_v numbers in for each row, and an atomic write for each that is spoiled. Deterministic:
//   whoever writes, writes 1.
extern "C" __global__ void note_spoiled_heads(const ACC* __restrict__ unit, const VALUE* __restrict__ companion,
                                              const unsigned char* __restrict__ mask, int* __restrict__ head_spoiled, long long num_rows,
                                              long long rows_per_head, int dim, int companion_dim) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows || !kept(mask, row)) return;  // the whole warp
  bool finite = is_finite(unit[row * dim]);         // a row that is not finite has been made NaN throughout
  for (int c = lane; c < companion_dim; c += 32) finite = finite && is_finite(widen(companion[row * companion_dim + c]));
  if (!__all_sync(FULL_WARP, finite) && lane == 0) atomicOr(&head_spoiled[row / rows_per_head], 1);
}

// through_normalization
//   From the gradient by a unit row u = x / |x| to that by x: factor (f - (f . u) u) / |x|. Rows
//   that are masked, and zero rows, get zeros, what is left of a spoiled head (`head_spoiled` may
//   be null) gets NaN. A warp takes one row, blocks have 8. Moves d vector entries and d of the
//   gradient in, again from cache three times, and d out. Deterministic.
extern "C" __global__ void through_normalization(const VALUE* __restrict__ vectors, const ACC* __restrict__ pull,
                                                 const unsigned char* __restrict__ mask, const int* __restrict__ head_spoiled,
                                                 VALUE* __restrict__ out, long long num_rows, long long rows_per_head, int dim,
                                                 ACC factor) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows) return;  // the whole warp
  const VALUE* x = vectors + row * dim;
  const ACC* f = pull + row * dim;
  VALUE* y = out + row * dim;

  const bool keep = kept(mask, row);
  const RowSize size = keep ? size_of_row(x, dim, lane) : RowSize{};
  if (!keep || (size.finite && size.scale == ACC(0))) {
    for (int c = lane; c < dim; c += 32) y[c] = narrow<VALUE>(ACC(0));
    return;
  }
  const bool spoiled = !size.finite || (head_spoiled != nullptr && head_spoiled[row / rows_per_head]);
  ACC along = 0;
  for (int c = lane; c < dim; c += 32) along += f[c] * size.unit(x[c]);
  along = warp_sum(along);
  for (int c = lane; c < dim; c += 32) {
    const ACC across = factor * (f[c] - along * size.unit(x[c]));
    y[c] = narrow<VALUE>(spoiled ? not_a_number() : across / size.length / size.scale);
  }
}
