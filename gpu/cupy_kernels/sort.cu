// Sorts rows by their hash code: a stable radix sort, four bits at a time, with one block for each
// head and hash.
#include "common.cuh"

constexpr int DIGIT_BITS = 4;
constexpr int DIGITS = (1 << DIGIT_BITS) + 1;  // in the last round a code of `capacity` may have one more than fits into the bits
constexpr int THREADS = 256;

constexpr int TILE = 32;

// transpose_codes
//   Codes (heads, n, m) become (heads, m, n). Masked rows, and codes out of range, get the code
//   `capacity`: it is greater than every other code, so it sorts last and matches no query. `order`
//   starts as 0, 1, 2, ...
//   A block of 32 by 8 threads moves 32 rows by 32 hashes through shared memory, so that
//   neighboring threads read and write neighboring entries. Rows of the tile are one entry longer
//   than their content, so that a column is spread over all banks. Grid (tiles of rows x tiles of
//   hashes, heads). Moves 4 bytes in and 8 out for each code. Deterministic.
extern "C" __global__ void transpose_codes(const int* __restrict__ codes, const unsigned char* __restrict__ mask,
                                           int* __restrict__ sorted_code, int* __restrict__ order, int n, int num_hash, int capacity) {
  __shared__ int tile[TILE][TILE + 1];
  const long long head = blockIdx.y;
  const int tiles = ceil_div(n, TILE), first_row = blockIdx.x % tiles * TILE, first_hash = blockIdx.x / tiles * TILE;

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

// sort_codes
//   One round of the sort, by the digit from `shift` on: four bits, or in the last round, where
//   `rest` is set, all that is left. That is 16 at most, for the code that masked rows have, so this
//   code takes no round of its own. A block sorts the n codes of one head and hash. Thread t takes
//   the t-th run of consecutive rows and counts its rows of each digit. A prefix sum over (digit,
//   thread), in that order, gives the positions to which a thread moves its rows of each digit, in
//   order. So equal digits keep their order. Shared memory: 17 x 256 counters; a thread adds up
//   seventeen neighbors, an odd number, so that threads use different banks. Moves 8 bytes in (the
//   codes twice) and 8 out for each code. Deterministic.
extern "C" __global__ void __launch_bounds__(THREADS)
sort_codes(const int* __restrict__ code, const int* __restrict__ order, int* __restrict__ code_out, int* __restrict__ order_out, int n,
           int shift, int rest) {
  __shared__ int start[DIGITS * THREADS];
  __shared__ int total[THREADS];
  const int t = threadIdx.x, run = ceil_div(n, THREADS);
  const int first = smaller(t * run, n), last = smaller(first + run, n);
  const long long base = static_cast<long long>(blockIdx.x) * n;
  const int mask = (rest ? 2 << DIGIT_BITS : 1 << DIGIT_BITS) - 1;
  const auto counter = [&](int key) -> int& { return start[(key >> shift & mask) * THREADS + t]; };

  for (int digit = 0; digit < DIGITS; ++digit) start[digit * THREADS + t] = 0;
  for (int i = first; i < last; ++i) ++counter(code[base + i]);
  __syncthreads();

  // Thread t adds up the t-th seventeen counters of the flat table. The 256 totals are summed from
  // left to right, then handed back to the seventeens.
  int* mine = start + t * DIGITS;
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
    const int moved = code[base + i], to = counter(moved)++;
    code_out[base + to] = moved;
    order_out[base + to] = order[base + i];
  }
}
