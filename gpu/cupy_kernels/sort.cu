// Sorting rows by their hash code: a stable radix sort, four bits at a time, one block for each
// head and hash.
#include "common.cuh"

constexpr int DIGITS = 16;
constexpr int THREADS = 256;

constexpr int TILE = 32;

// transpose_codes
//   (heads, n, m) becomes (heads, m, n), with `capacity` for what is masked or out of range:
//   greater than every code, so that it sorts last and matches nobody. `order` starts as 0, 1, 2,
//   ...
//   A block of 32 by 8 threads moves 32 rows by 32 hashes through shared memory, so that
//   neighboring threads read and write neighbors; rows there are one entry longer than their
//   content, so that a column does not stand in one bank. Moves 4 bytes in and 8 out for each code.
//   Deterministic.
extern "C" __global__ void transpose_codes(const int* __restrict__ codes, const unsigned char* __restrict__ mask, int* __restrict__ sorted_code,
                                           int* __restrict__ order, int n, int num_hash, int capacity) {
  __shared__ int tile[TILE][TILE + 1];
  const long long head = blockIdx.z;
  const int first_row = blockIdx.x * TILE, first_hash = blockIdx.y * TILE;

  for (int r = threadIdx.y; r < TILE; r += blockDim.y) {
    const int row = first_row + r, hash = first_hash + threadIdx.x;
    if (row >= n || hash >= num_hash) continue;
    const int code = codes[(head * n + row) * num_hash + hash];
    tile[r][threadIdx.x] = kept(mask, head * n + row) && in_range(code, capacity) ? code : capacity;
  }
  __syncthreads();
  for (int h = threadIdx.y; h < TILE; h += blockDim.y) {
    const int row = first_row + threadIdx.x, hash = first_hash + h;
    if (row >= n || hash >= num_hash) continue;
    const long long to = (head * num_hash + hash) * n + row;
    sorted_code[to] = tile[threadIdx.x][h];
    order[to] = row;
  }
}

// Where the count of a digit and a thread stands.
__device__ inline int place(int digit, int thread) {
  const int i = digit * THREADS + thread;
  return i + i / DIGITS;
}

// sort_codes
//   One round of the sort, by the four bits from `shift` on: a block sorts the n codes of one head
//   and hash. Thread t takes the t-th run of consecutive rows. It counts its rows of each digit; a
//   prefix sum over (digit, thread), in that order, says where each thread's rows of each digit go;
//   it puts them there, in order. So equal digits keep their order. Shared memory: 16 x 256 counts,
//   with a gap after every sixteen: a thread that adds up sixteen neighbors then meets no other in
//   a bank. Moves 8 bytes in (the codes twice) and 8 out for each code. Deterministic.
extern "C" __global__ void __launch_bounds__(THREADS)
sort_codes(const int* __restrict__ code, const int* __restrict__ order, int* __restrict__ code_out, int* __restrict__ order_out, int n, int shift) {
  __shared__ int start[DIGITS * (THREADS + THREADS / DIGITS)];
  __shared__ int total[THREADS];
  const int t = threadIdx.x, run = ceil_div(n, THREADS);
  const int first = smaller(t * run, n), last = smaller(first + run, n);
  const long long base = static_cast<long long>(blockIdx.x) * n;

  for (int digit = 0; digit < DIGITS; ++digit) start[place(digit, t)] = 0;
  for (int i = first; i < last; ++i) ++start[place(code[base + i] >> shift & (DIGITS - 1), t)];
  __syncthreads();

  // Thread t adds up the t-th sixteen counts of the flat table, 256 such totals are summed from
  // left to right, then spread again.
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
    const int c = code[base + i], to = start[place(c >> shift & (DIGITS - 1), t)]++;
    code_out[base + to] = c;
    order_out[base + to] = order[base + i];
  }
}
