// Weighted cumulation in three ways:
//   out_i = 1/m sum_h sum_j [code_h(q_i) = code_h(k_j)] (query_weight_i . key_weight_j) v_j.
//
// Compiled for VALUE, and for OUT, the type in which the result is stored.
//
// Arrays are contiguous: codes (heads, n, m), weights (heads, n, d_w), value (heads, n_k, d_v), out
// (heads, n_q, d_v), masks (heads, n), sorted codes and their order (heads, m, n), sums (heads,
// n_q, d_v rounded up to a multiple of four).
#include "common.cuh"
#include "sort.cuh"
#include "tiles.cuh"

__device__ inline long long padded(int value_dim) { return ceil_div(value_dim, 4) * 4; }

// Whether a whole row is finite. All lanes of a warp call it together.
__device__ inline bool finite_row(const VALUE* row, int dim, int lane) {
  bool all = true;
  for (int i = lane; i < dim; i += 32) all = all && is_finite(widen(row[i]));
  return __all_sync(FULL_WARP, all);
}

// ------------------------------------------------------------------------------------------------
// weight_by_weight: the paper's algorithm. The query's weight leaves the sum, one coordinate at a
// time: sum_j (a . b_j) v_j = sum_r a_r (sum_j b_jr v_j). So for each coordinate r, and 32 value
// dims at a time, the keys fill a table in global memory, (heads, m, capacity, 32), and the queries
// read it.

// weight_by_weight_scatter
//   A warp takes one key. Lane l adds key_weight_r times value dim first_dim + l to the key's
//   bucket of every hash. A block has 8 keys. Moves 4 m bytes of codes and 33 numbers in and 32 m
//   atomic additions out for each key. Not deterministic: the atomic additions come in any order.
extern "C" __global__ void weight_by_weight_scatter(const int* __restrict__ key_hash_code, const VALUE* __restrict__ key_weight,
                                                    const VALUE* __restrict__ value, const unsigned char* __restrict__ key_mask,
                                                    ACC* __restrict__ table, int n_k, int num_hash, int capacity, int weight_dim,
                                                    int value_dim, int coordinate, int first_dim) {
  const int key = blockIdx.x * blockDim.y + threadIdx.y, dim = first_dim + threadIdx.x;
  const long long head = blockIdx.y, row = head * n_k + key;
  if (key >= n_k || dim >= value_dim || !kept(key_mask, row)) return;
  const ACC term = widen(key_weight[row * weight_dim + coordinate]) * widen(value[row * value_dim + dim]);
  for (int hash = 0; hash < num_hash; ++hash) {
    const int code = key_hash_code[row * num_hash + hash];
    if (in_range(code, capacity)) atomicAdd(&table[((head * num_hash + hash) * capacity + code) * 32 + threadIdx.x], term);
  }
}

// weight_by_weight_gather
//   A warp takes one query. Lane l adds up value dim first_dim + l of the query's buckets, hash
//   after hash, and adds query_weight_r times that to the query's sums. A block has 8 queries.
//   Moves 4 m bytes of codes and 32 m table entries in, and 32 sums in and out for each query.
//   Deterministic for a given table.
extern "C" __global__ void weight_by_weight_gather(const int* __restrict__ query_hash_code, const VALUE* __restrict__ query_weight,
                                                   const unsigned char* __restrict__ query_mask, const ACC* __restrict__ table,
                                                   ACC* __restrict__ sums, int n_q, int num_hash, int capacity, int weight_dim,
                                                   int value_dim, int coordinate, int first_dim) {
  const int query = blockIdx.x * blockDim.y + threadIdx.y, dim = first_dim + threadIdx.x;
  const long long head = blockIdx.y, row = head * n_q + query;
  if (query >= n_q || dim >= value_dim || !kept(query_mask, row)) return;
  ACC sum = 0;
  for (int hash = 0; hash < num_hash; ++hash) {
    const int code = query_hash_code[row * num_hash + hash];
    if (in_range(code, capacity)) sum += table[((head * num_hash + hash) * capacity + code) * 32 + threadIdx.x];
  }
  sums[row * padded(value_dim) + dim] += widen(query_weight[row * weight_dim + coordinate]) * sum;
}

// finish_rows
//   Turns the sums over all hashes into the result: divides by m, rounds once, and writes NaN to
//   the row of a query with a non-finite weight. A warp takes one row, and a block has 8. Moves d_w
//   weights and d_v sums in and d_v results out for each row. Deterministic.
extern "C" __global__ void finish_rows(const VALUE* __restrict__ query_weight, const unsigned char* __restrict__ query_mask,
                                       const ACC* __restrict__ sums, OUT* __restrict__ out, long long rows, int num_hash, int weight_dim,
                                       int value_dim) {
  const int lane = threadIdx.x;
  const long long row = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // the whole warp
  const bool nonfinite = kept(query_mask, row) && !finite_row(query_weight + row * weight_dim, weight_dim, lane);
  for (int dim = lane; dim < value_dim; dim += 32) {
    const ACC sum = sums[row * padded(value_dim) + dim] / ACC(num_hash);
    out[row * value_dim + dim] = narrow<OUT>(nonfinite ? not_a_number() : nan_unless_finite(sum));
  }
}

// ------------------------------------------------------------------------------------------------
constexpr int HELD = 4;  // entries of a vector that a lane holds in registers: 128 for the warp

// sorted_pairs
//   A warp takes one query and 128 value dims. Its lanes look up 32 buckets at once, one hash each,
//   by bisection of the sorted codes. Then the warp goes through these buckets together, key by
//   key: it adds up the product of the weights by shuffles, and adds the product times the value to
//   sums in registers. A block has 8 queries; grid (queries / 8, slices of value dims, heads).
//   Registers of a warp: 128 coordinates of the query's weight (further ones come from cache), 128
//   sums of the bucket and 128 sums of the query. Moves, for each query, m codes and, mostly from
//   cache, d_w + 128 numbers for each key that it meets, and d_v results. Any capacity.
//   Deterministic: every sum is taken in the order of hash and key.
extern "C" __global__ void __launch_bounds__(256, 4)
sorted_pairs(const int* __restrict__ query_hash_code, const VALUE* __restrict__ query_weight, const unsigned char* __restrict__ query_mask,
             const int* __restrict__ sorted_code, const int* __restrict__ order, const VALUE* __restrict__ key_weight,
             const VALUE* __restrict__ value, OUT* __restrict__ out, int n_q, int n_k, int num_hash, int capacity, int weight_dim,
             int value_dim) {
  const int query = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x, first_dim = blockIdx.y * 32 * HELD;
  const long long head = blockIdx.z, query_row = head * n_q + query;
  if (query >= n_q) return;  // the whole warp
  const bool keep = kept(query_mask, query_row);
  const VALUE* query_weights = query_weight + query_row * weight_dim;

  ACC held[HELD], total[HELD] = {};
#pragma unroll
  for (int u = 0; u < HELD; ++u) held[u] = u * 32 + lane < weight_dim ? widen(query_weights[u * 32 + lane]) : ACC(0);

  for (int base_hash = 0; keep && base_hash < num_hash; base_hash += 32) {
    const int looked_up = base_hash + lane;
    int begin_of_lane = 0, end_of_lane = 0;
    if (looked_up < num_hash) {
      const int code = query_hash_code[query_row * num_hash + looked_up];
      const int* codes = sorted_code + (head * num_hash + looked_up) * n_k;
      if (in_range(code, capacity)) {
        begin_of_lane = lower_bound(codes, n_k, code);
        end_of_lane = begin_of_lane + lower_bound(codes + begin_of_lane, n_k - begin_of_lane, code + 1);
      }
    }
    for (int owner = 0; owner < 32 && base_hash + owner < num_hash; ++owner) {  // the lane that has looked up the hash
      const int begin = __shfl_sync(FULL_WARP, begin_of_lane, owner), end = __shfl_sync(FULL_WARP, end_of_lane, owner);
      const int* bucket = order + (head * num_hash + base_hash + owner) * n_k;
      ACC sum[HELD] = {};
      for (int i = begin; i < end; ++i) {
        const long long key_row = head * n_k + bucket[i];
        const VALUE* key_weights = key_weight + key_row * weight_dim;
        const VALUE* values = value + key_row * value_dim + first_dim;
        ACC product = 0;
#pragma unroll
        for (int u = 0; u < HELD; ++u) {
          if (u * 32 + lane < weight_dim) product += held[u] * widen(key_weights[u * 32 + lane]);
        }
#pragma unroll 1
        for (int r = 32 * HELD + lane; r < weight_dim; r += 32) product += widen(query_weights[r]) * widen(key_weights[r]);
        product = warp_sum(product);
#pragma unroll
        for (int u = 0; u < HELD; ++u) {
          if (first_dim + u * 32 + lane < value_dim) sum[u] += product * widen(values[u * 32 + lane]);
        }
      }
#pragma unroll
      for (int u = 0; u < HELD; ++u) total[u] += sum[u];
    }
  }

  const bool nonfinite = keep && !finite_row(query_weights, weight_dim, lane);
#pragma unroll
  for (int u = 0; u < HELD; ++u) {
    const int dim = first_dim + u * 32 + lane;
    const ACC mean = nan_unless_finite(total[u] / ACC(num_hash));
    if (dim < value_dim) out[query_row * value_dim + dim] = narrow<OUT>(nonfinite ? not_a_number() : mean);
  }
}

// ------------------------------------------------------------------------------------------------
constexpr int THREADS = 128;
constexpr int WEIGHTS = 64;                          // coordinates of the weights at a time
constexpr int COLUMNS = sizeof(ACC) == 8 ? 32 : 64;  // value dims of a block
constexpr int KEYS = 16;                             // keys at a time
constexpr int QUERIES = 32;                          // queries at a time

__device__ inline Four operator+(Four a, Four b) {
#pragma unroll
  for (int u = 0; u < 4; ++u) a.at[u] += b.at[u];
  return a;
}

// Copies rows order[0], ..., order[count - 1] of a matrix to a tile: WIDTH entries of each, from
// entry `from` on. Entries beyond the matrix are zeros, and so are the rows that fill up the last
// four.
template <int WIDTH, int STRIDE>
__device__ inline void fetch_rows(Four (*tile)[STRIDE], const VALUE* matrix, const int* order, int count, int dim, int from) {
  const int column = threadIdx.x % WIDTH;
  for (int row = threadIdx.x / WIDTH; row < ceil_div(count, 4) * 4; row += THREADS / WIDTH) {
    const bool inside = row < count && from + column < dim;
    tile[row][column / 4].at[column % 4] = inside ? widen(matrix[static_cast<long long>(order[row]) * dim + from + column]) : ACC(0);
  }
}

// The sum over `count` rows of a^T b, for four entries of each row in either tile.
template <int A, int B>
__device__ inline void sum_outer(Four (&sum)[4], const Four (*a_tile)[A], int a_four, const Four (*b_tile)[B], int b_four, int count) {
  for (int j = 0; j < count; ++j) {
    const Four a = a_tile[j][a_four], b = b_tile[j][b_four];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sum[u].at[v] += a.at[u] * b.at[v];
    }
  }
}

// The product of four rows of a tile, 4 fours entries long, and four columns of a matrix. `rows`
// and `columns` count fours.
template <int A, int B>
__device__ inline void multiply_rows(Four (&sum)[4], const Four (*tile)[A], int rows, const Four (*matrix)[B], int columns, int fours) {
  for (int four = 0; four < fours; ++four) {
    Four a[4], s[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) a[u] = tile[4 * rows + u][four], s[u] = matrix[4 * four + u][columns];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[u].at[v] += a[u].at[k] * s[k].at[v];
      }
    }
  }
}

// Adds to four neighboring entries in global memory, each at once whoever else adds to it. An H100
// does so by one instruction.
template <class T> __device__ inline void atomic_add(T* to, Four x) {
#pragma unroll
  for (int u = 0; u < 4; ++u) atomicAdd(&to[u], x.at[u]);
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <> __device__ inline void atomic_add(float* to, Four x) {
  const float a = float(x.at[0]), b = float(x.at[1]), c = float(x.at[2]), d = float(x.at[3]);
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
#endif

// outer_products
//   Inside a bucket the weighted sum is linear attention: S = sum_j key_weight_j v_j^T, and every
//   query of the bucket gets query_weight_i S. Keys and queries are sorted by the code of one hash,
//   so a bucket is a run of keys and a run of queries. A block takes a stretch of sorted keys and
//   does every bucket that starts in it, except those without a query.
//
//   In one hash a query is in one bucket, so one block adds to its row of `sums`; the hashes add one
//   after the other. One launch does them all, in the order of a ticket that every block draws from
//   turns[0]: group of `heads_at_once` heads, hash, head, slice of value dims, stretch. A block adds
//   only when all blocks of the hash before, for its head and slice, have ended; turns[1 ...] counts
//   those. They have lower tickets, so they are at work, whatever the order in which blocks start:
//   nobody waits for ever, and by that time few wait at all. `turns` comes as zeros. Sums that other
//   blocks have changed may not come from the L1 cache, so they are added to where they are, in the
//   L2 cache, by atomic additions, of which only one at a time can be on its way to a row.
//
//   A block makes S in pieces of 64 coordinates by 64 value dims (32 in float64) in shared memory.
//   First it adds the keys, 16 at a time; a thread takes 4 by 4 entries of S. Then it multiplies
//   the queries, 32 at a time; a thread takes 4 queries by 4 value dims. Below, `rows` counts
//   fours of coordinates or queries, and `columns` fours of value dims.
//   Grid (stretches x slices of value dims x heads x hashes). Shared memory: S, keys, values and
//   queries, 33 KiB (45 in float64). Moves, for each hash, n_k (d_w + d_v) and n_q d_w numbers in,
//   and n_q d_v atomic additions. Does 2 (n_q + n_k) d_w d_v operations, however skewed the buckets,
//   but one bucket is the work of one block. Deterministic: every sum is taken in the order of hash
//   and key.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
outer_products(const int* __restrict__ sorted_query_code, const int* __restrict__ query_order, const VALUE* __restrict__ query_weight,
               const int* __restrict__ sorted_key_code, const int* __restrict__ key_order, const VALUE* __restrict__ key_weight,
               const VALUE* __restrict__ value, ACC* __restrict__ sums, unsigned* __restrict__ turns, int heads, int heads_at_once,
               int stretches, int n_q, int n_k, int num_hash, int capacity, int weight_dim, int value_dim) {
  __shared__ unsigned ticket;
  __shared__ Four outer[WEIGHTS][COLUMNS / 4];
  __shared__ Four key_tile[KEYS][WEIGHTS / 4];
  __shared__ Four value_tile[KEYS][COLUMNS / 4];
  __shared__ Four query_tile[QUERIES][WEIGHTS / 4 + 1];  // one more, so that neighboring rows start in different banks

  if (threadIdx.x == 0) ticket = atomicAdd(&turns[0], 1u);
  __syncthreads();
  const unsigned slices = ceil_div(value_dim, COLUMNS), of_head = stretches * slices;  // blocks of a head and hash
  const unsigned group = ticket / (of_head * num_hash * heads_at_once), in_group = ticket % (of_head * num_hash * heads_at_once);
  const unsigned of_hash = of_head * smaller(heads_at_once, heads - static_cast<int>(group) * heads_at_once);  // blocks of a hash
  const int hash = in_group / of_hash, slice = in_group % of_head / stretches;
  const long long head = group * heads_at_once + in_group % of_hash / of_head, sorted = head * num_hash + hash;
  unsigned* ended = &turns[1 + head * slices + slice];

  const int* key_codes = sorted_key_code + sorted * n_k;
  const int* query_codes = sorted_query_code + sorted * n_q;
  const int* keys = key_order + sorted * n_k;
  const int* queries = query_order + sorted * n_q;
  const VALUE* key_weights = key_weight + head * n_k * weight_dim;
  const VALUE* query_weights = query_weight + head * n_q * weight_dim;
  const VALUE* values = value + head * n_k * value_dim;
  const int first_column = slice * COLUMNS;

  bool may_add = hash == 0;
  const auto wait_for_turn = [&] {  // all threads call it, before a barrier
    if (!may_add && threadIdx.x == 0) {
      while (atomicAdd(ended, 0u) < static_cast<unsigned>(hash * stretches)) {}
      __threadfence();
    }
    may_add = true;
  };

  const int stretch = ceil_div(n_k, stretches);
  int next = smaller(static_cast<int>(in_group % stretches) * stretch, n_k);
  const int last = smaller(next + stretch, n_k);
  if (next > 0 && next < last && key_codes[next] == key_codes[next - 1]) {  // the first bucket began in another stretch
    next += lower_bound(key_codes + next, n_k - next, key_codes[next] + 1);
  }

  while (next < last && key_codes[next] < capacity) {
    const int code = key_codes[next], begin = next, end = begin + lower_bound(key_codes + begin, n_k - begin, code + 1);
    const int first_asked = lower_bound(query_codes, n_q, code);
    const int last_asked = first_asked + lower_bound(query_codes + first_asked, n_q - first_asked, code + 1);
    next = end;
    if (first_asked == last_asked) continue;

    for (int first_weight = 0; first_weight < weight_dim; first_weight += WEIGHTS) {
      const int fours = ceil_div(smaller(WEIGHTS, weight_dim - first_weight), 4);

      for (int first = begin; first < end; first += KEYS) {
        const int count = smaller(KEYS, end - first);
        __syncthreads();  // the keys before have been added, and the S before has been read
        fetch_rows<WEIGHTS>(key_tile, key_weights, keys + first, count, weight_dim, first_weight);
        fetch_rows<COLUMNS>(value_tile, values, keys + first, count, value_dim, first_column);
        __syncthreads();
        for (int piece = threadIdx.x; piece < fours * (COLUMNS / 4); piece += THREADS) {
          const int rows = piece / (COLUMNS / 4), columns = piece % (COLUMNS / 4);
          Four sum[4] = {};
          sum_outer(sum, key_tile, rows, value_tile, columns, count);
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            outer[4 * rows + u][columns] = first > begin ? outer[4 * rows + u][columns] + sum[u] : sum[u];
          }
        }
      }

      for (int first = first_asked; first < last_asked; first += QUERIES) {
        const int count = smaller(QUERIES, last_asked - first);
        __syncthreads();  // the queries before have been multiplied
        fetch_rows<WEIGHTS>(query_tile, query_weights, queries + first, count, weight_dim, first_weight);
        wait_for_turn();
        __syncthreads();  // these queries are in the tile, S is complete, and it is this block's turn
        for (int piece = threadIdx.x; piece < ceil_div(count, 4) * (COLUMNS / 4); piece += THREADS) {
          const int rows = piece / (COLUMNS / 4), columns = piece % (COLUMNS / 4);
          Four sum[4] = {};
          multiply_rows(sum, query_tile, rows, outer, columns, fours);
          if (first_column + 4 * columns >= value_dim) continue;
          for (int u = 0; u < 4 && 4 * rows + u < count; ++u) {
            atomic_add(&sums[(head * n_q + queries[first + 4 * rows + u]) * padded(value_dim) + first_column + 4 * columns], sum[u]);
          }
        }
      }
    }
  }
  wait_for_turn();
  __syncthreads();  // every thread has added, before other blocks are told
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(ended, 1u);
  }
}
