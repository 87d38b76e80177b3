// Sorts rows by their hash code: a stable radix sort, four bits at a time, with one block for each
// head and hash.
#include "common.cuh"

constexpr int DIGITS = 16;
constexpr int THREADS = 256;

constexpr int TILE = 32;

// transpose_codes
//   Codes (heads, n, m) become (heads, m, n). Masked rows, and codes out of range, get the code
//   `capacity`: it is greater than every other code, so it sorts last and matches no query. `order`
//   starts as 0, 1, 2, ...
//   A block of 32 by 8 threads moves 32 rows by 32 hashes through shared memory, so that
//   neighboring threads read and write neighboring entries. Rows of the tile are one entry longer
//   than their content, so that a column is spread over all banks. Moves 4 bytes in and 8 out for
//   each code. Deterministic.
extern "C" __global__ void transpose_codes(const int* __restrict__ codes, const unsigned char* __restrict__ mask,
                                           int* __restrict__ sorted_code, int* __restrict__ order, int n, int num_hash, int capacity) {
  __shared__ int tile[TILE][TILE + 1];
  const long long head = blockIdx.z;
  const int first_row = blockIdx.x * TILE, first_hash = blockIdx.y * TILE;

  for (int i = threadIdx.y; i < TILE; i += blockDim.y) {
    const int row = first_row + i, hash = first_hash + threadIdx.x;
    if (row >= n || hash >= num_hash) continue;
    const int code = codes[(head * n + row) * num_hash + hash];
    tile[i][threadIdx.x] = kept(mask, head * n + row) && in_range(code, capacity) ? code : capacity;
  }
  __syncthreads();
  for (int i = threadIdx.y; i < TILE; i += blockDim.y) {
    const int row = first_row + threadIdx.x, hash = first_hash + i;
    if (row >= n || hash >= num_hash) continue;
    const long long to = (head * num_hash + hash) * n + row;
    sorted_code[to] = tile[threadIdx.x][i];
    order[to] = row;
  }
}

// The index of a thread's counter for a digit.
__device__ inline int counter(int digit, int thread) {
  const int i = digit * THREADS + thread;
  return i + i / DIGITS;
}

// sort_codes
//   One round of the sort, by the four bits (the digit) from `shift` on. A block sorts the n codes
//   of one head and hash. Thread t takes the t-th run of consecutive rows and counts its rows of
//   each digit. A prefix sum over (digit, thread), in that order, gives the positions to which a
//   thread moves its rows of each digit, in order. So equal digits keep their order. Shared memory:
//   16 x 256 counters, with a gap after every sixteen, so that the threads that each add up sixteen
//   neighbors use different banks. Moves 8 bytes in (the codes twice) and 8 out for each code.
//   Deterministic.
extern "C" __global__ void __launch_bounds__(THREADS)
sort_codes(const int* __restrict__ code, const int* __restrict__ order, int* __restrict__ code_out, int* __restrict__ order_out, int n,
           int shift) {
  __shared__ int start[DIGITS * (THREADS + THREADS / DIGITS)];
  __shared__ int total[THREADS];
  const int t = threadIdx.x, run = ceil_div(n, THREADS);
  const int first = smaller(t * run, n), last = smaller(first + run, n);
  const long long base = static_cast<long long>(blockIdx.x) * n;

  for (int digit = 0; digit < DIGITS; ++digit) start[counter(digit, t)] = 0;
  for (int i = first; i < last; ++i) ++start[counter(code[base + i] >> shift & (DIGITS - 1), t)];
  __syncthreads();

  // Thread t adds up the t-th sixteen counters of the flat table. The 256 totals are summed from
  // left to right, then handed back to the sixteens.
  int* mine = start + t * (DIGITS + 1);
  int sum = 0;
  for (int i = 0; i < DIGITS; ++i) sum += mine[i];
  total[t] = sum;
  for (int reach = 1; reach < THREADS; reach *= 2) {
    __syncthreads();
    const int left = t >= reach ? total[t - reach] : 0;
    __syncthreads();
    total[t] += left;
  }
  int before = total[t] - sum;
  for (int i = 0; i < DIGITS; ++i) {
    const int here = mine[i];
    mine[i] = before;
    before += here;
  }
  __syncthreads();

  for (int i = first; i < last; ++i) {
    const int moved = code[base + i], to = start[counter(moved >> shift & (DIGITS - 1), t)]++;
    code_out[base + to] = moved;
    order_out[base + to] = order[base + i];
  }
}
