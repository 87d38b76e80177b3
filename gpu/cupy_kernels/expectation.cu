// Expected attention: out_i = sum_j (1 - arccos(q_i . k_j) / pi)^tau v_j for unit q and k, blocked, so that no matrix of weights is stored.
//
// Compiled for VALUE, and for OUT, how the result is stored.
//
// Arrays are contiguous: query, key (heads, n, d), value (heads, n_k, d_v), out (heads, n_q, d_v), masks (heads, n).
#include "common.cuh"
#include "tiles.cuh"

constexpr ACC INVERSE_PI = ACC(0.318309886183790671538);
constexpr ACC STEEP = ACC(0.99);  // beyond this cosine arccos has lost too much: theta = 2 atan2(|q - k|, |q + k|)

// normalize_rows
//   A warp scales one row to unit length; VALUE is how the row is stored. It is divided by its largest entry first, so that no square
//   overflows or vanishes. A zero row stays zero, a row that is not finite becomes NaN.
//   Blocks of 8 rows. Moves d numbers in (again from cache, twice) and d out for each row. Deterministic.
extern "C" __global__ void normalize_rows(const VALUE* __restrict__ vectors, ACC* __restrict__ unit, long long rows, int dim) {
  const int lane = threadIdx.x;
  const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // the whole warp
  const VALUE* vector = vectors + row * dim;

  ACC largest = 0;
  bool finite = true;
  for (int c = lane; c < dim; c += 32) {
    const ACC x = widen(vector[c]);
    largest = larger(largest, ACC(fabs(x)));
    finite = finite && is_finite(x);
  }
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  finite = __all_sync(FULL_WARP, finite);
  const ACC scale = largest > ACC(0) ? largest : ACC(1);

  ACC squares = 0;
  for (int c = lane; c < dim; c += 32) {
    const ACC x = widen(vector[c]) / scale;
    squares += x * x;
  }
  squares = warp_sum(squares);
  const ACC length = squares > ACC(0) ? ACC(sqrt(squares)) : ACC(1);
  for (int c = lane; c < dim; c += 32) unit[row * dim + c] = finite ? widen(vector[c]) / scale / length : not_a_number();
}

constexpr int THREADS = 256;
constexpr int BLOCKS = sizeof(ACC) == 8 ? 2 : 3;     // that share a multiprocessor: so many registers may a thread have
constexpr int QUERIES = 64;                          // of a block
constexpr int KEYS = sizeof(ACC) == 8 ? 16 : 32;     // at one time
constexpr int DIMS = sizeof(ACC) == 8 ? 32 : 64;     // coordinates at one time
constexpr int COLUMNS = DIMS;                        // value dims of a block
constexpr int ACROSS = COLUMNS / 4, DOWN = THREADS / ACROSS;  // the threads as a rectangle: keys or columns across, queries down
constexpr int MY_QUERIES = QUERIES / DOWN, MY_KEYS = KEYS / ACROSS;

// Rows first_row ... of a head, WIDTH of their entries from first_dim on, go to a tile. Rows that are masked, and what lies beyond the
// matrix, are zeros: nothing of a masked row is read.
template <int ROWS, int WIDTH, int STRIDE, class T>
__device__ inline void fetch_rows(Four (*tile)[STRIDE], const T* matrix, const unsigned char* mask, long long head, int rows, int first_row,
                                  int dim, int first_dim) {
  const int c = threadIdx.x % WIDTH;
#pragma unroll 4
  for (int t = threadIdx.x / WIDTH; t < ROWS; t += THREADS / WIDTH) {
    const long long row = head * rows + first_row + t;
    const bool there = first_dim + c < dim && first_row + t < rows && kept(mask, row);
    tile[t][c / 4].at[c % 4] = there ? widen(matrix[row * dim + first_dim + c]) : ACC(0);
  }
}

// Every entry to the power of an exponent of at least 1, by squaring.
template <int N> __device__ inline void to_power(ACC (&x)[N], int exponent) {
  ACC square[N];
#pragma unroll
  for (int e = 0; e < N; ++e) square[e] = x[e], x[e] = ACC(1);
  for (; exponent > 0; exponent /= 2) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (exponent % 2) x[e] *= square[e];
      square[e] *= square[e];
    }
  }
}

// expectation
//   A block takes 64 queries and 64 value dims (32 of them in float64), and walks over the keys 32 (16) at a time:
//   1. queries, keys and values go to shared memory, 64 (32) coordinates at a time; queries stay there if they have no more;
//   2. a thread takes 4 queries by 2 keys (2 by 2): cosines in registers, weights to shared memory;
//   3. a thread takes 4 (2) queries by 4 value dims: weights times values, to sums in registers.
//   Every product reads shared memory four entries at a time, in rows that are four entries longer than their content, so that the rows
//   a warp reads at one time start in different banks.
//   Where a cosine is beyond 0.99 on either side, the whole warp takes |q - k| and |q + k| of that pair together.
//   grid (queries / 64, slices of value dims, heads). Shared memory: 43 KiB (37 in float64).
//   Moves, for each block, n_k (d + 64) numbers, from the L2 cache but for the first block of a head: 16 multiply-adds to a byte.
//   In all 2 n_q n_k (d + d_v) operations and n_q n_k arccosines for each head, the cosines again for each slice of 64.
//   Deterministic: every sum is taken in the order of the keys, by itself for each tile.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
expectation(const ACC* __restrict__ unit_query, const ACC* __restrict__ unit_key, const VALUE* __restrict__ value,
            const unsigned char* __restrict__ query_mask, const unsigned char* __restrict__ key_mask, OUT* __restrict__ out, int n_q,
            int n_k, int dim, int value_dim, int hash_code_len) {
  __shared__ Four query_tile[QUERIES][DIMS / 4 + 1];
  __shared__ Four key_tile[KEYS][DIMS / 4 + 1];
  __shared__ Four value_tile[KEYS][COLUMNS / 4];
  __shared__ Four weight_tile[QUERIES][KEYS / 4 + 1];

  // A warp is 8 threads across and 4 down, so that it reads few different rows at one time.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_across = warp % (ACROSS / 8) * 8, warp_down = warp / (ACROSS / 8) * 4;
  const int across = warp_across + lane % 8, down = warp_down + lane / 8;
  const int first_query = blockIdx.x * QUERIES, first_column = blockIdx.y * COLUMNS;
  const long long head = blockIdx.z;

  Four sum[MY_QUERIES] = {};
  for (int first_key = 0; first_key < n_k; first_key += KEYS) {
    ACC x[MY_QUERIES * MY_KEYS] = {};  // cosines, then chances, then weights
    for (int first_dim = 0; first_dim < dim; first_dim += DIMS) {
      __syncthreads();  // the tiles have been read
      if (first_key == 0 || dim > DIMS) {
        fetch_rows<QUERIES, DIMS>(query_tile, unit_query, query_mask, head, n_q, first_query, dim, first_dim);
      }
      fetch_rows<KEYS, DIMS>(key_tile, unit_key, key_mask, head, n_k, first_key, dim, first_dim);
      if (first_dim == 0) fetch_rows<KEYS, COLUMNS>(value_tile, value, key_mask, head, n_k, first_key, value_dim, first_column);
      __syncthreads();
      ACC part[MY_QUERIES * MY_KEYS] = {};
#pragma unroll 1
      for (int r = 0; r < ceil_div(smaller(DIMS, dim - first_dim), 4); ++r) {
        Four q[MY_QUERIES], k[MY_KEYS];
#pragma unroll
        for (int i = 0; i < MY_QUERIES; ++i) q[i] = query_tile[down + DOWN * i][r];
#pragma unroll
        for (int j = 0; j < MY_KEYS; ++j) k[j] = key_tile[across + ACROSS * j][r];
#pragma unroll
        for (int e = 0; e < MY_QUERIES * MY_KEYS; ++e) {
#pragma unroll
          for (int u = 0; u < 4; ++u) part[e] += q[e / MY_KEYS].at[u] * k[e % MY_KEYS].at[u];
        }
      }
#pragma unroll
      for (int e = 0; e < MY_QUERIES * MY_KEYS; ++e) x[e] += part[e];
    }

    unsigned steep = 0;  // one bit for each of the thread's pairs
#pragma unroll
    for (int e = 0; e < MY_QUERIES * MY_KEYS; ++e) {
      steep |= unsigned(ACC(fabs(x[e])) > STEEP) << e;
      const ACC angle = acos(smaller(ACC(1), ACC(fabs(x[e])))) * INVERSE_PI;  // in units of pi; of NaN it is NaN
      x[e] = x[e] < ACC(0) ? angle : ACC(1) - angle;
    }
    to_power(x, hash_code_len);
#pragma unroll
    for (int e = 0; e < MY_QUERIES * MY_KEYS; ++e) {
      const int j = across + ACROSS * (e % MY_KEYS);
      weight_tile[down + DOWN * (e / MY_KEYS)][j / 4].at[j % 4] = x[e];
    }
    for (int e = 0; __any_sync(FULL_WARP, steep >> e); ++e) {
      for (unsigned lanes = __ballot_sync(FULL_WARP, steep >> e & 1); lanes != 0; lanes &= lanes - 1) {
        const int owner = __ffs(int(lanes)) - 1;
        const int i = warp_down + owner / 8 + DOWN * (e / MY_KEYS), j = warp_across + owner % 8 + ACROSS * (e % MY_KEYS);
        const ACC* q = unit_query + (head * n_q + first_query + i) * dim;
        const ACC* k = unit_key + (head * n_k + first_key + j) * dim;
        ACC apart = 0, along = 0;
        for (int c = lane; c < dim; c += 32) {
          apart += (q[c] - k[c]) * (q[c] - k[c]);
          along += (q[c] + k[c]) * (q[c] + k[c]);
        }
        ACC weight[1] = {ACC(1) - 2 * INVERSE_PI * ACC(atan2(sqrt(warp_sum(apart)), sqrt(warp_sum(along))))};
        to_power(weight, hash_code_len);
        if (lane == owner) weight_tile[i][j / 4].at[j % 4] = weight[0];
      }
    }
    __syncthreads();

    if (first_column + 4 * across < value_dim) {
      Four part[MY_QUERIES] = {};
#pragma unroll 2
      for (int j = 0; j < KEYS / 4; ++j) {
        Four w[MY_QUERIES];
#pragma unroll
        for (int i = 0; i < MY_QUERIES; ++i) w[i] = weight_tile[down + DOWN * i][j];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const Four v = value_tile[4 * j + u][across];
#pragma unroll
          for (int i = 0; i < MY_QUERIES; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) part[i].at[c] += w[i].at[u] * v.at[c];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < MY_QUERIES; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[i].at[c] += part[i].at[c];
      }
    }
  }

#pragma unroll
  for (int i = 0; i < MY_QUERIES; ++i) {
    const int query = first_query + down + DOWN * i;
    const long long row = head * n_q + query;
    if (query >= n_q) continue;
    const bool keep = kept(query_mask, row), spoiled = keep && unit_query[row * dim] != unit_query[row * dim];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = first_column + 4 * across + c;
      const ACC result = !keep ? ACC(0) : spoiled ? not_a_number() : nan_unless_finite(sum[i].at[c]);
      if (column < value_dim) out[row * value_dim + column] = narrow<OUT>(result);
    }
  }
}
