// Bernoulli cumulation in three ways: out_i = 1/m sum_h sum_j [code_h(q_i) = code_h(k_j)] v_j. With
// oversampling the bracket is a_r for codes that differ in r bits: smoothing.cuh.
//
// Compiled for VALUE, and for OUT, the type in which the result is stored. shared_table is also
// compiled for LANES, the number of threads in a group, and for OVERSAMPLE and HELD_BITS if its
// tables are smoothed. With SPREAD=1 the gathers of shared_table and sorted_buckets also sum the
// squares of each hash's own row (spread.cuh), from `exponent` (heads) into `squares`. Without it
// these two parameters are null, and nobody reads them.
//
// Arrays are contiguous: codes (heads, n, m), value (heads, n_k, d_v), out (heads, n_q, d_v), masks
// (heads, n).
#include "common.cuh"
#include "smoothing.cuh"
#include "sort.cuh"
#include "spread.cuh"
#include "tiles.cuh"

__device__ inline OUT mean(ACC sum, int num_hash) { return narrow<OUT>(nan_unless_finite(sum / ACC(num_hash))); }

// ------------------------------------------------------------------------------------------------
// global_table: the paper's algorithm. Global memory holds a table of every hash, for 32 value dims
// at a time: (heads, m, capacity, 32). With oversampling, smooth_spheres smooths it in between.

// global_table_scatter
//   A warp takes one key. Lane l adds value dim first_dim + l to the key's bucket of every hash. A
//   block has 8 keys. Moves 4 m bytes of codes and 32 values in and 32 m atomic additions out for
//   each key. Not deterministic: the atomic additions come in any order.
extern "C" __global__ void global_table_scatter(const int* __restrict__ key_hash_code, const VALUE* __restrict__ value,
                                                const unsigned char* __restrict__ key_mask, ACC* __restrict__ table, int n_k, int num_hash,
                                                int capacity, int value_dim, int first_dim) {
  const int key = blockIdx.x * blockDim.y + threadIdx.y, dim = first_dim + threadIdx.x;
  const long long head = blockIdx.y, row = head * n_k + key;
  if (key >= n_k || dim >= value_dim || !kept(key_mask, row)) return;
  const ACC v = widen(value[row * value_dim + dim]);
  for (int hash = 0; hash < num_hash; ++hash) {
    const int code = key_hash_code[row * num_hash + hash];
    if (in_range(code, capacity)) atomicAdd(&table[((head * num_hash + hash) * capacity + code) * 32 + threadIdx.x], v);
  }
}

// global_table_gather
//   A warp takes one query. Lane l adds up value dim first_dim + l of the query's buckets, hash
//   after hash. A block has 8 queries. Moves 4 m bytes of codes and 32 m sums in and 32 results out
//   for each query. Deterministic for a given table.
extern "C" __global__ void global_table_gather(const int* __restrict__ query_hash_code, const unsigned char* __restrict__ query_mask,
                                               const ACC* __restrict__ table, OUT* __restrict__ out, int n_q, int num_hash, int capacity,
                                               int value_dim, int first_dim) {
  const int query = blockIdx.x * blockDim.y + threadIdx.y, dim = first_dim + threadIdx.x;
  const long long head = blockIdx.y, row = head * n_q + query;
  if (query >= n_q || dim >= value_dim) return;
  ACC sum = 0;
  if (kept(query_mask, row)) {
    for (int hash = 0; hash < num_hash; ++hash) {
      const int code = query_hash_code[row * num_hash + hash];
      if (in_range(code, capacity)) sum += table[((head * num_hash + hash) * capacity + code) * 32 + threadIdx.x];
    }
  }
  out[row * value_dim + dim] = mean(sum, num_hash);
}

// ------------------------------------------------------------------------------------------------
#ifdef LANES
constexpr int BATCH = 8;

#ifdef OVERSAMPLE
constexpr int MOST_THREADS = 384;  // of a block, as the launcher has it: a thread gets up to 168 registers
#else
constexpr int MOST_THREADS = 512;  // up to 128 registers
#endif

#ifdef OVERSAMPLE
// Smooths a thread's own column: `capacity` rows that are `stride` numbers apart. T_1 ... T_s follow
// the row for masked keys.
__device__ inline void smooth_column(ACC* column, int stride, int capacity) {
  const int bits = __ffs(capacity) - 1;
  const Smoothing smoothing(bits);
  const auto at = [&](int r, int row) -> ACC& { return column[(r * capacity + (r > 0) + row) * stride]; };
  cross_bits(
      bits, 0, 1,
      [&](int row, Spheres& sphere, bool begins) {
        sphere[0] = at(0, row);
#pragma unroll
        for (int r = 1; r < SPHERES; ++r) {
          if (!begins) sphere[r] = at(r, row);
        }
      },
      [&](int row, const Spheres& sphere, bool begins, bool ends) {
        if (ends) at(0, row) = smoothing.of(sphere);
#pragma unroll
        for (int r = 1; r < SPHERES; ++r) {
          if (!ends) at(r, row) = sphere[r];
        }
      },
      [] {});
}
#endif

// Squares a table in place. For each bucket, the first of `dims` neighboring entries gets the sum of
// their squares. This thread takes share number `share` of `shares` of the buckets of one hash.
__device__ inline void square_table(ACC* entries, int columns, int capacity, int dims, int share, int shares, ACC unit) {
  for (int code = share; code < capacity; code += shares) {
    ACC sum = 0;
    for (int d = 0; d < dims; ++d) {
      const ACC x = entries[code * columns + d * LANES] * unit;
      sum += x * x;
    }
    entries[code * columns] = sum;
  }
}

// Adds up `sum` over a group of LANES threads, so that sum[0] of thread i becomes the whole sum of
// entry i.
template <int HALF> __device__ inline void add_by_halves(ACC* sum, int lane) {
  if constexpr (HALF > 0) {
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const bool upper = lane & HALF;
      const ACC given = upper ? sum[i] : sum[i + HALF], own = upper ? sum[i + HALF] : sum[i];
      sum[i] = own + __shfl_xor_sync(FULL_WARP, given, HALF);
    }
    add_by_halves<HALF / 2>(sum, lane);
  }
}

// shared_table
//   A block takes a few value dims of one head and does the whole cumulation for them: it adds all
//   keys to its tables, then all queries read. The tables are one array in shared memory, with
//   capacity + 1 rows and one *column* for each pair of a hash and a value dim. Every column
//   belongs to one thread: thread t has hash t % LANES and value dim t / LANES of the block. So no
//   two threads add to the same entry, and no atomics are needed. Neighboring threads have
//   neighboring columns, so no banks conflict, whatever the codes. Every sum is taken in the order
//   of the keys. Masked keys go to the last row, which nobody reads.
//
//   Scatter: BATCH keys at a time, so that their table entries are read together and not one after
//   the other. If two of these keys share a bucket, the later key takes the sum of the earlier one
//   in place of the entry that was read. Gather: a thread reads the entries of its column for LANES
//   queries. Its group of LANES threads then adds up the hashes by halves: in each step a thread
//   gives away half of its queries and takes the partner's sums for the other half. So LANES
//   queries cost LANES - 1 shuffles, and thread i ends with the whole sum of query i. If m is
//   greater than `side_by_side`, the number of hashes done at a time, the block works in rounds and
//   keeps the sums in `unfinished`.
//
//   With OVERSAMPLE, each thread smooths its column between the two: s log2(capacity) additions a
//   row. If the bits are more than HELD_BITS, T_1 ... T_s take capacity rows each behind the table.
//
//   With SPREAD, the block then squares its tables in place: for each bucket and hash, the column of
//   the first dim gets the squares of all `width` dims. So the queries read one column for each hash,
//   and the groups of threads share them out. Shared memory is the same as without. It adds 1 / width
//   of the gather, a multiply-add and a read for every entry of the tables, one more read of the
//   query codes, and 4 bytes (float64: 8) out for each query, in `squares` (heads, slices, n_q).
//   Barriers part it from what is before and after.
//
//   Grid (slices of value dims, heads). Moves, for each block, all codes of its head (from the L2
//   cache, except for the first block), its slice of the values, and its slice of the result.
//   Deterministic.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
shared_table(const int* __restrict__ query_hash_code, const int* __restrict__ key_hash_code, const VALUE* __restrict__ value,
             const unsigned char* __restrict__ query_mask, const unsigned char* __restrict__ key_mask, ACC* __restrict__ unfinished,
             OUT* __restrict__ out, int n_q, int n_k, int num_hash, int capacity, int value_dim, int width, int side_by_side,
             const int* __restrict__ exponent, ACC* __restrict__ squares) {
  extern __shared__ double shared[];  // double, so that it is aligned for both types of ACC
  ACC* table = reinterpret_cast<ACC*>(shared);

  const int columns = LANES * width, lane = threadIdx.x % LANES;
  const int dim = blockIdx.x * width + threadIdx.x / LANES;
  const bool has_dim = threadIdx.x < columns && dim < value_dim;
  const long long head = blockIdx.y;
  const ACC unit = SPREAD ? unit_of(exponent[head]) : ACC(0);
  ACC* column = table + threadIdx.x;

  for (int first_hash = 0; first_hash < num_hash; first_hash += side_by_side) {
    const int hash = first_hash + lane;
    const bool live = has_dim && lane < side_by_side && hash < num_hash;

    if (live) {
      for (int code = 0; code <= capacity; ++code) column[code * columns] = 0;

      int next_code[BATCH];
      ACC next_value[BATCH];
      const auto fetch = [&](int first_key) {
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
          const long long row = head * n_k + smaller(first_key + b, n_k - 1);
          const int code = key_hash_code[row * num_hash + hash];
          const ACC v = widen(value[row * value_dim + dim]);
          const bool valid = kept(key_mask, row) & (first_key + b < n_k);
          next_code[b] = valid & in_range(code, capacity) ? code : capacity;
          next_value[b] = v;
        }
      };
      fetch(0);
      for (int first_key = 0; first_key < n_k; first_key += BATCH) {
        int code[BATCH];
        ACC added[BATCH], sum[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) code[b] = next_code[b], added[b] = next_value[b];
        fetch(first_key + BATCH);
#pragma unroll
        for (int b = 0; b < BATCH; ++b) sum[b] = column[code[b] * columns];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
#pragma unroll
          for (int earlier = 0; earlier < b; ++earlier) sum[b] = code[earlier] == code[b] ? sum[earlier] : sum[b];
          sum[b] += added[b];
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) column[code[b] * columns] = sum[b];
      }
#ifdef OVERSAMPLE
      smooth_column(column, columns, capacity);
#endif
    }

    // The thread that reads a column has written it: no barrier is needed. With SPREAD, all read
    // again when the squares are there: as if these were one more value dim.
    for (int pass = 0; pass <= SPREAD; ++pass) {
      const bool of_squares = SPREAD && pass > 0;
      const int group = of_squares ? threadIdx.x / LANES : 0, groups = of_squares ? blockDim.x / LANES : 1;
      const bool reads = of_squares ? lane < side_by_side && hash < num_hash : live;
      const ACC* entries = of_squares ? table + lane : column;
      if (of_squares) {
        __syncthreads();
        square_table(table + lane, columns, reads ? capacity : 0, smaller(width, value_dim - int(blockIdx.x) * width), group, groups, unit);
        __syncthreads();
      }
      for (int first_of_all = 0; first_of_all < n_q; first_of_all += groups * LANES) {
        const int first_query = first_of_all + group * LANES;
        ACC sum[LANES];
#pragma unroll
        for (int i = 0; i < LANES; ++i) {
          const long long row = head * n_q + first_query + i;
          const int code = reads && first_query + i < n_q ? query_hash_code[row * num_hash + hash] : capacity;
          sum[i] = in_range(code, capacity) ? entries[code * columns] : ACC(0);
        }
        add_by_halves<LANES / 2>(sum, lane);
        const int query = first_query + lane;
        if (!(has_dim || of_squares) || query >= n_q) continue;
        const long long row = head * n_q + query, at = row * value_dim + dim;
        if (of_squares) {
          ACC& total = squares[(head * gridDim.x + blockIdx.x) * n_q + query];
          total = first_hash == 0 ? sum[0] : total + sum[0];
          continue;
        }
        const ACC total = first_hash == 0 ? sum[0] : unfinished[at] + sum[0];
        if (first_hash + side_by_side < num_hash) unfinished[at] = total;
        else out[at] = kept(query_mask, row) ? mean(total, num_hash) : narrow<OUT>(ACC(0));
      }
    }
    if constexpr (SPREAD) __syncthreads();  // before the next hashes clear the table
  }
}
#endif

// ------------------------------------------------------------------------------------------------
// sorted_buckets: keys are sorted by their codes. So a bucket is a run of neighbors, and its sum
// needs no atomics. Any capacity. `bucket_sum` is (heads, hashes of the group, n_k, d_v); the sum
// of a bucket is stored at the position where the bucket starts.

constexpr int STRETCH = 64;

// sum_buckets
//   A block walks over a stretch of STRETCH sorted positions of one head and hash, with one thread
//   for each value dim. It writes one sum for each bucket, at the start of the bucket, or at the
//   start of the stretch if the bucket began before it. Moves 8 bytes and one row of values in for
//   each key and one row of sums out for each bucket. Deterministic.
extern "C" __global__ void sum_buckets(const int* __restrict__ sorted_code, const int* __restrict__ order, const VALUE* __restrict__ value,
                                       ACC* __restrict__ bucket_sum, int n_k, int num_hash, int first_hash, int capacity, int value_dim) {
  const long long head = blockIdx.z;
  const int first = blockIdx.x * STRETCH, last = smaller(first + STRETCH, n_k);
  const int* code = sorted_code + (head * num_hash + first_hash + blockIdx.y) * n_k;
  const int* row = order + (head * num_hash + first_hash + blockIdx.y) * n_k;
  ACC* sums = bucket_sum + (head * gridDim.y + blockIdx.y) * n_k * value_dim;
  for (int dim = threadIdx.x; dim < value_dim; dim += blockDim.x) {
    ACC sum = 0;
    int start = first;
    for (int i = first; i < last && code[i] < capacity; ++i) {
      if (i > first && code[i] != code[i - 1]) {
        sums[static_cast<long long>(start) * value_dim + dim] = sum;
        sum = 0;
        start = i;
      }
      sum += widen(value[(head * n_k + row[i]) * value_dim + dim]);
    }
    sums[static_cast<long long>(start) * value_dim + dim] = sum;
  }
}

// join_stretches
//   For buckets that span several stretches, adds up the sums of the stretches at the start of the
//   bucket, from left to right. A block takes one head and hash, a thread one value dim. Moves two
//   rows of sums for each stretch that starts inside a bucket. Deterministic.
extern "C" __global__ void join_stretches(const int* __restrict__ sorted_code, ACC* __restrict__ bucket_sum, int n_k, int num_hash,
                                          int first_hash, int capacity, int value_dim) {
  const long long head = blockIdx.y;
  const int* code = sorted_code + (head * num_hash + first_hash + blockIdx.x) * n_k;
  ACC* sums = bucket_sum + (head * gridDim.x + blockIdx.x) * n_k * value_dim;
  for (int i = STRETCH; i < n_k && code[i] < capacity; i += STRETCH) {
    if (code[i] != code[i - 1]) continue;
    const long long start = lower_bound(code, n_k, code[i]);
    for (int dim = threadIdx.x; dim < value_dim; dim += blockDim.x) {
      sums[start * value_dim + dim] += sums[static_cast<long long>(i) * value_dim + dim];
    }
  }
}

// The whole warp: adds its sum to a query's squares, or begins them.
__device__ inline void add_squares(ACC& squares, ACC own_squares, int lane, bool begins) {
  const ACC sum = warp_sum(own_squares);
  if (lane == 0) squares = begins ? sum : squares + sum;
}

// gather_buckets
//   A warp takes one query. Its lanes look up the starts of 32 buckets at once, one hash each, by
//   bisection of the sorted codes. Then they go through these buckets together, with one lane for
//   each value dim. A block has 8 queries. Moves, for each query and hash, 4 bytes of code, about
//   log2(n_k) sorted codes and one row of sums in, and for each query one row of results out. With
//   SPREAD, every lane also squares what it adds, 2 multiply-adds for an entry, and a query has 4
//   bytes more (float64: 8) of `squares` (heads, n_q) out. Deterministic.
extern "C" __global__ void gather_buckets(const int* __restrict__ query_hash_code, const unsigned char* __restrict__ query_mask,
                                          const int* __restrict__ sorted_code, const ACC* __restrict__ bucket_sum,
                                          ACC* __restrict__ unfinished, OUT* __restrict__ out, int n_q, int n_k, int num_hash,
                                          int first_hash, int group, int capacity, int value_dim,
                                          const int* __restrict__ exponent, ACC* __restrict__ squares) {
  const int query = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
  const long long head = blockIdx.y, query_row = head * n_q + query;
  if (query >= n_q) return;  // the whole warp
  const bool keep = kept(query_mask, query_row);
  const ACC unit = SPREAD ? unit_of(exponent[head]) : ACC(0);
  ACC own_squares = 0;

  for (int base_dim = 0; base_dim < value_dim; base_dim += 32) {
    const int dim = base_dim + lane;
    const long long at = query_row * value_dim + dim;
    ACC sum = first_hash > 0 && dim < value_dim ? unfinished[at] : ACC(0);
    for (int base_hash = 0; base_hash < group; base_hash += 32) {
      const int in_group = base_hash + lane;
      int start = -1;
      if (keep && in_group < group) {
        const int code = query_hash_code[query_row * num_hash + first_hash + in_group];
        const int* codes = sorted_code + (head * num_hash + first_hash + in_group) * n_k;
        const int found = in_range(code, capacity) ? lower_bound(codes, n_k, code) : n_k;
        if (found < n_k && codes[found] == code) start = found;
      }
      for (int hash = 0; hash < 32 && base_hash + hash < group; ++hash) {
        const int position = __shfl_sync(FULL_WARP, start, hash);
        if (position >= 0 && dim < value_dim) {
          const ACC bucket = bucket_sum[((head * group + base_hash + hash) * n_k + position) * value_dim + dim];
          sum += bucket;
          if constexpr (SPREAD) own_squares += (bucket * unit) * (bucket * unit);
        }
      }
    }
    if (dim >= value_dim) continue;
    if (first_hash + group < num_hash) unfinished[at] = sum;
    else out[at] = mean(sum, num_hash);
  }
  if constexpr (SPREAD) add_squares(squares[query_row], own_squares, lane, first_hash == 0);
}

#ifndef MY_DIMS
#define MY_DIMS 4
#endif

// The next larger number with as many set bits as this one has, at least one.
__device__ inline int next_with_as_many_bits(int x) {
  const int ripple = x + (x & -x);
  return ripple | (x ^ ripple) >> 2 >> (__ffs(x) - 1);
}

// gather_neighbors
//   gather_buckets with oversampling: a query also reads the buckets whose codes differ from its own
//   in r = 1 ... s bits, each times a_r. A warp takes one query. It goes through the distances from s
//   down to 0, and at each of them through all codes at that distance. Its lanes look up 32 buckets
//   at once, one hash each, by bisection of the sorted codes. Then they go through those that exist
//   together, with up to 4 value dims for each lane. A block has 8 queries. Moves, for each query and
//   hash, 4 bytes of code, about log2(n_k) sorted codes for each of sum_r C(bits, r) neighbors, and
//   one row of sums for each of these that is occupied in; for each query one row of results out.
//   Deterministic.
//
//   With SPREAD, a warp has the rows of all hashes of the group in shared memory, for the dims at
//   hand: `group` rows of at most 32 MY_DIMS numbers. Whatever it adds to the sum it also adds there,
//   in the same order, so no bucket is looked up twice. Every lane keeps to its own dims, so no
//   barrier is needed and no banks conflict. It adds a read and a write in shared memory for each
//   number that is added, s + 2 passes over the rows for each query, and 4 bytes (float64: 8) of
//   `squares` (heads, n_q) out for each query.
extern "C" __global__ void gather_neighbors(const int* __restrict__ query_hash_code, const unsigned char* __restrict__ query_mask,
                                            const int* __restrict__ sorted_code, const ACC* __restrict__ bucket_sum,
                                            ACC* __restrict__ unfinished, OUT* __restrict__ out, int n_q, int n_k, int num_hash,
                                            int first_hash, int group, int capacity, int value_dim, int oversample,
                                            const int* __restrict__ exponent, ACC* __restrict__ squares) {
  extern __shared__ double shared[];  // double, so that it is aligned for both types of ACC
  const int width = smaller(value_dim, 32 * MY_DIMS);
  ACC* own_rows = reinterpret_cast<ACC*>(shared) + (threadIdx.y * group * width + threadIdx.x);  // (hash, dim)

  const int query = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
  const long long head = blockIdx.y, query_row = head * n_q + query;
  if (query >= n_q) return;  // the whole warp
  const int bits = __ffs(capacity) - 1, farthest = kept(query_mask, query_row) ? oversample : -1;
  const ACC unit = SPREAD ? unit_of(exponent[head]) : ACC(0);
  ACC own_squares = 0;

  for (int first_dim = lane; first_dim - lane < value_dim; first_dim += 32 * MY_DIMS) {
    ACC sum[MY_DIMS] = {};
    const auto each_own = [&](auto change) {  // of the numbers of this lane
      for (int hash = 0; hash < group; ++hash) {
        for (int d = 0; d < MY_DIMS && first_dim + 32 * d < value_dim; ++d) change(own_rows[hash * width + 32 * d]);
      }
    };
    for (int distance = farthest; distance >= 0; --distance) {
      // sum_r a_r T_r, where a_(r+1) / a_r = (s - r) / (bits - r) and T_s comes first
      const ACC ratio = ACC(oversample - distance) / ACC(bits - distance);
      for (int d = 0; d < MY_DIMS; ++d) sum[d] *= ratio;
      if constexpr (SPREAD) {
        each_own([&](ACC& own) { own = distance == oversample ? ACC(0) : own * ratio; });
      }
      for (int base_hash = 0; base_hash < group; base_hash += 32) {
        const int in_group = base_hash + lane;
        const bool live = in_group < group;
        const int code = live ? query_hash_code[query_row * num_hash + first_hash + in_group] : -1;
        const int* codes = sorted_code + (head * num_hash + first_hash + (live ? in_group : 0)) * n_k;
        int across = (1 << distance) - 1;
        do {
          const int neighbor = code ^ across;
          const int start = in_range(code, capacity) ? lower_bound(codes, n_k, neighbor) : n_k;
          unsigned found = __ballot_sync(FULL_WARP, start < n_k && codes[start] == neighbor);
          for (; found != 0; found &= found - 1) {
            const int hash = __ffs(found) - 1;
            const long long position = __shfl_sync(FULL_WARP, start, hash);
            const ACC* bucket = bucket_sum + ((head * group + base_hash + hash) * n_k + position) * value_dim;
            for (int d = 0; d < MY_DIMS; ++d) {
              if (first_dim + 32 * d < value_dim) {
                sum[d] += bucket[first_dim + 32 * d];
                if constexpr (SPREAD) own_rows[(base_hash + hash) * width + 32 * d] += bucket[first_dim + 32 * d];
              }
            }
          }
          if (distance > 0) across = next_with_as_many_bits(across);
        } while (distance > 0 && across < capacity);
      }
    }
    for (int d = 0; d < MY_DIMS; ++d) {
      const int dim = first_dim + 32 * d;
      if (dim >= value_dim) break;
      const long long at = query_row * value_dim + dim;
      const ACC total = first_hash > 0 ? unfinished[at] + sum[d] : sum[d];
      if (first_hash + group < num_hash) unfinished[at] = total;
      else out[at] = mean(total, num_hash);
    }
    if (SPREAD && farthest >= 0) each_own([&](ACC& own) { own_squares += (own * unit) * (own * unit); });
  }
  if constexpr (SPREAD) add_squares(squares[query_row], own_squares, lane, first_hash == 0);
}
