// The kernels of YOSO attention beside hash and cumulation: one finds the heads with non-finite
// keys, one scales the result to unit length. For the errors of the rows (spread.cuh), one more finds
// the size of the values.
//
// Compiled for VALUE, the type in which the result is stored, and for SPREAD=1 if errors are wanted.
#include "common.cuh"
#include "spread.cuh"
#include "tiles.cuh"

constexpr int WARPS = 8;
constexpr int MY_ROWS = 32;

// scan_exponents
//   Finds the exponent of the largest finite number among the kept values of each head, as
//   stored_exponent has it; `exponent` comes as zeros. A warp takes 32 rows of one head, and a block
//   256. Moves the values and a byte of the mask for each row in, and for each warp an atomic maximum
//   out. Deterministic: a maximum is the same in any order.
extern "C" __global__ void scan_exponents(const VALUE* __restrict__ value, const unsigned char* __restrict__ key_mask,
                                          int* __restrict__ exponent, int rows_per_head, int value_dim) {
  const int lane = threadIdx.x % 32, blocks = ceil_div(rows_per_head, WARPS * MY_ROWS);
  const int first = (blockIdx.x % blocks * WARPS + threadIdx.x / 32) * MY_ROWS, last = smaller(first + MY_ROWS, rows_per_head);
  const long long head = blockIdx.x / blocks;
  ACC largest = 0;
  for (int i = first; i < last; ++i) {
    const long long row = head * rows_per_head + i;
    if (!kept(key_mask, row)) continue;
    for (int dim = lane; dim < value_dim; dim += 32) {
      const ACC size = ACC(fabs(widen(value[row * value_dim + dim])));
      if (is_finite(size)) largest = larger(largest, size);
    }
  }
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  if (lane == 0 && largest > ACC(0)) atomicMax(&exponent[head], stored_exponent(largest));
}

// mark_nonfinite_heads
//   A block takes one head. It writes 1 if any kept row of the head is non-finite (holds an
//   infinity or NaN), and 0 if none is. The hash kernel has marked the rows. Moves one or two bytes
//   for each row in and 4 bytes for each head out. Deterministic.
extern "C" __global__ void mark_nonfinite_heads(const unsigned char* __restrict__ row_nonfinite, const unsigned char* __restrict__ mask,
                                                int* __restrict__ head_nonfinite, int rows_per_head) {
  const long long first = static_cast<long long>(blockIdx.x) * rows_per_head;
  int found = 0;
  for (int i = threadIdx.x; i < rows_per_head; i += blockDim.x) found |= row_nonfinite[first + i] && kept(mask, first + i);
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) head_nonfinite[blockIdx.x] = found;
}

// finish_attention
//   A warp takes one row of sums. The row becomes NaN if its query or any kept key of its head is
//   non-finite. Otherwise it is scaled to unit length if `normalize` is set, and rounded to VALUE.
//   Masked rows and rows of length 1e-12 or less become zeros. The length is computed from the row
//   divided by its largest entry, so that no square overflows or vanishes. A block has 8 rows.
//   Moves one row of sums in and one row out; the cache serves the second and third read of the
//   row. `lengths`, where it is given, gets the length of every row before that, which the gradient
//   of the step needs. With SPREAD, the warp first takes the error of the row from `own_squares` of its
//   `slices`, (heads, slices, rows of a head): 4 bytes (float64: 8) in for each slice and 4 out.
//   Masked rows get 0, rows of zeros infinity, and non-finite rows NaN. Deterministic.
extern "C" __global__ void finish_attention(const ACC* __restrict__ sums, const unsigned char* __restrict__ query_mask,
                                       const unsigned char* __restrict__ query_nonfinite, const int* __restrict__ head_nonfinite,
                                       VALUE* __restrict__ out, ACC* __restrict__ lengths, long long num_rows, long long rows_per_head, int value_dim, int normalize,
                                       const ACC* __restrict__ own_squares, const int* __restrict__ exponent, float* __restrict__ errors,
                                       int slices, int num_hash) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows) return;  // the whole warp
  const ACC* x = sums + row * value_dim;
  VALUE* y = out + row * value_dim;

  const bool keep = kept(query_mask, row);
  const bool nonfinite =
      (query_nonfinite != nullptr && query_nonfinite[row]) || (head_nonfinite != nullptr && head_nonfinite[row / rows_per_head]);
  if constexpr (SPREAD) {
    const long long head = row / rows_per_head;
    const RowSize size = size_of_row(x, value_dim, lane);
    ACC found = 0;
    for (int slice = lane; slice < slices; slice += 32) found += own_squares[(head * slices + slice) * rows_per_head + row % rows_per_head];
    found = warp_sum(found);
    const ACC error = error_of_row(size.scale, size.length, unit_of(exponent[head]), found, num_hash);
    if (lane == 0) errors[row] = float(!keep ? ACC(0) : nonfinite || !size.finite ? not_a_number() : error);
  }
  if (!keep || nonfinite || !normalize) {
    if (lengths != nullptr && lane == 0) lengths[row] = keep && nonfinite ? not_a_number() : ACC(0);
    for (int i = lane; i < value_dim; i += 32) y[i] = narrow<VALUE>(!keep ? ACC(0) : nonfinite ? not_a_number() : x[i]);
    return;
  }
  ACC largest = 0;
  bool finite = true;
  for (int i = lane; i < value_dim; i += 32) {
    largest = larger(largest, ACC(fabs(x[i])));
    finite = finite && is_finite(x[i]);
  }
  finite = __all_sync(FULL_WARP, finite);
  for (int stride = 16; stride > 0; stride /= 2) largest = larger(largest, __shfl_xor_sync(FULL_WARP, largest, stride));
  ACC squares = 0;
  for (int i = lane; i < value_dim && largest > ACC(0); i += 32) {
    const ACC scaled = x[i] / largest;
    squares += scaled * scaled;
  }
  const ACC length = sqrt(warp_sum(squares));  // of the scaled row: at least 1
  const bool tiny = !(largest * length > ACC(1e-12));
  if (lengths != nullptr && lane == 0) lengths[row] = finite ? largest * length : not_a_number();
  for (int i = lane; i < value_dim; i += 32) {
    y[i] = narrow<VALUE>(!finite ? not_a_number() : tiny ? ACC(0) : x[i] / largest / length);
  }
}
