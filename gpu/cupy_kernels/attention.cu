// The two kernels of YOSO attention beside hash and cumulation: one finds the heads with non-finite
// keys, one scales the result to unit length.
//
// Compiled for VALUE, the type in which the result is stored.
#include "common.cuh"
#include "tiles.cuh"

constexpr int WARPS = 8;

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
//   of the step needs. Deterministic.
extern "C" __global__ void finish_attention(const ACC* __restrict__ sums, const unsigned char* __restrict__ query_mask,
                                       const unsigned char* __restrict__ query_nonfinite, const int* __restrict__ head_nonfinite,
                                       VALUE* __restrict__ out, ACC* __restrict__ lengths, long long num_rows, long long rows_per_head, int value_dim, int normalize) {
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= num_rows) return;  // the whole warp
  const ACC* x = sums + row * value_dim;
  VALUE* y = out + row * value_dim;

  const bool keep = kept(query_mask, row);
  const bool nonfinite =
      (query_nonfinite != nullptr && query_nonfinite[row]) || (head_nonfinite != nullptr && head_nonfinite[row / rows_per_head]);
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
